"""The faster exponential against NumPy in float64, and the gate made of it against its formula."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.activations import swiglu as theirs

from textpolicy.mlx.kernels.exponentials import attention, exp, swiglu


def test_the_exponential_is_exact_to_two_units_in_the_seventh_place():
    x = np.linspace(-86.9, 87.9, 200_001).astype(np.float32)
    exact = np.exp(x.astype(np.float64))
    np.testing.assert_allclose(np.array(exp(mx.array(x))), exact, rtol=2e-7)


def test_impossible_tokens_have_a_probability_of_exactly_zero():
    assert exp(mx.array([-np.inf, -1e30, -88.0])).tolist() == [0.0, 0.0, 0.0]


def test_the_gate_and_its_slopes_are_those_of_float64():
    rng = np.random.default_rng(0)
    gate, x, c = (rng.normal(scale=4, size=(50, 30)).astype(np.float32) for _ in range(3))
    g, y, w = (a.astype(np.float64) for a in (gate, x, c))
    s = 1 / (1 + np.exp(-g))
    np.testing.assert_allclose(np.array(swiglu(mx.array(gate), mx.array(x))), g * s * y, rtol=1e-6, atol=1e-6)

    def loss(gate, x):
        return (swiglu(gate, x) * mx.array(c)).sum()

    by_gate, by_x = mx.grad(loss, argnums=(0, 1))(mx.array(gate), mx.array(x))
    np.testing.assert_allclose(np.array(by_gate), w * y * s * (1 + g * (1 - s)), rtol=1e-5, atol=1e-5)
    np.testing.assert_allclose(np.array(by_x), w * g * s, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("dtype", [mx.float16, mx.bfloat16])
def test_other_types_are_left_to_mlx_lm(dtype):
    gate, x = (mx.random.normal((4, 8)).astype(dtype) for _ in range(2))
    assert mx.array_equal(swiglu(gate, x), theirs(gate, x))


LENGTH, SLOTS = 5, 9
SEEN = np.random.default_rng(5).random((2, 1, LENGTH, SLOTS)) < 0.5
SEEN[..., 0] = True
MASKS = {
    "none": (None, np.ones((LENGTH, SLOTS), bool)),
    "causal": ("causal", np.tri(LENGTH, SLOTS, SLOTS - LENGTH, dtype=bool)),
    "of each row": (mx.array(SEEN), SEEN),
    "of all rows": (mx.array(SEEN[0, 0]), SEEN[0, 0]),
}


def attention_in_float64(q, k, v, scale, seen):
    """(B, H, L, E), head by head."""
    share = q.shape[1] // k.shape[1]
    k, v = (np.repeat(a, share, axis=1) for a in (k, v))
    scores = np.where(seen, scale * q @ k.swapaxes(-1, -2), -np.inf)
    mass = np.exp(scores - scores.max(axis=-1, keepdims=True))
    return mass / mass.sum(axis=-1, keepdims=True) @ v


def made_up(*shapes):
    rng = np.random.default_rng(0)
    return [rng.normal(size=shape).astype(np.float32) for shape in shapes]


@pytest.mark.parametrize("name", MASKS)
@pytest.mark.parametrize("heads", [2, 6])
def test_attention_and_its_slopes_are_those_of_float64(name, heads):
    """The slopes by differences of the formula in float64, at a few places of each array."""
    mask, seen = MASKS[name]
    q, k, v, c = made_up((2, heads, LENGTH, 4), (2, 2, SLOTS, 4), (2, 2, SLOTS, 3), (2, heads, LENGTH, 3))

    def exact(*arrays):
        return (c * attention_in_float64(*(a.astype(np.float64) for a in arrays), 0.5, seen)).sum()

    out = attention(*map(mx.array, (q, k, v)), None, 0.5, mask)
    doubles = (a.astype(np.float64) for a in (q, k, v))
    np.testing.assert_allclose(np.array(out), attention_in_float64(*doubles, 0.5, seen), rtol=1e-5, atol=1e-6)
    slopes = mx.grad(lambda *a: (attention(*a, None, 0.5, mask) * mx.array(c)).sum(), argnums=(0, 1, 2))(
        *map(mx.array, (q, k, v))
    )
    for i, slope in enumerate(slopes):
        for place in range(0, slope.size, 7):
            step = np.zeros(slope.size)
            step[place] = 1e-4
            around = []
            for sign in (1, -1):
                moved = [a.astype(np.float64) for a in (q, k, v)]
                moved[i] = moved[i] + sign * step.reshape(slope.shape)
                around.append(exact(*moved))
            assert slope.reshape(-1)[place].item() == pytest.approx((around[0] - around[1]) / 2e-4, abs=2e-5)


def test_a_row_with_no_visible_slot_is_not_nan():
    q, k, v = map(mx.array, made_up((1, 2, 2, 4), (1, 2, 3, 4), (1, 2, 3, 4)))
    seen = mx.array([[True, True, False], [False, False, False]])
    assert mx.isfinite(attention(q, k, v, None, 0.5, seen)).all()


@pytest.mark.parametrize("why", ["another type", "an additive mask", "a mask for each head", "sinks"])
def test_unsupported_attention_is_left_to_mlx(why):
    q, k, v = map(mx.array, made_up((1, 2, 3, 32), (1, 2, 3, 32), (1, 2, 3, 32)))
    mask, sinks = None, None
    if why == "another type":
        q, k, v = (a.astype(mx.bfloat16) for a in (q, k, v))
    elif why == "an additive mask":
        mask = mx.array(np.where(np.tri(3), 0, -np.inf).astype(np.float32))
    elif why == "a mask for each head":
        mask = mx.array(np.stack([np.tri(3), np.ones((3, 3))])[None].astype(bool))
    else:
        sinks = mx.array([0.5, -0.5])
    theirs = mx.fast.scaled_dot_product_attention(q, k, v, scale=0.5, mask=mask, sinks=sinks)
    assert mx.array_equal(attention(q, k, v, None, 0.5, mask, sinks), theirs)
