"""Parts of a model exchanged in a copy of it, or for a while; the model itself stays as it is."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

Path = tuple[str, ...]  # the names that lead from a module to one inside it


class StandIn:
    """In a module's place: another function to call, and the module's attributes (tied embeddings among them)."""

    def __init__(self, module: nn.Module, call: Callable[..., Any]):
        self.module, self.call = module, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)


def with_child(module: Any, path: Path, make: Callable[[Any], Any]) -> Any:
    """A shallow copy of ``module`` that has ``make(child)`` in place of the child at ``path`` and shares the rest."""
    name, rest = path[0], path[1:]
    twin = copy(module)
    twin[name] = with_child(module[name], rest, make) if rest else make(module[name])
    return twin


def child(module: Any, path: Path) -> Any:
    """What is at ``path``."""
    for name in path:
        module = module[name]
    return module


@contextmanager
def parameters(module: nn.Module, values: Mapping[str, mx.array]) -> Iterator[None]:
    """Within it ``module`` has ``values`` for the parameters of those dotted names."""
    own = dict(tree_flatten(module.parameters()))
    before = [(name, own[name]) for name in values]
    module.update(tree_unflatten(list(values.items())))
    try:
        yield
    finally:
        module.update(tree_unflatten(before))


def exchanged(module: Any, make: Callable[[tuple[str | int, ...], nn.Module], Any], where: tuple = ()) -> Any:
    """``module`` with ``make(where, part)`` in place of each part for which that is not None; others are looked into.

    Parts on the way to these are shallow copies; all others are the module's own.
    """
    changed: dict[Any, Any] = {}
    for name, value in module.items() if isinstance(module, dict) else enumerate(module):
        here = (*where, name)
        other = make(here, value) if isinstance(value, nn.Module) else None
        if other is None and isinstance(value, nn.Module | list | dict):
            other = exchanged(value, make, here)
        if other is not None and other is not value:
            changed[name] = other
    if not changed:
        return module
    twin = copy(module)
    for name, value in changed.items():
        twin[name] = value
    return twin
