"""Where a quantized network loses its accuracy, and what brings it back, measured."""
