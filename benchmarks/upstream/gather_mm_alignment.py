"""Show that mx.gather_mm of MLX 0.32.4 reads memory that is not aligned on CUDA, for one row and 2 or 3 outputs.

It ends in "cudaGetLastError() failed: misaligned address", after which nothing in the process works. With 8 or 16
outputs, or sorted indices, it works. A LoRA of rank 2 on the experts of a model meets it.
"""

import mlx.core as mx

x, weights = mx.random.normal((12, 2, 1, 16)), mx.random.normal((4, 16, 2))
mx.eval(mx.gather_mm(x, weights, rhs_indices=mx.random.randint(0, 4, (12, 2))))
mx.synchronize()
