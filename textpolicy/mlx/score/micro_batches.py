"""Log-probs of a batch's sampled tokens, with gradients, computing nothing twice.

The prompts of a batch form a tree (see tree.py). Completions that say the same after the same prompt
are scored once, completions of similar length run together, and only the positions before a sampled
token reach the model's head (see logprobs.py).
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...types import Batch
from ..read.context import Context
from ..read.tree import PromptTree
from .checkpointing import recomputing
from .logprobs import Split, token_logprobs

_NARROWER = 0.75  # completions shorter than this share of the longest in their pass get one of their own


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """R continuations that run side by side."""

    inputs: np.ndarray  # (R, T) int32, from the last prompt token on
    parents: np.ndarray  # (R,) int32, which prompt of the tree each continues
    picked: np.ndarray  # (M,) int32, the positions before a sampled token, of the flattened (R, T)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """A micro-batch of B rows, arranged for ``score``: their distinct continuations, with N sampled tokens in all."""

    tree: PromptTree
    passes: tuple[Pass, ...]  # longest continuations first
    targets: np.ndarray  # (N,) int32, pass after pass
    temperatures: np.ndarray  # (N,) float32
    place: np.ndarray  # (B, T) int32, which of the N each position of the rows is; N where nothing was sampled
    rows: Batch  # (B, T), the batch with every row moved to its first sampled target

    @classmethod
    def build(cls, batch: Batch) -> Layout:
        """``batch`` must not hold a row without weights."""
        rows, spans, prompts = _left_aligned(batch), batch.lengths - batch.starts, prompt_rows(batch)
        chosen, which = _distinct(rows, spans, prompts)
        sampled = np.zeros((len(chosen), rows.weights.shape[1]), bool)
        np.logical_or.at(sampled, which, rows.weights != 0)
        numbered = np.where(sampled, np.cumsum(sampled).reshape(sampled.shape) - 1, sampled.sum())
        tree = PromptTree.build([prompts[i] for i in chosen])
        return cls(
            tree=tree,
            passes=tuple(
                Pass(rows.inputs[chosen[part], :width], tree.parents[part], np.flatnonzero(sampled[part, :width]))
                for part, width in _parts(spans[chosen])
            ),
            targets=rows.targets[chosen][sampled],
            temperatures=np.broadcast_to(rows.temperatures[chosen], sampled.shape)[sampled],
            place=numbered[which].astype(np.int32),
            rows=rows,
        )

    def map(self, fn: Callable[[np.ndarray], Any]) -> Layout:
        """``fn`` of every array but ``tree.lengths`` and those of the tree that scoring does not read."""
        return Layout(
            tree=replace(self.tree, header=fn(self.tree.header), rests=fn(self.tree.rests)),
            passes=tuple(Pass(fn(p.inputs), fn(p.parents), fn(p.picked)) for p in self.passes),
            targets=fn(self.targets),
            temperatures=fn(self.temperatures),
            place=fn(self.place),
            rows=self.rows.map(fn),
        )


def score(model: nn.Module, layout: Layout, *, checkpoint_every: int = 0, gradient: bool = True) -> mx.array:
    """(B, T) float32 log-probs of the rows' sampled targets at their temperatures; 0 elsewhere.

    The activations of every ``checkpoint_every``-th block are computed again in the backward pass (0: of
    none). Without ``gradient`` it is cheaper and must not be differentiated.
    """
    split = Split.of(model)
    reader = replace(split, model=recomputing(model, checkpoint_every))
    context = layout.tree.read(reader.model)
    hidden = mx.concatenate([_hidden(context, reader, part) for part in layout.passes])
    targets, temperatures = mx.array(layout.targets), mx.array(layout.temperatures)
    logprobs = token_logprobs(split, hidden, targets, temperatures, gradient=gradient).logprobs
    return mx.concatenate([logprobs, mx.zeros(1)])[mx.array(layout.place)]


def _hidden(context: Context, reader: Split, part: Pass) -> mx.array:
    """(M, D) hidden states of a pass, at the positions picked."""
    states = context.fork(part.parents).read(reader.body, mx.array(part.inputs))
    return states.reshape(-1, states.shape[-1])[mx.array(part.picked)]


def micro_batches(batch: Batch, max_tokens: int, max_rows: int | None = None) -> Iterator[tuple[np.ndarray, Layout]]:
    """Rows of one prompt side by side, at most ``max_tokens`` padded tokens (prompts too), or one row, at a time.

    Which rows of the batch they are, (R,) int, and their layout; ``max_rows`` of them at most, if given. As few
    passes as that takes, and these as even as they can be, because the largest decides on memory. Any split has
    the same gradient.
    """
    order = _by_prompt(batch)
    lengths = batch.lengths[order].tolist()
    for start, stop in _even_runs(lengths, max_tokens, len(lengths) if max_rows is None else max_rows):
        rows = order[start:stop]
        yield rows, Layout.build(batch.take(rows, max(lengths[start:stop])))


def logprobs_of(model: nn.Module, batch: Batch, max_tokens: int, max_rows: int | None = None) -> np.ndarray:
    """(B, T) float32 log-probs of the batch's sampled targets under ``model``, without gradients; 0 elsewhere."""
    out = np.zeros(batch.weights.shape, np.float32)
    live = np.flatnonzero(batch.weights.any(axis=1))
    for rows, layout in micro_batches(batch.take(live), max_tokens, max_rows):
        scored = np.array(score(model, layout, gradient=False))
        for i, line in zip(live[rows], scored, strict=True):
            start, stop = batch.starts[i], batch.lengths[i]
            out[i, start:stop] = line[: stop - start]
    return np.where(batch.weights != 0, out, 0)


def prompt_rows(batch: Batch) -> list[np.ndarray]:
    """Each row's tokens up to the one that its first sampled target follows."""
    return [row[: start + 1] for row, start in zip(batch.inputs, batch.starts, strict=True)]


def arrays(batch: Batch) -> Any:
    """The batch with MLX arrays in its fields, as the objectives read it."""
    return batch.map(mx.array)


def _by_prompt(batch: Batch) -> np.ndarray:
    """Row order with equal prompts together, long rows of each first."""
    prompts = [p.tobytes() for p in prompt_rows(batch)]
    first = {key: i for i, key in reversed(list(enumerate(prompts)))}
    return np.lexsort((-batch.lengths, np.array([first[p] for p in prompts])))


def _runs(lengths: Sequence[int], max_tokens: int, max_rows: int) -> list[tuple[int, int]]:
    """Consecutive runs of ``lengths``, each as long as it may be: (start, stop) of each."""
    runs, start, width = [], 0, 0
    for i, length in enumerate(lengths):
        if i > start and (i - start == max_rows or max(width, length) * (i + 1 - start) > max_tokens):
            runs.append((start, i))
            start, width = i, 0
        width = max(width, length)
    return [*runs, (start, len(lengths))] if lengths else []


def _even_runs(lengths: Sequence[int], max_tokens: int, max_rows: int) -> list[tuple[int, int]]:
    """As many runs as ``_runs`` makes, of which the largest is as small as it can be."""
    runs = _runs(lengths, max_tokens, max_rows)
    largest = max((max(lengths[a:b]) * (b - a) for a, b in runs), default=0)
    too_few, enough = 0, min(largest, max_tokens)  # tokens, for so many runs
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        narrower = _runs(lengths, middle, max_rows)
        if len(narrower) > len(runs):
            too_few = middle
        else:
            runs, enough = narrower, middle
    return runs


def _left_aligned(batch: Batch) -> Batch:
    """Every row from its first sampled target on, moved to the left edge."""
    starts, spans = batch.starts, batch.lengths - batch.starts
    columns = np.minimum(starts[:, None] + np.arange(spans.max()), batch.weights.shape[1] - 1)
    inside = np.arange(spans.max()) < spans[:, None]

    def move(array: np.ndarray) -> np.ndarray:
        return np.where(inside, np.take_along_axis(array, columns, axis=1), np.zeros((), array.dtype))

    return batch.map(move, skip=("temperatures",))


def _distinct(rows: Batch, spans: np.ndarray, prompts: list[np.ndarray]) -> tuple[np.ndarray, np.ndarray]:
    """A row of each distinct continuation, (D,) longest first, and which of them each row is, (B,)."""
    keys = [
        (prompt.tobytes(), target[:span].tobytes(), float(temperature))
        for prompt, target, span, temperature in zip(prompts, rows.targets, spans, rows.temperatures[:, 0], strict=True)
    ]
    first = {key: i for i, key in reversed(list(enumerate(keys)))}
    chosen = np.array(sorted(first.values(), key=lambda i: -spans[i]))
    place = {keys[i]: d for d, i in enumerate(chosen)}
    return chosen, np.array([place[key] for key in keys])


def _parts(spans: np.ndarray) -> list[tuple[slice, int]]:
    """Consecutive runs of the descending ``spans`` that are worth a pass of their own width, with that width."""
    starts = [0]
    for i, span in enumerate(spans):
        if span < _NARROWER * spans[starts[-1]]:
            starts.append(i)
    return [(slice(a, b), int(spans[a])) for a, b in zip(starts, [*starts[1:], len(spans)], strict=True)]
