"""The decode loop: many completions side by side, each prompt read once, finished rows leave."""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..engine import Sampling
from ..types import Completion
from .context import Context
from .sampling import draw, penalize, uniforms
from .tree import PromptTree

_SPARE = 64  # positions allocated ahead
_LEAVE = 0.75  # rows are moved together when fewer than this share is still running


def decode(
    model: nn.Module, prompts: Sequence[np.ndarray], sampling: Sampling, stop: np.ndarray, max_rows: int
) -> list[Completion]:
    """One completion per prompt (token ids); equal prompts are read once.

    Row i draws from the stream (sampling.seed, i), so neither ``max_rows`` nor the company
    it keeps changes what it says, beyond the rounding of the matrix products.
    """
    tree = PromptTree.build(prompts)
    context = tree.read(model, spare=_SPARE)
    chunks = np.array_split(np.arange(len(prompts)), -(-len(prompts) // max_rows))
    return [c for rows in chunks for c in _decode_rows(model, context, tree, prompts, rows, sampling, stop)]


def _decode_rows(
    model: nn.Module,
    prefix: Context,
    tree: PromptTree,
    prompts: Sequence[np.ndarray],
    rows: np.ndarray,
    sampling: Sampling,
    stop: np.ndarray,
) -> list[Completion]:
    context = prefix.fork(mx.array(tree.parents[rows]))
    random = np.stack([uniforms(sampling.seed, int(r), sampling.max_tokens) for r in rows])
    record = _Record(len(rows), sampling.max_tokens)
    running = np.arange(len(rows))
    tokens = mx.array(tree.last[rows])
    seen = _seen(model, prompts, rows) if sampling.repetition_penalty != 1 else None
    for step in range(sampling.max_tokens):
        logits = context.read(model, tokens[:, None])[:, -1]
        if seen is not None:
            logits = penalize(logits, seen, sampling.repetition_penalty)
        drawn = draw(logits, mx.array(random[running, step]), sampling.temperature, sampling.top_p)
        mx.eval(drawn)
        ended = record.add(running, drawn, stop)
        tokens = drawn.tokens
        if seen is not None:
            seen = mx.put_along_axis(seen, tokens[:, None], mx.array(True), axis=-1)
        if record.done.all():
            break
        if ended.any() and (~record.done[running]).mean() < _LEAVE:
            keep = np.flatnonzero(~record.done[running])
            running, index = running[keep], mx.array(keep)
            context, tokens = context.fork(index), tokens[index]
            seen = None if seen is None else seen[index]
    return record.completions(sampling)


def _seen(model: nn.Module, prompts: Sequence[np.ndarray], rows: np.ndarray) -> mx.array:
    """(B, V) bool: the tokens each row's prompt holds."""
    vocabulary = model(mx.array([[0]])).shape[-1]
    seen = np.zeros((len(rows), vocabulary), bool)
    for i, row in enumerate(rows):
        seen[i, prompts[row]] = True
    return mx.array(seen)


class _Record:
    """Tokens, log-probs and entropies of B rows, and which of them have met a stop token."""

    def __init__(self, rows: int, width: int):
        self.tokens = np.zeros((rows, width), np.int32)
        self.logprobs = np.zeros((rows, width), np.float32)
        self.entropy = np.zeros((rows, width), np.float32)
        self.lengths = np.zeros(rows, np.int32)
        self.done = np.zeros(rows, bool)

    def add(self, rows: np.ndarray, drawn: tuple[mx.array, mx.array, mx.array], stop: np.ndarray) -> np.ndarray:
        """Write one step of the ``rows`` not done yet; returns which of them ended with it."""
        new = ~self.done[rows]
        at, column = rows[new], self.lengths[rows[new]]
        tokens, logprobs, entropy = (np.array(a)[new] for a in drawn)
        self.tokens[at, column] = tokens
        self.logprobs[at, column] = logprobs
        self.entropy[at, column] = entropy
        self.lengths[at] += 1
        ended = np.isin(tokens, stop)
        self.done[at[ended]] = True
        return ended

    def completions(self, sampling: Sampling) -> list[Completion]:
        return [
            Completion(
                tokens=self.tokens[i, :n].copy(),
                logprobs=self.logprobs[i, :n].copy(),
                entropy=self.entropy[i, :n].copy(),
                truncated=not self.done[i],
                temperature=sampling.scored_temperature,
            )
            for i, n in enumerate(self.lengths)
        ]
