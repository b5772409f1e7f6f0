"""Searches: from statistics, sampled activations and weights to the parameters of a format."""
