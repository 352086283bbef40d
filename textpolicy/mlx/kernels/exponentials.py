"""The fast exponential for CPUs, where MLX computes one number at a time; SwiGLU and attention built on it."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

# exp(x) = 2^n exp(r) with n = round(x / ln 2) and |r| <= ln 2 / 2; ln 2 in two parts, so that r is exact (Cody, Waite).
_LN2_HIGH, _LN2_LOW = 0.693359375, -2.12194440e-4
_TO_WHOLE = 12582912.0  # 1.5 * 2^23: adding and subtracting it rounds to a whole number, in a way compilers vectorise
_LOWEST = -3.4e38  # the score of a hidden slot; -inf would make a row with no visible slot NaN
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


@mx.compile
def _score_slopes(mass: mx.array, slope: mx.array, mean: mx.array) -> mx.array:
    return mass * (slope - mean)


def exp(x: mx.array) -> mx.array:
    """Return exp(x) of float32 ``x`` with a relative error of at most 2e-7; 0 below -87. It has no gradient."""
    p, power = _exp_factors(x)
    return _scaled(x, p, mx.view(power, mx.float32))


def exp_without_gradient(x: mx.array) -> mx.array:
    """Return exp(x) by the fastest method of the default device."""
    return exp(x) if _on_cpu() and x.dtype == mx.float32 else mx.exp(x)


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


def attention(queries: Any, keys: Any, values: Any, cache: Any, scale: float, mask: Any, sinks: Any = None) -> mx.array:
    """Return softmax(scale q k^T) v of queries (B, H, L, D), keys (B, G, S, D) and values (B, G, S, E), with gradient.

    It computes float32 without a mask, under "causal" or under booleans shared by all heads; for anything else it
    calls mlx-lm's.
    """
    if isinstance(mask, mx.array):
        supported = mask.dtype == mx.bool_ and mask.ndim <= 4 and (mask.ndim == 2 or mask.shape[-3] == 1)
    else:
        supported = mask is None or mask == "causal"
    if sinks is not None or not supported or any(a.dtype != mx.float32 for a in (queries, keys, values)):
        from mlx_lm.models.base import scaled_dot_product_attention as theirs

        return theirs(queries, keys, values, cache=cache, scale=scale, mask=mask, sinks=sinks)
    length, slots = queries.shape[2], keys.shape[2]
    if isinstance(mask, str):
        mask = mx.arange(slots) <= mx.arange(slots - length, slots)[:, None]
    elif mask is not None and mask.ndim == 4:
        mask = mask[:, :, None]  # (B, 1, 1, L, S), for the heads of a group
    out: Any = _attention(scale, mask)(queries, keys, values)
    return out[0]


def _attention(scale: float, mask: mx.array | None) -> Callable[..., Any]:
    """Return the attention with this scale and mask, which keeps the softmax's numerator and sum for its gradient.

    Heads that share keys are rows of one matrix product.
    """

    def by_group(a: mx.array, keys: mx.array) -> mx.array:
        return a.reshape(a.shape[0], keys.shape[1], -1, a.shape[-1])  # (B, G, H / G L, ...)

    @mx.custom_function
    def attend(queries: mx.array, keys: mx.array, values: mx.array) -> list[mx.array]:
        scores = (scale * by_group(queries, keys)) @ keys.swapaxes(-1, -2)
        if mask is not None:
            (b, g, rows, slots), length = scores.shape, queries.shape[2]
            visible = mx.where(mask, scores.reshape(b, g, rows // length, length, slots), _LOWEST)
            scores = visible.reshape(b, g, rows, slots)
        mass = exp(scores - scores.max(axis=-1, keepdims=True))
        total = mass.sum(axis=-1, keepdims=True)
        return [((mass @ values) / total).reshape(*queries.shape[:-1], -1), mass, total]

    @attend.vjp
    def backward(primals: Any, slopes: Any, outputs: Any) -> tuple[mx.array, mx.array, mx.array]:
        queries, keys, values = primals
        out, mass, total = outputs
        slope = by_group(slopes[0], keys) / total
        mean = (slope * by_group(out, keys)).sum(axis=-1, keepdims=True)
        by_scores = _score_slopes(mass, slope @ values.swapaxes(-1, -2), mean)
        by_keys = by_scores.swapaxes(-1, -2) @ (scale * by_group(queries, keys))
        return (scale * (by_scores @ keys)).reshape(queries.shape), by_keys, mass.swapaxes(-1, -2) @ slope

    return attend


def patches() -> Mapping[str, Callable[..., Any]]:
    """Return the functions that replace mlx-lm's of the same name on a CPU; empty on another default device."""
    return {"swiglu": swiglu, "scaled_dot_product_attention": attention} if _on_cpu() else {}


def _on_cpu() -> bool:
    return mx.default_device() == mx.Device(mx.cpu)
