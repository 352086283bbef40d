"""The decode loop: many completions side by side, and nothing computed twice.

Completions that have said the same so far share one row of the model's context and fork when they
diverge, so a group reads its prompt once and draws its first tokens from one row of logits. Once
every completion has a row of its own, the next step is computed while the last one is looked at.
Completions that end leave, and waiting ones take their places.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...engine import Sampling
from ...types import Completion
from ..read.context import Context
from ..read.sizes import size_up
from ..read.tree import PromptTree
from .compiled_steps import Rows, Steps
from .sampling import Draw, Sampler, penalize, uniforms

_SPARE = 64  # positions allocated ahead, at most
_LEAVE = 0.75  # the context is packed again when a smaller share of its rows is still in use
_ENTER = 0.25  # waiting completions enter when at least this share of the places is free


def decode(
    model: nn.Module,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    stop: np.ndarray,
    max_rows: int,
    ahead: bool | None = None,
    steps: Steps | None = None,
) -> list[Completion]:
    """One completion per prompt (token ids), at most ``max_rows`` at a time; neighbours with equal prompts share it.

    Row i draws from the stream (sampling.seed, i), so neither ``max_rows`` nor the company
    it keeps changes what it says, beyond the rounding of the matrix products. ``ahead`` computes the
    next step while Python looks at the last one: None is yes on a GPU, and no on a CPU, which gains nothing.
    ``steps`` of this model are used where they can be; without them the model runs as it is.
    """
    on_gpu = mx.default_device() == mx.Device(mx.gpu)
    decoder = _Decoder(model, prompts, sampling, stop, max_rows, on_gpu if ahead is None else ahead)
    if steps is not None and not decoder.seen.matters and all(len(prompt) > 1 for prompt in prompts):
        return decoder.run_steadily(steps)
    return decoder.run()


@dataclass(frozen=True, slots=True, eq=False)
class _Front:
    """The completions being written, and the row of the context that holds what each has said so far."""

    context: Context  # C rows
    rows: np.ndarray  # (R,) int, which completion
    state: np.ndarray  # (R,) int, its row of the context
    reads: mx.array  # (C,) int32, what each row of the context reads next

    @property
    def spread(self) -> bool:
        """Whether every completion has the row of the context that stands at its own place."""
        return len(self.rows) == self.reads.shape[0] and bool((self.state == np.arange(len(self.state))).all())

    @classmethod
    def begin(cls, model: nn.Module, prompts: Sequence[np.ndarray], rows: np.ndarray, spare: int) -> _Front:
        """Read the prompts of ``rows``, each distinct one once."""
        tree = PromptTree.build(prompts)
        sources, reads, state = _distinct(tree.parents, tree.last)
        return cls(tree.read(model, spare).fork(sources), rows, state, mx.array(reads))

    def shared(self, tokens: np.ndarray, running: np.ndarray) -> _Front:
        """After (R,) ``tokens`` were drawn: those ``running`` (R,) go on, equal texts in one row of the context."""
        rows = self.rows[running]
        sources, reads, state = _distinct(self.state[running], tokens[running])
        size = self.reads.shape[0]
        if len(np.unique(sources)) == len(sources) >= _LEAVE * size:  # nobody diverged, few have left
            everyone = np.zeros(size, np.int32)
            everyone[sources] = reads
            return _Front(self.context, rows, sources[state], mx.array(everyone))
        return _Front(self.context.fork(sources), rows, state, mx.array(reads))

    def only(self, running: np.ndarray) -> _Front:
        """The spread completions ``running`` (R,), each still in a row of its own."""
        kept = np.flatnonzero(running)
        return _Front(self.context.fork(kept), self.rows[running], np.arange(len(kept)), self.reads[mx.array(kept)])

    def joined(self, other: _Front) -> _Front:
        return _Front(
            Context.join([self.context, other.context]),
            np.concatenate([self.rows, other.rows]),
            np.concatenate([self.state, other.state + self.reads.shape[0]]),
            mx.concatenate([self.reads, other.reads]),
        )


@dataclass(frozen=True, slots=True, eq=False)
class _Steady:
    """Completions being written, each in a row of its own; some rows may belong to completions that have ended."""

    held: Rows
    rows: np.ndarray  # (R,) int, which completion
    reads: mx.array  # (R,) int32, what each row reads next

    @classmethod
    def begin(cls, steps: Steps, prompts: Sequence[np.ndarray], rows: np.ndarray) -> _Steady:
        """Read the prompts of ``rows``, each distinct one once."""
        tree = PromptTree.build(prompts)
        return cls(Rows.begin(steps.read(tree), tree.parents, steps.share), rows, mx.array(tree.last))

    def only(self, kept: np.ndarray) -> _Steady:
        if len(kept) == len(self.rows):
            return self
        return _Steady(self.held.only(kept), self.rows[kept], self.reads[mx.array(kept)])

    def joined(self, other: _Steady) -> _Steady:
        reads = mx.concatenate([self.reads, other.reads])
        return _Steady(self.held.joined(other.held), np.concatenate([self.rows, other.rows]), reads)


def _packed(running: np.ndarray) -> np.ndarray:
    """The rows to keep: those running, and others up to one of few sizes, so that compiled steps are used again."""
    live, ended = np.flatnonzero(running), np.flatnonzero(~running)
    return np.sort(np.concatenate([live, ended[: size_up(len(live)) - len(live)]]))


class _Decoder:
    """One call of ``decode``."""

    def __init__(
        self,
        model: nn.Module,
        prompts: Sequence[np.ndarray],
        sampling: Sampling,
        stop: np.ndarray,
        max_rows: int,
        ahead: bool,
    ):
        self.model, self.prompts, self.sampling, self.max_rows = model, prompts, sampling, max_rows
        self.sampler = Sampler(sampling)
        self.record = _Record(len(prompts), sampling.max_tokens, stop)
        self.seen = _Seen.begin(model, prompts, sampling.repetition_penalty)
        self.random = np.zeros((len(prompts), sampling.max_tokens), np.float32)  # filled when a completion begins
        self.begun = 0
        self.ahead = ahead and not self.seen.matters  # a penalty must see a token before the next is drawn

    def run(self) -> list[Completion]:
        front = self.filled(None)
        while front is not None:
            front = self.filled(self.write_ahead(front) if self.ahead and front.spread else self.write(front))
        return self.record.completions(self.sampling)

    def run_steadily(self, steps: Steps) -> list[Completion]:
        """As ``run``, with every completion in a row of its own from the start."""
        steps.refresh()
        front: _Steady | None = None
        while (front := self.steadily_filled(front, steps)) is not None:
            front = self.write_steadily(front, steps)
        return self.record.completions(self.sampling)

    def steadily_filled(self, front: _Steady | None, steps: Steps) -> _Steady | None:
        rows = self.entering(0 if front is None else int(self.record.running(front.rows).sum()))
        if not len(rows):
            return front
        new = _Steady.begin(steps, [self.prompts[row] for row in rows.tolist()], rows)
        if front is None:
            return new
        running = np.flatnonzero(self.record.running(front.rows))
        return front.only(running).joined(new)

    def write_steadily(self, front: _Steady, steps: Steps) -> _Steady | None:
        """Tokens for every row until enough have ended; ``ahead`` looks at each a step later."""
        unseen = None
        running = self.record.running(front.rows)
        while not self.worth_packing(running):
            uniform = self.random[front.rows, self.record.launch(front.rows)]
            drawn, held = steps(front.held, front.reads, mx.array(uniform), self.sampling)
            front = replace(
                front, held=held, reads=drawn.tokens
            )  # before it runs: what nobody holds is written in place
            mx.async_eval(drawn, held.own) if self.ahead else mx.eval(drawn, held.own)
            if unseen is not None:
                self.record.add(front.rows, unseen)
            unseen = drawn
            if not self.ahead:
                self.record.add(front.rows, unseen)
                unseen = None
            running = self.record.running(front.rows)
        if unseen is not None:
            self.record.add(front.rows, unseen)
            running = self.record.running(front.rows)
        return front.only(_packed(running)) if running.any() else None

    def entering(self, running: int) -> np.ndarray:
        """Waiting completions that begin now, if so many run that it is worth it."""
        free = self.max_rows - running
        rows = np.arange(self.begun, min(self.begun + free, len(self.prompts)))
        if running and free < _ENTER * self.max_rows:
            return rows[:0]
        self.begun += len(rows)
        for row in rows:
            self.random[row] = uniforms(self.sampling.seed, int(row), self.sampling.max_tokens)
        return rows

    def filled(self, front: _Front | None) -> _Front | None:
        """``front`` with waiting completions in its free places, if these are many enough to bother."""
        rows = self.entering(0 if front is None else len(front.rows))
        if not len(rows):
            return front
        spare = min(_SPARE, self.sampling.max_tokens)
        new = _Front.begin(self.model, [self.prompts[row] for row in rows.tolist()], rows, spare)
        return new if front is None else front.joined(new)

    def write(self, front: _Front) -> _Front | None:
        """One token for every completion of ``front``; those that go on."""
        drawn = self.draw(front)
        mx.eval(drawn)
        tokens = self.record.add(front.rows, drawn)
        self.seen.add(front.rows, tokens)
        running = self.record.running(front.rows)
        return front.shared(tokens, running) if running.any() else None

    def write_ahead(self, front: _Front) -> _Front | None:
        """Tokens for every completion of ``front``, a step ahead of what is looked at, until enough have ended.

        What a completion says after its end, before that is seen, is dropped.
        """
        unseen = None
        running = self.record.running(front.rows)
        while not self.worth_packing(running):
            drawn = self.draw(front)
            mx.async_eval(drawn)
            if unseen is not None:
                self.record.add(front.rows, unseen)
            unseen, front = drawn, replace(front, reads=drawn.tokens)
            running = self.record.running(front.rows)
        if unseen is not None:
            self.record.add(front.rows, unseen)
            running = self.record.running(front.rows)
        return front.only(running) if running.any() else None

    def worth_packing(self, running: np.ndarray) -> bool:
        waiting = self.begun < len(self.prompts)
        free = self.max_rows - running.sum()
        return running.mean() < _LEAVE or (waiting and free >= _ENTER * self.max_rows)

    def draw(self, front: _Front) -> Draw:
        """The next token of every completion in ``front``."""
        logits = front.context.read(self.model, front.reads[:, None])[:, -1]
        logits, state = self.seen.penalize(logits, front)
        uniform = self.random[front.rows, self.record.launch(front.rows)]
        return self.sampler(logits, mx.array(state), mx.array(uniform))


class _Seen:
    """Which tokens each completion's text holds, prompt included; kept only under a repetition penalty."""

    def __init__(self, penalty: float, seen: np.ndarray | None):
        self.penalty, self.seen = penalty, seen

    @property
    def matters(self) -> bool:
        return self.seen is not None

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
    """The distinct (source, token) pairs as two arrays, and which of them each row is; in row order if all differ."""
    pairs, which = np.unique(np.stack([sources, tokens], axis=1), axis=0, return_inverse=True)
    if len(pairs) == len(sources):
        return np.asarray(sources), tokens.astype(np.int32), np.arange(len(sources))
    return pairs[:, 0], pairs[:, 1].astype(np.int32), which.reshape(-1)


class _Record:
    """Tokens, log-probs and entropies of N completions, and which of them have ended."""

    def __init__(self, rows: int, width: int, stop: np.ndarray):
        self.stop = stop
        self.tokens = np.zeros((rows, width), np.int32)
        self.logprobs = np.zeros((rows, width), np.float32)
        self.entropy = np.zeros((rows, width), np.float32)
        self.lengths = np.zeros(rows, np.int32)  # tokens written down
        self.launched = np.zeros(rows, np.int32)  # tokens drawn, those not looked at yet included
        self.stopped = np.zeros(rows, bool)  # by a stop token

    def launch(self, rows: np.ndarray) -> np.ndarray:
        """Which of its random numbers each of ``rows`` draws its next token with."""
        place = np.minimum(self.launched[rows], self.tokens.shape[1] - 1)
        self.launched[rows] += 1
        return place

    def running(self, rows: np.ndarray) -> np.ndarray:
        """Which of ``rows`` have said neither a stop token nor all they may."""
        return ~self.stopped[rows] & (self.lengths[rows] < self.tokens.shape[1])

    def add(self, rows: np.ndarray, drawn: Draw) -> np.ndarray:
        """Write one step of those ``rows`` that are running; returns everyone's tokens."""
        tokens, logprobs, entropy = (np.array(a) for a in drawn)
        live = self.running(rows)
        who, column = rows[live], self.lengths[rows[live]]
        self.tokens[who, column] = tokens[live]
        self.logprobs[who, column] = logprobs[live]
        self.entropy[who, column] = entropy[live]
        self.lengths[who] += 1
        self.stopped[who] = np.isin(tokens[live], self.stop)
        return tokens

    def completions(self, sampling: Sampling) -> list[Completion]:
        return [
            Completion(
                tokens=self.tokens[i, :n].copy(),
                logprobs=self.logprobs[i, :n].copy(),
                entropy=self.entropy[i, :n].copy(),
                truncated=not self.stopped[i],
                temperature=sampling.scored_temperature,
            )
            for i, n in enumerate(self.lengths)
        ]
