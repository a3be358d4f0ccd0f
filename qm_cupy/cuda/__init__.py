"""CUDA: compilation and launches of kernels, and GPU memory."""
