"""Gradient checkpointing (arXiv:1604.06174): blocks whose activations the backward pass computes again."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from functools import partial
from itertools import count
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_map

from ..adapters.merging import trainable
from ..adapters.tinylora import ProjectedCore
from ..kernels.patching import Path, StandIn, parameters, with_child
from ..read.context import Attention, Group, State

Layer = Attention | State | Group  # what a block reads and extends; see context.py


def recomputing(model: nn.Module, every: int) -> nn.Module:
    """A shallow copy of ``model``, with its parameters, whose every ``every``-th block keeps no activations.

    With 0 it is the model itself.
    """
    chosen = {id(block) for block in model.layers[every - 1 :: every]} if every else set()

    def wrap(blocks: list[Any]) -> list[Any]:
        return [StandIn(b, partial(_recomputed, b)) if id(b) in chosen else b for b in blocks]

    for path in _lists(model) if every else ():
        model = with_child(model, path, wrap)
    return model


def _lists(module: Any, path: Path = ()) -> Iterator[Path]:
    """Where the lists of modules are."""
    for name, value in module.items():
        if isinstance(value, nn.Module):
            yield from _lists(value, (*path, name))
        elif isinstance(value, list) and value and isinstance(value[0], nn.Module):
            yield (*path, name)


def _recomputed(block: nn.Module, *args: Any, **kwargs: Any) -> Any:
    """``block(*args, **kwargs)``, run once more in the backward pass.

    A checkpoint sees only the arrays that it is handed: parameters, activations and what the block has
    read before. What it has read after is handed back, and both runs work on copies of the layers as
    they are now.
    """
    arguments = (args, kwargs)
    layers: list[Layer] = [leaf for leaf in _leaves(arguments) if isinstance(leaf, Layer)]
    whole = _with_vectors(block)
    still, before, trained = [_still(layer) for layer in layers], held(layers), trainable(whole)
    form: list[Any] = []  # what the block returns, with a mark for each array

    def run(*arrays: mx.array) -> list[mx.array]:
        given, mine = iter(arrays), [_still(layer) for layer in still]
        values = {name: next(given) for name in trained}
        args, kwargs = _map(_has_gradient, lambda _: next(given), arguments)
        _fill(mine, {place: next(given) for place in before})
        copies = iter(mine)
        args, kwargs = _map(lambda leaf: isinstance(leaf, Layer), lambda _: next(copies), (args, kwargs))
        with parameters(whole, values):
            out = (block(*args, **kwargs), held(mine))
        form[:] = [_map(_has_gradient, lambda leaf: _Array, out)]
        return _arrays(out)

    outputs = iter(_checkpoint(run, len(trained))(*trained.values(), *_arrays(arguments), *before.values()))
    out, read = _map(lambda leaf: leaf is _Array, lambda _: next(outputs), form[0])
    _fill(layers, read)
    return out


def _with_vectors(block: nn.Module) -> nn.Module:
    """``block`` and the vectors of a TinyLoRA that its layers read but do not own, as one module."""
    whole = nn.Module()
    whole.block = block
    vectors = {id(m.vectors): m.vectors for m in block.modules() if isinstance(m, ProjectedCore)}
    whole.vectors = list(vectors.values())
    return whole


def _checkpoint(run: Callable[..., list[mx.array]], parameters: int) -> Callable[..., Any]:
    """As mx.checkpoint, with an order: it runs again when its turn has come, and gives up all that before the next.

    The first so many arguments are ``parameters``. Without the order MLX may run many blocks again before
    it uses any.
    """
    checkpointed = mx.custom_function(run)

    @checkpointed.vjp
    def backward(arrays: list[mx.array], slopes: list[mx.array], outputs: list[mx.array]) -> list[mx.array]:
        _, by_arrays = mx.vjp(run, mx.depends(list(arrays), list(slopes)), list(slopes))
        ours, others = by_arrays[:parameters], by_arrays[parameters:]
        return [*ours, *(mx.depends(others, ours) if ours else others)]

    return checkpointed


class _Array:
    """Stands for an array in a structure of them."""


def _leaves(tree: Any) -> list[Any]:
    pairs: list[Any] = tree_flatten(tree)  # type: ignore[assignment]
    return [leaf for _, leaf in pairs]


def _arrays(tree: Any) -> list[mx.array]:
    return [leaf for leaf in _leaves(tree) if _has_gradient(leaf)]


def _has_gradient(leaf: Any) -> bool:
    return isinstance(leaf, mx.array) and mx.issubdtype(leaf.dtype, mx.floating)


def _map(which: Callable[[Any], bool], fn: Callable[[Any], Any], tree: Any) -> Any:
    """``tree`` with ``fn`` of some of its leaves."""
    return tree_map(lambda leaf: fn(leaf) if which(leaf) else leaf, tree)


def _still(layer: Layer) -> Layer:
    """A copy that later reads leave as it is."""
    if isinstance(layer, Group):
        return Group(*map(_still, layer.caches))
    if isinstance(layer, Attention):
        return layer.in_context(copy(layer.context))
    twin = copy(layer)
    twin.cache = list(twin.cache)
    return twin


def _members(layers: Sequence[Layer]) -> list[State | Attention]:
    """Those of groups, too."""
    return [m for layer in layers for m in (_members(layer.caches) if isinstance(layer, Group) else [layer])]


def held(layers: Sequence[Layer]) -> dict[str, mx.array]:
    """The arrays that are there, by their place."""
    slots: list[mx.array | None] = []
    for m in _members(layers):
        slots += m.cache if isinstance(m, State) else [m.keys, m.values]
    return {str(i): array for i, array in enumerate(slots) if array is not None}


def _fill(layers: Sequence[Layer], held: dict[str, mx.array]) -> None:
    """Put back what ``held`` returned."""
    slots: Iterator[Any] = (held.get(str(i)) for i in count())
    for m in _members(layers):
        if isinstance(m, State):
            m.cache = [next(slots) for _ in m.cache]
        else:
            m.keys, m.values = next(slots), next(slots)
