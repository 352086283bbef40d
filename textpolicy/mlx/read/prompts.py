"""The prompts of a rollout or a batch: what several begin with, or an earlier turn has read, is read once."""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from .context import Context

logger = logging.getLogger(__name__)

_warned: set[str] = set()  # model types whose prompts are read in batches of equal length


@dataclass(slots=True, eq=False)
class Kept:
    """The contexts of one row each, by the text that they have read; the oldest leave when ``room`` bytes are full."""

    room: float = 0.0
    contexts: OrderedDict[bytes, Context] = field(default_factory=OrderedDict)
    nbytes: int = 0

    def add(self, text: np.ndarray, context: Context) -> None:
        """Keep the context that has read ``text`` (N,) int32."""
        self.discard(text)
        self.contexts[text.tobytes()] = context
        self.nbytes += context.nbytes
        while self.nbytes > self.room:
            self.nbytes -= self.contexts.popitem(last=False)[1].nbytes

    def discard(self, text: np.ndarray) -> None:
        """Forget the context that has read ``text``, if there is one."""
        if (context := self.contexts.pop(text.tobytes(), None)) is not None:
            self.nbytes -= context.nbytes

    def longest(self, text: np.ndarray) -> Context | None:
        """Return the context that has read the most of what ``text`` (N,) int32 begins with, if there is one."""
        sizes = sorted(
            {len(known) // text.itemsize for known in self.contexts if len(known) <= text.nbytes}, reverse=True
        )
        found = (self.contexts.get(text[:size].tobytes()) for size in sizes)
        return next((context for context in found if context is not None), None)


@dataclass(frozen=True, slots=True, eq=False)
class PromptTree:
    """The tree of N prompts: a shared header, distinct rests, and last tokens, which the continuations read first."""

    header: np.ndarray  # (H,) int32, what every prompt begins with
    rests: np.ndarray  # (U, P) int32, each distinct prompt after the header, shortest first, padded on the right
    lengths: np.ndarray  # (U,) int32, real length of each rest
    parents: np.ndarray  # (N,) int32, the distinct prompt that row n continues
    last: np.ndarray  # (N,) int32, the last prompt token of row n
    traced: bool = False  # read the rests as unequal whatever their lengths, which may then be traced by mx.compile

    @classmethod
    def build(cls, prompts: Sequence[np.ndarray]) -> PromptTree:
        """Return the tree of N prompts of token ids, each of at least one token; equal ones are stored once."""
        heads = [np.asarray(p[:-1], np.int32) for p in prompts]
        rows = sorted({h.tobytes(): h for h in heads}.values(), key=len)
        index = {row.tobytes(): i for i, row in enumerate(rows)}
        block = np.stack([row[: len(rows[0])] for row in rows])  # (U, length of the shortest)
        differs = (block != block[0]).any(axis=0)
        shared = int(np.argmax(differs)) if differs.any() else len(rows[0])
        rests = np.zeros((len(rows), len(rows[-1]) - shared), np.int32)
        for i, row in enumerate(rows):
            rests[i, : len(row) - shared] = row[shared:]
        return cls(
            header=rows[0][:shared],
            rests=rests,
            lengths=np.array([len(r) - shared for r in rows], np.int32),
            parents=np.array([index[h.tobytes()] for h in heads], np.int32),
            last=np.array([p[-1] for p in prompts], np.int32),
        )

    def read(self, model: nn.Module, spare: int = 0, kept: Kept | None = None) -> Context:
        """Run header and prompts; return a context of U rows, one per distinct prompt.

        A model with running states reads prompts of equal length at a time, since padding would change them. Of
        prompts that continue a text in ``kept`` only the rest is read, and that text is kept no longer.
        """
        if kept is not None and kept.contexts:
            texts = [np.concatenate([self.header, rest[:n]]) for rest, n in zip(self.rests, self.lengths, strict=True)]
            found = [kept.longest(text) for text in texts]
            if any(context is not None for context in found):
                for text, context in zip(texts, found, strict=True):
                    if context is not None:
                        kept.discard(text[: context.size])
                return _continued(model, spare, texts, found)
        context = Context(model, spare)
        if len(self.header):
            context.read(model, mx.array(self.header)[None])
        even = not self.traced and bool((self.lengths == self.rests.shape[1]).all())
        if even or not context.recurrent:
            context = context.fork(np.zeros(len(self.rests), np.int32))
            if self.rests.size:
                context.read(model, mx.array(self.rests), None if even else mx.array(self.lengths))
            return context
        if model.model_type not in _warned:
            _warned.add(model.model_type)
            logger.warning(
                "the prompts of %s are read in batches of equal length, because its layers with an ArraysCache "
                "keep a running state that padding would change",
                model.model_type,
            )
        starts, parts = np.flatnonzero(np.diff(self.lengths, prepend=-1)).tolist(), []
        for start, stop in zip(starts, [*starts[1:], len(self.lengths)], strict=True):
            rests = self.rests[start:stop, : int(self.lengths[start])]
            parts.append(context.fork(np.zeros(len(rests), np.int32)))
            if rests.size:
                parts[-1].read(model, mx.array(rests))
        return Context.join(parts)


def _continued(model: nn.Module, spare: int, texts: Sequence[np.ndarray], found: Sequence[Context | None]) -> Context:
    """Return a context of the rows that have read ``texts``, of which the contexts ``found`` have read a beginning.

    The rests of the same length are read together where the model keeps running states, else all at a time.
    """
    rests = [text if c is None else text[c.size :] for text, c in zip(texts, found, strict=True)]
    recurrent = next(c for c in found if c is not None).recurrent
    alike: dict[Any, list[int]] = {}
    for i, (rest, known) in enumerate(zip(rests, found, strict=True)):
        alike.setdefault((known is None, len(rest) * recurrent), []).append(i)
    parts = []
    for (new, _), rows in alike.items():
        if new:
            parts.append(PromptTree.build([np.append(rests[i], 0) for i in rows]).read(model, spare))
            continue
        begun = [c for i in rows if (c := found[i]) is not None]
        lengths = np.array([len(rests[i]) for i in rows], np.int32)
        more = int(lengths.max()) + spare if spare else 0
        part = Context.join(begun, more) if len(begun) > 1 else begun[0].fork(np.zeros(1, np.int32))
        part.spare = spare
        if lengths.max():
            padded = np.stack([np.pad(rests[i], (0, lengths.max() - len(rests[i]))) for i in rows])
            part.read(model, mx.array(padded), None if lengths.min() == lengths.max() else mx.array(lengths))
        parts.append(part)
    order = np.concatenate(list(alike.values()))
    return Context.join(parts).fork(np.argsort(order))
