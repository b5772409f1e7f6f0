"""Closed-form corrections: weights that make up for quantized inputs, and rounding that carries errors on."""
