"""Attention under masks of booleans on CUDA, where MLX spells a mask out for every head of every layer."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from . import cuda

_KEPT = 4  # masks of a pass: with and without a window, and those of the pass before


class SharedMasks:
    """In place of mlx-lm's attention: what the kernel adds to the scores is made once for all layers and heads.

    It holds a few masks, so use one for a few passes through a model, not for a rollout.
    """

    def __init__(self) -> None:
        self.added: OrderedDict[tuple[int, mx.Dtype], tuple[mx.array, mx.array]] = OrderedDict()

    def __call__(
        self, queries: Any, keys: Any, values: Any, cache: Any, scale: float, mask: Any, sinks: Any = None
    ) -> mx.array:
        if isinstance(mask, mx.array) and mask.dtype == mx.bool_ and queries.dtype in (mx.bfloat16, mx.float16):
            mask = self._addend(mask, queries.dtype)
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)

    def _addend(self, seen: mx.array, dtype: mx.Dtype) -> mx.array:
        """0 where ``seen``, else -inf."""
        key = (id(seen), dtype)
        if key not in self.added:
            addend = mx.where(seen, mx.array(0, dtype), mx.array(-mx.inf, dtype))
            self.added[key] = (seen, addend)  # with ``seen``, whose id would else be another's
            if len(self.added) > _KEPT:
                self.added.popitem(last=False)
        return self.added[key][1]


def substitutes() -> Mapping[str, Callable[..., Any]]:
    """What models are to call instead of mlx-lm's functions while a batch is scored or differentiated, by name."""
    return {"scaled_dot_product_attention": SharedMasks()} if cuda.is_default() else {}
