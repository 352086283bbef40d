"""Replace parts of a model in a copy of it, or its parameters and mlx-lm's functions for a while."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from copy import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

Path = tuple[str, ...]  # the names that lead from a module to one inside it


class StandIn:
    """The replacement of a module: another function to call, the module's attributes (for tied embeddings) and class.

    Models choose masks and paths by ``isinstance``; ``type`` still tells a stand-in from what it stands for.
    """

    def __init__(self, module: nn.Module, call: Callable[..., Any]):
        self.module, self.call = module, call

    def __call__(self, *args: Any, **kwargs: Any) -> Any:
        return self.call(*args, **kwargs)

    def __getattr__(self, name: str) -> Any:
        return getattr(self.module, name)

    @property  # type: ignore[misc]
    def __class__(self) -> type:
        return type(self.module)


def with_child(module: Any, path: Path, make: Callable[[Any], Any]) -> Any:
    """Return a shallow copy of ``module`` with ``make(child)`` in place of the child at ``path``."""
    name, rest = path[0], path[1:]
    twin = copy(module)
    twin[name] = with_child(module[name], rest, make) if rest else make(module[name])
    return twin


def child(module: Any, path: Path) -> Any:
    """Return the module at ``path`` inside ``module``."""
    for name in path:
        module = module[name]
    return module


def with_modules(module: Any, make: Callable[[tuple[str | int, ...], nn.Module], Any], where: tuple = ()) -> Any:
    """Return ``module`` with each part replaced by ``make(where, part)``; None leaves the part and descends into it.

    Parts on the way to a replaced one are shallow copies; all others are the module's own.
    """
    changed: dict[Any, Any] = {}
    for name, value in module.items() if isinstance(module, dict) else enumerate(module):
        here = (*where, name)
        if type(value) is StandIn:
            continue
        other = make(here, value) if isinstance(value, nn.Module) else None
        if other is None and isinstance(value, nn.Module | list | dict):
            other = with_modules(value, make, here)
        if other is not None and other is not value:
            changed[name] = other
    if not changed:
        return module
    twin = copy(module)
    for name, value in changed.items():
        twin[name] = value
    return twin


@contextmanager
def parameters(module: nn.Module, values: Mapping[str, mx.array]) -> Iterator[None]:
    """Give ``module`` the ``values`` for the parameters of these dotted names, within the context."""
    own = dict(tree_flatten(module.parameters()))
    before = [(name, own[name]) for name in values]
    module.update(tree_unflatten(list(values.items())))
    try:
        yield
    finally:
        module.update(tree_unflatten(before))


@contextmanager
def patched(model: nn.Module, functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Replace mlx-lm's functions of these names in the Python modules that define ``model``, within the context.

    A Python module that does not import the name, or defines its own function of that name, is left alone.
    """
    from mlx_lm.models import activations, base, ssm, switch_layers

    libraries = (activations, base, ssm, switch_layers)
    originals = {name: function for library in libraries for name, function in vars(library).items()}
    changed = [
        (sys.modules[library], name)
        for library in {type(part).__module__ for part in model.modules()}
        for name in functions
        if sys.modules[library].__dict__.get(name) is originals[name]
    ]
    for library, name in changed:
        setattr(library, name, functions[name])
    try:
        yield
    finally:
        for library, name in changed:
            setattr(library, name, originals[name])
