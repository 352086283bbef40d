"""Keys and values that many rows share: compute a prefix once, fork it, continue every row.

Rollouts and updates both run a model in levels: what all rows begin with (one row), then each
distinct prompt (one row each), then each completion (one row each). Between levels the keys and
values are gathered, which is differentiable, so the same code serves sampling and gradients.
"""

from __future__ import annotations

from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.cache import KVCache, make_prompt_cache

from ..errors import UserError


class Layer:
    """One attention layer's keys and values, in the interface of mlx-lm's caches."""

    def __init__(self, context: Context):
        self.context = context
        self.keys: mx.array | None = None  # (B, heads, S, D)
        self.values: mx.array | None = None

    @property
    def offset(self) -> mx.array | int:
        """Position of the next token: an int if all rows agree, else (B,)."""
        return self.context.offset

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Any:
        return self.context.mask(n, return_array, window_size)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        if self.keys is not None:
            keys = self._append(self.keys, keys)
            values = self._append(self.values, values)
        self.keys, self.values = keys, values
        end = self.context.size + self.context.arriving
        return keys[..., :end, :], values[..., :end, :]

    def _append(self, old: mx.array | None, new: mx.array) -> mx.array:
        assert old is not None
        start, end = self.context.size, self.context.size + new.shape[2]
        if self.context.spare == 0:
            return mx.concatenate([old, new], axis=2)
        if end > old.shape[2]:
            room = mx.zeros((*old.shape[:2], end - start + self.context.spare, old.shape[3]), old.dtype)
            old = mx.concatenate([old[..., :start, :], room], axis=2)
        old[..., start:end, :] = new
        return old


class Context:
    """What a model has read: B rows of S positions, of which each row uses some.

    ``spare`` positions are allocated ahead when it grows, for decoding token by token;
    0 concatenates, which is what a gradient wants.
    """

    def __init__(self, model: nn.Module, spare: int = 0):
        self.spare = spare
        self.layers = [Layer(self) for _ in _attention_layers(model)]
        self.offset: mx.array | int = 0
        self.size = 0
        self.arriving = 0
        self.positions: mx.array | None = None  # (B, S) int32; None while every row uses all of S
        self.valid: mx.array | None = None  # (B, S) bool

    def read(self, model: nn.Module, tokens: mx.array, lengths: mx.array | None = None) -> mx.array:
        """Run (B, N) ``tokens`` after what was read; returns logits (B, N, V), evaluated only if used.

        ``lengths`` (B,) says how many of the N are real, when rows are padded on the right.
        """
        self.arriving = tokens.shape[1]
        logits = model(tokens, cache=self.layers)
        if lengths is not None:
            self._track(tokens.shape[0])
        if self.positions is not None:
            self._extend(tokens.shape, lengths)
        self.offset = self.offset + (tokens.shape[1] if lengths is None else lengths)
        self.size, self.arriving = self.size + tokens.shape[1], 0
        return logits

    def fork(self, parents: mx.array) -> Context:
        """A context whose row b continues row ``parents[b]``; this one stays as it is."""
        child = object.__new__(Context)
        child.spare, child.size, child.arriving = self.spare, self.size, 0
        child.offset = self.offset if isinstance(self.offset, int) else self.offset[parents]
        child.positions = None if self.positions is None else self.positions[parents]
        child.valid = None if self.valid is None else self.valid[parents]
        child.layers = []
        for layer in self.layers:
            forked = Layer(child)
            if layer.keys is not None and layer.values is not None:
                forked.keys, forked.values = layer.keys[parents], layer.values[parents]
            child.layers.append(forked)
        return child

    def mask(self, n: int, return_array: bool, window: int | None) -> Any:
        """Which of the S stored and n arriving positions each arriving one may attend to."""
        if self.positions is None and (window is None or self.size + n <= window):
            if n == 1:
                return None
            if not return_array:
                return "causal"
        queries = self._arriving_positions(n)
        keys = queries if self.size == 0 else mx.concatenate([self._stored_positions(queries), queries], axis=1)
        seen = keys[:, None, :] <= queries[:, :, None]
        if window is not None:
            seen = seen & (queries[:, :, None] - keys[:, None, :] < window)
        if self.valid is not None:
            arrived = mx.ones((self.valid.shape[0], n), mx.bool_)
            seen = seen & mx.concatenate([self.valid, arrived], axis=1)[:, None, :]
        return seen[:, None]

    def _arriving_positions(self, n: int) -> mx.array:
        steps = mx.arange(n, dtype=mx.int32)[None]
        return steps + (self.offset if isinstance(self.offset, int) else self.offset[:, None])

    def _stored_positions(self, like: mx.array) -> mx.array:
        if self.positions is not None:
            return self.positions
        return mx.broadcast_to(mx.arange(self.size, dtype=mx.int32)[None], (like.shape[0], self.size))

    def _track(self, rows: int) -> None:
        """Begin to keep positions and validity per row, from now on rows differ."""
        if self.positions is None:
            positions = mx.arange(self.size, dtype=mx.int32)[None]
            self.positions = mx.broadcast_to(positions, (rows, self.size))
            self.valid = mx.ones((rows, self.size), mx.bool_)
            self.offset = mx.full((rows,), self.offset, mx.int32)

    def _extend(self, shape: tuple[int, ...], lengths: mx.array | None) -> None:
        assert self.positions is not None
        assert self.valid is not None
        rows, n = shape
        steps = mx.arange(n, dtype=mx.int32)[None]
        arrived = mx.ones((rows, n), mx.bool_) if lengths is None else steps < lengths[:, None]
        self.positions = mx.concatenate([self.positions, self._arriving_positions(n)], axis=1)
        self.valid = mx.concatenate([self.valid, arrived], axis=1)


def _attention_layers(model: nn.Module) -> list[Any]:
    """mlx-lm's own caches of this model, if sharing a prefix among rows is known to be right for them."""
    caches = make_prompt_cache(model)
    other = sorted({type(c).__name__ for c in caches if type(c) is not KVCache})
    if other:
        raise UserError(
            f"this model keeps state in {', '.join(other)}, which textpolicy cannot fork yet; "
            "choose a model with full attention in every layer (Llama, Qwen2, Qwen3, SmolLM)"
        )
    return caches
