"""The faster exponential against NumPy in float64, and the gate made of it against its formula."""

import mlx.core as mx
import numpy as np
import pytest
from mlx_lm.models.activations import swiglu as theirs

from textpolicy.mlx.kernels.exponentials import exp, swiglu


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
