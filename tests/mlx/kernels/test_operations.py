"""The operations of a decoding step against plain ones, row by row."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest

from textpolicy.mlx.kernels import operations
from textpolicy.mlx.kernels.operations import Sharing


def expected_attention(queries, own, prefix, parents, seen, scale, sinks):
    """Each row's keys in one array, and a softmax in float64."""
    out = []
    for row, parent in enumerate(parents):
        keys, values = (
            np.concatenate([np.array(prefix[i][parent]), *(np.array(part[i][row]) for part in own)], axis=1)
            for i in range(2)
        )
        for head in range(queries.shape[1]):
            kv = head * keys.shape[0] // queries.shape[1]
            scores = scale * keys[kv].astype(float) @ np.array(queries[row, head, 0]).astype(float)
            scores = np.where(np.array(seen[row]), scores, -np.inf)
            extra = [] if sinks is None else [float(sinks[head])]
            masses = np.exp(np.append(scores, extra) - max([*scores, *extra]))
            out.append((masses[: len(scores)] / masses.sum()) @ values[kv])
    return np.array(out).reshape(len(parents), queries.shape[1], 1, -1)


@pytest.mark.parametrize("parents", [[0, 0, 1, 1, 2, 2], [2, 0, 2, 2, 1], [1], [0] * 7, [3, 3, 0]])
@pytest.mark.parametrize(("heads", "kv", "sizes"), [(4, 2, (16, 16)), (3, 3, (8, 24)), (6, 1, (16, 16))])
@pytest.mark.parametrize("sunk", [False, True])
def test_rows_attend_to_their_prompt_and_to_their_own_slots(parents, heads, kv, sizes, sunk):
    mx.random.seed(1)
    rows, prompts, slots, capacities = len(parents), 5, 7, (6, 3)
    queries = mx.random.normal((rows, heads, 1, sizes[0]))
    prefix = [mx.random.normal((prompts, kv, slots, size)) for size in sizes]
    own = [[mx.random.normal((rows, kv, capacity, size)) for size in sizes] for capacity in capacities]
    seen = mx.random.uniform(shape=(rows, slots + sum(capacities))) < 0.6
    seen[:, -1] = True
    sinks = mx.random.normal((heads,)) if sunk else None
    sharing = Sharing.of(np.array(parents), prompts)
    out = operations.attend(queries, own, prefix, sharing, seen, 0.3, sinks)
    expected = expected_attention(queries, own, prefix, parents, seen, 0.3, sinks)
    np.testing.assert_allclose(np.array(out), expected, atol=1e-5)


@pytest.mark.parametrize(
    ("parents", "prompts", "even"), [([0, 0, 1, 1], 2, True), ([0, 1, 0], 2, False), ([0], 2, False)]
)
def test_rows_that_lie_in_order_need_no_moving(parents, prompts, even):
    assert Sharing.of(np.array(parents), prompts).even is even


def joined(rows, widths, ranks):
    """What layers of these widths and ranks make of one input: y and b as in operations.py, and their outputs."""
    x = mx.random.normal((rows, 32))
    weights = [mx.random.normal((width, 32)) / 6 for width in widths]
    a = [mx.random.normal((32, rank)) / 6 for rank in ranks]
    b = [mx.random.normal((rank, width)) / 6 for rank, width in zip(ranks, widths, strict=True)]
    outputs = [x @ w.T + x @ low @ high for w, low, high in zip(weights, a, b, strict=True)]
    return x @ mx.concatenate([*weights, *(low.T for low in a)]).T, operations.spread(b), outputs


def close(ours, expected):
    np.testing.assert_allclose(np.array(ours), np.array(expected), atol=2e-5)


def test_loras_of_unequal_ranks_are_added():
    y, b, outputs = joined(5, [24, 8, 16], [4, 2, 7])
    for ours, expected in zip(operations.add_lora(y, b, [24, 8, 16]), outputs, strict=True):
        close(ours, expected)


@pytest.mark.parametrize("normed", [True, False])
@pytest.mark.parametrize(("queries", "keys", "size"), [(4, 2, 16), (9, 3, 64)])
def test_heads_are_normed_and_rotated_as_mlx_does(queries, keys, size, normed):
    y, b, outputs = joined(7, [queries * size, keys * size, keys * size], [4, 4, 4])
    weights = (mx.random.uniform(shape=(size,)), mx.random.uniform(shape=(size,)))
    positions = mx.random.randint(0, 3000, (7,))
    frequencies = 1e4 ** (mx.arange(0, size, 2) / -size)
    ours = operations.heads(y, b, (queries, keys), weights if normed else None, 1e-6, (positions, frequencies))
    for i, (out, count) in enumerate(zip(outputs, (queries, keys, keys), strict=True)):
        expected = out.reshape(7, count, 1, size)
        if i < 2:
            expected = mx.fast.rms_norm(expected, weights[i], 1e-6) if normed else expected
            expected = mx.fast.rope(expected, size, traditional=False, base=1e4, scale=1.0, offset=positions)
        np.testing.assert_allclose(np.array(ours[i]), np.array(expected), atol=2e-3)  # float32 angles up to 3000


def test_a_layer_is_added_to_the_residual_and_normed():
    y, b, [out] = joined(5, [40], [8])
    residual, weight = mx.random.normal((5, 40)), mx.random.uniform(shape=(40,))
    added, normed = operations.add_and_norm(y, b, residual, weight, 1e-5)
    close(added, residual + out)
    close(normed, mx.fast.rms_norm(residual + out, weight, 1e-5))


def test_the_gate_is_multiplied_with_the_up_projection():
    y, b, [gate, up] = joined(5, [24, 24], [4, 4])
    close(operations.swiglu(y, b), nn.silu(gate) * up)
