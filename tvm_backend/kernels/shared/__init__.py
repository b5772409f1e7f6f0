"""Kernels that are loops and nothing else: on a CPU threads share their rows, on a GPU each row is a thread."""
