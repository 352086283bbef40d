"""The fused kernels for CPU and CUDA, and their installation in place of MLX's own operations."""
