"""Predict the peak memory of updates and rollouts before step 1, and set sizes and limits that fit the device.

A model is measured on itself with a few hundred tokens; a step of any size is then a sum of these costs.
Sizes are in bytes; a GB is 10^9 bytes.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .._system import machine as host
from ..errors import UserError
from ..types import Batch, Completion, Episode
from .adapters.merging import trainable
from .decode import folded_weights as folded
from .engine import MLXEngine, pass_patches
from .kernels import attention
from .kernels.patching import patched
from .kernels.plain import plain_operations
from .read.context import Context
from .read.sizes import size_up, slot_block, step_slots
from .score.checkpointing import held
from .score.divergences import token_divergences
from .score.logprobs import Split, token_logprobs, tokens_at_once
from .score.micro_batches import Layout, arrays_of, compiled, hidden_states, padded

_LENGTHS = (12, 24, 48, 96, 192)  # tokens of the rows that costs are measured on, as far as memory allows
# likewise of compiled passes, which a CPU hardly has; CUDA's attention has a fused gradient for such lengths
_WIDE = {mx.cpu: (), mx.gpu: (128, 256, 512)}
_TIMES = {mx.cpu: 1, mx.gpu: 3}  # each is measured; memory that is let go of late only adds, so the least counts
_BEFORE = 5  # tokens of the prompt before such a row, which padding makes uneven, as most are
_CHUNKS = (1, 2, 4)  # chunks of tokens through the head, likewise, and parts of one: more hardly raise the peak
_FEWEST = 16  # tokens through the head that a measurement begins with
_SPARE = 64  # slots by which keys and values grow while decoding
_RECENT = 64  # slots of steps on a GPU that are written anew: those of the step before and after
_COPIED = 1.1  # own slots, with those of the layers that are being copied
_LOGITS = {mx.cpu: 11 * 4, mx.gpu: 6 * 4}  # bytes per logit while a token is drawn; a GPU joins operations
_SHARE = {mx.cpu: 0.8, mx.gpu: 0.9}  # of the device's memory that a run may plan with
_CACHED = 2**25  # bytes of freed buffers that MLX keeps on a CPU by default
_KEPT = 1 / 16  # of usable_memory(), on a CPU, for freed buffers, which MLX keeps beyond its limit on arrays
_MARGIN = {mx.cpu: 1.05, mx.gpu: 1.12}  # factor on predictions: MLX allocates some steps ahead
_FIRST_MARGIN = 1.25  # likewise, for the few tokens of a measurement, where those steps are much of the memory
_WIRED = "max_recommended_working_set_size"  # Metal's name for the memory that a GPU may use


@dataclass(frozen=True, slots=True)
class Workload:
    """The completions of one call of the engine, at their longest."""

    prompts: int
    group: int  # completions of each
    prompt_tokens: int
    completion_tokens: int

    @property
    def row(self) -> int:
        """The tokens of a prompt and a completion."""
        return self.prompt_tokens + self.completion_tokens

    @property
    def rows(self) -> int:
        return self.prompts * self.group

    def spanned(self, rows: int) -> int:
        """Return the most prompts that ``rows`` neighbouring rows can belong to."""
        return min(self.prompts, rows, (rows - 2) // self.group + 2)


@dataclass(frozen=True, slots=True)
class Curve:
    """The peak: base + token * tokens + pair * (pairs of a token and one that it attends to)."""

    base: float
    token: float
    pair: float

    @classmethod
    def through(cls, peaks: Mapping[float, float], before: int = 0) -> Self:
        """Fit the peaks of the three longest rows of so many tokens, each after a prompt of ``before`` tokens.

        Use a line where the curve would bend down, or two are known.
        """
        n, y = np.array([*peaks][-3:]), np.array([*peaks.values()][-3:])
        tokens, pairs = n + before, n * (n + before) + before * before
        if len(n) == 1:
            return cls(0.0, float(y[0] / tokens[0]), 0.0)
        bent = np.linalg.solve(np.stack([n**0, tokens, pairs], axis=1), y) if len(n) == 3 else (0.0, 0.0, -1.0)
        if bent[2] < 0:
            linear, constant = np.polyfit(tokens, y, 1)
            bent = (constant, linear, 0.0)
        return cls(max(0.0, float(bent[0])), float(bent[1]), float(bent[2]))

    def __call__(self, tokens: float, pairs: float) -> float:
        return self.base + self.token * tokens + self.pair * pairs


@dataclass(frozen=True, slots=True)
class Costs:
    """The memory that a model takes, measured on itself."""

    weights: float
    trained: float  # the trainable part of the weights
    recomputed: bool  # whether the backward pass computes some activations again
    learning: Curve  # a forward and backward pass through the body, gradients of the weights aside
    compiled: (
        Curve | None
    )  # likewise where passes are compiled, and then padded to ``size_up``; each is met first as is
    reading: Curve  # a forward pass, with the keys and values that it keeps
    cache: float  # keys and values of a token
    state: float  # running states of a row
    chunk: int  # tokens that the head takes at once
    head: Mapping[float, float]  # log-probs with gradients, by the number of chunks
    head_trained: float  # the part of ``trained`` that the head uses
    scored: float  # per scored token
    logits: float  # per row from which a token is drawn
    folded: float = 0.0  # copies of weights that a rollout makes
    block: float = 0.0  # the weights of a block, at most; steps on a GPU have them twice while they join them anew
    taught: tuple[Curve, ...] = ()  # the forward passes of teachers
    heads: int = 0  # query heads of the attention that keeps no scores beyond ``attention.most_kept()``; 0: none does

    @classmethod
    @plain_operations()
    def measure(
        cls,
        model: nn.Module,
        *,
        checkpoint_every: int = 0,
        compiled: bool = False,
        scored: float = math.inf,
        limit: float = math.inf,
        entropy: bool = False,
        teachers: Sequence[nn.Module] = (),
    ) -> Self:
        """Measure with passes over a few hundred tokens, fewer where those could pass ``limit`` bytes in all.

        ``scored`` are the tokens that an update scores at most; some updates have a bonus for the ``entropy``, or learn
        the distributions of ``teachers``. This resets MLX's record of its peak memory.
        """
        # a GPU gets up to some gigabytes of work ahead, unless MLX is at its limit; that is no cost of a model
        before = mx.set_memory_limit(1) if mx.default_device() == mx.gpu else None
        try:
            hidden = Split.of(model).body(mx.zeros((1, 1), mx.int32))
            vocabulary = model(mx.zeros((1, 1), mx.int32)).shape[-1]
            two, three = (_bytes(_read(model, n)) for n in (2, 3))
            chunk = tokens_at_once(vocabulary)
            parts = [2**i / chunk for i in range(chunk.bit_length()) if _FEWEST <= 2**i < chunk]
            needed = [n for n in (*parts, *_CHUNKS) if n < 2 * max(scored, _FEWEST) / chunk]
            learning, wide = _learning(model, checkpoint_every, compiled, limit)
            head = dict.fromkeys(needed, 0.0)
            for through in (_score(entropy), *map(_diverge, teachers)):
                of_states = partial(_head_gradients, model, hidden, through)
                found = _peaks(needed, lambda n, of=of_states: partial(of, math.ceil(n * chunk)), limit)  # type: ignore[misc]
                head = {n: max(head[n], peak) for n, peak in found.items() if n in head}
            states = max((Split.of(t).body(mx.zeros((1, 1), mx.int32)).nbytes for t in teachers), default=0)
            costs = cls(
                weights=_bytes(dict(tree_flatten(model.parameters())).values()),
                trained=_bytes(trainable(model).values()),
                recomputed=checkpoint_every > 0,
                learning=learning,
                compiled=wide,
                reading=_reading(model, limit),
                cache=three - two,
                state=3 * two - 2 * three,
                chunk=chunk,
                head=head,
                head_trained=_bytes(Split.of(model).trained().values()),
                # a hidden state: alone, concatenated, with its slopes; a teacher's, before and after it is ordered
                scored=3 * hidden.nbytes + 2 * states,
                logits=_LOGITS[mx.default_device().type] * vocabulary,
                folded=folded.copies(model),
                block=max(_bytes(dict(tree_flatten(block.parameters())).values()) for block in model.layers),
                taught=tuple(_reading(teacher, limit) for teacher in teachers),
                heads=_heads(model),
            )
            mx.clear_cache()
            mx.reset_peak_memory()
            return costs
        finally:
            if before is not None:
                mx.set_memory_limit(before)

    def update(self, work: Workload, micro_batch_tokens: int) -> float:
        """Return the peak of an update; shorter completions, of which more fit into a micro-batch, may need more."""
        fixed = self.weights + 2 * self.trained  # and the two moments of Adam
        peak = fixed + 3 * self.trained  # gradients as they were, scaled down, and one being made of them
        for completion in {max(1, work.completion_tokens // 2**i) for i in range(16)}:
            shorter = replace(work, completion_tokens=completion)
            rows = min(shorter.rows, max(1, micro_batch_tokens // shorter.row))
            accumulated = self.trained if rows < shorter.rows else 0.0
            # a compiled shape is met as it is before it is met compiled
            one_pass = self._pass(self.learning, shorter.spanned(rows), shorter.prompt_tokens, rows, completion)
            if self.compiled is not None:
                sizes = (shorter.spanned(rows), shorter.prompt_tokens, rows, completion)
                one_pass = max(one_pass, self._pass(self.compiled, *map(size_up, sizes)))
            prompts, p = shorter.spanned(rows), shorter.prompt_tokens
            pairs = prompts * p * p + rows * completion * (p + completion)
            for reading in self.taught:
                states = rows * completion * self.scored
                one_pass = max(one_pass, reading(prompts * p + rows * completion, pairs) + states)
            peak = max(peak, fixed + accumulated + self.trained + one_pass)
        return _MARGIN[mx.default_device().type] * peak

    def _pass(self, curve: Curve, prompts: int, p: int, n: int, t: int) -> float:
        """Return the peak of a pass over ``prompts`` prompts of p tokens and n completions of t tokens."""
        before, written, most = prompts * p * p, n * t * (p + t), math.inf
        if self.heads:
            most = attention.most_kept() / self.heads
        kept = sum(pairs for pairs in (before, written) if pairs <= most)
        body = curve(prompts * p + n * t, kept)
        if before > most or written > most:
            body += attention.tile_bytes(self.heads * (n * (p + t) if written > most else prompts * p))
        if written > most:  # shorter completions keep their scores
            shorter = (math.sqrt(p * p + 4 * most / n) - p) / 2
            body = max(body, curve(prompts * p + n * shorter, kept + most))
        # a checkpointed block gets copies of the prompt's keys and values, and of its state
        read = n * (p * self.cache + self.state) * (2 if self.recomputed else 1)
        return body + read + self.through_head(n * t / self.chunk) + n * t * self.scored

    def through_head(self, chunks: float) -> float:
        """Return the peak of log-probs with gradients; beyond what was measured, chunks add what the last ones did."""
        known, peaks = [0.0, *self.head], [0.0, *self.head.values()]
        beyond = max(0.0, chunks - known[-1])
        waiting = 2 * self.head_trained  # gradients of a chunk, to be added up
        slope = waiting if known[-1] == _CHUNKS[-1] else (peaks[-1] - peaks[-2]) / (known[-1] - known[-2])
        return float(np.interp(chunks, known, peaks)) + beyond * max(slope, waiting)

    def decode(self, work: Workload, rows: int, copies: bool = True) -> float:
        """Return the peak of decoding ``rows`` completions side by side, with or without copies of weights."""
        if mx.default_device() == mx.gpu:
            return self._decode_sharing(work, rows)
        prompts, p, n = work.spanned(rows), work.prompt_tokens, size_up(rows) if self.compiled is not None else rows
        step, block = 1 + min(_SPARE, work.completion_tokens), slot_block()
        slots = work.prompt_tokens + math.ceil(work.completion_tokens / step) * step
        slots = math.ceil(slots / block) * block  # keys and values of a row that is decoded to its end
        reading = self.reading(prompts * p, prompts * p * p)
        context = n * (slots * self.cache + self.state)
        entering = max(reading, context)  # rows that fork, leave or join: their context is held twice for a while
        peak = entering + context if rows < work.rows else max(reading, 2 * context)
        fixed = self.weights + 2 * self.trained  # and the two moments of Adam
        return _MARGIN[mx.default_device().type] * (fixed + copies * self.folded + n * self.logits + peak)

    def _decode_sharing(self, work: Workload, rows: int) -> float:
        """Return the peak of decoding by steps whose rows share their prompts' keys, as on a GPU."""
        prompts, p, n = work.spanned(rows), work.prompt_tokens, size_up(rows)
        slots = step_slots(step_slots(p) + work.completion_tokens) - step_slots(p) + _RECENT
        own = n * (slots * self.cache + self.state)
        shared = size_up(prompts) * step_slots(p) * self.cache
        # rows that leave, join or get more slots are copied a layer after the other, so that own slots are never twice
        peak = max(self.reading(prompts * p, prompts * p * p), _COPIED * own, self.block) + shared
        if rows < work.rows:  # others are read meanwhile
            peak += self.reading(prompts * p, prompts * p * p)
        fixed = self.weights + 4 * self.trained  # with the moments of Adam, and the LoRAs as steps want them
        return _MARGIN[mx.gpu] * (fixed + n * self.logits + peak)


@dataclass(frozen=True, slots=True)
class Plan:
    """The sizes that fit, and the peaks predicted for them."""

    micro_batch_tokens: int
    decode_rows: int
    update_bytes: float
    decode_bytes: float
    budget: float
    shrunk: tuple[str, ...]  # the settings that are smaller than requested
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
    """Return the two sizes as given, or as much smaller as ``budget`` requires; no result depends on them.

    ``evaluation`` is decoded, too. Raises UserError where even one completion at a time does not fit.
    """
    decoded = [training, *evaluation]

    def decode(rows: int, copies: bool) -> float:
        return max(costs.decode(work, min(rows, work.rows), copies) for work in decoded)

    copies = decode(decode_rows, copies=True) <= budget  # copies give way before anything is made smaller
    passes = range(min(training.rows, micro_batch_tokens // training.row), 0, -1)
    places = range(min(decode_rows, max(work.rows for work in decoded)), 0, -1)
    chosen, peaks = [], []
    for what, sizes, peak in (
        ("an update", [micro_batch_tokens, *(n * training.row for n in passes)], partial(costs.update, training)),
        ("decoding", [decode_rows, *places], partial(decode, copies=copies)),
    ):
        size = next((size for size in sizes if peak(size) <= budget), sizes[-1])  # of falling sizes
        if peak(size) > budget:
            raise UserError(
                f"{what} needs about {_gb(peak(size))} for one completion of {training.completion_tokens} tokens after "
                f"a prompt of {training.prompt_tokens}, and {_gb(budget)} may be used; lower rollout.max_tokens, "
                "shorten the prompts, set machine.checkpoint_every to 1, raise machine.memory_limit_gb, or choose a "
                "smaller or quantised model"
            )
        chosen.append(size)
        peaks.append(peak(size))
    requested = {"micro_batch_tokens": micro_batch_tokens, "decode_rows": decode_rows}
    shrunk = tuple(name for (name, most), size in zip(requested.items(), chosen, strict=True) if size < most)
    return Plan(
        micro_batch_tokens=chosen[0],
        decode_rows=chosen[1],
        update_bytes=peaks[0],
        decode_bytes=peaks[1],
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
    *,
    entropy: bool = False,
    teachers: Sequence[nn.Module] = (),
) -> Plan:
    """Set MLX's limits, measure the engine's model and give the engine sizes that fit into ``limit`` bytes.

    The engine is then held to the peaks that are predicted, since a GPU's work in flight would take what there is.
    ``limit`` defaults to ``usable_memory()``. The memory of other arrays is left to them, and room is left for
    ``copies`` copies of the trainable parameters. ``entropy`` and ``teachers`` are those of ``Costs.measure``. Raises
    UserError where no size fits.
    """
    budget = limit_memory(limit)
    costs = Costs.measure(
        engine.model,
        checkpoint_every=engine.checkpoint_every,
        compiled=engine.compiled,
        scored=training.rows * training.completion_tokens,
        limit=budget,
        entropy=entropy,
        teachers=teachers,
    )
    budget -= max(0.0, mx.get_active_memory() - costs.weights) + copies * costs.trained
    plan = fit(costs, training, budget, engine.micro_batch_tokens, engine.decode_rows, evaluation)
    engine.micro_batch_tokens, engine.decode_rows = plan.micro_batch_tokens, plan.decode_rows
    engine.copies = engine.copies and plan.copies
    hold(engine, costs, plan.update_bytes, plan.decode_bytes)
    return plan


def hold(engine: MLXEngine, costs: Costs, update_bytes: float, decode_bytes: float) -> None:
    """Make the engine wait for work in flight before it takes more than the predicted peaks.

    One operation may go beyond the point where it waits. The largest takes what each layer keeps, at most.
    """
    share, fixed = 1 - 1 / (2 + len(engine.model.layers)), costs.weights + 2 * costs.trained
    engine.room = {"update": share * update_bytes - fixed, "decode": share * decode_bytes - fixed}


def usable_memory() -> float:
    """Return the bytes that a run may plan with: most of the default device's memory, or of the container's share.

    Runs of a campaign that go on at the same time have equal parts of it.
    """
    info, device = mx.device_info(), mx.default_device().type
    known = [int(info[name]) for name in (_WIRED, "total_memory", "memory_size") if name in info]
    return _SHARE[device] * (known[0] if known and device == mx.gpu else host.memory()) / host.runs_at_a_time()


def limit_memory(limit: float | None = None) -> float:
    """Set MLX's limits for a run within ``limit`` bytes, or ``usable_memory()``; return the limit on arrays.

    On Metal the model stays resident, and the freed buffers that MLX keeps are bounded, since everything else on the
    machine lives in the same memory. On a CPU a part of ``usable_memory()`` is for such buffers, because memory that
    was returned to the system comes back page by page; with a ``limit`` MLX keeps its default of 32 MB of them,
    beside the limit. On CUDA MLX frees them when the limit is near.
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


def _gb(size: float) -> str:
    return f"{size / 1e9:.2f} GB"


def _bytes(arrays: Iterable[Any]) -> float:
    return float(sum(a.nbytes for a in arrays))


def _peaks(
    sizes: Sequence[float], pass_of: Callable[[float], Callable[[], list[Any]]], limit: float
) -> dict[float, float]:
    """Return the peaks of the first of ``sizes``, which double, and of those that stay below ``limit`` bytes in all.

    If p(n) = b + t n + q n^2 without a b, then p(2n) is 2 p(n) + 4 (p(n) - 2 p(n/2)); with one it is less.
    """
    peaks: dict[float, float] = {}
    before = most = 0.0
    for size in sizes:
        if peaks and most > limit - mx.get_active_memory():
            break
        results = pass_of(size)
        peaks[size] = now = min(_peak(results()) for _ in range(_TIMES[mx.default_device().type]))
        most = _FIRST_MARGIN * (2 * now + (4 * max(0.0, now - 2 * before) if before else 0.0))
        before = now
    return peaks


def _peak(results: list[Any]) -> float:
    """Return the peak extra bytes while evaluating ``results`` one at a time and releasing each."""
    before = mx.get_active_memory()
    mx.reset_peak_memory()
    while results:
        mx.eval(results.pop())
    return float(mx.get_peak_memory() - before)


def _learning(model: nn.Module, checkpoint_every: int, compiled: bool, limit: float) -> tuple[Curve, Curve | None]:
    """Return the costs of a forward and backward pass through the body, as it is and compiled."""

    def curve(lengths: Sequence[float], compiled: bool) -> Curve:
        peaks = _peaks(lengths, lambda n: _body_gradients(model, int(n), checkpoint_every, compiled), limit)
        return Curve.through(peaks, _BEFORE)

    plain = curve(_LENGTHS, compiled=False)
    room = limit - mx.get_active_memory()
    wide = [n for n in _WIDE[mx.default_device().type] if compiled and _FIRST_MARGIN * plain(n, n * n) <= room]
    return plain, curve(wide, compiled=True) if wide else plain if compiled else None


def _body_gradients(
    model: nn.Module, n: int, checkpoint_every: int, compile: bool
) -> Callable[[], list[list[mx.array]]]:
    """Return a function that returns gradients, not yet evaluated, for a completion of n tokens.

    Those of what blocks share come first, then those of each block's weights in order; those of the head are left out.
    """
    completion = Completion(np.zeros(n, np.int32), np.zeros(n, np.float32), None)
    episode = Episode.from_completion([0] * (_BEFORE + 1), completion, reward=0.0, group=0)
    layout = Layout.build(Batch.pack([episode], [np.ones(len(episode.tokens), np.float32)]))
    number = {id(block): i for i, block in enumerate(model.layers)}
    blocks = {f"{name}.": number[id(module)] for name, module in model.named_modules() if id(module) in number}
    others, first_to_last = (*blocks, *Split.of(model).trained()), sorted(blocks, key=lambda name: blocks[name])

    def differentiate(layout: Layout) -> Any:
        return nn.value_and_grad(model, lambda model: hidden_states(model, layout, checkpoint_every).sum())(model)[1]

    if compile:
        layout = padded(layout, prompts=not Context(model).recurrent)
        run = partial(compiled(model, layout, differentiate), arrays_of(layout))
    else:
        run = partial(differentiate, layout)

    def gradients() -> list[list[mx.array]]:
        with patched(model, pass_patches()):
            found: list[Any] = tree_flatten(run())  # type: ignore[assignment]
        shared = [value for name, value in found if not name.startswith(others)]
        return [shared, *([value for name, value in found if name.startswith(block)] for block in first_to_last)]

    return gradients


def _reading(model: nn.Module, limit: float) -> Curve:
    """Return the cost of a forward pass, with the keys and values that it keeps."""
    return Curve.through(_peaks(_LENGTHS, lambda n: lambda: [_read(model, int(n))], limit))


def _score(entropy: bool) -> Callable[[nn.Module, mx.array], mx.array]:
    """Return the sum of log-probs after states (N, D), and of entropies if asked for, as a function of a model."""

    def total(model: nn.Module, states: mx.array) -> mx.array:
        n = len(states)
        found = token_logprobs(Split.of(model), states, mx.zeros(n, mx.int32), mx.ones(n), entropy=entropy)
        return found.logprobs.sum() if found.entropy is None else found.logprobs.sum() + found.entropy.sum()

    return total


def _diverge(teacher: nn.Module) -> Callable[[nn.Module, mx.array], mx.array]:
    """Return the sum of divergences from a teacher after states (N, D) as a function of a model."""
    like = Split.of(teacher).body(mx.zeros((1, 1), mx.int32))

    def total(model: nn.Module, states: mx.array) -> mx.array:
        n, split = len(states), Split.of(teacher)
        theirs = mx.zeros((n, like.shape[-1]), like.dtype)
        return token_divergences(Split.of(model), states, split, theirs, mx.ones(n), beta=0.5).sum()

    return total


def _head_gradients(
    model: nn.Module, hidden: mx.array, through: Callable[[nn.Module, mx.array], mx.array], n: int
) -> list[Any]:
    """Return gradients of what n states like ``hidden`` give ``through`` the head, by them and by its weights."""
    states = mx.zeros((n, hidden.shape[-1]), hidden.dtype)
    mx.eval(states)
    outside = Split.of(model).trained()

    by_states = mx.grad(lambda states: through(model, states))(states)
    if not outside:
        return [by_states]
    gradients: list[Any] = tree_flatten(nn.value_and_grad(model, through)(model, states)[1])  # type: ignore[assignment]
    return [[gradient for name, gradient in gradients if name in outside]]


def _heads(model: nn.Module) -> int:
    """Return the most query heads of an attention of ``model`` that keeps no scores where they are many; 0: it does."""
    seen = [0]

    def noted(
        queries: mx.array, keys: mx.array, values: mx.array, cache: Any, scale: float, mask: Any, **sinks: Any
    ) -> Any:
        seen.append(2**31 if isinstance(mask, mx.array) and mask.dtype != mx.bool_ else queries.shape[1])
        return attention.attention(queries, keys, values, cache, scale, mask, **sinks)

    with patched(model, {"scaled_dot_product_attention": noted}):
        model(mx.zeros((1, 2), mx.int32))
    return max(seen) % 2**31


def _read(model: nn.Module, n: int) -> list[mx.array]:
    """Return the arrays that a row of n tokens leaves in the context, not yet evaluated."""
    context = Context(model)
    context.read(model, mx.zeros((1, n), mx.int32))
    return list(held(context.layers).values())
