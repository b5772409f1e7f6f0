"""What only NVIDIA GPUs need: CUDA C++ and its compiler, device memory, and the program that runs there."""
