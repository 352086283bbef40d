"""Rows of tokens as a prefix tree of three levels: shared header, distinct prompts, continuations."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .context import Context


@dataclass(frozen=True, slots=True, eq=False)
class PromptTree:
    """Prompts without their last token (a continuation starts by reading that one)."""

    header: np.ndarray  # (H,) int32, what every prompt begins with
    rests: np.ndarray  # (U, P) int32, each distinct prompt after the header, padded on the right
    lengths: np.ndarray  # (U,) int32, real length of each rest
    parents: np.ndarray  # (N,) int32, which distinct prompt row n continues
    last: np.ndarray  # (N,) int32, the last prompt token of row n

    @classmethod
    def build(cls, prompts: Sequence[np.ndarray]) -> PromptTree:
        """From N prompts of token ids, each of at least one token; equal ones are stored once."""
        heads = [np.asarray(p[:-1], np.int32) for p in prompts]
        distinct = {h.tobytes(): h for h in heads}
        index = {key: i for i, key in enumerate(distinct)}
        rows = list(distinct.values())
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

    @property
    def size(self) -> int:
        """Padded tokens that reading the prompts costs."""
        return len(self.header) + self.rests.size

    def read(self, model: nn.Module, spare: int = 0) -> Context:
        """Run header and prompts; returns a context of U rows, one per distinct prompt."""
        context = Context(model, spare)
        if len(self.header):
            context.read(model, mx.array(self.header)[None])
        if len(self.rests) > 1 and context.size:
            context = context.fork(mx.zeros(len(self.rests), mx.int32))
        if self.rests.size:
            even = bool((self.lengths == self.rests.shape[1]).all())
            context.read(model, mx.array(self.rests), None if even else mx.array(self.lengths))
        return context


def _common_length(rows: Sequence[np.ndarray]) -> int:
    shortest = min(len(r) for r in rows)
    block = np.stack([r[:shortest] for r in rows])
    differs = (block != block[0]).any(axis=0)
    return int(np.argmax(differs)) if differs.any() else shortest
