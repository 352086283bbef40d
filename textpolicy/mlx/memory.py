"""What updates and rollouts will need at their peak, predicted before step 1, and limits that suit the device.

A model is measured on itself with a few hundred tokens; a step of any size is then a sum of these costs.
Sizes are in bytes, GB are 10^9 of them.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .._system import machine as host
from ..errors import UserError
from .adapters.merging import trainable
from .decode import folded_weights as folded
from .engine import MLXEngine
from .kernels import cuda
from .read.context import Context
from .read.sizes import size_up
from .score.checkpointing import held, recomputing
from .score.logprobs import Split, token_logprobs, tokens_at_once

_LENGTHS = (48, 96, 192)  # tokens of the rows that costs are measured on
_CHUNKS = (0, 1, 2, 4)  # of tokens through the head: more hardly raise the peak
_SPARE = 64  # slots by which keys and values grow while decoding
_BLOCK = {mx.cpu: 1, mx.gpu: 256}  # slots are allocated in these
_LOGITS = 11 * 4  # bytes per logit while a token is drawn from float32 ones
_SHARE = {mx.cpu: 0.8, mx.gpu: 0.9}  # of the device's memory that a run may plan with
_CACHED = 2**25  # bytes of freed buffers that MLX keeps on a CPU if it is not told otherwise
_KEPT = 1 / 16  # of that, on a CPU, for freed buffers, which MLX keeps beyond its limit on arrays
_MARGIN = 1.05  # on what is predicted: MLX allocates some steps ahead
_WIRED = "max_recommended_working_set_size"  # what Metal calls the memory that a GPU may use


@dataclass(frozen=True, slots=True)
class Workload:
    """Completions of one call of the engine, at their longest."""

    prompts: int
    group: int  # completions of each
    prompt_tokens: int
    completion_tokens: int

    @property
    def row(self) -> int:
        """Tokens of a prompt and a completion."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    def spanned(self, rows: int) -> int:
        """The most prompts that so many neighbouring rows can belong to."""
        return min(self.prompts, rows, (rows - 2) // self.group + 2)


@dataclass(frozen=True, slots=True)
class Curve:
    """Peak = base + token * tokens + pair * (pairs of a token and one that it attends to)."""

    base: float
    token: float
    pair: float

    @classmethod
    def through(cls, peak: Callable[[int], float]) -> Self:
        """From rows of three lengths; a line where the curve would bend down."""
        n, y = np.array(_LENGTHS, float), np.array([peak(length) for length in _LENGTHS])
        square, linear, constant = np.polyfit(n, y, 2)
        if square < 0:
            square, (linear, constant) = 0.0, np.polyfit(n, y, 1)
        return cls(max(0.0, float(constant)), float(linear), float(square))

    def __call__(self, tokens: float, pairs: float) -> float:
        return self.base + self.token * tokens + self.pair * pairs


@dataclass(frozen=True, slots=True)
class Costs:
    """What a model takes, measured on itself."""

    weights: float
    trained: float  # the part of the weights that is trained
    recomputed: bool  # some activations, in the backward pass
    compiled: bool  # passes are padded to ``size_up``
    learning: Curve  # a forward and backward pass through the body, gradients of the weights aside
    reading: Curve  # a forward pass, with what is kept of it
    cache: float  # keys and values of a token
    state: float  # running states of a row
    chunk: int  # tokens that the head takes at once
    head: tuple[float, ...]  # log-probs with gradients of _CHUNKS chunks
    head_trained: float  # the part of ``trained`` that the head uses
    scored: float  # of each of these tokens
    logits: float  # of a row from which a token is drawn
    folded: float = 0.0  # copies of weights that a rollout makes

    @classmethod
    def measure(cls, model: nn.Module, *, checkpoint_every: int = 0, compiled: bool = False) -> Self:
        """Takes passes over a few hundred tokens. MLX's record of its peak memory begins anew."""
        with _nothing_ahead():
            return cls._measured(model, checkpoint_every, compiled)

    @classmethod
    def _measured(cls, model: nn.Module, checkpoint_every: int, compiled: bool) -> Self:
        hidden = Split.of(model).body(mx.zeros((1, 1), mx.int32))
        vocabulary = model(mx.zeros((1, 1), mx.int32)).shape[-1]
        two, three = (_bytes(_read(model, n)) for n in (2, 3))
        chunk = tokens_at_once(vocabulary)
        costs = cls(
            weights=_bytes(dict(tree_flatten(model.parameters())).values()),
            trained=_bytes(trainable(model).values()),
            recomputed=checkpoint_every > 0,
            compiled=compiled,
            learning=Curve.through(lambda n: _peak(_body_gradients(model, n, checkpoint_every))),
            reading=Curve.through(lambda n: _peak([_read(model, n)])),
            cache=three - two,
            state=3 * two - 2 * three,
            chunk=chunk,
            head=tuple(_peak(_head_gradients(model, hidden, n * chunk)) if n else 0.0 for n in _CHUNKS),
            head_trained=_bytes(Split.of(model).trained().values()),
            scored=3 * hidden.nbytes,  # as they come, joined, and with their slopes
            logits=_LOGITS * vocabulary,
            folded=folded.copies(model),
        )
        mx.clear_cache()
        return costs

    @property
    def fixed(self) -> float:
        """Weights and the two moments of Adam."""
        return self.weights + 2 * self.trained

    def update(self, work: Workload, micro_batch_tokens: int) -> float:
        """The peak of an update; shorter completions, of which more fit into a micro-batch, may need more."""
        lengths = {max(1, work.completion_tokens // 2**i) for i in range(16)}
        shorter = [replace(work, completion_tokens=t) for t in lengths]
        return max(self._update(w, min(w.rows, max(1, micro_batch_tokens // w.row))) for w in shorter)

    def _update(self, work: Workload, rows: int) -> float:
        accumulated = self.trained if rows < work.rows else 0.0
        gradients = self.trained
        optimizer = self.fixed + 3 * self.trained  # gradients as they were, scaled down, and one being made of them
        return _MARGIN * max(optimizer, self.fixed + accumulated + gradients + self._pass(work, rows))

    def _pass(self, work: Workload, rows: int) -> float:
        """Of one micro-batch."""
        up: Callable[[int], int] = size_up if self.compiled else int
        prompts, p, t = up(work.spanned(rows)), up(work.prompt_tokens), up(work.completion_tokens)
        n = up(rows)
        tokens, pairs = prompts * p + n * t, prompts * p * p + n * t * (p + t)
        # the prompt's for each row, and with its own; a block that is computed again gets them handed
        read = n * ((p + p + t) * self.cache + self.state) * (2 if self.recomputed else 1)
        return self.learning(tokens, pairs) + read + self._head(n * t) + n * t * self.scored

    def _head(self, tokens: int) -> float:
        chunks = tokens / self.chunk
        waiting = 2 * max(0.0, chunks - _CHUNKS[-1]) * self.head_trained  # gradients of chunks, to be added up
        return float(np.interp(chunks, _CHUNKS, self.head)) + waiting

    def decode(self, work: Workload, rows: int, copies: bool = True) -> float:
        """The peak of decoding ``rows`` completions side by side, with copies of weights or without."""
        prompts, p, n = work.spanned(rows), work.prompt_tokens, size_up(rows) if self.compiled else rows
        reading = self.reading(prompts * p, prompts * p * p)
        context = n * (_slots(work) * self.cache + self.state)
        entering = max(reading, context)  # rows that fork, leave or join: what they read is there twice for a while
        peak = entering + context if rows < work.rows else max(reading, 2 * context)
        return _MARGIN * (self.fixed + copies * self.folded + n * self.logits + peak)


def _slots(work: Workload) -> int:
    """Of the keys and values of a row that is decoded to its end."""
    step, block = 1 + min(_SPARE, work.completion_tokens), _BLOCK[mx.default_device().type]
    slots = work.prompt_tokens + math.ceil(work.completion_tokens / step) * step
    return math.ceil(slots / block) * block


@dataclass(frozen=True, slots=True)
class Plan:
    """Sizes that fit, and the peaks predicted for them."""

    micro_batch_tokens: int
    decode_rows: int
    update_bytes: float
    decode_bytes: float
    budget: float
    shrunk: tuple[str, ...]  # the settings that are smaller than was asked for
    copies: bool = True  # whether rollouts may make copies of weights

    def __str__(self) -> str:
        return (
            f"an update needs about {_gb(self.update_bytes)} with micro_batch_tokens {self.micro_batch_tokens}, "
            f"decoding {_gb(self.decode_bytes)} with decode_rows {self.decode_rows}; {_gb(self.budget)} may be used"
        )


def fit(
    costs: Costs,
    training: Workload,
    budget: float,
    micro_batch_tokens: int,
    decode_rows: int,
    evaluation: Sequence[Workload] = (),
) -> Plan:
    """The two sizes as given, or as much smaller as ``budget`` wants them; no result depends on them.

    ``evaluation`` is decoded, too. Raises UserError where even one completion at a time does not fit.
    """
    decoded = [training, *evaluation]

    def update(tokens: int) -> float:
        return costs.update(training, tokens)

    def decode(rows: int, copies: bool) -> float:
        return max(costs.decode(work, min(rows, work.rows), copies) for work in decoded)

    copies = decode(decode_rows, copies=True) <= budget  # before anything is made smaller for them
    side = partial(decode, copies=copies)
    rows = range(min(training.rows, micro_batch_tokens // training.row), 0, -1)
    tokens = _largest([micro_batch_tokens, *(n * training.row for n in rows)], update, budget)
    side_by_side = _largest([decode_rows, *range(min(decode_rows, max(w.rows for w in decoded)), 0, -1)], side, budget)
    for what, size, peak in (("an update", tokens, update), ("decoding", side_by_side, side)):
        if peak(size) > budget:
            raise UserError(_does_not_fit(what, peak(size), budget, training))
    asked = {"micro_batch_tokens": micro_batch_tokens, "decode_rows": decode_rows}
    sizes = {"micro_batch_tokens": tokens, "decode_rows": side_by_side}
    shrunk = tuple(name for name, size in sizes.items() if size < asked[name])
    return Plan(
        **sizes,
        update_bytes=update(tokens),
        decode_bytes=side(side_by_side),
        budget=budget,
        shrunk=shrunk,
        copies=copies,
    )


def preflight(
    engine: MLXEngine,
    training: Workload,
    evaluation: Sequence[Workload] = (),
    limit: float | None = None,
    copies: int = 0,
) -> Plan:
    """Set MLX's limits, measure the engine's model and give the engine sizes that fit into ``limit`` bytes.

    ``limit`` is ``usable_memory()`` if not given; what other arrays take of it is left to them, and room for so many
    ``copies`` of what is trained. Raises UserError where no size fits.
    """
    budget = limit_memory(limit)
    costs = Costs.measure(engine.model, checkpoint_every=engine.checkpoint_every, compiled=engine.compiled)
    budget -= max(0.0, mx.get_active_memory() - costs.weights) + copies * costs.trained
    plan = fit(costs, training, budget, engine.micro_batch_tokens, engine.decode_rows, evaluation)
    engine.micro_batch_tokens, engine.decode_rows = plan.micro_batch_tokens, plan.decode_rows
    engine.copies = engine.copies and plan.copies
    return plan


def usable_memory() -> float:
    """What a run may plan with: most of the default device's memory, or of this container's share of it."""
    info, device = mx.device_info(), mx.default_device().type
    known = [int(info[name]) for name in (_WIRED, "total_memory", "memory_size") if name in info]
    return _SHARE[device] * (known[0] if known and device == mx.gpu else host.memory())


def limit_memory(limit: float | None = None) -> float:
    """Set MLX's limits for a run within ``limit`` bytes, or ``usable_memory()``; returns the one on arrays.

    On Metal the model stays resident, and freed buffers that MLX keeps are bounded, since all else on the machine
    lives in the same memory. On a CPU a part of ``usable_memory()`` is for such buffers, since what goes back to the
    system comes again page by page; with a ``limit`` MLX keeps its default of 32 MB of them, beside what was asked
    for. On CUDA MLX gives them back when the limit is near.
    """
    budget, info = limit or usable_memory(), mx.device_info()
    if mx.default_device() == mx.cpu:
        kept = 0.0 if limit else _KEPT * budget
        mx.set_cache_limit(int(kept or _CACHED))
        budget -= kept
    elif _WIRED in info:
        mx.set_cache_limit(int(budget / 4))
        mx.set_wired_limit(int(min(budget, info[_WIRED])))
    mx.set_memory_limit(int(budget))
    return budget


def _largest(sizes: Sequence[int], peak: Callable[[int], float], budget: float) -> int:
    """The first of falling ``sizes`` whose peak fits, or the last."""
    return next((size for size in sizes if peak(size) <= budget), sizes[-1])


def _does_not_fit(what: str, peak: float, budget: float, work: Workload) -> str:
    return (
        f"{what} needs about {_gb(peak)} for one completion of {work.completion_tokens} tokens after a prompt of "
        f"{work.prompt_tokens}, and {_gb(budget)} may be used; lower rollout.max_tokens, shorten the prompts, set "
        "machine.checkpoint_every to 1, raise machine.memory_limit_gb, or choose a smaller or quantised model"
    )


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


# Measuring


@contextmanager
def _nothing_ahead() -> Iterator[None]:
    """CUDA is handed up to some gigabytes of work ahead, unless MLX is at its limit; that is no cost of a model."""
    if not cuda.is_default():
        yield
        return
    before = mx.set_memory_limit(1)
    try:
        yield
    finally:
        mx.set_memory_limit(before)


def _bytes(arrays: Iterable[Any]) -> float:
    return float(sum(a.nbytes for a in arrays))


def _peak(results: list[Any]) -> float:
    """Bytes that computing ``results`` one after another takes beyond what is there, each dropped once it is there."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    while results:
        mx.eval(results.pop())
    return float(mx.get_peak_memory() - before)


def _body_gradients(model: nn.Module, n: int, checkpoint_every: int) -> list[list[mx.array]]:
    """Of what blocks share, then of each block's weights, first block first, for a row of n tokens; not the head's."""
    split = Split.of(model)
    number = {id(block): i for i, block in enumerate(model.layers)}
    blocks = {f"{name}.": number[id(module)] for name, module in model.named_modules() if id(module) in number}

    def loss(model: nn.Module) -> mx.array:
        return replace(split, model=recomputing(model, checkpoint_every)).body(mx.zeros((1, n), mx.int32)).sum()

    gradients: list[Any] = tree_flatten(nn.value_and_grad(model, loss)(model)[1])  # type: ignore[assignment]
    others = (*blocks, *split.trained())
    shared = [value for name, value in gradients if not name.startswith(others)]
    first_to_last = sorted(blocks, key=lambda name: blocks[name])
    return [shared, *([value for name, value in gradients if name.startswith(block)] for block in first_to_last)]


def _head_gradients(model: nn.Module, hidden: mx.array, n: int) -> list[Any]:
    """Of log-probs after n states of the width and type of ``hidden``, by the states and the head's weights."""
    states = mx.zeros((n, hidden.shape[-1]), hidden.dtype)
    mx.eval(states)
    outside = Split.of(model).trained()

    def loss(model: nn.Module, states: mx.array) -> mx.array:
        return token_logprobs(Split.of(model), states, mx.zeros(n, mx.int32), mx.ones(n)).logprobs.sum()

    by_states = mx.grad(lambda states: loss(model, states))(states)
    if not outside:
        return [by_states]
    gradients: list[Any] = tree_flatten(nn.value_and_grad(model, loss)(model, states)[1])  # type: ignore[assignment]
    return [[gradient for name, gradient in gradients if name in outside]]


def _read(model: nn.Module, n: int) -> list[mx.array]:
    """What a row of n tokens leaves behind, not yet computed."""
    context = Context(model)
    context.read(model, mx.zeros((1, n), mx.int32))
    return list(held(context.layers).values())
