"""The decode loop: many completions side by side, and nothing computed twice.

Completions that have said the same so far share one row of the model's context and fork when they
diverge, so a group reads its prompt once and draws its first tokens from one row of logits.
"""

from __future__ import annotations

from collections.abc import Sequence

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..engine import Sampling
from ..types import Completion
from .context import Context
from .sampling import Draw, draw, penalize, uniforms
from .tree import PromptTree

_SPARE = 64  # positions allocated ahead, at most
_LEAVE = 0.75  # the context is packed again when a smaller share of its rows is still in use


def decode(
    model: nn.Module, prompts: Sequence[np.ndarray], sampling: Sampling, stop: np.ndarray, max_rows: int
) -> list[Completion]:
    """One completion per prompt (token ids), ``max_rows`` at a time; equal prompts among those are read once.

    Row i draws from the stream (sampling.seed, i), so neither ``max_rows`` nor the company
    it keeps changes what it says, beyond the rounding of the matrix products.
    """
    chunks = np.array_split(np.arange(len(prompts)), -(-len(prompts) // max_rows))
    return [c for rows in chunks for c in _decode_rows(model, [prompts[r] for r in rows], rows, sampling, stop)]


def _decode_rows(
    model: nn.Module, prompts: Sequence[np.ndarray], places: np.ndarray, sampling: Sampling, stop: np.ndarray
) -> list[Completion]:
    random = np.stack([uniforms(sampling.seed, int(place), sampling.max_tokens) for place in places])
    record = _Record(len(prompts), sampling.max_tokens)
    tree = PromptTree.build(prompts)
    front = _Front.begin(tree.read(model, spare=min(_SPARE, sampling.max_tokens)), tree)
    seen = _Seen.begin(model, prompts, sampling.repetition_penalty)
    for step in range(sampling.max_tokens):
        logits = front.context.read(model, mx.array(front.tokens)[:, None])[:, -1]
        logits, state = seen.penalize(logits, front)
        drawn = draw(logits, mx.array(state), mx.array(random[front.rows, step]), sampling.temperature, sampling.top_p)
        mx.eval(drawn)
        tokens, running = record.add(front.rows, drawn, stop)
        if not running.any():
            break
        seen.add(front.rows, tokens)
        front = front.advance(tokens, running)
    return record.completions(sampling)


class _Front:
    """The rows still running, and the row of the context that holds what each has said so far."""

    def __init__(self, context: Context, rows: np.ndarray, state: np.ndarray, tokens: np.ndarray):
        self.context = context  # C rows
        self.rows = rows  # (R,) int, which completion
        self.state = state  # (R,) int, its row of the context
        self.tokens = tokens  # (C,) int32, what each row of the context reads next

    @classmethod
    def begin(cls, prefix: Context, tree: PromptTree) -> _Front:
        sources, tokens, state = _distinct(tree.parents, tree.last)
        return cls(prefix.fork(mx.array(sources)), np.arange(len(state)), state, tokens)

    def advance(self, tokens: np.ndarray, running: np.ndarray) -> _Front:
        """After (R,) ``tokens`` were drawn; only the rows ``running`` (R,) go on."""
        rows = self.rows[running]
        sources, reads, state = _distinct(self.state[running], tokens[running])
        size = len(self.tokens)
        if len(np.unique(sources)) == len(sources) >= _LEAVE * size:  # nobody diverged, few have left
            everyone = np.zeros(size, np.int32)
            everyone[sources] = reads
            return _Front(self.context, rows, sources[state], everyone)
        return _Front(self.context.fork(mx.array(sources)), rows, state, reads)


class _Seen:
    """Which tokens each completion's text holds, prompt included; kept only under a repetition penalty."""

    def __init__(self, penalty: float, seen: np.ndarray | None):
        self.penalty, self.seen = penalty, seen

    @classmethod
    def begin(cls, model: nn.Module, prompts: Sequence[np.ndarray], penalty: float) -> _Seen:
        if penalty == 1:
            return cls(penalty, None)
        seen = np.zeros((len(prompts), model(mx.array([[0]])).shape[-1]), bool)
        for i, prompt in enumerate(prompts):
            seen[i, prompt] = True
        return cls(penalty, seen)

    def penalize(self, logits: mx.array, front: _Front) -> tuple[mx.array, np.ndarray]:
        """Logits to draw from, and which row of them each running completion draws from."""
        if self.seen is None:
            return logits, front.state
        penalised = penalize(logits[mx.array(front.state)], mx.array(self.seen[front.rows]), self.penalty)
        return penalised, np.arange(len(front.rows))

    def add(self, rows: np.ndarray, tokens: np.ndarray) -> None:
        if self.seen is not None:
            self.seen[rows, tokens] = True


def _distinct(sources: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """The distinct (source, token) pairs as two arrays, and which of them each row is."""
    pairs, which = np.unique(np.stack([sources, tokens], axis=1), axis=0, return_inverse=True)
    return pairs[:, 0], pairs[:, 1].astype(np.int32), which.reshape(-1)


class _Record:
    """Tokens, log-probs and entropies of R completions, and which of them have met a stop token."""

    def __init__(self, rows: int, width: int):
        self.tokens = np.zeros((rows, width), np.int32)
        self.logprobs = np.zeros((rows, width), np.float32)
        self.entropy = np.zeros((rows, width), np.float32)
        self.lengths = np.zeros(rows, np.int32)
        self.done = np.zeros(rows, bool)

    def add(self, rows: np.ndarray, drawn: Draw, stop: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
        """Write one step of ``rows``; returns their tokens, and which of them go on."""
        tokens, logprobs, entropy = (np.array(a) for a in drawn)
        column = self.lengths[rows]
        self.tokens[rows, column] = tokens
        self.logprobs[rows, column] = logprobs
        self.entropy[rows, column] = entropy
        self.lengths[rows] += 1
        ended = np.isin(tokens, stop)
        self.done[rows[ended]] = True
        return tokens, ~ended

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
