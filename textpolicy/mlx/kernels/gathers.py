"""The gathers whose gradients are sums in a fixed order, so that equal updates are equal to the last bit on a GPU, too.

There MLX's own gradient of a gather adds rows that were used more than once in the order in which threads come.
"""

from __future__ import annotations

from collections.abc import Mapping
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.models.switch_layers import SwitchLinear
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


def gather_mm(a: mx.array, b: mx.array, *, rhs_indices: mx.array, sorted_indices: bool = False) -> mx.array:
    """Return ``mx.gather_mm`` as mlx-lm calls it: tokens (..., 1, D), each times its experts' of ``b`` (E, D, N).

    Of fewer than 64 pairs of token and expert, P, which are not sorted, MLX adds the gradient of ``b`` in any order,
    and on CUDA in float32 with a kernel that asks for more shared memory than there is, if N is above 64. Here it is
    E products, in each of which the tokens of other experts are zeros.

    Of sorted pairs MLX on CUDA takes the stride of the axis of one element for the distance between tokens. That is 1
    where the axis was inserted, as in experts' biases, from which sums may take their strides.
    """
    if sorted_indices:
        return _strided(mx.gather_mm(_strided(a), b, rhs_indices=rhs_indices, sorted_indices=True))

    @mx.custom_function
    def product(a: mx.array, b: mx.array) -> mx.array:
        return mx.gather_mm(a, b, rhs_indices=rhs_indices)

    @product.vjp
    def backward(primals: tuple[mx.array, mx.array], slope: mx.array, _: mx.array) -> tuple[mx.array, mx.array]:
        a, b = primals
        each = mx.gather_mm(slope, b.swapaxes(-1, -2), rhs_indices=rhs_indices)  # (..., K, 1, D)
        tokens = mx.broadcast_to(a, each.shape).reshape(-1, a.shape[-1])  # (P, D)
        own = (mx.arange(len(b))[:, None] == rhs_indices.flatten()).astype(a.dtype)  # (E, P)
        slopes = (own[..., None] * tokens).swapaxes(-1, -2) @ slope.reshape(-1, slope.shape[-1])
        return _of_tokens(a, each), slopes

    result: Any = product(a, b)
    return result


def gather_qmm(
    x: mx.array, w: mx.array, scales: mx.array, biases: mx.array | None, *, sorted_indices: bool = False, **how: Any
) -> mx.array:
    """Return ``mx.gather_qmm`` as mlx-lm calls it: ``gather_mm`` with frozen experts that are quantized."""
    if sorted_indices:
        return mx.gather_qmm(x, w, scales, biases, sorted_indices=True, **how)

    @mx.custom_function
    def product(x: mx.array) -> mx.array:
        return mx.gather_qmm(x, w, scales, biases, **how)

    @product.vjp
    def backward(x: mx.array, slope: mx.array, _: mx.array) -> mx.array:
        back = {**how, "transpose": not how["transpose"]}
        return _of_tokens(x, mx.gather_qmm(slope, w, scales, biases, **back))

    result: Any = product(x)
    return result


def _of_tokens(tokens: mx.array, each: mx.array) -> mx.array:
    """Return the slopes of ``tokens`` (..., 1 or K, 1, D) from those for each of their experts (..., K, 1, D)."""
    shared = [axis for axis, size in enumerate(tokens.shape) if size < each.shape[axis]]
    return each.sum(axis=shared, keepdims=True) if shared else each


def _strided(tokens: mx.array) -> mx.array:
    """Return ``tokens`` (P, 1, D), and give their slope, with D as the stride of the axis of one element."""
    return tokens.reshape(-1, tokens.shape[-1]).reshape(tokens.shape)


def unsteady(model: nn.Module) -> str:
    """Return what may differ in last bits between two equal updates of ``model`` on the default device; "" if nothing.

    These are sums in the order of threads that are not ours: gradients of embeddings, of the biases of a mixture's
    experts, and of cuDNN's attention.
    """
    if mx.default_device() == mx.Device(mx.cpu):
        return ""
    parts = list(model.modules())
    tables = [part for part in parts if isinstance(part, nn.Embedding | LoRAEmbedding | DoRAEmbedding)]
    experts = [part for part in parts if isinstance(part, SwitchLinear)]
    parameters: Any = tree_flatten(model.parameters())
    half = any(a.dtype in (mx.bfloat16, mx.float16) for _, a in parameters)
    found = {
        "the gradients of embeddings": any(tree_flatten(table.trainable_parameters()) for table in tables),
        "the gradients of experts' biases": any("bias" in part.trainable_parameters() for part in experts),
        "the gradients of attention in half precision": half and not mx.metal.is_available(),
    }
    return "; ".join(what for what, holds in found.items() if holds)


def patches() -> Mapping[str, Any]:
    """Return what replaces mlx-lm's of the same name on a GPU, its ``mx`` too; empty on a CPU, which adds in order."""
    return {} if mx.default_device() == mx.Device(mx.cpu) else in_order()


def in_order() -> dict[str, Any]:
    """Return mlx-lm's names whose gradients add in any order, with what adds in a fixed one."""
    products = {"gather_mm": gather_mm, "gather_qmm": gather_qmm}
    return {"_gather_sort": gather_sort, "mx": SimpleNamespace(**{**vars(mx), **products})}
