"""Trace a model, find its sites, calibrate, simulate and integerize. Knows no compiler."""
