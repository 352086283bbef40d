"""The Metal kernels against formulas in NumPy's float64: on a Mac as they are, elsewhere in metal_emulator.py."""

import mlx.core as mx
import numpy as np
import pytest
from metal_emulator import COMPILER, Emulator

from textpolicy.mlx.decode.sampling import draw
from textpolicy.mlx.kernels import metal

ERROR = {mx.float32: 1e-5, mx.float16: 2e-3, mx.bfloat16: 2e-2}  # of numbers near 1


@pytest.fixture(scope="module", autouse=True)
def machine(tmp_path_factory):
    if mx.metal.is_available():
        yield None
        return
    if COMPILER is None:
        pytest.skip("needs a Mac, or g++ for the emulator of one")
    emulator = Emulator(tmp_path_factory.mktemp("metal"))
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx.fast, "metal_kernel", emulator.metal_kernel)
        yield emulator


def normal(seed, *shape, dtype=mx.float32, scale=1.0):
    return mx.array(np.random.default_rng([seed, *shape]).normal(0, scale, shape).astype(np.float32)).astype(dtype)


def exact(array):
    return np.array(array.astype(mx.float32)).astype(np.float64)


def agree(ours, expected, dtype, times=1.0):
    np.testing.assert_allclose(exact(ours), expected, rtol=times * ERROR[dtype], atol=times * ERROR[dtype])


@pytest.mark.parametrize(
    ("rows", "prompts", "heads", "kv_heads", "size", "prompt_slots", "own_slots", "last", "dtype"),
    [
        (5, 2, 4, 2, 64, 17, 24, 12, mx.float32),
        (2, 2, 3, 3, 128, 9, 8, 0, mx.float32),  # the first token, and no group
        (3, 1, 3, 1, 64, 1, 8, 7, mx.bfloat16),  # the last slot
        (4, 3, 8, 2, 128, 5, 16, 3, mx.float16),
        (2, 1, 10, 2, 64, 40, 8, 2, mx.bfloat16),
        (2, 2, 6, 1, 64, 8, 8, 5, mx.float16),
        (2, 1, 14, 2, 128, 3, 8, 1, mx.bfloat16),
        (2, 2, 16, 2, 128, 11, 8, 4, mx.float32),
        (1, 1, 32, 2, 64, 7, 8, 6, mx.bfloat16),  # more query heads than a threadgroup takes
        (1, 1, 11, 1, 64, 7, 8, 6, mx.float32),  # which no number up to 8 divides
    ],
)
def test_attention_reads_prompts_and_own_slots_and_writes_the_new_keys_and_values(
    rows, prompts, heads, kv_heads, size, prompt_slots, own_slots, last, dtype
):
    queries = normal(0, rows, heads, 1, size, dtype=dtype)
    fresh = [normal(s, rows, kv_heads, 1, size, dtype=dtype) for s in (1, 2)]
    own = [normal(s, rows, kv_heads, own_slots, size, dtype=dtype) for s in (3, 4)]
    prefix = [normal(s, prompts, kv_heads, prompt_slots, size, dtype=dtype) for s in (5, 6)]
    rng = np.random.default_rng(rows)
    parents = rng.integers(0, prompts, rows)
    seen = (rng.random((rows, prompt_slots + own_slots)) > 0.3) & (
        np.arange(prompt_slots + own_slots) <= prompt_slots + last
    )
    seen[:, prompt_slots + last] = True
    seen[0, : prompt_slots + last] = False  # a row that sees its own token alone
    near = mx.full((8,), last, mx.int32)
    before = [exact(a) for a in (*prefix, *own)]
    out = metal.attend(
        queries, fresh, own, prefix, mx.array(parents.astype(np.int32)), mx.array(seen), near, size**-0.5
    )
    mx.eval(out)
    for a, new in zip(before[2:], fresh, strict=True):
        a[:, :, last] = exact(new)[:, :, 0]
    for a, b in zip(before, (*prefix, *own), strict=True):
        np.testing.assert_array_equal(a, exact(b))
    keys, values = (np.concatenate([p[parents], o], axis=2) for p, o in zip(before[:2], before[2:], strict=True))
    keys, values = (np.repeat(a, heads // kv_heads, axis=1) for a in (keys, values))
    scores = np.einsum("bhd,bhsd->bhs", exact(queries)[:, :, 0], keys) * size**-0.5
    weights = np.where(seen[:, None], np.exp(scores - scores.max(axis=-1, keepdims=True)), 0)
    weights /= weights.sum(axis=-1, keepdims=True)
    agree(out, np.einsum("bhs,bhsd->bhd", weights, values)[:, :, None], dtype)


def test_attention_of_large_scores_hidden_rows_and_keys_of_another_type():
    queries = normal(0, 3, 4, 1, 64, scale=300.0)
    fresh, own = ([normal(s, 3, 2, n, 64, dtype=mx.bfloat16) for s in (1, 2)] for n in (1, 8))
    prefix = [normal(s, 1, 2, 5, 64, dtype=mx.bfloat16) for s in (5, 6)]
    seen = np.zeros((3, 13), bool)
    seen[0, :8] = seen[1, 7] = True  # row 2 sees nothing
    whole = [np.concatenate([np.repeat(exact(p), 3, 0), exact(o)], 2) for p, o in zip(prefix, own, strict=True)]
    out = exact(metal.attend(queries, fresh, own, prefix, mx.zeros(3, mx.int32), mx.array(seen), mx.array([2]), 1.0))
    for a, new in zip(whole, fresh, strict=True):
        a[:, :, 7] = exact(new)[:, :, 0]
    scores = np.einsum("hd,hsd->hs", exact(queries)[0, :, 0], np.repeat(whole[0][0], 2, 0)[:, :8])
    likeliest = np.repeat(whole[1][0], 2, 0)[np.arange(4), scores.argmax(axis=-1)]  # scores lie hundreds apart
    np.testing.assert_allclose(out[0, :, 0], likeliest, atol=1e-4)
    np.testing.assert_allclose(out[1, :, 0], np.repeat(whole[1][1, :, 7], 2, 0), atol=1e-6)
    assert not out[2].any()


def joined(rows, widths, rank, dtype):
    """What the kernels call y and b, and the layers' outputs with their LoRAs."""
    y = normal(rows, rows, sum(widths) + len(widths) * rank, dtype=dtype)
    b = normal(rank, rank, sum(widths), dtype=dtype, scale=rank**-0.5)
    parts = np.split(exact(y), [sum(widths)], axis=1)
    ends = np.cumsum(widths)[:-1]
    low = np.split(parts[1], len(widths), axis=1)
    layers = zip(np.split(parts[0], ends, axis=1), low, np.split(exact(b), ends, axis=1), strict=True)
    return y, b, [base + z @ weights for base, z, weights in layers]


@pytest.mark.parametrize(
    ("rows", "widths", "rank", "dtype"),
    [
        (37, (48, 16, 24), 8, mx.bfloat16),
        (3, (264,), 16, mx.float16),
        (4, (5, 300), 3, mx.float32),
        (1, (8, 8, 8, 8), 1, mx.bfloat16),
    ],
)
def test_loras_of_joined_layers_are_added_to_each(rows, widths, rank, dtype):
    y, b, outputs = joined(rows, widths, rank, dtype)
    for ours, expected in zip(metal.add_lora(y, b, widths), outputs, strict=True):
        agree(ours, expected, dtype, 3)


@pytest.mark.parametrize(
    ("rows", "queries", "keys", "size", "rank", "normed", "dtype"),
    [
        (5, 4, 2, 128, 16, True, mx.bfloat16),
        (3, 9, 3, 64, 8, False, mx.float16),
        (1, 1, 1, 64, 1, True, mx.float32),
        (8, 3, 3, 128, 8, False, mx.float32),
    ],
)
def test_heads_are_normed_and_rotated(rows, queries, keys, size, rank, normed, dtype):
    y, b, outputs = joined(rows, [queries * size, keys * size, keys * size], rank, dtype)
    weights = [normal(s, size, dtype=dtype) for s in (1, 2)]
    positions = np.random.default_rng(0).integers(0, 3000, rows)
    angles = positions[:, None] * 1e4 ** (np.arange(0, size, 2) / -size)
    turns = tuple(mx.array(a.astype(np.float32)) for a in (np.cos(angles), np.sin(angles)))
    ours = metal.heads(y, b, (queries, keys), weights if normed else None, 1e-6, turns)
    turn = np.exp(1j * angles)[:, None, None]
    for i, (out, count) in enumerate(zip(outputs, (queries, keys, keys), strict=True)):
        expected = out.reshape(rows, count, 1, size)
        if i < 2 and normed:
            mean = (expected**2).mean(axis=-1, keepdims=True)
            expected = expected / np.sqrt(mean + 1e-6) * exact(weights[i])
        if i < 2:
            turned = (expected[..., : size // 2] + 1j * expected[..., size // 2 :]) * turn
            expected = np.concatenate([turned.real, turned.imag], axis=-1)
        agree(ours[i], expected, dtype, 3)


@pytest.mark.parametrize(
    ("rows", "width", "rank", "dtype"),
    [(2, 8, 8, mx.float32), (3, 576, 4, mx.bfloat16), (1, 8200, 1, mx.float16), (2, 301, 3, mx.float32)],
)
def test_a_layer_is_added_to_the_residual_and_normed(rows, width, rank, dtype):
    y, b, [out] = joined(rows, [width], rank, dtype)
    residual, weight = normal(1, rows, width, dtype=dtype), normal(2, width, dtype=dtype)
    added, normed = metal.add_and_norm(y, b, residual, weight, 1e-5)
    agree(added, exact(residual) + out, dtype, 3)
    shrink = 1 / np.sqrt((exact(added) ** 2).mean(axis=-1, keepdims=True) + 1e-5)
    agree(normed, exact(added) * shrink * exact(weight), dtype, 3)


@pytest.mark.parametrize(
    ("rows", "width", "rank", "dtype"), [(6, 300, 4, mx.bfloat16), (1, 8, 1, mx.float32), (9, 33, 5, mx.float16)]
)
def test_the_gate_is_multiplied_with_the_up_projection(rows, width, rank, dtype):
    y, b, _ = joined(rows, [width, width], rank, dtype)
    y[0, :4] = mx.array([-1e4, 1e4, -90.0, 90.0], dtype)
    layers = np.split(exact(y)[:, : 2 * width], 2, axis=1)
    low, weights = np.split(exact(y)[:, 2 * width :], 2, axis=1), np.split(exact(b), 2, axis=1)
    gate, up = (base + z @ w for base, z, w in zip(layers, low, weights, strict=True))
    agree(metal.swiglu(y, b), gate / (1 + np.exp(-np.maximum(gate, -700))) * up, dtype, 3)


@pytest.mark.parametrize(
    ("vocabulary", "dtype", "temperature"),
    [
        (1000, mx.float32, 0.7),
        (256, mx.float16, 1.0),
        (257, mx.bfloat16, 1.3),
        (8, mx.float32, 1.0),
        (49_152, mx.bfloat16, 0.7),
        (655_360, mx.float16, 1.0),
    ],
)
def test_drawing_gives_a_token_of_positive_probability_at_the_point_and_its_log_prob_and_entropy(
    vocabulary, dtype, temperature
):
    logits = normal(7, 3, vocabulary, dtype=dtype, scale=3.0)
    logits[1, ::3] = -mx.inf  # a probability of exactly 0
    logits[2, : vocabulary - 2] = -mx.inf  # all of it in the tail
    state, uniform = mx.array([1, 2, 0, 1, 2, 0, 1]), mx.array([0.43, 0.99999994, 0.0, 0.0, 0.2, 0.9, 1.0])
    if vocabulary > 10_000:
        logits, state, uniform = logits[1:], state[:2] - 1, uniform[:2]
    tokens, logprobs, entropy = (np.array(a) for a in metal.draw(logits, state, uniform, temperature))
    z = exact(logits)[np.array(state)] / temperature
    p = np.exp(z - z.max(axis=-1, keepdims=True))
    p /= p.sum(axis=-1, keepdims=True)
    upto, rows = p.cumsum(axis=-1), np.arange(len(z))
    assert (p[rows, tokens] > 0).all()
    assert (upto[rows, tokens] >= np.array(uniform) - 1e-6).all()
    assert (upto[rows, tokens] - p[rows, tokens] <= np.array(uniform) + 1e-6).all()
    np.testing.assert_allclose(logprobs, np.log(p[rows, tokens]), atol=1e-5)
    np.testing.assert_allclose(entropy, -(p * np.log(np.maximum(p, 1e-300))).sum(axis=-1), atol=1e-5)
    below = np.array(uniform) < 1  # at 1 the running sum exceeds the point nowhere, as rounding may leave it
    np.testing.assert_array_equal(tokens[below], np.array(draw(logits, state, uniform, temperature).tokens)[below])


def test_drawing_at_a_point_between_two_tokens_gives_the_second():
    uniform = mx.array([0.0, 0.25, 0.5, 0.875])
    assert metal.draw(mx.zeros((1, 8)), mx.zeros(4, mx.int32), uniform, 1.0)[0].tolist() == [0, 2, 4, 7]


@pytest.mark.parametrize("wrong", [float("nan"), float("inf")])
@pytest.mark.parametrize("places", [[0], [700], slice(None)])
def test_a_logit_that_is_no_number_shows_in_the_logprob_of_its_row_alone(wrong, places):
    rows = np.random.default_rng(0).normal(0, 3, (4, 1000)).astype(np.float32)
    rows[1, places] = wrong
    rows[3] = -np.inf
    tokens, logprobs, entropy = metal.draw(mx.array(rows), mx.arange(4), mx.array([0.2, 0.5, 0.9, 0.0]), 1.0)
    assert np.isfinite(np.array(logprobs)).tolist() == [True, False, True, False]
    assert np.isfinite(np.array(entropy)).tolist() == [True, False, True, False]
    assert 0 <= min(tokens.tolist()) <= max(tokens.tolist()) < 1000


def test_what_the_kernels_do_not_support_is_refused(monkeypatch):
    monkeypatch.setattr(metal, "is_default", lambda: True)

    def attends(queries=(2, 4, 1, 64), values=(2, 2, 9, 64), dtype=mx.bfloat16):
        return metal.can_attend(mx.zeros(queries, dtype), mx.zeros(values, dtype))

    assert attends()
    assert not attends(queries=(2, 4, 2, 64))
    assert not attends(values=(2, 2, 9, 128))
    assert not attends((2, 4, 1, 80), (2, 2, 9, 80))
    assert not attends(dtype=mx.int32)
    assert metal.can_draw(mx.zeros((1, 655_360)))
    assert not metal.can_draw(mx.zeros((1, 655_361)))
    assert not metal.can_draw(mx.zeros((1, 8), mx.int32))


@pytest.mark.parametrize(
    ("source", "fault"),
    [
        ("out[i + 1] = x[i];", "heap-buffer-overflow"),
        ("out[i] = x[i - 1];", "heap-buffer-overflow"),
        ("threadgroup float all[64]; all[i] = x[i]; out[i] = all[63 - i];", "order of the threads"),  # no barrier
        (  # no barrier after the reading
            "threadgroup float all[1]; if (i == 0) all[0] = 1; threadgroup_barrier(metal::mem_flags::mem_threadgroup); "
            "out[i] = metal::simd_sum(all[0]); if (i == 0) all[0] = 2;",
            "order of the threads",
        ),
        ("threadgroup float all[32]; all[i] = x[i];", "out of bounds"),
        ("threadgroup float all[9000]; all[i] = x[i];", "32 KB"),
        ("if (i < 40) out[i] = metal::simd_sum(x[i]);", "do not come"),
        ("if (i < 40) threadgroup_barrier(metal::mem_flags::mem_threadgroup);", "do not come"),
    ],
)
def test_the_emulator_finds_faults(machine, source, fault):
    if machine is None:
        pytest.skip("a Mac needs no emulator")
    lines = "const int i = thread_position_in_grid.x;\n" + source.replace("; ", ";\n")
    kernel = mx.fast.metal_kernel("faulty", ["x"], ["out"], lines)
    with pytest.raises(RuntimeError, match=fault):
        kernel(
            inputs=[mx.arange(64, dtype=mx.float32)], template=[("T", mx.float32)], grid=(64, 1, 1),
            threadgroup=(64, 1, 1), output_shapes=[(64,)], output_dtypes=[mx.float32],
        )  # fmt: skip
