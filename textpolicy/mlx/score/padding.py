"""Micro-batches padded to few shapes, so that compiled functions are used again; no number changes."""

from __future__ import annotations

from dataclasses import dataclass, fields, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...types import Batch
from ..read.context import Context
from ..read.sizes import size_down, size_up
from ..read.tree import PromptTree
from .micro_batches import Layout, Pass


@dataclass(frozen=True, slots=True, eq=False)
class RaggedTree(PromptTree):
    """A tree whose rests are read as unequal whatever their lengths, which may therefore be traced."""

    def read(self, model: nn.Module, spare: int = 0) -> Context:
        context = Context(model, spare)
        if len(self.header):
            context.read(model, mx.array(self.header)[None])
        context = context.fork(np.zeros(len(self.rests), np.int32))
        if self.rests.size:
            context.read(model, mx.array(self.rests), mx.array(self.lengths))
        return context


def padded(layout: Layout, prompts: bool) -> Layout:
    """``layout`` with sizes of ``size_up`` throughout; those of its prompts only if asked for.

    What is added is not picked, has no weight and no place in the result. A model with running states
    must read its prompts as they are.
    """
    n = len(layout.targets)
    more = size_up(n) - n
    *passes, last = [_padded_pass(p) for p in layout.passes]
    rows, width = (size_up(k) for k in layout.place.shape)
    return Layout(
        tree=_padded_tree(layout.tree) if prompts else layout.tree,
        passes=(*passes, replace(last, picked=np.pad(last.picked, (0, more)))),
        targets=np.pad(layout.targets, (0, more)),
        temperatures=np.pad(layout.temperatures, (0, more), constant_values=1),
        place=_padded(np.where(layout.place == n, n + more, layout.place), rows, width, n + more),
        rows=_padded_rows(layout.rows, rows, width),
    )


def _padded_pass(part: Pass) -> Pass:
    rows, width = part.inputs.shape
    more = size_up(rows) - rows
    row, column = np.divmod(part.picked, width)
    inputs = _padded(part.inputs, rows + more, size_up(width))
    return Pass(inputs, np.pad(part.parents, (0, more)), row * size_up(width) + column)


def _padded_tree(tree: PromptTree) -> RaggedTree:
    """The end of the header moves into the rests, which the padding makes unequal."""
    kept = size_down(len(tree.header))
    moved = np.tile(tree.header[kept:], (len(tree.rests), 1))
    rests = np.concatenate([moved, tree.rests], axis=1)
    rows, width = (size_up(k) for k in rests.shape)
    changed = {
        "header": tree.header[:kept],
        "rests": _padded(rests, rows, width),
        "lengths": np.pad(tree.lengths + moved.shape[1], (0, rows - len(rests))),
    }
    return RaggedTree(**({f.name: getattr(tree, f.name) for f in fields(tree)} | changed))


def _padded_rows(batch: Batch, rows: int, width: int) -> Batch:
    temperatures = np.pad(batch.temperatures, [(0, rows - len(batch)), (0, 0)], constant_values=1)
    grown = batch.map(lambda a: _padded(a, rows, width), skip=("temperatures",))
    return replace(grown, temperatures=temperatures)


def _padded(array: np.ndarray, rows: int, width: int, value: int = 0) -> np.ndarray:
    more = [(0, rows - array.shape[0]), (0, width - array.shape[1])]
    return np.pad(array, more, constant_values=value)
