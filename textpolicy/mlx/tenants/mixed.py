"""The model with several adapters at once, each on its own rows: y = W x + ((x [A1 .. AK]) where own) [B1; ..; BK]."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear

from ..adapters.attach import WRAPPERS, LowRankLinear, trainable, wrapped
from ..kernels.patching import StandIn, with_modules

_ROWS = 5  # of a pass that tells what layers are given
_MIXED = (LoRALinear, LowRankLinear, LoRAEmbedding)


def can_mix(model: nn.Module) -> bool:
    """Return whether all layers that the adapter of ``model`` wraps can have several adapters at once.

    They must be given one row for each row of the batch, which a mixture's experts are not, and be finite, since
    0 times a factor that is not would reach the rows of others.
    """
    rows, seen = mx.arange(_ROWS)[:, None], list[bool]()

    def watched(_: Any, module: nn.Module) -> Any:
        if not isinstance(module, WRAPPERS):
            return None

        def call(x: mx.array, *args: Any, **named: Any) -> Any:
            seen.append(type(module) in _MIXED and len(x) == _ROWS)
            return module(x, *args, **named)

        return StandIn(module, call)

    with_modules(model, watched)(rows)  # never evaluated, but where a model itself asks for a value
    if not (all(seen) and all(type(module) in _MIXED for _, module in wrapped(model))):
        return False
    return all(bool(mx.isfinite(array).all()) for array in trainable(model).values())


class Mixed:
    """The view of a base in which row r of a batch has the adapter ``owners[r]`` of several, or none (-1)."""

    def __init__(self, base: nn.Module, models: Sequence[nn.Module]):
        layers = [dict(wrapped(model)) for model in models]
        ranks = [max((_low(layer)[0].shape[1] for layer in some.values()), default=0) for some in layers]
        self.columns = mx.array([i for i, rank in enumerate(ranks) for _ in range(rank)], mx.int32)  # (sum of ranks,)
        self.mask = mx.zeros((0, len(self.columns)), mx.bool_)  # (R, sum of ranks), of the rows being read
        arrays: dict[str, tuple[mx.array, mx.array]] = {}
        for name in dict.fromkeys(name for some in layers for name in some):
            a, b = zip(*(_low(some[name]) if name in some else (None, None) for some in layers), strict=True)
            like = next(pair for pair in zip(a, b, strict=True) if pair[0] is not None)
            arrays[name] = (
                mx.concatenate([_or_zeros(x, (like[0].shape[0], r)) for x, r in zip(a, ranks, strict=True)], axis=1),
                mx.concatenate([_or_zeros(x, (r, like[1].shape[1])) for x, r in zip(b, ranks, strict=True)]),
            )
        mx.eval(arrays)

        def stand_in(where: tuple[str | int, ...], module: nn.Module) -> Any:
            found = arrays.get(".".join(map(str, where)))
            if found is None:
                return None
            return self._table(module, *found) if isinstance(module, _TABLES) else self._linear(module, *found)

        self.model: nn.Module = with_modules(base, stand_in)

    def own(self, owners: Any) -> None:
        """Say which adapter each row (R,) of the next reads has."""
        self.mask = mx.array(owners)[:, None] == self.columns

    def _linear(self, layer: nn.Module, a: mx.array, b: mx.array) -> StandIn:
        def call(x: mx.array) -> mx.array:
            low = self._own(x @ a.astype(x.dtype))
            return layer(x) + low @ b.astype(x.dtype)

        return StandIn(layer, call)

    def _table(self, table: Any, a: mx.array, b: mx.array) -> Any:
        def call(ids: mx.array) -> mx.array:
            y = table(ids)
            return y + (self._own(a[ids]) @ b).astype(y.dtype)

        def as_linear(x: mx.array) -> mx.array:
            low = self._own(x @ b.T.astype(x.dtype))
            return table.as_linear(x) + low @ a.T.astype(x.dtype)

        other: Any = StandIn(table, call)
        other.as_linear = as_linear
        return other

    def _own(self, low: mx.array) -> mx.array:
        """Return ``low`` (R, .., sum of ranks) with zeros in the columns of adapters that are not the row's."""
        mask = self.mask.reshape(len(self.mask), *[1] * (low.ndim - 2), -1)
        return mx.where(mask, low, mx.array(0, low.dtype))


_TABLES = (nn.Embedding, nn.QuantizedEmbedding)


def _low(layer: Any) -> tuple[mx.array, mx.array]:
    """Return A (inputs, r) and B (r, outputs), with the scale, of an adapted layer; a table has a row of A a token."""
    return layer.lora_a, layer.scale * layer.lora_b


def _or_zeros(array: mx.array | None, shape: tuple[int, ...]) -> mx.array:
    return mx.zeros(shape) if array is None else array
