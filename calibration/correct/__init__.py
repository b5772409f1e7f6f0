"""Closed-form corrections: weights that make up for what quantization did to the inputs, and rounding that carries errors on."""
