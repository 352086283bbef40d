"""The fast exponential for CPUs, where MLX computes one number at a time; SwiGLU built on it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

# exp(x) = 2^n exp(r) with n = round(x / ln 2) and |r| <= ln 2 / 2; ln 2 in two parts, so that r is exact (Cody, Waite).
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_TO_WHOLE = 12582912.0  # 1.5 * 2^23: adding and subtracting it rounds to a whole number, in a way compilers vectorise
_TERMS = [1 / 5040, 1 / 720, 1 / 120, 1 / 24, 1 / 6, 1 / 2]  # of exp(r) = 1 + r + r^2 (1/2 + r (1/6 + ...))


@mx.compile
def _exp_factors(x: mx.array) -> tuple[mx.array, mx.array]:
    """Return exp(r), and 2^n as the bits of a float."""
    x = mx.maximum(mx.minimum(x, 88.0), -87.0)
    n = (x * 1.4426950408889634 + _TO_WHOLE) - _TO_WHOLE
    r = x - n * _LN2_HIGH - n * _LN2_LOW
    p = r * _TERMS[0] + _TERMS[1]
    for term in _TERMS[2:]:
        p = p * r + term
    return p * r * r + r + 1.0, (n.astype(mx.int32) + 127) << 23


@mx.compile
def _scaled(x: mx.array, p: mx.array, power: mx.array) -> mx.array:
    return mx.where(x < -87.0, 0.0, p * power)  # exactly 0, so that an impossible token is never drawn


@mx.compile
def _logistic(p: mx.array, power: mx.array) -> mx.array:
    return 1.0 / (1.0 + p * power)


@mx.compile
def _gated(gate: mx.array, x: mx.array, s: mx.array) -> mx.array:
    return gate * s * x


@mx.compile
def _gate_slopes(gate: mx.array, x: mx.array, s: mx.array, slope: mx.array) -> tuple[mx.array, mx.array]:
    return slope * x * s * (1.0 + gate * (1.0 - s)), slope * gate * s


def exp(x: mx.array) -> mx.array:
    """Return exp(x) of float32 ``x`` with a relative error of at most 2e-7; 0 below -87. It has no gradient."""
    p, power = _exp_factors(x)
    return _scaled(x, p, mx.view(power, mx.float32))


def exp_without_gradient(x: mx.array) -> mx.array:
    """Return exp(x) by the fastest method of the default device."""
    return exp(x) if on_cpu() and x.dtype == mx.float32 else mx.exp(x)


def swiglu(gate: mx.array, x: mx.array) -> mx.array:
    """Return SwiGLU, silu(gate) * x, with its gradient; calls mlx-lm's unless both are float32."""
    if gate.dtype != mx.float32 or x.dtype != mx.float32:
        from mlx_lm.models.activations import swiglu as theirs

        return theirs(gate, x)
    out: Any = _swiglu(gate, x)
    return out[0]


@mx.custom_function
def _swiglu(gate: mx.array, x: mx.array) -> list[mx.array]:
    p, power = _exp_factors(-gate)
    s = _logistic(p, mx.view(power, mx.float32))
    return [_gated(gate, x, s), s]


@_swiglu.vjp
def _swiglu_backward(primals: Any, slopes: Any, outputs: Any) -> tuple[mx.array, mx.array]:
    gate, x = primals
    by_gate, by_x = _gate_slopes(gate, x, outputs[1], slopes[0])
    return by_gate, by_x


def on_cpu() -> bool:
    """Return whether the default device is a CPU."""
    return mx.default_device() == mx.Device(mx.cpu)
