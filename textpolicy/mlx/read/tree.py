"""Rows of tokens as a prefix tree of three levels: shared header, distinct prompts, continuations."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from dataclasses import dataclass
from functools import cache

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .context import Context

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class PromptTree:
    """Prompts without their last token (a continuation starts by reading that one)."""

    header: np.ndarray  # (H,) int32, what every prompt begins with
    rests: np.ndarray  # (U, P) int32, each distinct prompt after the header, shortest first, padded on the right
    lengths: np.ndarray  # (U,) int32, real length of each rest
    parents: np.ndarray  # (N,) int32, which distinct prompt row n continues
    last: np.ndarray  # (N,) int32, the last prompt token of row n

    @classmethod
    def build(cls, prompts: Sequence[np.ndarray]) -> PromptTree:
        """From N prompts of token ids, each of at least one token; equal ones are stored once."""
        heads = [np.asarray(p[:-1], np.int32) for p in prompts]
        rows = sorted({h.tobytes(): h for h in heads}.values(), key=len)
        index = {row.tobytes(): i for i, row in enumerate(rows)}
        shared = _common_length(rows)
        width = max(len(r) for r in rows) - shared
        rests = np.zeros((len(rows), width), np.int32)
        for i, row in enumerate(rows):
            rests[i, : len(row) - shared] = row[shared:]
        return cls(
            header=rows[0][:shared],
            rests=rests,
            lengths=np.array([len(r) - shared for r in rows], np.int32),
            parents=np.array([index[h.tobytes()] for h in heads], np.int32),
            last=np.array([p[-1] for p in prompts], np.int32),
        )

    def read(self, model: nn.Module, spare: int = 0) -> Context:
        """Run header and prompts; returns a context of U rows, one per distinct prompt.

        A model with running states reads prompts of equal length at a time, since padding would change them.
        """
        context = Context(model, spare)
        if len(self.header):
            context.read(model, mx.array(self.header)[None])
        even = bool((self.lengths == self.rests.shape[1]).all())
        if context.recurrent and not even:
            _say_batches_are_of_equal_length(model.model_type)
            return Context.join([self._read_run(context, model, run) for run in self._runs()])
        context = context.fork(np.zeros(len(self.rests), np.int32))
        if self.rests.size:
            context.read(model, mx.array(self.rests), None if even else mx.array(self.lengths))
        return context

    def _runs(self) -> list[slice]:
        """Neighbouring rests of equal length."""
        starts = np.flatnonzero(np.diff(self.lengths, prepend=-1)).tolist()
        return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(self.lengths)], strict=True)]

    def _read_run(self, header: Context, model: nn.Module, run: slice) -> Context:
        rests = self.rests[run, : int(self.lengths[run.start])]
        context = header.fork(np.zeros(len(rests), np.int32))
        if rests.size:
            context.read(model, mx.array(rests))
        return context


@cache  # so that it is said once
def _say_batches_are_of_equal_length(model_type: str) -> None:
    logger.warning(
        "the prompts of %s are read in batches of equal length, because its layers with an ArraysCache "
        "keep a running state that padding would change",
        model_type,
    )


def _common_length(rows: Sequence[np.ndarray]) -> int:
    shortest = min(len(r) for r in rows)
    block = np.stack([r[:shortest] for r in rows])
    differs = (block != block[0]).any(axis=0)
    return int(np.argmax(differs)) if differs.any() else shortest
