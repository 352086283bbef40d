"""The continuous batch: requests of any samplers join it every few tokens and are decoded side by side.

Rows of one adapter alone run as a rollout's do, on copies of the weights with the adapter folded in where those pay.
Rows of several run through layers that hold all of their adapters (mixed.py).
"""

from __future__ import annotations

from collections import deque
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any
from weakref import WeakKeyDictionary

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...engine import Sampling
from ...errors import NotFiniteError, UserError
from ...serving import Alternatives, Request, Sampled
from ...types import Completion, token_ids
from ..decode.decoder import ActiveRows, distinct
from ..decode.folded_weights import FEW, folded
from ..decode.sampling import Sampler, uniforms
from ..engine import decode_patches
from ..kernels.patching import patched
from ..kernels.plain import plain_operations
from ..read.bounds import Bounds
from ..read.context import Context
from ..read.prompts import PromptTree
from .mixed import Mixed, can_mix
from .reading import likeliest
from .room import Room
from .snapshot import Snapshot

PLACES = 128  # completions decoded side by side, at most
_SPARE = 64  # the most positions of a context to allocate ahead
_AT_ONCE = 8  # tokens between two points at which requests can join, unless one ends before
_ENTER = 0.25  # where not all that are queued find a place, some start when at least this share is free


@dataclass(slots=True, eq=False)
class _Row:
    """The completion of a request, so far."""

    key: str
    index: int  # among the completions of the request
    request: Request
    kind: Sampling  # of the draws: those with equal settings are made together
    random: np.ndarray  # (max_tokens,) float32
    tokens: list[int] = field(default_factory=list)
    logprobs: list[float] = field(default_factory=list)
    entropy: list[float] = field(default_factory=list)
    alternatives: list[tuple[np.ndarray, np.ndarray]] = field(default_factory=list)
    stopped: bool = False  # by a token or a text
    gone: bool = False  # its request was cancelled

    @property
    def running(self) -> bool:
        return not (self.stopped or self.gone or len(self.tokens) == self.request.sampling.max_tokens)

    def sampled(self) -> Sampled:
        request, alternatives = self.request, None
        if request.top:
            ids, values = zip(*self.alternatives, strict=True)
            alternatives = Alternatives(np.stack(ids), np.stack(values))
        completion = Completion(
            tokens=np.array(self.tokens, np.int32),
            logprobs=np.array(self.logprobs, np.float32),
            entropy=np.array(self.entropy, np.float32),
            truncated=not self.stopped,
            temperature=request.sampling.scored_temperature,
        )
        return Sampled(completion, alternatives)


class Decoding:
    """The continuous batch of one base. ``tokenizer`` is for texts that end a completion."""

    def __init__(self, base: nn.Module, tokenizer: Any, bounds: Bounds, room: Room | None = None):
        self._base, self._tokenizer, self._bounds, self._room = base, tokenizer, bounds, room
        self._queue: deque[_Row] = deque()
        self._rows: dict[int, _Row] = {}  # running ones, by number
        self._started = 0
        self._left: dict[str, int] = {}  # completions of a request that have not ended
        self._ended: dict[str, list[_Row]] = {}
        self._failed: dict[str, NotFiniteError] = {}
        self._active: dict[Any, ActiveRows] = {}  # one for all, or one for each adapter that cannot be mixed
        self._views: dict[Any, tuple[Any, Any]] = {}  # of each of these, what it was made for and the view
        self._samplers: dict[Sampling, Sampler] = {}
        self._mixes: WeakKeyDictionary[Any, bool] = WeakKeyDictionary()  # whether rows of other samplers can join

    def __len__(self) -> int:
        return len(self._left)

    def admit(self, key: str, request: Request) -> None:
        """Queue a request. Raises UserError for one that can never be served."""
        prompt = token_ids(request.prompt, self._bounds.vocabulary)
        size, more = len(prompt), request.sampling.max_tokens
        if not size or request.n < 1:
            raise UserError(f"{request.n} completions of a prompt of {size} tokens; ask for 1 or more of 1 or more")
        if self._bounds.positions is not None and size + more > self._bounds.positions:
            raise UserError(
                f"a prompt of {size} tokens and up to {more} more are beyond the {self._bounds.positions} that the "
                "model reads; shorten the prompt, or lower max_tokens"
            )
        if request.sampling.repetition_penalty != 1:
            raise UserError("a repetition penalty is not served here; set it to 1")
        if self._room is not None and not self._room.places([(size, more)], self._contexts()):
            raise UserError(
                f"memory has no room for one completion of {size + more} tokens; shorten the prompt, or lower "
                "max_tokens"
            )
        seed = request.sampling.seed
        kind = replace(request.sampling, seed=0, max_tokens=1)
        self._queue += [_Row(key, i, request, kind, uniforms(seed, i, more)) for i in range(request.n)]
        self._left[key], self._ended[key] = request.n, []

    def cancel(self, key: str) -> None:
        """Forget the request ``key`` and what it has sampled."""
        for row in self._rows.values():
            row.gone = row.gone or row.key == key
        self._queue = deque(row for row in self._queue if row.key != key)
        self._left.pop(key, None)
        self._ended.pop(key, None)

    def step(self) -> Mapping[str, Sequence[Sampled] | NotFiniteError]:
        """Sample a few tokens for every running completion; return requests that have ended, by key.

        A request whose logits are not finite ends with an error, and the others go on.
        """
        with patched(self._base, decode_patches()), plain_operations("kimi_k3"):
            self._start_queued()
            for _ in range(_AT_ONCE):
                for group in list(self._active):
                    if (after := self._write(group, self._active[group])) is None:
                        del self._active[group]
                        self._views.pop(group, None)
                    else:
                        self._active[group] = after
                if not self._active or self._failed or 0 in self._left.values():
                    break
        ended: dict[str, Sequence[Sampled] | NotFiniteError] = {**self._failed}
        self._failed = {}
        for key in [key for key, left in self._left.items() if left == 0]:
            del self._left[key]
            rows = self._ended.pop(key)
            ended[key] = [row.sampled() for row in sorted(rows, key=lambda row: row.index)]
        return ended

    # ---- places

    def _start_queued(self) -> None:
        """Give the queued completions the free places, if they are all that is asked for, or enough."""
        running = [row for row in self._rows.values() if row.running]
        if not self._queue:
            return
        places = PLACES
        if self._room is not None:
            some = [row.request for row in [*running, *self._queue][:PLACES]]
            sizes = [(len(request.prompt), request.sampling.max_tokens) for request in some]
            places = max(self._room.places(sizes, self._contexts()), 1)
        free = places - len(running)
        if free <= 0 or (running and free < min(len(self._queue), _ENTER * places)):
            return
        new: dict[Any, dict[int, _Row]] = {}
        for _ in range(min(free, len(self._queue))):
            row = self._queue.popleft()
            new.setdefault(row.request.weights, {})[self._started] = row
            self._started += 1
        for weights, begun in new.items():
            self._rows |= begun
            tree = PromptTree.build([row.request.prompt for row in begun.values()])
            sources, reads, state = distinct(tree.parents, tree.last)
            spare = min(_SPARE, max(row.request.sampling.max_tokens for row in begun.values()))
            context = tree.read(weights.model, spare=spare).fork(sources)
            rows = ActiveRows(context, np.array([*begun]), state, mx.array(reads))
            if weights not in self._mixes:
                self._mixes[weights] = can_mix(weights.model)
            group = None if self._mixes[weights] else weights
            before = self._active.get(group)
            self._active[group] = rows if before is None else before.joined(rows)

    def _contexts(self) -> list[Context]:
        return [active.context for active in self._active.values()]

    # ---- tokens

    def _write(self, group: Any, active: ActiveRows) -> ActiveRows | None:
        """Write one token for every completion; return the running ones, with equal texts in one row of the context."""
        rows = [self._rows[i] for i in active.rows.tolist()]
        logits = active.context.read(self._view(group, active, rows), active.reads[:, None])[:, -1]
        settings: dict[Sampling, list[int]] = {}
        for r, row in enumerate(rows):
            settings.setdefault(row.kind, []).append(r)
        uniform = np.array([row.random[min(len(row.tokens), len(row.random) - 1)] for row in rows], np.float32)
        draws = []
        self._samplers = {kind: self._samplers.get(kind) or Sampler(kind) for kind in settings}
        for sampling, places in settings.items():
            state, from_, who = active.state[places], logits, np.array(places)
            if len(settings) > 1:
                used, state = np.unique(state, return_inverse=True)
                from_ = logits[mx.array(used)]
            draws.append((who, self._samplers[sampling](from_, mx.array(state), mx.array(uniform[who]))))
        tops = [(r, row.request) for r, row in enumerate(rows) if row.request.top and row.running]
        tables = self._alternatives(logits, active.state, tops) if tops else None
        mx.eval(draws, tables)
        tokens = np.zeros(len(rows), np.int32)
        for who, drawn in draws:
            drawn_tokens, logprobs, entropy = (np.array(a) for a in drawn)
            tokens[who] = drawn_tokens
            for r, token, logprob, h in zip(
                who, drawn_tokens.tolist(), logprobs.tolist(), entropy.tolist(), strict=True
            ):
                if rows[r].running:
                    self._record(rows[r], token, logprob, h)
        if tables is not None:
            ids, values = (np.array(a) for a in tables)
            for (r, request), line, value in zip(tops, ids, values, strict=True):
                rows[r].alternatives.append((line[: request.top], value[: request.top]))
        for i, row in zip(active.rows.tolist(), rows, strict=True):
            if not row.running:
                self._leave(i, row)
        running = np.array([row.running for row in rows])
        return active.after(tokens, running) if running.any() else None

    def _view(self, group: Any, active: ActiveRows, rows: Sequence[_Row]) -> Any:
        """Return the model to run the rows with, and say to it whose each row of the context is."""
        present = list(dict.fromkeys(row.request.weights for row in rows))
        few = len(rows) <= FEW
        made_for = (present[0], few) if len(present) == 1 else tuple(present)
        if group not in self._views or self._views[group][0] != made_for:
            models = [_model(weights) for weights in present]
            view: Any = folded(models[0], len(rows)) if len(present) == 1 else Mixed(self._base, models)
            self._views[group] = (made_for, view)
        view = self._views[group][1]
        if not isinstance(view, Mixed):
            return view
        owners = np.full(active.reads.shape[0], -1, np.int32)
        owners[active.state] = [present.index(row.request.weights) for row in rows]
        view.own(owners)
        return view.model

    def _alternatives(self, logits: mx.array, state: np.ndarray, tops: Sequence[tuple[int, Request]]) -> Any:
        """Return the likeliest tokens (N, K) of the rows in ``tops`` and their log-probs, before any filter."""
        l = logits[mx.array(state[[r for r, _ in tops]])].astype(mx.float32)
        l = l / mx.array([request.sampling.temperature or 1.0 for _, request in tops])[:, None]
        l = l - mx.logsumexp(l, axis=-1, keepdims=True)
        return likeliest(l, min(max(request.top for _, request in tops), l.shape[-1]))

    def _record(self, row: _Row, token: int, logprob: float, entropy: float) -> None:
        """Append a token to a completion, and note whether that ended it or failed its request."""
        if not np.isfinite(logprob):
            self.cancel(row.key)
            self._failed[row.key] = NotFiniteError(
                f"the logits of the model are not finite after {len(row.request.prompt) + len(row.tokens)} tokens; "
                "check the weights of the sampler"
            )
            return
        row.tokens.append(token)
        row.logprobs.append(logprob)
        row.entropy.append(entropy)
        row.stopped = token in row.request.stop
        if row.request.strings and not row.stopped:
            most = max(len(text.encode()) for text in row.request.strings)
            tail = self._tokenizer.decode(row.tokens[-most - 8 :])  # a text ends in the token that completes it
            row.stopped = any(text in tail for text in row.request.strings)

    def _leave(self, number: int, row: _Row) -> None:
        if self._rows.pop(number, None) is not None and not row.gone:
            self._left[row.key] -= 1
            self._ended[row.key].append(row)


def _model(weights: Any) -> nn.Module:
    assert isinstance(weights, Snapshot)
    return weights.model
