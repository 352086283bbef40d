"""Log-probs of a batch's sampled tokens, with gradients, computing nothing twice.

The prompts of a batch form a tree (see tree.py). Completions that say the same after the same prompt
are scored once, and completions of similar length run together, so that little padding is computed.
"""

from __future__ import annotations

from collections.abc import Iterator
from dataclasses import dataclass
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..types import Batch
from .sampling import token_logprobs
from .tree import PromptTree

_NARROWER = 0.75  # completions shorter than this share of the longest in their bucket start a new one


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """A micro-batch of B rows, arranged for ``score``: D distinct continuations, longest first."""

    tree: PromptTree  # D prompts
    inputs: np.ndarray  # (D, T) int32, from the last prompt token on
    targets: np.ndarray  # (D, T) int32
    temperatures: np.ndarray  # (D, 1) float32
    buckets: list[slice]  # of the D, each to be cut to the length of its first
    spans: np.ndarray  # (D,) int
    distinct: np.ndarray  # (B,) int32, which continuation each row of the batch is
    rows: Batch  # (B, T), the batch with every row moved to its first sampled target

    @classmethod
    def build(cls, batch: Batch) -> Layout:
        """``batch`` must not hold a row without weights."""
        rows, spans, prompts = _left_aligned(batch), batch.lengths - batch.starts, prompt_rows(batch)
        keys = [
            (prompt.tobytes(), target[:span].tobytes(), float(temperature))
            for prompt, target, span, temperature in zip(
                prompts, rows.targets, spans, rows.temperatures[:, 0], strict=True
            )
        ]
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        chosen = np.array(sorted(first.values(), key=lambda i: -spans[i]))
        place = {keys[i]: d for d, i in enumerate(chosen)}
        return cls(
            tree=PromptTree.build([prompts[i] for i in chosen]),
            inputs=rows.inputs[chosen],
            targets=rows.targets[chosen],
            temperatures=rows.temperatures[chosen],
            buckets=_buckets(spans[chosen]),
            spans=spans[chosen],
            distinct=np.array([place[key] for key in keys], np.int32),
            rows=rows,
        )


def score(model: nn.Module, layout: Layout) -> mx.array:
    """(B, T) float32 log-probs of the rows' targets at their temperatures; 0 past a bucket's width."""
    context = layout.tree.read(model)
    width = layout.targets.shape[1]
    scored = []
    for bucket in layout.buckets:
        span = int(layout.spans[bucket.start])
        inputs, targets = (mx.array(a[bucket, :span]) for a in (layout.inputs, layout.targets))
        logits = context.fork(mx.array(layout.tree.parents[bucket])).read(model, inputs)
        logprobs = token_logprobs(logits, targets, mx.array(layout.temperatures[bucket]))
        scored.append(mx.pad(logprobs, [(0, 0), (0, width - span)]))
    return mx.concatenate(scored)[mx.array(layout.distinct)]


def micro_batches(batch: Batch, max_tokens: int) -> Iterator[tuple[np.ndarray, Layout]]:
    """Rows of one prompt side by side, at most ``max_tokens`` padded tokens (prompts too), or one row, at a time.

    Which rows of the batch they are, (R,) int, and their layout. Any split has the same gradient.
    """
    order = _by_prompt(batch)
    lengths = batch.lengths[order]
    start = 0
    while start < len(order):
        stop, width = start + 1, int(lengths[start])
        while stop < len(order) and max(width, lengths[stop]) * (stop + 1 - start) <= max_tokens:
            width = max(width, int(lengths[stop]))
            stop += 1
        yield order[start:stop], Layout.build(batch.take(order[start:stop], width))
        start = stop


def logprobs_of(model: nn.Module, batch: Batch, max_tokens: int) -> np.ndarray:
    """(B, T) float32 log-probs of the batch's sampled targets under ``model``, without gradients; 0 elsewhere."""
    out = np.zeros(batch.weights.shape, np.float32)
    live = np.flatnonzero(batch.weights.any(axis=1))
    for rows, layout in micro_batches(batch.take(live), max_tokens):
        scored = np.array(score(model, layout))
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


def _left_aligned(batch: Batch) -> Batch:
    """Every row from its first sampled target on, moved to the left edge."""
    starts, spans = batch.starts, batch.lengths - batch.starts
    columns = np.minimum(starts[:, None] + np.arange(spans.max()), batch.weights.shape[1] - 1)
    inside = np.arange(spans.max()) < spans[:, None]

    def move(array: np.ndarray) -> np.ndarray:
        return np.where(inside, np.take_along_axis(array, columns, axis=1), np.zeros((), array.dtype))

    return batch.map(move, skip=("temperatures",))


def _buckets(spans: np.ndarray) -> list[slice]:
    """Consecutive runs of the descending ``spans`` that are worth a pass of their own width."""
    starts = [0]
    for i, span in enumerate(spans):
        if span < _NARROWER * spans[starts[-1]]:
            starts.append(i)
    return [slice(a, b) for a, b in zip(starts, [*starts[1:], len(spans)], strict=True)]
