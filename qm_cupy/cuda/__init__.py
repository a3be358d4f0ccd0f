"""CUDA: kernels compiled and launched, and memory."""
