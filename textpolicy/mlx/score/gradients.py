"""Gradients of micro-batches and steps of the optimiser, compiled for the shapes that come again.

MLX keeps every function that it has compiled for as long as the Python function lives, so those here are
kept in a bounded table, one for each shape, and a shape is compiled when it comes for the second time.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim

from ..read.context import Context
from .micro_batches import Layout, score
from .padding import RaggedTree, padded

# (B, T) log-probs and the rows they belong to, MLX arrays in their fields -> loss, sums to report
Objective = Callable[[mx.array, Any], tuple[mx.array, dict[str, mx.array]]]

_KEPT = 64  # shapes remembered, compiled or not


class Gradients:
    """Of an objective by the trained parameters of ``model``.

    A compiled function is used for objectives that compare equal, such as frozen dataclasses.
    """

    def __init__(self, model: nn.Module, *, checkpoint_every: int = 0, compiled: bool = False):
        self.model, self.checkpoint_every, self.compiled = model, checkpoint_every, compiled
        self.known: OrderedDict[Hashable, Callable[..., Any] | None] = OrderedDict()  # None: came once

    @property
    def seen(self) -> list[str]:
        """Which shapes came, oldest first: a run that is resumed compiles the same ones as it would have."""
        return [key if isinstance(key, str) else repr(key) for key in self.known]

    @seen.setter
    def seen(self, keys: Sequence[str]) -> None:
        self.known = OrderedDict((key, None) for key in keys)

    def __call__(self, layout: Layout, objective: Objective) -> tuple[dict[str, mx.array], Any]:
        """Sums to report, and gradients."""
        if not self.compiled:
            return self._differentiate(layout, objective)
        wide = padded(layout, prompts=not Context(self.model).recurrent)
        key: Hashable = (objective, _signature(wide))
        if repr(key) in self.known:  # it came before the run was resumed
            del self.known[repr(key)]
            self.known[key] = None
        if key not in self.known:
            self._remember(key, None)
            return self._differentiate(layout, objective)
        step = self.known[key] or self._compile(wide, objective)
        self._remember(key, step)
        return step(_arrays(wide))

    def _differentiate(self, layout: Layout, objective: Objective) -> tuple[dict[str, mx.array], Any]:
        def loss(model: nn.Module) -> tuple[mx.array, dict[str, mx.array]]:
            logprobs = score(model, layout, checkpoint_every=self.checkpoint_every)
            return objective(logprobs, layout.rows.map(mx.array))

        (_, sums), gradients = nn.value_and_grad(self.model, loss)(self.model)
        return sums, gradients

    def _compile(self, layout: Layout, objective: Objective) -> Callable[..., Any]:
        def step(arrays: Sequence[mx.array]) -> tuple[dict[str, mx.array], Any]:
            own = self.model.trainable_parameters()
            try:
                return self._differentiate(_with_arrays(layout, arrays), objective)
            finally:
                self.model.update(own)  # mx.compile wants its inputs back as they were

        return mx.compile(step, inputs=[self.model.state])

    def _remember(self, key: Hashable, step: Callable[..., Any] | None) -> None:
        self.known[key] = step
        self.known.move_to_end(key)
        if len(self.known) > _KEPT:
            self.known.popitem(last=False)


class OptimizerStep:
    """Clipping and the optimiser's update of ``model``, compiled if asked for."""

    def __init__(self, model: nn.Module, optimizer: optim.Optimizer, *, compiled: bool = False):
        self.model, self.optimizer, self.compiled = model, optimizer, compiled
        self.clip = mx.compile(optim.clip_grad_norm) if compiled else optim.clip_grad_norm
        self.state: Any = None  # of the optimiser, that ``step`` was compiled for
        self.step: Callable[..., Any] | None = None

    def __call__(self, gradients: Any) -> None:
        """Change the model's parameters and the optimiser's state."""
        parameters = self.model.trainable_parameters()
        if not self.compiled:
            self.optimizer.update(self.model, gradients)
            return
        if self.step is None or self.state is not self.optimizer.state:
            self.optimizer.init(parameters)
            self.state = self.optimizer.state
            self.step = mx.compile(self.optimizer.apply_gradients, inputs=self.state, outputs=self.state)
        self.model.update(self.step(gradients, parameters))


def _signature(layout: Layout) -> Hashable:
    """All that a compiled function cannot see: shapes, which arrays there are, and the lengths that stay in Python."""
    tree = layout.tree
    lengths = tree.lengths.shape if isinstance(tree, RaggedTree) else tuple(tree.lengths.tolist())
    named = tuple(a is None for a in (layout.rows.old, layout.rows.reference))
    return tuple(a.shape for a in _arrays(layout)), lengths, named


def _arrays(layout: Layout) -> list[mx.array]:
    """Everything that varies between layouts of one signature."""
    found: list[mx.array] = []
    layout.map(lambda a: found.append(mx.array(a)))
    if isinstance(layout.tree, RaggedTree):
        found.append(mx.array(layout.tree.lengths))
    return found


def _with_arrays(layout: Layout, arrays: Sequence[mx.array]) -> Layout:
    """``layout`` with other ``_arrays``."""
    given: Iterator[Any] = iter(arrays)
    other = layout.map(lambda a: next(given))
    if isinstance(layout.tree, RaggedTree):
        other = replace(other, tree=replace(other.tree, lengths=next(given)))
    return other
