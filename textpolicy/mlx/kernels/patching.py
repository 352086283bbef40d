"""Functions that mlx-lm's models call, exchanged for faster equals while ours run them."""

from __future__ import annotations

import sys
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from typing import Any

import mlx.nn as nn


@contextmanager
def substituted(model: nn.Module, functions: Mapping[str, Callable[..., Any]]) -> Iterator[None]:
    """Within it the modules that define ``model``'s parts have ``functions`` under the names they are imported by.

    A module that lacks a name, or has one of its own making under it, is left alone.
    """
    from mlx_lm.models import activations, base

    originals = {name: function for room in (activations, base) for name, function in vars(room).items()}
    rooms = {type(part).__module__ for part in model.modules()}
    changed = [
        (sys.modules[room], name)
        for room in rooms
        for name in functions
        if sys.modules[room].__dict__.get(name) is originals[name]
    ]
    for room, name in changed:
        setattr(room, name, functions[name])
    try:
        yield
    finally:
        for room, name in changed:
            setattr(room, name, originals[name])
