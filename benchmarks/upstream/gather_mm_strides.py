"""Show that mx.gather_mm of MLX 0.32.4 on CUDA reads the wrong tokens where the axis of one row was inserted.

With sorted indices it takes that axis's stride, 1 after expand_dims, for the distance between tokens. mlx-lm's experts
with biases meet it now and then: a sum takes its strides from the operand whose memory it may reuse, product or bias.
It prints the largest error of both forms: about 1e-6 for both where MLX is right, otherwise 5 or more for the first.
"""

import mlx.core as mx

x, weights = mx.random.normal((90, 64)), mx.random.normal((4, 64, 32))
experts = mx.sort(mx.random.randint(0, 4, (90,))).astype(mx.uint32)
right = (x[:, None, :, None] * weights[experts][:, None]).sum(axis=2)
for rows in (mx.expand_dims(x, -2), x.reshape(90, 1, 64)):
    print(mx.abs(mx.gather_mm(rows, weights, rhs_indices=experts, sorted_indices=True) - right).max().item())
