"""The CUDA kernels agree with MLX's own operations; run where there is an NVIDIA GPU."""

import os
import subprocess
import sys
from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx_lm.models import llama, qwen3

from textpolicy.engine import Sampling
from textpolicy.mlx.adapters.merging import attach_lora
from textpolicy.mlx.decode.compiled_steps import Steps
from textpolicy.mlx.decode.sampling import draw
from textpolicy.mlx.kernels import cuda
from textpolicy.mlx.kernels.masks import SharedMasks
from textpolicy.mlx.read.prompts import PromptTree
from textpolicy.mlx.score.logprobs import token_logprobs

pytestmark = pytest.mark.cuda

SHAPES = [  # rows, prompts, heads, kv heads, head size, prompt slots, own slots
    (5, 2, 4, 2, 64, 17, 64),
    (256, 16, 16, 8, 128, 256, 256),
    (3, 3, 8, 1, 128, 9, 64),
    (4, 1, 9, 3, 64, 5, 64),
    (1030, 9, 2, 1, 128, 33, 64),
    (301, 16, 16, 8, 128, 70, 50),  # from here on tensor cores in half precision
    (520, 5, 9, 3, 64, 16, 17),
    (515, 5, 14, 2, 64, 33, 40),
    (130, 3, 16, 16, 128, 50, 33),
]


def attention(queries, keys, values, seen, scale):
    """By matrix products in float32."""
    q, k, v = (a.astype(mx.float32) for a in (queries, keys, values))
    share = q.shape[1] // k.shape[1]
    scores = (q @ mx.repeat(k, share, 1).swapaxes(-1, -2)) * scale
    seen = seen if seen.ndim == 4 else seen[:, None, None]
    return mx.softmax(mx.where(seen, scores, -mx.inf), axis=-1) @ mx.repeat(v, share, 1)


@pytest.mark.parametrize(("dtype", "error"), [(mx.float32, 1e-5), (mx.float16, 2e-3), (mx.bfloat16, 1e-2)])
@pytest.mark.parametrize("together", [True, False])  # the rows of a prompt
@pytest.mark.parametrize("shape", SHAPES)
def test_attention_reads_prompts_and_own_slots_and_writes_the_new_keys_and_values(shape, together, dtype, error):
    rows, prompts, heads, kv_heads, size, prompt_slots, own_slots = shape

    def random(*shape):
        return mx.random.normal(shape).astype(dtype)

    queries = random(rows, heads, 1, size)
    fresh = [random(rows, kv_heads, 1, size) for _ in "kv"]
    own = [random(rows, kv_heads, own_slots, size) for _ in "kv"]
    prefix = [random(prompts, kv_heads, prompt_slots, size) for _ in "kv"]
    parents, last = mx.random.randint(0, prompts, (rows,)), mx.array([own_slots // 2], mx.int32)
    parents = mx.sort(parents) if together else parents
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


@pytest.mark.parametrize("check", [None, "1"])
def test_a_run_may_have_any_number_of_cuda_graphs(check):
    """MLX ends a process after twice as many as it keeps, unless it is told not to."""
    code = (
        "import textpolicy, mlx.core as mx\n"
        "for n in range(1, 12):\n"
        "    x = mx.ones((4, 4))\n"
        "    for _ in range(n):\n"
        "        x = x @ x\n"
        "    mx.eval(x)\n"
        "print('alive')\n"
    )
    env = {**os.environ, "MLX_CUDA_GRAPH_CACHE_SIZE": "2"}
    env.pop("MLX_ENABLE_CACHE_THRASHING_CHECK", None)
    env |= {"MLX_ENABLE_CACHE_THRASHING_CHECK": check} if check else {}
    ran = subprocess.run([sys.executable, "-c", code], capture_output=True, text=True, env=env)
    assert ("alive" in ran.stdout, "thrashing" in ran.stderr) == (check is None, check is not None), ran.stderr


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


def joined(rows, widths, rank, dtype=mx.float32):
    """What the kernels call y and b, and the layers' outputs with their LoRAs."""
    y = mx.random.normal((rows, sum(widths) + len(widths) * rank)).astype(dtype)
    b = (mx.random.normal((rank, sum(widths))) * 0.1).astype(dtype)
    ends, outputs = np.cumsum(widths), []
    for i, (end, width) in enumerate(zip(ends.tolist(), widths, strict=True)):
        low = y[:, sum(widths) + i * rank :][:, :rank].astype(mx.float32)
        outputs.append(y[:, end - width : end].astype(mx.float32) + low @ b[:, end - width : end].astype(mx.float32))
    return y, b, outputs


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("queries", "keys", "size"), [(16, 8, 128), (9, 3, 64)])
def test_heads_are_normed_and_rotated_as_mlx_does(queries, keys, size, normed):
    rows, rank = 37, 16
    y, b, outputs = joined(rows, [queries * size, keys * size, keys * size], rank)
    weights = (mx.random.uniform(shape=(size,)), mx.random.uniform(shape=(size,)))
    positions = mx.random.randint(0, 3000, (rows,))
    angles = positions[:, None] * 1e4 ** (mx.arange(0, size, 2) / -size)
    ours = cuda.heads(y, b, (queries, keys), weights if normed else None, 1e-6, (mx.cos(angles), mx.sin(angles)))
    for i, (out, count) in enumerate(zip(outputs, (queries, keys, keys), strict=True)):
        expected = out.reshape(rows, count, 1, size)
        if i < 2:
            expected = mx.fast.rms_norm(expected, weights[i], 1e-6) if normed else expected
            expected = mx.fast.rope(expected, size, traditional=False, base=1e4, scale=1.0, offset=positions)
        np.testing.assert_allclose(np.array(ours[i]), np.array(expected), atol=5e-3)


@pytest.mark.parametrize("width", [576, 1024, 8192])
def test_a_layer_is_added_to_the_residual_and_normed(width):
    y, b, [out] = joined(37, [width], 8)
    residual, weight = mx.random.normal((37, width)), mx.random.uniform(shape=(width,))
    added, normed = cuda.add_and_norm(y, b, residual, weight, 1e-5)
    np.testing.assert_allclose(np.array(added), np.array(residual + out), atol=5e-3)
    np.testing.assert_allclose(np.array(normed), np.array(mx.fast.rms_norm(added, weight, 1e-5)), atol=1e-4)


@pytest.mark.parametrize("width", [1536, 3072])
def test_the_gate_is_multiplied_with_the_up_projection(width):
    y, b, [gate, up] = joined(37, [width, width], 16)
    np.testing.assert_allclose(np.array(cuda.swiglu(y, b)), np.array(nn.silu(gate) * up), atol=2e-2)


@pytest.mark.parametrize("kind", [llama, qwen3])
def test_blocks_of_few_kernels_draw_what_the_model_draws(kind):
    model = small(kind)
    prompts = [p for p in np.random.default_rng(0).integers(0, 1000, (3, 9)) for _ in range(5)]
    fused, plain = (Steps(model, compiled=True) for _ in range(2))
    assert len(fused.blocks) == 2
    plain.blocks = ()
    tree = PromptTree.build(prompts)
    held = []
    for steps in (fused, plain):
        steps.refresh()
        held.append(steps.begin(tree, np.arange(15)))
    for _ in range(4):
        uniform = mx.random.uniform(shape=(15,))
        a, held[0] = fused(held[0], uniform, Sampling(8))
        b, held[1] = plain(held[1], uniform, Sampling(8))
        mx.eval(a, b, held[0].own, held[1].own)
        same = np.array(a.tokens) == np.array(b.tokens)
        assert same.mean() > 0.9  # rounding moves a point between neighbours now and then
        np.testing.assert_allclose(np.array(a.logprobs)[same], np.array(b.logprobs)[same], atol=5e-3)
        np.testing.assert_allclose(np.array(a.entropy), np.array(b.entropy), atol=5e-3)
        held[0] = replace(held[0], reads=b.tokens)


def small(kind):
    sizes = {
        "hidden_size": 192, "num_hidden_layers": 2, "intermediate_size": 512, "num_attention_heads": 3,
        "num_key_value_heads": 1, "rms_norm_eps": 1e-5, "vocab_size": 1000, "head_dim": 64, "rope_theta": 1e4,
        "max_position_embeddings": 4096, "tie_word_embeddings": kind is llama, "model_type": "small",
    }  # fmt: skip
    model = kind.Model(kind.ModelArgs(**sizes))
    attach_lora(model, 8, 16.0)
    for module in model.modules():
        if "lora_b" in module:
            module.lora_b = mx.random.normal(module.lora_b.shape) * 0.05
    return model


def ragged_attention(dtype, rows=3, heads=8, kv_heads=2, queries=128, keys=200, size=64):
    """Arrays and a mask as a pass over completions of unequal prompts has them."""
    q, *kv = (
        mx.random.normal((rows, h, n, size)).astype(dtype) for h, n in [(heads, queries), *[(kv_heads, keys)] * 2]
    )
    prompt = keys - queries
    used = mx.arange(prompt) < mx.array([prompt, prompt // 2, 1])[:, None]
    own = mx.arange(queries) <= mx.arange(queries)[:, None]
    grids = [mx.broadcast_to(a, (rows, queries, a.shape[-1])) for a in (used[:, None], own[None])]
    return [q, *kv], mx.concatenate(grids, axis=-1)[:, None]


@pytest.mark.parametrize(("queries", "keys"), [(128, 200), (256, 321), (96, 160), (128, 135)])
@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
def test_one_addend_for_all_heads_gives_the_attention_under_the_mask_and_its_gradient(queries, keys, dtype):
    arrays, seen = ragged_attention(dtype, queries=queries, keys=keys)

    def slopes(attend):
        def loss(*arrays):
            return (attend(*arrays).astype(mx.float32) ** 2).sum()

        value, gradients = mx.value_and_grad(loss, argnums=(0, 1, 2))(*arrays)
        return [np.array(a.astype(mx.float32)) for a in (value, *gradients)]

    ours = slopes(lambda *qkv: SharedMasks()(*qkv, None, 0.125, seen))
    theirs = slopes(lambda *qkv: attention(*qkv, seen, 0.125))
    for mine, expected in zip(ours, theirs, strict=True):
        np.testing.assert_allclose(mine, expected, atol=3e-2 * np.abs(expected).max())


def test_layers_keep_one_mask_for_all_heads():
    arrays, seen = ragged_attention(mx.bfloat16, queries=1024, keys=1100)

    def peak(attend):
        def loss(q, k, v):
            for _ in range(12):
                q = attend(q, k, v)
            return q.sum()

        mx.eval(arrays, seen)
        mx.reset_peak_memory()
        before = mx.get_active_memory()
        mx.eval(mx.grad(loss)(*arrays))
        return mx.get_peak_memory() - before

    shared = SharedMasks()
    theirs = peak(lambda q, k, v: mx.fast.scaled_dot_product_attention(q, k, v, scale=0.125, mask=seen))
    ours = peak(lambda q, k, v: shared(q, k, v, None, 0.125, seen))
    assert theirs - ours > 8 * seen.nbytes * 2 * 8  # of the twelve masks of eight heads, with two bytes a number


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("places", [[0], [3000], slice(None)])
def test_a_logit_that_is_no_number_shows_in_the_logprob_of_its_row_alone(wrong, places):
    rows = np.random.default_rng(0).normal(0, 3, (3, 4096)).astype(np.float32)
    rows[1, places] = wrong
    tokens, logprobs, entropy = cuda.draw(mx.array(rows), mx.arange(3), mx.array([0.2, 0.5, 0.9]), 1.0)
    assert np.isfinite(np.array(logprobs)).tolist() == [True, False, True]
    assert np.isfinite(np.array(entropy)).tolist() == [True, False, True]
    assert 0 <= min(tokens.tolist()) <= max(tokens.tolist()) < 4096


@pytest.mark.parametrize(("dtype", "error"), [(mx.float32, 1e-6), (mx.float16, 1e-3), (mx.bfloat16, 8e-3)])
@pytest.mark.parametrize("vocabulary", [8, 1000, 49152, 151936])
def test_scores_and_their_slopes_are_those_of_float64(vocabulary, dtype, error):
    rng = np.random.default_rng(0)
    logits = rng.normal(0, 4, (37, vocabulary)).astype(np.float32)
    logits[rng.uniform(size=logits.shape) < 0.1] = -np.inf  # tokens that are impossible
    targets, temperatures = rng.integers(0, vocabulary, 37), rng.uniform(0.5, 2, 37).astype(np.float32)
    logits[np.arange(37), targets] = 1.5
    given = mx.array(logits).astype(dtype)
    z = np.array(given.astype(mx.float32)).astype(np.float64) / temperatures[:, None]
    p = np.exp(z - z.max(axis=1, keepdims=True))
    p /= p.sum(axis=1, keepdims=True)
    onehot = np.arange(vocabulary) == targets[:, None]
    logprobs, entropy, slopes = cuda.score(given, mx.array(targets), mx.array(temperatures))
    np.testing.assert_allclose(np.array(logprobs), np.log(p[onehot]), atol=2e-5)
    np.testing.assert_allclose(np.array(entropy), -(p * np.log(np.where(p > 0, p, 1))).sum(axis=1), atol=2e-5)
    assert slopes.dtype == dtype
    expected = (onehot - p) / temperatures[:, None]
    np.testing.assert_allclose(np.array(slopes.astype(mx.float32)), expected, rtol=error, atol=1e-7)
    only = cuda.score(given, mx.array(targets), mx.array(temperatures), slopes=False)
    assert [a.tolist() for a in only[:2]] == [logprobs.tolist(), entropy.tolist()]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("places", [[0], [3000], slice(None)])
def test_a_logit_that_is_no_number_shows_in_the_score_of_its_row_alone(wrong, places):
    rows = np.random.default_rng(0).normal(0, 3, (3, 4096)).astype(np.float32)
    rows[1, places] = wrong
    found = cuda.score(mx.array(rows), mx.array([5, 6, 7]), mx.ones(3))
    assert [np.isfinite(np.array(a)).reshape(3, -1).all(axis=1).tolist() for a in found] == [[True, False, True]] * 3


@pytest.mark.parametrize("entropy", [False, True])
def test_log_probs_of_a_head_and_their_gradient_are_those_of_mlxs_own_operations(entropy, monkeypatch):
    mx.random.seed(0)
    weight, hidden = mx.random.normal((4096, 64)), mx.random.normal((700, 64))
    targets, temperatures = mx.random.randint(0, 4096, (700,)), mx.random.uniform(0.5, 2, (700,))
    weights = mx.arange(700)

    class Linear:
        head = staticmethod(lambda h: h @ weight.T)
        trained = staticmethod(dict)

    def found():
        def loss(hidden):
            scored = token_logprobs(Linear, hidden, targets, temperatures, at_once=300)
            return (weights * scored.logprobs).sum(), scored.logprobs

        (_, logprobs), slopes = mx.value_and_grad(loss)(hidden)
        plain = token_logprobs(Linear, hidden, targets, temperatures, entropy=entropy, gradient=False, at_once=300)
        return [np.array(a) for a in (logprobs, slopes, *plain) if a is not None]

    ours = found()
    monkeypatch.setattr(cuda, "can_draw", lambda logits: False)
    for a, b in zip(ours, found(), strict=True):
        np.testing.assert_allclose(a, b, rtol=1e-4, atol=1e-4 * np.abs(b).max())
