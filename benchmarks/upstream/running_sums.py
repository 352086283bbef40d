"""Show that mx.cumsum of MLX 0.32.4 writes beyond its array on a GPU, along an axis of one element with a long stride.

MLX knows: its pull request 4430. The last element of a row of 64 keeps the row's stride, by which the kernel counts.
"""

import mlx.core as mx

row, others = mx.arange(64.0)[None], [mx.full((16,), float(i)) for i in range(12)]
mx.eval(row, others)
mx.eval(mx.cumsum(row[:, 63:], axis=0))
changed = [i for i, a in enumerate(others) if (a != i).any().item()]
print("changed:", changed, "and the row itself" if (row[0] != mx.arange(64.0)).any().item() else "")
