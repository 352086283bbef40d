"""The fast exponential for CPUs, where MLX computes one number at a time; SwiGLU built on it."""

from __future__ import annotations

from typing import Any

import mlx.core as mx

# exp(x) = 2^n exp(r) with n = round(x / ln 2) and |r| <= ln 2 / 2; ln 2 in two parts, so that r is exact (Cody, Waite).
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
# Adding 1.5 * 2^23 rounds to a whole number, as compilers can vectorise; with 127 its last bits are a float's exponent.
_TO_WHOLE = 12582912.0 + 127.0
_TERMS = [0.00829031473816242, 0.04189792955296189, 0.16667636196154875, 0.4999914952882923, 0.999999707188667, 1.0]
# the polynomial in r whose largest error relative to exp(r) is least, 9e-8, among those that are 1 at 0


@mx.compile
def _rounded(x: mx.array) -> mx.array:
    """Return n + _TO_WHOLE; n is at least -126."""
    return mx.maximum(x, -87.0) * 1.4426950408889634 + _TO_WHOLE


@mx.compile
def _rest(x: mx.array, rounded: mx.array) -> mx.array:
    n = rounded - _TO_WHOLE
    return x - n * _LN2_HIGH - n * _LN2_LOW


@mx.compile
def _polynomial(r: mx.array) -> mx.array:
    p = r * _TERMS[0] + _TERMS[1]
    for term in _TERMS[2:]:
        p = p * r + term
    return p


@mx.compile
def _scaled(x: mx.array, p: mx.array, power: mx.array) -> mx.array:
    return mx.where(x < -87.0, 0.0, p * power)  # exactly 0, so that an impossible token is never drawn


def _exp_factors(x: mx.array) -> tuple[mx.array, mx.array]:
    """Return exp(r) and 2^n. MLX fuses each of the functions above whole, but not all of them as one."""
    rounded = _rounded(x)
    return _polynomial(_rest(x, rounded)), mx.view(mx.view(rounded, mx.int32) << 23, mx.float32)


@mx.compile
def _negated(gate: mx.array) -> mx.array:
    return mx.minimum(mx.maximum(-gate, -87.0), 88.0)


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
    """Return exp(x) of float32 ``x`` up to 88 with a relative error of at most 2e-7; 0 below -87.

    It has no gradient.
    """
    return _scaled(x, *_exp_factors(x))


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
    s = _logistic(*_exp_factors(_negated(gate)))
    return [_gated(gate, x, s), s]


@_swiglu.vjp
def _swiglu_backward(primals: Any, slopes: Any, outputs: Any) -> tuple[mx.array, mx.array]:
    gate, x = primals
    by_gate, by_x = _gate_slopes(gate, x, outputs[1], slopes[0])
    return by_gate, by_x


def on_cpu() -> bool:
    """Return whether the default device is a CPU."""
    return mx.default_device() == mx.Device(mx.cpu)
