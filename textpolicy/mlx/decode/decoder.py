"""The decoding loop: sample many completions side by side and compute nothing twice.

Completions with equal text share one row of the model's context and fork where they diverge, so a group
reads its prompt once and draws its first tokens from one row of logits. Once every completion has a row of
its own, the next step can be computed while Python handles the last one. Completions that end free their
places for queued ones.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...engine import Sampling
from ...errors import NotFiniteError
from ...types import Completion
from ..read.context import Context
from ..read.prompts import Kept, PromptTree
from ..read.sizes import size_up
from .compiled_steps import StaticRows, Steps
from .drafts import ROWS, Drafts
from .sampling import Draw, Sampler, uniforms

_GAP = 64  # unused slots between used ones, after which drafts leave the context packed again
_SPARE = 64  # the most positions to allocate ahead
_LEAVE = 0.75  # the context is packed again when a smaller share of its rows is still in use
_ENTER = 0.25  # queued completions start when at least this share of the places is free


def decode(
    model: nn.Module,
    prompts: Sequence[np.ndarray],
    sampling: Sampling,
    stop: np.ndarray,
    max_rows: int,
    ahead: bool | None = None,
    steps: Steps | None = None,
    kept: Kept | None = None,
    streams: Sequence[int] | None = None,
    drafts: bool = True,
) -> list[Completion]:
    """Return one completion per prompt (token ids), sampling at most ``max_rows`` at a time.

    Equal prompts that start together are read once. Row i draws from the stream
    (sampling.seed, streams[i]), by default (sampling.seed, i), so neither ``max_rows`` nor the other rows change what
    it samples, beyond the rounding of the matrix products.
    ``ahead`` computes the next step while Python handles the last one; None does so on a GPU only, because a CPU
    gains nothing. ``steps`` are compiled steps of this model, used where they apply; without them the model runs
    as it is. Prompts that continue a text in ``kept`` begin with what was read then, and completions that a stop
    token ends are added to it. With ``drafts`` the last few completions are decoded several tokens at a time where
    texts repeat (see drafts.py); without steps computed ahead, and with no running states.
    """
    n, width, penalty = len(prompts), sampling.max_tokens, sampling.repetition_penalty
    repetition = None
    if penalty != 1:
        repetition = RepetitionPenalty(penalty, np.zeros((n, model(mx.array([[0]])).shape[-1]), bool))
        for i, prompt in enumerate(prompts):
            repetition.seen[i, prompt] = True
    if penalty != 1 or any(len(prompt) < 2 for prompt in prompts):
        steps = None
    if ahead is None:
        ahead = mx.default_device() == mx.Device(mx.gpu)
    decoder = _Decoder(
        model=model,
        prompts=prompts,
        sampling=sampling,
        sampler=Sampler(sampling),
        stop=stop,
        max_rows=max_rows,
        ahead=ahead and penalty == 1,  # a penalty must see a token before the next is drawn
        steps=steps,
        kept=kept,
        penalty=repetition,
        tries_drafts=drafts,
        streams=range(n) if streams is None else streams,
        random=np.zeros((n, width), np.float32),
        tokens=np.zeros((n, width), np.int32),
        logprobs=np.zeros((n, width), np.float32),
        entropy=np.zeros((n, width), np.float32),
        lengths=np.zeros(n, np.int32),
        launched=np.zeros(n, np.int32),
        stopped=np.zeros(n, bool),
    )
    return decoder.run()


@dataclass(frozen=True, slots=True, eq=False)
class ActiveRows:
    """The R completions being sampled; those with equal text share a row of the context."""

    context: Context  # C rows
    rows: np.ndarray  # (R,) int, the index of each completion
    state: np.ndarray  # (R,) int, the row of the context that holds its text
    reads: mx.array  # (C,) int32, the token that each row of the context reads next

    def only(self, kept: np.ndarray) -> ActiveRows:
        """Return the completions at ``kept`` (K,), each of which has a row of its own."""
        return ActiveRows(self.context.fork(kept), self.rows[kept], np.arange(len(kept)), self.reads[mx.array(kept)])

    def apart(self) -> ActiveRows:
        """Return the same completions with a row of the context for each."""
        rows = self.context.fork(self.state)
        return ActiveRows(rows, self.rows, np.arange(len(self.rows)), self.reads[mx.array(self.state)])

    def after(self, tokens: np.ndarray, running: np.ndarray) -> ActiveRows:
        """Return the completions that are ``running`` (R,) bool after ``tokens`` (R,), one row for equal texts."""
        rows, size = self.rows[running], self.reads.shape[0]
        sources, reads, state = distinct(self.state[running], tokens[running])
        if len(np.unique(sources)) == len(sources) >= _LEAVE * size:  # none diverged and few have ended: keep the rows
            padded = np.zeros(size, np.int32)
            padded[sources] = reads
            return ActiveRows(self.context, rows, sources[state], mx.array(padded))
        return ActiveRows(self.context.fork(sources), rows, state, mx.array(reads))

    def joined(self, new: ActiveRows) -> ActiveRows:
        """Return these completions followed by ``new``."""
        return ActiveRows(
            Context.join([self.context, new.context], self.context.spare),
            np.concatenate([self.rows, new.rows]),
            np.concatenate([self.state, new.state + self.reads.shape[0]]),
            mx.concatenate([self.reads, new.reads]),
        )


@dataclass(frozen=True, slots=True, eq=False)
class RepetitionPenalty:
    """The penalty on tokens that a completion's text contains, its prompt included."""

    penalty: float
    seen: np.ndarray  # (N, V) bool, the tokens of each completion's text so far

    def __call__(self, logits: mx.array, rows: np.ndarray) -> mx.array:
        """Divide positive and multiply negative logits (R, V) of the tokens seen in completions ``rows`` (R,).

        See arXiv:1909.05858, sec. 4.1.
        """
        scaled = mx.where(logits > 0, logits / self.penalty, logits * self.penalty)
        return mx.where(mx.array(self.seen[rows]), scaled, logits)


@dataclass(slots=True, eq=False)
class _Decoder:
    """The state of one call of ``decode``: its settings, and the N completions so far, of at most T tokens."""

    model: nn.Module
    prompts: Sequence[np.ndarray]
    sampling: Sampling
    sampler: Sampler
    stop: np.ndarray
    max_rows: int
    ahead: bool
    steps: Steps | None
    kept: Kept | None
    penalty: RepetitionPenalty | None
    tries_drafts: bool
    streams: Sequence[int]  # N
    random: np.ndarray  # (N, T) float32, filled when a completion starts
    tokens: np.ndarray  # (N, T) int32
    logprobs: np.ndarray  # (N, T) float32
    entropy: np.ndarray  # (N, T) float32
    lengths: np.ndarray  # (N,) int32, tokens recorded
    launched: np.ndarray  # (N,) int32, tokens drawn, including those not recorded yet
    stopped: np.ndarray  # (N,) bool, by a stop token
    started: int = 0  # completions
    drafts: Drafts | None = None  # once few are left
    passes: int = 0  # over the rows being sampled

    def run(self) -> list[Completion]:
        if self.steps is not None:
            self.steps.refresh()
        active: Any = None  # ActiveRows, or StaticRows where there are compiled steps
        while (active := self.start_queued(active)) is not None:
            if isinstance(active, StaticRows):
                alone, active = [active], None  # a variable would hold the first keys and values beside the last
                active = self.write(alone.pop())
            else:
                one_row_each = np.array_equal(active.state, np.arange(active.reads.shape[0]))
                if self.ahead and one_row_each:
                    active = self.write(active)
                elif self.may_draft(active):
                    active = self.write_drafts(active if one_row_each else active.apart())
                else:
                    active = self.write_shared(active)
        return [
            Completion(
                tokens=self.tokens[i, :n].copy(),
                logprobs=self.logprobs[i, :n].copy(),
                entropy=self.entropy[i, :n].copy(),
                truncated=not self.stopped[i],
                temperature=self.sampling.scored_temperature,
            )
            for i, n in enumerate(self.lengths)
        ]

    def start_queued(self, active: Any) -> Any:
        """Return ``active`` with queued completions in its free places; unchanged while too few are free."""
        running = np.zeros(0, bool) if active is None else self.running(active.rows)
        free = self.max_rows - int(running.sum())
        rows = np.arange(self.started, min(self.started + free, len(self.prompts)))
        if not len(rows) or (running.any() and free < _ENTER * self.max_rows):
            return active
        self.started += len(rows)
        for row in rows.tolist():
            self.random[row] = uniforms(self.sampling.seed, self.streams[row], self.sampling.max_tokens)
        tree = PromptTree.build([self.prompts[row] for row in rows.tolist()])
        new: Any = None if self.steps is None else self.steps.begin(tree, rows, self.kept)
        if new is None:
            self.steps = None
            sources, reads, state = distinct(tree.parents, tree.last)
            if len(sources) == len(rows):  # in the order of the tree, or its contexts would be copied
                order = np.argsort(sources, kind="stable")
                rows, sources, reads = rows[order], sources[order], reads[order]
            context = tree.read(self.model, min(_SPARE, self.sampling.max_tokens), self.kept).fork(sources)
            new = ActiveRows(context, rows, state, mx.array(reads))
        if active is None:
            return new
        return (active if running.all() else active.only(np.flatnonzero(running))).joined(new)

    def step(self, active: Any) -> tuple[Any, Draw, Any]:
        """Return the rows after one more token, that token's draw, and the arrays to evaluate."""
        column = np.minimum(self.launched[active.rows], self.sampling.max_tokens - 1)
        self.launched[active.rows] += 1
        uniform = mx.array(self.random[active.rows, column])
        if isinstance(active, StaticRows):
            assert self.steps is not None
            drawn, after = self.steps(active, uniform, self.sampling)
            return after, drawn, (drawn, after.own, after.recent)
        self.passes += 1
        logits = active.context.read(self.model, active.reads[:, None])[:, -1]
        state = active.state
        if self.penalty is not None:
            logits, state = self.penalty(logits[mx.array(state)], active.rows), np.arange(len(active.rows))
        drawn = self.sampler(logits, mx.array(state), uniform)
        return replace(active, reads=drawn.tokens), drawn, drawn

    def write_shared(self, active: ActiveRows) -> ActiveRows | None:
        """Write one token for every completion; return the running ones, with equal texts in one row of the context."""
        _, drawn, pending = self.step(active)
        mx.eval(pending)
        tokens = self.record(active, drawn)
        if self.penalty is not None:
            self.penalty.seen[active.rows, tokens] = True
        running = self.running(active.rows)
        return active.after(tokens, running) if running.any() else None

    def may_draft(self, active: ActiveRows) -> bool:
        """Return whether few completions are left, which drafts may shorten."""
        if not self.tries_drafts or self.penalty is not None or self.started < len(self.prompts):
            return False
        return len(active.rows) <= ROWS and not active.context.recurrent

    def write_drafts(self, active: ActiveRows) -> ActiveRows | None:
        """Write a token for every completion, and those of its draft that it draws, too; return the running ones."""
        rows, context = active.rows, active.context
        if self.drafts is None:
            said = [self.tokens[i, :n] for i, n in enumerate(self.lengths.tolist())]
            self.drafts = Drafts(self.prompts, said, set(rows.tolist()))
        drafts = self.drafts.of(rows.tolist())
        width = 1 + max(map(len, drafts))
        reads = np.zeros((len(rows), width), np.int32)
        reads[:, 0] = np.array(active.reads)
        for line, draft in zip(reads, drafts, strict=True):
            line[1 : 1 + len(draft)] = draft
        columns = np.minimum(self.lengths[rows, None] + np.arange(width), self.sampling.max_tokens - 1)
        uniform = mx.array(self.random[rows[:, None], columns].reshape(-1))
        logits = context.read(self.model, mx.array(reads)).reshape(reads.size, -1)
        drawn = self.sampler(logits, mx.arange(reads.size), uniform)
        mx.eval(drawn)
        self.passes += 1
        tokens, logprobs, entropy = (np.array(a).reshape(reads.shape) for a in drawn)
        within = np.arange(1, width) <= np.array([len(draft) for draft in drafts])[:, None]
        accepted = np.cumprod((tokens[:, :-1] == reads[:, 1:]) & within, axis=1).sum(axis=1)
        if width > 1:
            context.take_back(width, accepted + 1)
        for column in range(int(accepted.max()) + 1):
            here = np.flatnonzero(accepted >= column)
            for at in here[self.running(rows[here])].tolist():
                self.drafts.add(int(rows[at]), int(tokens[at, column]))
            self.note(active, here, tokens[here, column], logprobs[here, column], entropy[here, column])
        self.launched[rows] = self.lengths[rows]
        running = self.running(rows)
        if not running.any():
            return None
        after = active.after(tokens[np.arange(len(rows)), accepted], running)
        if after.context.ragged is not None and after.context.ragged.gap > max(_GAP, after.context.size // 4):
            read = [len(self.prompts[i]) + int(self.lengths[i]) - 1 for i in after.rows]
            after = after.apart()
            after = replace(after, context=after.context.packed(read))
        return after

    def write(self, active: Any) -> Any:
        """Write tokens for completions with a row each until enough have ended; return those that are running.

        ``ahead`` records each step while the next is computed; tokens drawn after a completion's end are dropped.
        """
        unrecorded = None
        running, queued = self.running(active.rows), self.started < len(self.prompts)
        while self.together(active, running) and not (
            queued and self.max_rows - running.sum() >= _ENTER * self.max_rows
        ):
            # ``active`` is replaced before evaluation, since MLX writes in place into arrays with no other reference
            active, drawn, pending = self.step(active)
            mx.async_eval(pending) if self.ahead else mx.eval(pending)
            if self.ahead:
                unrecorded, drawn = drawn, unrecorded
            if drawn is not None:
                self.record(active, drawn)
            running = self.running(active.rows)
        if unrecorded is not None:
            self.record(active, unrecorded)
            running = self.running(active.rows)
        if not running.any():
            return None
        kept = np.flatnonzero(running)
        if isinstance(active, StaticRows):  # ended rows fill up to one of few sizes, so that compiled steps are reused
            kept = np.sort(np.concatenate([kept, np.flatnonzero(~running)[: size_up(len(kept)) - len(kept)]]))
        return active.only(kept)

    def together(self, active: Any, running: np.ndarray) -> bool:
        """Return whether the rows go on side by side: few have ended, or ``active`` would not have fewer rows."""
        left = int(running.sum())
        return left >= _LEAVE * len(running) or (
            isinstance(active, StaticRows) and left > 0 and size_up(left) >= len(running)
        )

    def running(self, rows: np.ndarray) -> np.ndarray:
        """Return a mask of the ``rows`` without a stop token and below the maximal length."""
        return ~self.stopped[rows] & (self.lengths[rows] < self.sampling.max_tokens)

    def record(self, active: Any, drawn: Draw) -> np.ndarray:
        """Record one step for those rows that are running; return the tokens of all."""
        tokens, logprobs, entropy = (np.array(a) for a in drawn)
        self.note(active, np.arange(len(active.rows)), tokens, logprobs, entropy)
        return tokens

    def note(
        self, active: Any, places: np.ndarray, tokens: np.ndarray, logprobs: np.ndarray, entropy: np.ndarray
    ) -> None:
        """Record a token, (K,) each, for those of the active rows at ``places`` (K,) that are running."""
        rows = active.rows[places]
        live = self.running(rows)
        who, column = rows[live], self.lengths[rows[live]]
        if not np.isfinite(logprobs[live]).all():
            i = int(who[~np.isfinite(logprobs[live])][0])
            raise NotFiniteError(
                f"the logits of the model are not finite after {len(self.prompts[i]) + self.lengths[i]} tokens; "
                "check its weights, or load it in float32"
            )
        self.tokens[who, column] = tokens[live]
        self.logprobs[who, column] = logprobs[live]
        self.entropy[who, column] = entropy[live]
        self.lengths[who] += 1
        self.stopped[who] = np.isin(tokens[live], self.stop)
        if self.kept is not None:
            for at in places[live][self.stopped[who]].tolist():
                self.keep(self.kept, active, at)

    def keep(self, kept: Kept, active: Any, at: int) -> None:
        """Add what the row ``at`` of the active ones has read until the token that stopped it to ``kept``."""
        i = active.rows[at]
        text = np.concatenate([self.prompts[i], self.tokens[i, : self.lengths[i] - 1]])
        if self.steps is not None and isinstance(active, StaticRows):
            context = self.steps.alone(active, at, len(text))
        else:
            context = active.context.alone(int(active.state[at]), len(text))
        if context is not None:
            kept.add(text, context)


def distinct(sources: np.ndarray, tokens: np.ndarray) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the distinct (source, token) pairs as two arrays, and the index of each row's pair.

    The pairs stay in row order if all differ.
    """
    pairs, which = np.unique(np.stack([sources, tokens], axis=1), axis=0, return_inverse=True)
    if len(pairs) == len(sources):
        return np.asarray(sources), tokens.astype(np.int32), np.arange(len(sources))
    return pairs[:, 0], pairs[:, 1].astype(np.int32), which.reshape(-1)
