"""Show that mx.cumsum of MLX 0.32.4 reads and writes beyond its array on a GPU, down an axis that is not the last.

Shape (3, 6000, 4) needs 3 blocks of threads and gets thousands, since get_2d_grid_dims divides 3 * 6000 * 4 by 6000 * 4
one axis after the other and rounds up in the end. It ends in an illegal memory access, or other arrays change.
Memory checkers name the kernel: compute-sanitizer python benchmarks/upstream/running_sums.py (strided_scan).
"""

import mlx.core as mx

others = [mx.full((3 * 6000 * 4,), 7.0) for _ in range(20)]
x = mx.ones((3, 6000, 4))
mx.eval(x, others)
del others[10]
mx.eval(mx.cumsum(x, axis=1))
print("arrays that changed:", sum(bool((a != 7).any().item()) for a in others))
