"""Fused kernels for CPU and CUDA, and where they take the place of MLX's own operations."""
