"""The CUDA kernels agree with MLX's own operations; run where there is an NVIDIA GPU."""

import mlx.core as mx
import numpy as np
import pytest

from textpolicy.mlx import cuda
from textpolicy.mlx.sampling import draw

pytestmark = pytest.mark.skipif(not cuda.is_default(), reason="needs an NVIDIA GPU and MLX's CUDA backend")

SHAPES = [  # rows, prompts, heads, kv heads, head size, prompt slots, own slots
    (5, 2, 4, 2, 64, 17, 64),
    (256, 16, 16, 8, 128, 256, 256),
    (3, 3, 8, 1, 256, 9, 64),
    (4, 1, 9, 3, 64, 5, 64),
]


def attention(queries, keys, values, seen, scale):
    """By matrix products in float32."""
    q, k, v = (a.astype(mx.float32) for a in (queries, keys, values))
    share = q.shape[1] // k.shape[1]
    scores = (q @ mx.repeat(k, share, 1).swapaxes(-1, -2)) * scale
    return mx.softmax(mx.where(seen[:, None, None], scores, -mx.inf), axis=-1) @ mx.repeat(v, share, 1)


@pytest.mark.parametrize(("dtype", "error"), [(mx.float32, 1e-5), (mx.float16, 2e-3), (mx.bfloat16, 1e-2)])
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_reads_prompts_and_own_slots_and_writes_what_arrives(shape, dtype, error):
    rows, prompts, heads, kv_heads, size, prompt_slots, own_slots = shape

    def random(*shape):
        return mx.random.normal(shape).astype(dtype)

    queries = random(rows, heads, 1, size)
    fresh = [random(rows, kv_heads, 1, size) for _ in "kv"]
    own = [random(rows, kv_heads, own_slots, size) for _ in "kv"]
    prefix = [random(prompts, kv_heads, prompt_slots, size) for _ in "kv"]
    parents, last = mx.random.randint(0, prompts, (rows,)), mx.array([own_slots // 2], mx.int32)
    seen = (mx.random.uniform(shape=(rows, prompt_slots + own_slots)) > 0.3) & (
        mx.arange(prompt_slots + own_slots) <= prompt_slots + last
    )
    seen = mx.slice_update(seen, mx.ones((rows, 1), mx.bool_), last + prompt_slots, axes=[1])
    expected = [mx.slice_update(a, new, last, axes=[2]) for a, new in zip(own, fresh, strict=True)]
    whole = [mx.concatenate([p[parents], e], axis=2) for p, e in zip(prefix, expected, strict=True)]
    mx.eval(own, fresh, prefix, expected, whole, seen)
    ours = cuda.attend(queries, fresh, own, prefix, parents, seen, last, size**-0.5)
    np.testing.assert_allclose(
        np.array(ours.astype(mx.float32)), np.array(attention(queries, *whole, seen, size**-0.5)), atol=error
    )
    for a, e in zip(own, expected, strict=True):
        np.testing.assert_array_equal(np.array(a.astype(mx.float32)), np.array(e.astype(mx.float32)))


@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
@pytest.mark.parametrize("vocabulary", [1000, 49152, 151936])
def test_drawing_gives_the_token_log_prob_and_entropy_of_the_reference(vocabulary, dtype):
    logits = (mx.random.normal((64, vocabulary)) * 3).astype(dtype)
    state, uniform = mx.random.randint(0, 64, (200,)), mx.random.uniform(shape=(200,))
    tokens, logprobs, entropy = (np.array(a) for a in cuda.draw(logits, state, uniform, 0.7))
    expected = draw(logits, state, uniform, 0.7)
    same = tokens == np.array(expected.tokens)
    assert same.mean() > 0.98  # rounding moves a point between neighbours now and then
    np.testing.assert_allclose(logprobs[same], np.array(expected.logprobs)[same], atol=1e-5)
    np.testing.assert_allclose(entropy, np.array(expected.entropy), atol=1e-5)


def test_loras_of_joined_layers_are_added_to_each():
    widths, rank, rows = (48, 16, 24), 8, 37
    y = mx.random.normal((rows, sum(widths) + 3 * rank))
    b = mx.random.normal((rank, sum(widths)))
    ours = cuda.add_lora(y, b, widths)
    start = 0
    for i, (width, out) in enumerate(zip(widths, ours, strict=True)):
        low = np.array(y)[:, sum(widths) + i * rank :][:, :rank]
        expected = np.array(y)[:, start : start + width] + low @ np.array(b)[:, start : start + width]
        np.testing.assert_allclose(np.array(out), expected, atol=1e-4)
        start += width
