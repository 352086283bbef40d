"""The attention for scoring and training: its scores are kept for the gradient, or computed again in tiles."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from typing import Any

import mlx.core as mx

from .exponentials import exp, exp_without_gradient, on_cpu, swiglu

_LOWEST = -3.4e38  # the score of a hidden slot; -inf would make a row with no visible slot NaN
_TILE = {mx.cpu: 2**21, mx.gpu: 2**24}  # scores of one tile
FEWEST = 16  # queries of a tile, below which products get slow
_KEPT = 4  # tiles' worth of scores, beyond which none are kept
_AT_ONCE = 6  # arrays of a tile's size that live at the same time


@mx.compile
def _score_slopes(mass: mx.array, slope: mx.array, mean: mx.array) -> mx.array:
    return mass * (slope - mean)


def attention(queries: Any, keys: Any, values: Any, cache: Any, scale: float, mask: Any, sinks: Any = None) -> mx.array:
    """Return softmax(scale q k^T) v of queries (B, H, L, D), keys (B, G, S, D) and values (B, G, S, E), with gradient.

    It computes float32 without a mask, under "causal" or under booleans shared by all heads, and anything that has too
    many scores to be kept; for the rest it calls mlx-lm's.
    """
    if too_many(queries, keys, mask):
        return tiled(queries, keys, values, scale, mask, sinks)
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


def too_many(queries: mx.array, keys: mx.array, mask: Any) -> bool:
    """Return whether queries (B, H, L, D) and keys (B, G, S, D) have too many scores to be kept for a gradient.

    Addends to the scores as a ``mask`` are as many, and may have a gradient themselves (DeepSeek), so they stay.
    """
    (b, h, length, _), slots = queries.shape, keys.shape[2]
    added = isinstance(mask, mx.array) and mask.dtype != mx.bool_
    return bool(not added and length > FEWEST and b * h * length * slots > most_kept())


def most_kept() -> int:
    """Return the scores of one layer beyond which the default device keeps none."""
    return _KEPT * _TILE[mx.default_device().type]


def tile_bytes(width: int) -> int:
    """Return the most memory of a tile of which each query has ``width`` scores, over all rows and heads."""
    return _AT_ONCE * 4 * max(_TILE[mx.default_device().type], FEWEST * width)


def tiled(
    queries: mx.array,
    keys: mx.array,
    values: mx.array,
    scale: float,
    mask: Any,
    sinks: mx.array | None = None,
    forward: Callable[..., mx.array] | None = None,
) -> mx.array:
    """Return softmax(scale q k^T) v of queries (B, H, L, D), keys (B, G, S, D) and values (B, G, S, E), with gradient.

    The backward pass makes the scores again, a tile of queries at a time, as FlashAttention-2 does (arXiv:2307.08691),
    so that memory grows with the length and not with its square. Tiles are as wide as the keys that a causal mask
    leaves them, so that a row of scores is whole and its softmax takes one pass. ``mask`` is None, "causal" or booleans
    that broadcast to (B, H, L, S); ``sinks`` (H,) are scores of a key without a value. ``forward`` computes the result
    from queries, keys, values and sinks; None does so in tiles, too.
    """

    @mx.custom_function
    def attend(queries: mx.array, keys: mx.array, values: mx.array, sinks: mx.array | None) -> list[mx.array]:
        if forward is not None:
            return [forward(queries, keys, values, sinks)]
        parts: list[mx.array] = []
        for a, b, end, at in _tiles(queries, keys, mask):
            q = queries[:, :, a:b]
            if parts:  # wait for the tile before, so that their scores are never alive together
                q, at = mx.depends([q, at], parts[-1:])
            k = keys[:, :, :end]
            share, _ = _shares(q, k, scale, _visible(mask, a, b, at, k), sinks)
            out = share.astype(values.dtype) @ values[:, :, :end]
            parts.append(out.reshape(*q.shape[:-1], -1))
        return [mx.concatenate(parts, axis=2)]

    @attend.vjp
    def backward(primals: Any, slopes: Any, outputs: Any) -> tuple[mx.array, ...]:
        queries, keys, values, sinks = primals
        dtype = queries.dtype
        by_queries: list[mx.array] = []
        by_keys, by_values = (mx.zeros(a.shape, mx.float32) for a in (keys, values))
        by_sinks = None if sinks is None else mx.zeros(sinks.shape, mx.float32)
        for a, b, end, at in _tiles(queries, keys, mask):
            q, slope, out = (x[:, :, a:b] for x in (queries, slopes[0], outputs[0]))
            q, slope, at = mx.depends([q, slope, at], [by_keys, by_values, *by_queries[-1:]])
            k, v = keys[:, :, :end], values[:, :, :end]
            share, sunk = _shares(q, k, scale, _visible(mask, a, b, at, k), sinks)
            mean = _grouped((slope * out).astype(mx.float32).sum(axis=-1, keepdims=True), keys)
            slope = _grouped(slope, keys)
            by_scores = share * ((slope @ v.swapaxes(-1, -2)).astype(mx.float32) - mean)
            by_scores = by_scores.astype(dtype)
            by_queries.append((scale * (by_scores @ k)).reshape(q.shape))
            rest = [(0, 0), (0, 0), (0, keys.shape[2] - end), (0, 0)]
            by_keys = by_keys + mx.pad(by_scores.swapaxes(-1, -2) @ (scale * _grouped(q, keys)), rest)
            by_values = by_values + mx.pad(share.astype(dtype).swapaxes(-1, -2) @ slope, rest)
            if by_sinks is not None and sunk is not None:
                lost = (sunk * mean).reshape(*q.shape[:2], -1)
                by_sinks = by_sinks - lost.sum(axis=(0, 2))
        results = [mx.concatenate(by_queries, axis=2), by_keys.astype(dtype), by_values.astype(values.dtype)]
        return (*results, *([] if by_sinks is None else [by_sinks.astype(sinks.dtype)]))

    out: Any = attend(queries, keys, values, sinks)
    return out[0]


def _tiles(queries: mx.array, keys: mx.array, mask: Any) -> Iterator[tuple[int, int, int, mx.array]]:
    """Yield the queries [a, b) of each tile, and the end of the keys that they see, also as an array."""
    (b, h, length, _), slots = queries.shape, keys.shape[2]
    rows = max(FEWEST, _TILE[mx.default_device().type] // (b * h * slots))
    for start in range(0, length, rows):
        stop = min(start + rows, length)
        end = slots - length + stop if isinstance(mask, str) else slots
        yield start, stop, end, mx.array(end)


def _visible(mask: Any, a: int, b: int, end: mx.array, keys: mx.array) -> mx.array | None:
    """Return the part of ``mask`` for the queries [a, b), the last of which sees the ``keys`` to their ``end``."""
    if isinstance(mask, str):
        return mx.arange(keys.shape[2]) - end < mx.arange(a - b + 1, 1)[:, None]  # less than the query's own distance
    return mask if mask is None or mask.shape[-2] == 1 else mask[..., a:b, :]


def _grouped(a: mx.array, keys: mx.array) -> mx.array:
    """Return (B, H, L, N) ``a`` as (B, G, H / G L, N): heads that share keys are rows of one matrix product."""
    return a.reshape(a.shape[0], keys.shape[1], -1, a.shape[-1])


def _shares(
    queries: mx.array, keys: mx.array, scale: float, mask: mx.array | None, sinks: mx.array | None
) -> tuple[mx.array, mx.array | None]:
    """Return softmax(scale q k^T), (B, G, H / G L, S) float32, and the share of the sinks, (B, G, H / G L, 1)."""
    scores = ((scale * _grouped(queries, keys)) @ keys.swapaxes(-1, -2)).astype(mx.float32)
    (b, h, length, _), (_, groups, slots, _) = queries.shape, keys.shape
    if mask is not None:
        apart = scores.reshape(b, groups, h // groups, length, slots)
        if mask.ndim == 4:  # (B or 1, H or 1, ...)
            heads = (1, 1) if mask.shape[1] == 1 else (groups, h // groups)
            mask = mask.reshape(mask.shape[0], *heads, *mask.shape[2:])
        scores = mx.where(mask, apart, _LOWEST).reshape(scores.shape)
    most = scores.max(axis=-1, keepdims=True)
    if sinks is None:
        mass = exp_without_gradient(scores - most)
        return mass / mass.sum(axis=-1, keepdims=True), None
    sunk = mx.broadcast_to(sinks.astype(mx.float32).reshape(groups, -1, 1), (b, groups, h // groups, length))
    sunk = sunk.reshape(b, groups, -1, 1)
    most = mx.maximum(most, sunk)
    mass, sunk = exp_without_gradient(scores - most), mx.exp(sunk - most)
    total = mass.sum(axis=-1, keepdims=True) + sunk
    return mass / total, sunk / total


def patches() -> Mapping[str, Callable[..., Any]]:
    """Return the functions that replace mlx-lm's of the same name on a CPU; empty on another default device."""
    return {"swiglu": swiglu, "scaled_dot_product_attention": attention} if on_cpu() else {}
