"""The gathers whose gradients are sums in a fixed order, so that equal updates are equal to the last bit on a GPU, too.

There MLX's own gradient of a gather adds rows that were used more than once in the order in which threads come.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.dora import DoRAEmbedding
from mlx_lm.tuner.lora import LoRAEmbedding


def take_rows(array: mx.array, rows: mx.array) -> mx.array:
    """Return the ``rows`` (B,) int of ``array`` (U, ...), each of which may occur any number of times."""
    return mx.take(array, rows, axis=0) if mx.default_device() == mx.Device(mx.cpu) else take_by_product(array, rows)


def take_by_product(array: mx.array, rows: mx.array) -> mx.array:
    """Return ``take_rows`` with the gradient as a product with (U, B) zeros and ones, which adds in float32."""

    @mx.custom_function
    def taken(array: mx.array) -> mx.array:
        return mx.take(array, rows, axis=0)

    @taken.vjp
    def backward(array: mx.array, slope: mx.array, _: mx.array) -> mx.array:
        if slope.size == 0:  # whose product ends the process on CUDA
            return mx.zeros_like(array)
        uses = (mx.arange(len(array))[:, None] == rows).astype(slope.dtype)
        return (uses @ slope.reshape(len(rows), -1)).reshape(array.shape)

    result: Any = taken(array)
    return result


def gather_sort(x: mx.array, indices: mx.array) -> tuple[mx.array, mx.array, mx.array]:
    """Return mlx-lm's ``_gather_sort``: N tokens (..., 1, 1, D), each for its K experts (..., K), by expert.

    These are tokens (N K, 1, D), their experts and the inverse permutation, each (N K,). The gradient of a token is
    the sum of its K slopes, fetched by that permutation.
    """
    experts = indices.shape[-1]
    order = mx.argsort(indices.flatten())
    inverse = mx.argsort(order)

    @mx.custom_function
    def gathered(tokens: mx.array) -> mx.array:
        return tokens[order // experts]

    @gathered.vjp
    def backward(tokens: mx.array, slope: mx.array, _: mx.array) -> mx.array:
        return slope[inverse].reshape(len(tokens), experts, *tokens.shape[1:]).sum(axis=1)

    result: Any = gathered(x.flatten(0, -3))
    return result, indices.flatten()[order], inverse


def unsteady(model: nn.Module) -> str:
    """Return what may differ in last bits between two equal updates of ``model`` on the default device; "" if nothing.

    These are sums in the order of threads that are not ours: gradients of embeddings, of a mixture's experts where few
    tokens come together, and of cuDNN's attention.
    """
    if mx.default_device() == mx.Device(mx.cpu):
        return ""
    parts = list(model.modules())
    tables = [part for part in parts if isinstance(part, nn.Embedding | LoRAEmbedding | DoRAEmbedding)]
    experts = any(isinstance(part, SwitchLinear | QuantizedSwitchLinear) for part in parts)
    parameters: Any = tree_flatten(model.parameters())
    half = any(a.dtype in (mx.bfloat16, mx.float16) for _, a in parameters)
    found = {
        "the gradients of embeddings": any(tree_flatten(table.trainable_parameters()) for table in tables),
        "the gradients of experts with fewer than 64 pairs of token and expert": experts,
        "the gradients of attention in half precision": half and not mx.metal.is_available(),
    }
    return "; ".join(what for what, holds in found.items() if holds)


def patches() -> Mapping[str, Callable[..., Any]]:
    """Return the function that replaces mlx-lm's of the same name on a GPU; empty on a CPU, which adds in order."""
    return {} if mx.default_device() == mx.Device(mx.cpu) else {"_gather_sort": gather_sort}
