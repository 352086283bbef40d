"""The attention under boolean masks for scoring and training on a GPU."""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx

from . import cuda
from .attention import tiled, too_many

_KEPT = 4  # masks of a pass: with and without a window, and those of the pass before


class SharedMasks:
    """The attention that replaces mlx-lm's: all layers and heads share one addend to the scores per mask.

    MLX on CUDA would expand a boolean mask for every head of every layer. An instance holds a few masks: use it for a
    few passes through a model, not for a rollout. MLX's own gradient keeps all scores on every GPU but NVIDIA's, so
    longer passes have their gradient made in tiles there.
    """

    def __init__(self) -> None:
        self.added: OrderedDict[tuple[int, mx.Dtype], tuple[mx.array, mx.array]] = OrderedDict()

    def __call__(
        self, queries: Any, keys: Any, values: Any, cache: Any, scale: float, mask: Any, sinks: Any = None
    ) -> mx.array:
        given = mask
        if isinstance(mask, mx.array) and mask.dtype == mx.bool_ and queries.dtype in (mx.bfloat16, mx.float16):
            key = (id(mask), queries.dtype)
            if key not in self.added:
                addend = mx.where(mask, mx.array(0, queries.dtype), mx.array(-mx.inf, queries.dtype))
                self.added[key] = (mask, addend)  # holding the mask keeps its id from being reused
                if len(self.added) > _KEPT:
                    self.added.popitem(last=False)
            mask = self.added[key][1]
        if too_many(queries, keys, given) and not cuda.is_default():

            def fused(queries: mx.array, keys: mx.array, values: mx.array, sinks: mx.array | None) -> mx.array:
                return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)

            return tiled(queries, keys, values, scale, given, sinks, fused)
        return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


def patches() -> Mapping[str, Callable[..., Any]]:
    """Return the functions that replace mlx-lm's of the same name while a batch is scored or differentiated."""
    return {"scaled_dot_product_attention": SharedMasks()} if mx.default_device() == mx.Device(mx.gpu) else {}
