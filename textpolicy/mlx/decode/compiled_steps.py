"""The compiled decoding steps of one shape: R rows, each after a prompt that it may share, with room to grow.

What changes from token to token (where to write, which slots are visible) is data, so one compiled function
serves hundreds of tokens. The rows of a prompt read the same keys: through a kernel of ours on CUDA, elsewhere as the
rows of one product.
"""

from __future__ import annotations

import logging
from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...engine import Sampling
from ..adapters.merging import trainable
from ..kernels import cuda, metal, operations
from ..kernels import fused_block as blocks
from ..kernels.fused_block import blocks_of
from ..kernels.fused_linear import View
from ..kernels.operations import Sharing
from ..kernels.patching import patched
from ..read.context import Attention, Context, Group, State, members
from ..read.prompts import Kept, PromptTree
from ..read.sizes import size_up, step_slots
from .sampling import Draw, Sampler

_KEPT = 64  # compiled functions remembered
_NEAR = 8  # copies of the slot's index, see StepState
_TRIED, _STEPS = (12, 40, 90), 3  # lengths of prompts, and steps, on which kernels are tried
_AGREES = 0.05  # nats by which log-probs and entropies may differ then; of a wrong kernel they differ by far more
_UNUSED = "the Metal kernels of this machine %s; decoding goes on with MLX's own operations"
_PLAIN = "this model does not decode by compiled steps (%s); decoding goes on without them"
_RECENT = 32  # slots that a step copies; products with fewer are slow on NVIDIA GPUs, with more the copies are

Arrays = list[mx.array]

logger = logging.getLogger(__name__)


@dataclass(frozen=True, slots=True, eq=False)
class StaticRows:
    """The R completions of compiled steps; some may have ended and stay for the shape.

    Row r continues a prompt of U. Its own tokens are in C slots, which no step writes, and in W recent ones, which
    move to the others when they are full: MLX copies an array that it writes while an earlier step is computed.
    Kernels that write in place have no recent slots.
    """

    rows: np.ndarray  # (R,) int, the index of each completion
    reads: mx.array  # (R,) int32, the token that each row reads next
    lengths: mx.array  # (R,) int32, position of the next token
    seen: mx.array  # (R, P + C + W) bool, the slots whose content the row may attend to
    parents: np.ndarray  # (R,) int, the prompt of each row
    sharing: Sharing  # the same as arrays
    common: tuple[Arrays, ...]  # per layer, keys and values of U prompts (U, heads, P, D); [] for a running state
    own: tuple[Arrays, ...]  # per layer, (R, heads, C, D), or the running states
    recent: tuple[Arrays, ...]  # per layer, (R, heads, W, D); [] for a running state, or if W is 0
    prompt_slots: int  # P
    recent_slots: int  # W
    used: int  # of the C own slots
    written: int  # of the W recent slots
    start_slot: np.ndarray  # (R,) the first slot of each row, counted after the prompt's

    @classmethod
    def begin(cls, context: Context, tree: PromptTree, rows: np.ndarray, recent: int) -> StaticRows:
        """Return completions ``rows`` (R,) of the prompts of ``tree``, which ``context`` has read.

        Each gets ``recent`` slots that are written first.
        """
        spelled, parents = context.spelled_out(), mx.array(tree.parents)
        wide, tall = step_slots(context.size), size_up(context.rows)
        pad = [(0, tall - context.rows), (0, 0), (0, wide - context.size), (0, 0)]
        tail = [(0, 0), (0, 0), (0, recent), (0, 0)]
        common: list[Arrays] = []
        own: list[Arrays] = []
        for layer in members(context.layers):
            if isinstance(layer, Attention):
                held: list[Any] = [layer.keys, layer.values]
                common.append([mx.pad(a[..., : context.size, :], pad) for a in held])
                own.append([mx.zeros((len(rows), a.shape[1], 0, a.shape[3]), a.dtype) for a in common[-1]])
            else:
                common.append([])
                own.append([a[parents] for a in layer.cache])
        begun = cls(
            rows=rows,
            reads=mx.array(tree.last),
            lengths=spelled.lengths[parents],
            seen=mx.pad(spelled.used, [(0, 0), (0, wide - spelled.used.shape[1] + recent)])[parents],
            parents=tree.parents,
            sharing=Sharing.of(tree.parents, tall),
            common=tuple(common),
            own=tuple(own),
            recent=tuple(
                [mx.pad(a, tail) for a in o] if c and recent else [] for c, o in zip(common, own, strict=True)
            ),
            prompt_slots=wide,
            recent_slots=recent,
            used=0,
            written=0,
            start_slot=np.zeros(len(rows), int),
        )
        return begun._with_capacity(1)

    def with_room(self) -> StaticRows:
        """Return rows with a slot to write: full recent slots move to the others, of which there may be more then."""
        w = self.recent_slots
        if w == 0 or self.written < w:
            return self if w else self._with_capacity(1)
        here = self._with_capacity(w)
        at, end = mx.array([here.used], mx.int32), here.seen.shape[1] - w
        moved = mx.slice_update(here.seen, here.seen[:, end:], at + here.prompt_slots, axes=[1])
        pairs = zip(here.own, here.recent, strict=True)
        return replace(
            here,
            seen=mx.concatenate([moved[:, :end], mx.zeros((len(here.rows), w), mx.bool_)], axis=1),
            own=tuple(
                [mx.slice_update(a, b, at, axes=[2]) for a, b in zip(o, r, strict=True)] if r else o for o, r in pairs
            ),
            used=here.used + w,
            written=0,
        )

    def _with_capacity(self, needed: int) -> StaticRows:
        """Return rows with ``needed`` free own slots, made first by dropping leading ones that no row uses."""
        here, p, w = self, self.prompt_slots, self.recent_slots
        capacity = self.seen.shape[1] - p - w
        if self.used + needed <= capacity:
            return self
        if w == 0:
            mx.eval(self.reads)  # Metal does not know that the step before still writes into what is copied here
        cut = min(int(self.start_slot.min()), self.used)
        if cut > 0:
            here = replace(
                self,
                seen=mx.concatenate([self.seen[:, :p], self.seen[:, p + cut :]], axis=1),
                used=self.used - cut,
                start_slot=self.start_slot - cut,
                own=self._attending(lambda a: a[..., cut:, :]),
            )
        more = step_slots(p + here.used + needed) - p - (capacity - cut)
        if more <= 0:
            return here
        pad, end = [(0, 0), (0, 0), (0, more), (0, 0)], here.seen.shape[1] - w
        grown = mx.pad(here.seen[:, :end], [(0, 0), (0, more)])
        return replace(
            here,
            seen=mx.concatenate([grown, here.seen[:, end:]], axis=1),
            own=here._attending(lambda a: mx.pad(a, pad)),
        )

    def only(self, kept: np.ndarray) -> StaticRows:
        """Return the completions at ``kept`` (K,), and only their prompts where most others have none left."""
        if len(kept) == len(self.rows):
            return self
        rows, parents, common, prompts = mx.array(kept), self.parents[kept], self.common, self.prompts
        left = np.unique(parents)
        if 2 * size_up(len(left)) <= prompts:
            prompts, parents = size_up(len(left)), np.searchsorted(left, parents)
            held = mx.array(np.resize(left, prompts))
            common = tuple([a[held] for a in arrays] for arrays in common)
        return replace(
            self,
            rows=self.rows[kept],
            reads=self.reads[rows],
            lengths=self.lengths[rows],
            seen=self.seen[rows],
            parents=parents,
            sharing=Sharing.of(parents, prompts),
            start_slot=self.start_slot[kept],
            common=common,
            own=tuple([a[rows] for a in arrays] for arrays in self.own),
            recent=tuple([a[rows] for a in arrays] for arrays in self.recent),
        )

    def joined(self, new: StaticRows) -> StaticRows:
        """Return these completions followed by ``new`` ones, which have no token yet."""
        slots, after = max(self.prompt_slots, new.prompt_slots), self.seen.shape[1] - self.prompt_slots
        a, b = self._with_prompts_of(slots), new._with_prompts_of(slots)
        # the new rows get the same own and recent slots, of which they use none so far
        pad = [(0, 0), (0, 0), (0, after - self.recent_slots), (0, 0)]
        own = b._attending(lambda array: mx.pad(array[..., :0, :], pad))
        parents = np.concatenate([a.parents, b.parents + self.prompts])
        return replace(
            a,
            rows=np.concatenate([a.rows, b.rows]),
            reads=mx.concatenate([a.reads, b.reads]),
            lengths=mx.concatenate([a.lengths, b.lengths]),
            seen=mx.concatenate([a.seen, mx.pad(b.seen[:, :slots], [(0, 0), (0, after)])]),
            parents=parents,
            sharing=Sharing.of(parents, a.prompts + b.prompts),
            common=_joined(a.common, b.common),
            own=_joined(a.own, own),
            recent=_joined(a.recent, b.recent),
            start_slot=np.concatenate([a.start_slot, np.full(len(b.start_slot), self.used + self.written)]),
        )

    @property
    def prompts(self) -> int:
        """The number U of prompts whose keys are kept."""
        return int(self.sharing.grid.shape[0])

    def _with_prompts_of(self, slots: int) -> StaticRows:
        """Return these rows with ``slots`` slots for prompts, the added ones empty."""
        more, p = slots - self.prompt_slots, self.prompt_slots
        if more == 0:
            return self
        hidden = mx.zeros((len(self.start_slot), more), mx.bool_)
        seen = mx.concatenate([self.seen[:, :p], hidden, self.seen[:, p:]], axis=1)
        pad = [(0, 0), (0, 0), (0, more), (0, 0)]
        common = tuple([mx.pad(a, pad) for a in arrays] for arrays in self.common)
        return replace(self, seen=seen, common=common, prompt_slots=slots)

    def _attending(self, change: Callable[[mx.array], mx.array]) -> tuple[Arrays, ...]:
        """Return the own arrays after ``change`` to those of attention layers."""
        pairs = zip(self.common, self.own, strict=True)
        return tuple([change(a) for a in arrays] if common else arrays for common, arrays in pairs)


class Steps:
    """The compiled decoding steps of one model, by the ``kernels`` of a device or by MLX's own operations."""

    def __init__(self, model: nn.Module, *, compiled: bool, kernels: Any = None, patches: dict[str, Any] | None = None):
        self.model, self.compiled = model, compiled
        self.kernels = kernels or (cuda if cuda.is_default() else operations)
        self.view = View.of(model, self.kernels)
        self.blocks = blocks_of(model, self.view, self.kernels)
        self.context = Context(model)  # empty; it tells the kinds of layers and the form of their masks
        self.known: OrderedDict[Hashable, Callable[..., Any]] = OrderedDict()
        self.patches = {**(patches or {}), "scaled_dot_product_attention": _attention}

    @classmethod
    def chosen(cls, model: nn.Module, compiled: bool) -> Steps | None:
        """Return steps by the kernels of the default device where these serve all layers, else by MLX's operations.

        Those of Metal must also draw what the operations draw, since no test has run them on a Mac. Of a model that
        does not allow for such steps it is None. A line says what was not taken, and why.
        """
        for kernels in [*(kernels for kernels in (cuda, metal) if kernels.is_default()), operations]:
            try:
                # first, since steps join the weights of the model anew, and those before would be in memory twice
                expected = cls(model, compiled=compiled, kernels=operations)._tried()[0] if kernels is metal else None
                steps = cls(model, compiled=compiled, kernels=kernels)
                drawn, in_place = steps._tried(expected[0] if expected else None)
                if kernels is operations or (in_place and kernels is cuda):
                    return steps
                if in_place and expected:
                    off = max(float(np.abs(a - b).max()) for a, b in zip(drawn[1:], expected[1:], strict=True))
                    if off <= _AGREES:
                        return steps
                    logger.warning(_UNUSED, f"differ from MLX's operations by {off:.2g} nats")
            except (RuntimeError, ValueError, TypeError, LookupError, AttributeError) as error:  # code of a model, too
                logger.warning(*(_UNUSED, f"failed: {error}") if kernels is metal else (_PLAIN, error))
        return None

    def _tried(self, forced: np.ndarray | None = None) -> tuple[list[np.ndarray], bool]:
        """Return tokens, log-probs and entropies (S, R) of a few steps, and whether all were written in place.

        A row reads the tokens ``forced`` (S, R) in place of those that it draws.
        """
        draw = np.random.default_rng(0)
        self.refresh()
        prompts = [draw.integers(0, self.vocabulary, n).astype(np.int32) for n in _TRIED for _ in range(2)]
        rows = self.begin(PromptTree.build(prompts), np.arange(len(prompts)))
        if rows is None:
            return [], False
        steps = []
        in_place = True
        for i in range(_STEPS):
            before = rows.own
            drawn, rows = self(rows, mx.array(draw.random(len(prompts), np.float32)), Sampling())
            mx.eval(drawn, rows.own, rows.recent)
            if i:  # there was room for the token
                in_place = in_place and all(a is b for a, b, c in zip(before, rows.own, rows.common, strict=True) if c)
            steps.append([np.array(a) for a in drawn])
            if forced is not None:
                rows = replace(rows, reads=mx.array(forced[i]))
        self.known.clear()  # which hold the steps themselves: those that are not taken go now, with their arrays
        return [np.stack(arrays) for arrays in zip(*steps, strict=True)], in_place

    def refresh(self) -> None:
        """Read the trained parameters; call it when they have changed."""
        self.trained = {n: v for n, v in trainable(self.model).items() if n not in self.view.consumed}
        # what the model computes in is the type of its output, since a quantised weight does not tell
        logits = self.model(mx.zeros((1, 1), mx.int32))
        self.vocabulary, dtype = logits.shape[-1], logits.dtype
        del logits  # which would hold the weights that are joined anew
        self.adapters = []
        self.adapters = self.view.adapters(dtype)
        mx.eval(self.adapters)

    def begin(self, tree: PromptTree, rows: np.ndarray, kept: Kept | None = None) -> StaticRows | None:
        """Return completions ``rows`` (R,) of the prompts of ``tree``, read with the parameters as of ``refresh``.

        It is None for a model that has left a running state empty, since compiled steps take arrays alone. What has
        been ``kept`` is not read again.
        """
        with self.view.using(self.adapters, {}), patched(self.model, self.patches):
            context = tree.read(self.view.model, kept=kept)
            context.evaluate()  # or the memory that reading takes would come on top of the slots for what is written
        recent = _RECENT if self.kernels is operations else 0
        return StaticRows.begin(context, tree, rows, recent) if context.complete else None

    def alone(self, rows: StaticRows, at: int, length: int) -> Context | None:
        """Return a context of the row ``at`` after the first ``length`` tokens that it has read.

        It is None where more were read into a running state.
        """
        mx.eval(rows.reads)  # Metal does not know that a step still writes into what is copied here
        slots = np.flatnonzero(np.array(rows.seen[at]))
        if self.context.recurrent and len(slots) != length:
            return None
        taken, parent = mx.array(slots[:length]), int(rows.parents[at])
        held = []
        for common, own, recent in zip(rows.common, rows.own, rows.recent, strict=True):
            if common:
                parts = [[a[parent], b[at]] for a, b in zip(common, own, strict=True)]
                parts = [[*part, a[at]] for part, a in zip(parts, recent, strict=True)] if recent else parts
                held.append([mx.take(mx.concatenate(part, axis=1), taken, axis=1)[None] for part in parts])
            else:
                held.append([mx.take(a, mx.array([at]), axis=0) for a in own])
        return self.context.of_one_row(length, held)

    def __call__(self, rows: StaticRows, uniform: mx.array, sampling: Sampling) -> tuple[Draw, StaticRows]:
        """Return a token for each row, drawn with (R,) ``uniform`` numbers, and the rows that read it next."""
        rows = rows.with_room()
        step, w, sharing = self._step(rows, sampling), rows.recent_slots, rows.sharing
        slot = rows.written if w else rows.used  # of the arrays that the step writes
        drawn, lengths, seen, states, written = step(
            self.trained, self.adapters, rows.reads, uniform, mx.array([slot], mx.int32), rows.lengths, rows.seen,
            [sharing.parents, sharing.grid, sharing.place], list(rows.common), list(rows.own), list(rows.recent),
        )  # fmt: skip
        after = replace(
            rows,
            reads=drawn[0],
            lengths=lengths,
            seen=seen,
            own=_replaced(rows.own, states if w else [s or a for s, a in zip(states, written, strict=True)]),
            recent=_replaced(rows.recent, written) if w else rows.recent,
            used=rows.used + (w == 0),
            written=rows.written + (w > 0),
        )
        return Draw(*drawn), after

    def _step(self, rows: StaticRows, sampling: Sampling) -> Callable[..., Any]:
        """Return the step for the shapes of ``rows``, compiled when these first occur."""
        form = (rows.sharing.grid.shape, rows.sharing.even) if self.kernels is operations else rows.prompts
        settings = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        key = (settings, rows.seen.shape, rows.prompt_slots, form)  # all other shapes follow from these
        if key in self.known:
            self.known.move_to_end(key)
            return self.known[key]
        # the step must not hold ``rows``
        even = rows.sharing.even and self.kernels is operations  # others have steps for all ways to share prompts
        sampler = Sampler(sampling, compiled=False, kernels=self.kernels)
        first = rows.seen.shape[1] - rows.recent_slots if rows.recent_slots else rows.prompt_slots
        every = mx.arange(len(rows.seen))
        mx.eval(every)  # so that it is a constant of the compiled step

        def step(
            trained: dict[str, mx.array], adapters: list[Arrays], tokens: mx.array, uniform: mx.array, last: mx.array,
            lengths: mx.array, seen: mx.array, shared: Arrays, common: list[Arrays], own: list[Arrays],
            recent: list[Arrays],
        ) -> Any:  # fmt: skip
            seen = mx.slice_update(seen, mx.ones((len(tokens), 1), mx.bool_), last + first, axes=[1])
            near = last + mx.zeros((_NEAR,), mx.int32)
            here = (mx.arange(seen.shape[1] - first) == last)[:, None]
            sharing = Sharing(shared[0], shared[1], shared[2], even)
            now = StepState(lengths, seen, last, near, here, sharing, self.context.grouped, self.kernels)
            given = iter(zip(common, own, recent, strict=True))
            layers = [_layer(layer, now, given) for layer in self.context.layers]
            with self.view.using(adapters, trained), patched(self.model, self.patches):
                if self.blocks:
                    attend = [layer.attend_alone for layer in layers]
                    logits = blocks.logits(self.view.model, self.blocks, tokens, lengths, attend, self.kernels)
                else:
                    logits = self.view.model(tokens[:, None], cache=layers)[:, -1]
            drawn = sampler(logits, every, uniform)
            # a layer's states, or what it has written to, after the step; [] if that was written in place
            flat = members(layers)
            states = [[] if isinstance(m, _Slots) else list(m.cache) for m in flat]
            written = [m.written if isinstance(m, _Slots) else [] for m in flat]
            return list(drawn), lengths + 1, seen, states, written

        self.known[key] = mx.compile(step) if self.compiled else step
        if len(self.known) > _KEPT:
            self.known.popitem(last=False)
        return self.known[key]


@dataclass(frozen=True, slots=True, eq=False)
class StepState:
    """The arrays that all layers of one step share."""

    lengths: mx.array
    seen: mx.array  # including the arriving token
    last: mx.array  # (1,) int32
    near: mx.array  # (n,) int32, the same in the memory of a GPU, where arrays of a few bytes are not
    here: mx.array  # (slots that a step writes, 1) bool, the one that it writes
    sharing: Sharing
    grouped: bool
    kernels: Any


@dataclass(eq=False)
class _Slots:
    """The cache of an attention layer during one step, with the interface of mlx-lm's caches."""

    now: StepState
    offset: mx.array  # (R,) int32, the position of the arriving token
    window: int | None
    common: Arrays
    own: Arrays
    recent: Arrays
    written: Arrays = field(default_factory=list)  # the recent arrays after the step; the own ones, if none are recent
    fresh: Arrays = field(default_factory=list)  # the arriving keys and values
    fetched: Arrays = field(default_factory=list)

    @property
    def keys(self) -> mx.array:
        """The layer's own keys, which some models (DeepSeek V3.2) read and replace after ``update_and_fetch``."""
        return self.written[0]

    @keys.setter
    def keys(self, keys: mx.array) -> None:
        self.written[0] = keys

    @property
    def values(self) -> mx.array:
        """The layer's own values."""
        return self.written[1]

    @values.setter
    def values(self, values: mx.array) -> None:
        self.written[1] = values

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        seen, window = self.now.seen, window_size or self.window
        if window is not None:
            position = mx.cumsum(seen.astype(mx.int32), axis=1)
            seen = seen & (position[:, -1:] - position < window)
        return seen[:, None, None, None] if self.now.grouped else seen[:, None, None]

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Return all visible keys and values; where the kernel reads the parts instead, these are never computed."""
        self._write(keys, values)
        parts = zip(self.common, *self._parts(), strict=True)
        self.fetched = [mx.concatenate([common[self.now.sharing.parents], *own], axis=2) for common, *own in parts]
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Return what the step's ``update_and_fetch`` returned, for layers that read the keys of another."""
        return self.fetched[0], self.fetched[1]

    def attend_alone(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        """Do ``update_and_fetch`` and ``attend`` in one, under the layer's own mask."""
        self._write(keys, values)
        return self.attend(queries, scale, self.make_mask(1))

    def attend(self, queries: mx.array, scale: float, mask: mx.array, sinks: mx.array | None = None) -> mx.array:
        """Return the attention to shared and own slots under ``mask``; a device's kernel writes what arrives itself."""
        seen, sharing = mask.reshape(mask.shape[0], -1), self.now.sharing
        if self.recent or sinks is not None or not self.now.kernels.can_attend(queries, self.fresh[1]):
            return operations.attend(queries, self._parts(), self.common, sharing, seen, scale, sinks)
        self.written = []
        kernels, near = self.now.kernels, self.now.near
        return kernels.attend(queries, self.fresh, self.own, self.common, sharing.parents, seen, near, scale)

    def _write(self, keys: mx.array, values: mx.array) -> None:
        before = self.recent or self.own
        self.fresh = [a.astype(old.dtype) for a, old in zip((keys, values), before, strict=True)]
        # copying and writing is one kernel
        self.written = [mx.where(self.now.here, a, old) for old, a in zip(before, self.fresh, strict=True)]

    def _parts(self) -> list[Arrays]:
        """Return the keys and values of the row's own tokens, oldest first."""
        return [self.own, self.written] if self.recent else [self.written]


def _attention(
    queries: Any, keys: Any, values: Any, cache: Any, scale: float, mask: Any, sinks: Any = None
) -> mx.array:
    """The replacement of mlx-lm's function: attention that reads the keys of a prompt once for all of its rows."""
    if (
        isinstance(cache, _Slots)
        and isinstance(mask, mx.array)
        and mask.dtype == mx.bool_
        and mask.size == mask.shape[0] * mask.shape[-1]
        and queries.shape[2] == 1
        and keys is cache.fetched[0]
    ):
        return cache.attend(queries, scale, mask, sinks)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


def _layer(layer: Any, now: StepState, given: Any) -> Any:
    """Return what the model gets as the cache of a layer of this kind."""
    if isinstance(layer, Group):
        return Group(*(_layer(member, now, given) for member in layer.caches))
    common, own, recent = next(given)
    if isinstance(layer, State):
        return State.holding(list(own))
    return _Slots(now, now.lengths, layer.window, common, own, recent)


def _joined(a: tuple[Arrays, ...], b: tuple[Arrays, ...]) -> tuple[Arrays, ...]:
    return tuple([mx.concatenate(list(pair)) for pair in zip(x, y, strict=True)] for x, y in zip(a, b, strict=True))


def _replaced(arrays: tuple[Arrays, ...], new: Sequence[Arrays]) -> tuple[Arrays, ...]:
    """Return ``arrays`` with the ``new`` ones of a layer in their place, if it has any."""
    return tuple(after or before for after, before in zip(new, arrays, strict=True))
