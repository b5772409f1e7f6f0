"""TIR kernels of the integer operators."""
