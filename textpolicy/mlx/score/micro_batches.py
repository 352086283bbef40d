"""The log-probs and gradients of a batch's sampled tokens in micro-batches, with nothing computed twice.

The prompts of a batch form a tree (see ``PromptTree``). Completions with equal text after the same prompt
are scored once, completions of similar length run together, and only the positions before a sampled
token reach the model's head (see logprobs.py).

Compiled functions need few shapes, so ``padded`` rounds them up, which changes no number. MLX keeps every function
that it has compiled for as long as the Python function lives, so ``Gradients`` keeps them in a bounded table, one
for each shape, and compiles a shape when it occurs for the second time.
"""

from __future__ import annotations

import math
from collections import OrderedDict
from collections.abc import Callable, Hashable, Iterator, Sequence
from dataclasses import KW_ONLY, dataclass, field, replace
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...types import Batch
from ..kernels.gathers import take_rows
from ..kernels.plain import plain_operations, refuse_kernels_alone
from ..read.context import Context
from ..read.prompts import PromptTree
from ..read.sizes import size_up
from .checkpointing import checkpointed
from .logprobs import Scored, Split, token_logprobs

_NARROWER = 0.75  # completions shorter than this share of the longest in their pass get a pass of their own
_KEPT = 64  # shapes remembered, compiled or not

# (B, T) log-probs and the rows they belong to, MLX arrays in their fields -> loss, sums or arrays to report
Objective = Callable[[mx.array, Any], tuple[mx.array, dict[str, mx.array]]]
Form = tuple[str, tuple[int, ...]]  # name and shape of what an objective reports


@dataclass(frozen=True, slots=True, eq=False)
class Pass:
    """The R continuations of one forward pass."""

    inputs: np.ndarray  # (R, T) int32, from the last prompt token on
    parents: np.ndarray  # (R,) int32, the prompt of the tree that each continues
    picked: np.ndarray  # (M,) int32, the positions before a sampled token, of the flattened (R, T)


@dataclass(frozen=True, slots=True, eq=False)
class Layout:
    """The arrangement of B rows for ``score``: their distinct continuations, with N sampled tokens in all."""

    tree: PromptTree
    passes: tuple[Pass, ...]  # longest continuations first
    targets: np.ndarray  # (N,) int32, or (N, K) where a position has K, pass after pass
    temperatures: np.ndarray  # (N,) float32
    place: np.ndarray  # (D, T) int32, the index among the N of each position; N where nothing was sampled
    which: np.ndarray  # (B,) int32, the continuation, of D, of each row
    rows: Batch  # (B, T), the batch with every row moved to its first sampled target

    @classmethod
    def build(cls, batch: Batch) -> Layout:
        """Return the layout of ``batch``, which must not contain a row without weights."""
        prompts, spans = prompt_rows(batch), batch.lengths - batch.starts
        # move every row to the left edge, from its first sampled target on
        columns = np.minimum(batch.starts[:, None] + np.arange(spans.max()), batch.weights.shape[1] - 1)
        inside = np.arange(spans.max()) < spans[:, None]
        moved, outside = (np.arange(len(batch))[:, None], columns), ~inside

        def left(a: np.ndarray) -> np.ndarray:
            out = a[moved]
            out[outside] = 0
            return out

        rows = batch.map(left, skip=("temperatures",))
        # choose a row of each distinct continuation, longest first; row b has the continuation which[b]
        keys = [
            (prompt.tobytes(), tokens[:span].tobytes(), target[:span].tobytes(), float(t))
            for prompt, tokens, target, span, t in zip(
                prompts, rows.inputs, rows.targets, spans, rows.temperatures[:, 0], strict=True
            )
        ]
        first = {key: i for i, key in reversed(list(enumerate(keys)))}
        chosen = np.array(sorted(first.values(), key=lambda i: -spans[i]))
        place = {keys[i]: d for d, i in enumerate(chosen)}
        which = np.array([place[key] for key in keys])
        sampled = np.zeros((len(chosen), rows.weights.shape[1]), bool)
        np.logical_or.at(sampled, which, rows.scored)
        numbered = np.where(sampled, np.cumsum(sampled).reshape(sampled.shape) - 1, sampled.sum())
        # cut the continuations into passes of similar lengths
        tree, widths = PromptTree.build([prompts[i] for i in chosen]), spans[chosen].tolist()
        starts = [0]
        for i, width in enumerate(widths):
            if width < _NARROWER * widths[starts[-1]]:
                starts.append(i)
        passes = []
        for a, b in zip(starts, [*starts[1:], len(widths)], strict=True):
            inputs, picked = rows.inputs[chosen[a:b], : widths[a]], np.flatnonzero(sampled[a:b, : widths[a]])
            passes.append(Pass(inputs, tree.parents[a:b], picked))
        return cls(
            tree=tree,
            passes=tuple(passes),
            targets=rows.targets[chosen][sampled],
            temperatures=np.broadcast_to(rows.temperatures[chosen], sampled.shape)[sampled],
            place=numbered.astype(np.int32),
            which=which.astype(np.int32),
            rows=rows,
        )

    def map(self, fn: Callable[[np.ndarray], Any]) -> Layout:
        """Return ``fn`` of every array that scoring reads; of ``tree.lengths`` last, and only if they are traced."""
        other = Layout(
            tree=replace(self.tree, header=fn(self.tree.header), rests=fn(self.tree.rests)),
            passes=tuple(Pass(fn(p.inputs), fn(p.parents), fn(p.picked)) for p in self.passes),
            targets=fn(self.targets),
            temperatures=fn(self.temperatures),
            place=fn(self.place),
            which=fn(self.which),
            rows=self.rows.map(fn),
        )
        return replace(other, tree=replace(other.tree, lengths=fn(self.tree.lengths))) if self.tree.traced else other


def prompt_rows(batch: Batch) -> list[np.ndarray]:
    """Return each row's tokens up to the one that its first sampled target follows."""
    return [row[: start + 1] for row, start in zip(batch.inputs, batch.starts, strict=True)]


def micro_batches(batch: Batch, max_tokens: int, max_rows: int | None = None) -> Iterator[tuple[np.ndarray, Layout]]:
    """Yield (R,) int rows of ``batch`` and their layout, with the rows of a prompt side by side.

    A micro-batch has at most ``max_tokens`` padded tokens, its prompts included, or one row, and at most
    ``max_rows`` rows if given. There are as few as that takes, and as even as they can be, because the largest
    decides the peak memory. Any split has the same gradient.
    """
    # equal prompts together, in the order of the batch, long rows of each first
    prompts = [p.tobytes() for p in prompt_rows(batch)]
    first = {key: i for i, key in reversed(list(enumerate(prompts)))}
    order = np.lexsort((-batch.lengths, np.array([first[p] for p in prompts])))
    lengths, rows_at_most = batch.lengths[order].tolist(), len(batch) if max_rows is None else max_rows
    runs = _runs(lengths, max_tokens, rows_at_most)
    # bisect for the fewest tokens that take no more runs
    largest = max((max(lengths[a:b]) * (b - a) for a, b in runs), default=0)
    too_few, enough = 0, min(largest, max_tokens)
    while enough - too_few > 1:
        middle = (too_few + enough) // 2
        narrower = _runs(lengths, middle, rows_at_most)
        if len(narrower) > len(runs):
            too_few = middle
        else:
            runs, enough = narrower, middle
    for start, stop in runs:
        rows = order[start:stop]
        yield rows, Layout.build(batch.take(rows, max(lengths[start:stop])))


def _runs(lengths: Sequence[int], max_tokens: int, max_rows: int) -> list[tuple[int, int]]:
    """Return (start, stop) of consecutive runs of ``lengths``, each as long as the limits allow."""
    runs, start, width = [], 0, 0
    for i, length in enumerate(lengths):
        if i > start and (i - start == max_rows or max(width, length) * (i + 1 - start) > max_tokens):
            runs.append((start, i))
            start, width = i, 0
        width = max(width, length)
    return [*runs, (start, len(lengths))] if lengths else []


def score(model: nn.Module, layout: Layout, *, checkpoint_every: int = 0, gradient: bool = True) -> mx.array:
    """Return (B, T) float32 log-probs of the rows' sampled targets at their temperatures; 0 elsewhere.

    They are (B, T, K) where a position has K targets. The activations of every ``checkpoint_every``-th block are
    computed again in the backward pass (0: of none). Without ``gradient`` it is cheaper and must not be differentiated.
    """
    return scores(model, layout, checkpoint_every=checkpoint_every, gradient=gradient).logprobs


def scores(
    model: nn.Module, layout: Layout, *, checkpoint_every: int = 0, gradient: bool = True, entropy: bool = False
) -> Scored:
    """Return what ``score`` does, and with ``entropy`` (B, T) float32 entropies of the distributions, in nats."""
    split, hidden = Split.of(model), hidden_states(model, layout, checkpoint_every)
    targets, temperatures = mx.array(layout.targets), mx.array(layout.temperatures)
    flat = token_logprobs(split, hidden, targets, temperatures, entropy=entropy, gradient=gradient)

    def placed(values: mx.array) -> mx.array:
        grid = mx.concatenate([values, mx.zeros((1, *values.shape[1:]))])[mx.array(layout.place)]  # (D, T), (D, T, K)
        return take_rows(grid, mx.array(layout.which))

    return Scored(placed(flat.logprobs), None if flat.entropy is None else placed(flat.entropy))


def hidden_states(model: nn.Module, layout: Layout, checkpoint_every: int = 0) -> mx.array:
    """Return the hidden states (N, D) before the sampled tokens of ``layout``."""
    split = Split.of(model)
    reader = replace(split, model=checkpointed(model, checkpoint_every)) if checkpoint_every else split
    context = layout.tree.read(reader.model)
    hidden = []
    for part in layout.passes:
        states = context.fork(part.parents).read(reader.body, mx.array(part.inputs))
        hidden.append(states.reshape(-1, states.shape[-1])[mx.array(part.picked)])  # (M, D)
    return mx.concatenate(hidden)


@plain_operations()
def logprobs_of(model: nn.Module, batch: Batch, max_tokens: int, max_rows: int | None = None) -> np.ndarray:
    """Return float32 log-probs of the sampled targets, in their shape, without gradients; 0 elsewhere."""
    out = np.zeros(batch.targets.shape, np.float32)
    live = np.flatnonzero(batch.scored.any(axis=1))
    for rows, layout in micro_batches(batch.take(live), max_tokens, max_rows):
        scored = np.array(score(model, layout, gradient=False))
        for i, line in zip(live[rows], scored, strict=True):
            start, stop = batch.starts[i], batch.lengths[i]
            out[i, start:stop] = line[: stop - start]
    out[~batch.scored] = 0
    return out


def padded(layout: Layout, prompts: bool) -> Layout:
    """Return ``layout`` with sizes of ``size_up`` throughout; ``prompts`` pads those of its prompts, too.

    The added tokens are not picked, have no weight and no place in the result. A model with running states
    must read its prompts as they are.
    """
    n = len(layout.targets)
    more, passes = size_up(n) - n, []
    for part in layout.passes:
        (rows, width), wide = part.inputs.shape, size_up(part.inputs.shape[1])
        row, column = np.divmod(part.picked, width)
        inputs, parents = _padded(part.inputs, size_up(rows), wide), np.pad(part.parents, (0, size_up(rows) - rows))
        passes.append(Pass(inputs, parents, row * wide + column))
    passes[-1] = replace(passes[-1], picked=np.pad(passes[-1].picked, (0, more)))
    tree = layout.tree
    if prompts:  # the end of the header moves into the rests, which the padding makes unequal
        kept = next(size for size in range(len(tree.header), -1, -1) if size_up(size) == size)
        moved = np.tile(tree.header[kept:], (len(tree.rests), 1))
        rests = np.concatenate([moved, tree.rests], axis=1)
        tall, wide = (size_up(k) for k in rests.shape)
        lengths = np.pad(tree.lengths + moved.shape[1], (0, tall - len(rests)))
        tree = replace(tree, header=tree.header[:kept], rests=_padded(rests, tall, wide), lengths=lengths, traced=True)
    distinct, wide = (size_up(k) for k in layout.place.shape)
    tall = size_up(len(layout.rows))
    temperatures = np.pad(layout.rows.temperatures, [(0, tall - len(layout.rows)), (0, 0)], constant_values=1)
    rows = layout.rows.map(lambda a: _padded(a, tall, wide), skip=("temperatures",))
    return Layout(
        tree=tree,
        passes=tuple(passes),
        targets=np.pad(layout.targets, [(0, more)] + [(0, 0)] * (layout.targets.ndim - 1)),
        temperatures=np.pad(layout.temperatures, (0, more), constant_values=1),
        place=_padded(np.where(layout.place == n, n + more, layout.place), distinct, wide, n + more),
        which=np.pad(layout.which, (0, tall - len(layout.rows))),
        rows=replace(rows, temperatures=temperatures),
    )


def _padded(array: np.ndarray, rows: int, width: int, value: int = 0) -> np.ndarray:
    more = [(0, rows - array.shape[0]), (0, width - array.shape[1])]
    return np.pad(array, more + [(0, 0)] * (array.ndim - 2), constant_values=value)


def arrays_of(layout: Layout) -> list[mx.array]:
    """Return the arrays of ``layout`` that scoring reads, the inputs of a ``compiled`` function."""
    arrays: list[mx.array] = []
    layout.map(lambda a: arrays.append(mx.array(a)))
    return arrays


def compiled(model: nn.Module, like: Layout, fn: Callable[[Layout], Any]) -> Callable[[Sequence[mx.array]], Any]:
    """Return ``fn``, which may differentiate ``model``, compiled for the arrays of layouts shaped like ``like``."""

    def step(arrays: Sequence[mx.array]) -> Any:
        traced, own = iter(arrays), model.trainable_parameters()
        try:
            return fn(like.map(lambda _: next(traced)))
        finally:
            model.update(own)  # mx.compile wants its inputs back as they were

    return mx.compile(step, inputs=[model.state])


@dataclass(eq=False)
class Gradients:
    """The gradients of an objective by the trainable parameters of ``model``.

    A compiled function is reused for objectives that compare equal, such as frozen dataclasses.
    """

    model: nn.Module
    _: KW_ONLY
    checkpoint_every: int = 0
    compiled: bool = False
    # the shapes so far, oldest first; None: occurred once. A resumed run knows them by their ``repr``.
    known: OrderedDict[Hashable, Callable[..., Any] | None] = field(default_factory=OrderedDict)

    @plain_operations()
    def __call__(self, layout: Layout, objective: Objective) -> tuple[dict[str, mx.array], Any]:
        """Return what the objective reports, and the gradients."""
        refuse_kernels_alone(self.model)
        compute = self._compiled if self.compiled else self._differentiate
        forms, flat, gradients = compute(layout, objective)
        ends = accumulate(math.prod(shape) for _, shape in forms)
        reported = {
            name: flat[end - math.prod(shape) : end].reshape(shape)
            for (name, shape), end in zip(forms, ends, strict=True)
        }
        return reported, gradients

    def _compiled(self, layout: Layout, objective: Objective) -> tuple[list[Form], mx.array, Any]:
        """Return what ``_differentiate`` does, from a compiled function if this shape occurred before."""
        wide = padded(layout, prompts=not Context(self.model).recurrent)
        given = arrays_of(wide)  # what varies between layouts of one key
        # all that a compiled function cannot see: shapes, the lengths that stay in Python, and which arrays there are
        lengths = wide.tree.lengths.shape if wide.tree.traced else tuple(wide.tree.lengths.tolist())
        missing = tuple(a is None for a in (wide.rows.old, wide.rows.reference, wide.rows.echo, wide.rows.bonus))
        key: Hashable = (objective, (tuple(a.shape for a in given), lengths, missing))
        if repr(key) in self.known:  # it occurred before the run was resumed
            del self.known[repr(key)]
            self.known[key] = None
        first, function = key not in self.known, self.known.get(key)
        if not first and function is None:
            function = compiled(self.model, wide, lambda traced: self._differentiate(traced, objective))
        self.known[key] = function
        self.known.move_to_end(key)
        if len(self.known) > _KEPT:
            self.known.popitem(last=False)
        return self._differentiate(layout, objective) if function is None else function(given)

    def _differentiate(self, layout: Layout, objective: Objective) -> tuple[list[Form], mx.array, Any]:
        """Return names and shapes of what the objective reports, all of it flat (K,) float32, and the gradients.

        It is one array because ``mx.compile`` fails where two outputs without a gradient are equal expressions.
        """

        def loss(model: nn.Module) -> tuple[mx.array, list[Form], mx.array]:
            rows: Any = layout.rows.map(mx.array)
            logprobs, entropy = scores(
                model, layout, checkpoint_every=self.checkpoint_every, entropy=rows.bonus is not None
            )
            total, reported = objective(
                logprobs, rows if entropy is None else replace(rows, bonus=rows.bonus * entropy)
            )
            arrays = {name: mx.array(value, mx.float32) for name, value in reported.items()}
            flat = mx.concatenate([mx.zeros(0), *(array.reshape(-1) for array in arrays.values())])
            return total, [(name, array.shape) for name, array in arrays.items()], flat

        (_, forms, flat), gradients = nn.value_and_grad(self.model, loss)(self.model)
        return forms, flat, gradients
