"""The checkpointing of gradients (arXiv:1604.06174): blocks whose activations the backward pass computes again."""

from __future__ import annotations

import logging
from collections.abc import Iterator, Sequence
from copy import copy
from functools import partial
from itertools import count
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from ..adapters.merging import trainable
from ..adapters.tinylora import ProjectedCore
from ..kernels.patching import StandIn, parameters, with_modules
from ..read.context import Attention, Group, Layer, State, members

logger = logging.getLogger(__name__)

_SEEN = (mx.array, Layer, int, float, str, mx.Dtype, type(None))  # what a block may be handed
_warned: set[str] = set()  # blocks that keep their activations


def checkpointed(model: nn.Module, every: int) -> nn.Module:
    """Return a view of ``model``, with its parameters, whose every ``every``-th block keeps no activations."""
    chosen = {id(block) for block in model.layers[every - 1 :: every]}
    return with_modules(
        model, lambda _, block: StandIn(block, partial(_recomputed, block)) if id(block) in chosen else None
    )


def _recomputed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """Return ``block(*args, **kwargs)``, computed once more in the backward pass.

    A checkpoint sees only the arrays that it is handed: parameters, activations and what the layers hold
    before. What they hold afterwards is returned, and both runs work on copies of the layers as they are now.
    An array that is returned twice, such as keys that the block hands on and its layer holds, becomes two:
    ``mx.vjp`` takes the slope of the first of equal outputs alone. A block that is handed an object of another
    kind, which may hold arrays (Kimi K3), keeps its activations.
    """
    arguments = (args, kwargs)
    leaves: Any = tree_flatten(arguments)
    if strange := [type(leaf).__name__ for _, leaf in leaves if not isinstance(leaf, _SEEN)]:
        _warn_once(type(block).__name__, strange[0])
        return block(*args, **kwargs)
    layers: list[Layer] = [leaf for _, leaf in leaves if isinstance(leaf, Layer)]
    activations = [leaf for _, leaf in leaves if _has_gradient(leaf)]
    whole = nn.Module()  # the block, and the vectors of a TinyLoRA that it reads but does not own
    whole.block = block
    whole.vectors = list({id(m.vectors): m.vectors for m in block.modules() if isinstance(m, ProjectedCore)}.values())
    still, before, trained = [_snapshot(layer) for layer in layers], held(layers), trainable(whole)
    form: list[Any] = []  # what the block returns, with a mark for each array

    def run(*arrays: mx.array) -> list[mx.array]:
        given, mine = iter(arrays), [_snapshot(layer) for layer in still]
        values = {name: next(given) for name in trained}
        args, kwargs = tree_map(lambda leaf: next(given) if _has_gradient(leaf) else leaf, arguments)
        _fill(mine, {place: next(given) for place in before})
        copies = iter(mine)
        args, kwargs = tree_map(lambda leaf: next(copies) if isinstance(leaf, Layer) else leaf, (args, kwargs))
        with parameters(whole, values):
            out = (block(*args, **kwargs), held(mine))
        form[:] = [tree_map(lambda leaf: _Array if _has_gradient(leaf) else leaf, out)]
        results: Any = tree_flatten(out)
        arrays_out = [leaf for _, leaf in results if _has_gradient(leaf)]
        return list(mx.depends(arrays_out, arrays_out[:1]))  # new arrays of the same memory

    # As mx.checkpoint, with an order: it runs again when its turn has come and frees all that before the next does.
    # Without the order MLX may run many blocks again before it uses any.
    checkpoint = mx.custom_function(run)

    @checkpoint.vjp
    def backward(arrays: list[mx.array], slopes: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
        _, by_arrays = mx.vjp(run, mx.depends(list(arrays), list(slopes)), list(slopes))
        ours, others = by_arrays[: len(trained)], by_arrays[len(trained) :]
        return [*ours, *(mx.depends(others, ours) if ours else others)]

    results: Any = checkpoint(*trained.values(), *activations, *before.values())
    outputs = iter(results)
    out, read = tree_map(lambda leaf: next(outputs) if leaf is _Array else leaf, form[0])
    _fill(layers, read)
    return out


def _warn_once(block: str, handed: str) -> None:
    if block not in _warned:
        _warned.add(block)
        logger.warning(
            "machine.checkpoint_every saves nothing: a %s is handed a %s, whose arrays a checkpoint does not see",
            block,
            handed,
        )


class _Array:
    """The mark of an array in a structure."""


def _has_gradient(leaf: Any) -> bool:
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)


def _snapshot(layer: Layer) -> Layer:
    """Return a copy that later reads do not change."""
    if isinstance(layer, Group):
        return Group(*map(_snapshot, layer.caches))
    if isinstance(layer, State):
        state = copy(layer)
        state.cache = list(layer.cache)
        return state
    context = copy(layer.context)
    twin = Attention(context, layer.window)
    twin.holds, twin.keys, twin.values = context, layer.keys, layer.values
    return twin


def held(layers: Sequence[Layer]) -> dict[str, mx.array]:
    """Return the arrays of the layers by their place; empty places are left out."""
    slots: list[mx.array | None] = []
    for layer in members(layers):
        slots += layer.cache if isinstance(layer, State) else [layer.keys, layer.values]
    return {str(i): array for i, array in enumerate(slots) if array is not None}


def _fill(layers: Sequence[Layer], held: dict[str, mx.array]) -> None:
    """Set the arrays of the layers to those that ``held`` returned."""
    slots: Iterator[Any] = (held.get(str(i)) for i in count())
    for layer in members(layers):
        if isinstance(layer, State):
            layer.cache = [next(slots) for _ in layer.cache]
        else:
            layer.keys, layer.values = next(slots), next(slots)
