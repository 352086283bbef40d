"""Attention with one addend for all heads and layers against attention under the mask itself."""

import mlx.core as mx
import numpy as np
import pytest

from textpolicy.mlx.kernels.masks import SharedMasks


def inputs(dtype, rows=2, heads=4, kv_heads=2, queries=8, keys=11, size=16):
    rng = np.random.default_rng(0)
    q = rng.normal(size=(rows, heads, queries, size))
    k, v = (rng.normal(size=(rows, kv_heads, keys, size)) for _ in "kv")
    seen = rng.random((rows, 1, queries, keys)) < 0.5
    seen[..., 0] = True
    return [mx.array(a).astype(dtype) for a in (q, k, v)], mx.array(seen)


def slopes(attend, arrays):
    def loss(*arrays):
        return (attend(*arrays).astype(mx.float32) ** 2).sum()

    value, gradients = mx.value_and_grad(loss, argnums=(0, 1, 2))(*arrays)
    return [np.array(a.astype(mx.float32)) for a in (value, *gradients)]


@pytest.mark.parametrize(("dtype", "error"), [(mx.float32, 0), (mx.float16, 2e-3), (mx.bfloat16, 2e-2)])
def test_masked_attention_and_its_gradient_are_those_of_plain_attention_under_the_mask(dtype, error):
    arrays, seen = inputs(dtype)
    ours = slopes(lambda q, k, v: SharedMasks()(q, k, v, None, 0.25, seen), arrays)
    theirs = slopes(lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.25, mask=seen), arrays)
    for mine, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, expected, atol=error * max(1, np.abs(expected).max()))


def test_layers_share_the_addend_of_a_mask():
    attend = SharedMasks()
    arrays, seen = inputs(mx.bfloat16)
    for mask in (seen, ~seen, seen):
        attend(*arrays, None, 0.25, mask)
    assert len(attend.added) == 2
    _, addend = attend.added[id(seen), mx.bfloat16]
    assert addend.shape == seen.shape  # one head for all


def test_few_masks_are_held_and_each_keeps_its_own_addend():
    attend = SharedMasks()
    arrays, seen = inputs(mx.float16)
    for i in range(12):
        mask = mx.array(np.arange(11) <= i % 11) | mx.zeros(seen.shape, mx.bool_)
        ours = attend(*arrays, None, 0.25, mask)
        theirs = mx.fast.scaled_dot_product_attention(*arrays, scale=0.25, mask=mask)
        np.testing.assert_allclose(np.array(ours), np.array(theirs), atol=2e-3)
    assert len(attend.added) == 4


@pytest.mark.parametrize("mask", ["causal", None])
def test_other_masks_are_left_alone(mask):
    attend = SharedMasks()
    arrays, _ = inputs(mx.bfloat16)
    out = attend(*arrays, None, 0.25, mask)
    assert mx.array_equal(out, mx.fast.scaled_dot_product_attention(*arrays, scale=0.25, mask=mask))
    assert not attend.added
