"""The compiled decoding steps of one shape: R rows, each after a prompt that it may share, with room to grow.

What changes from token to token (where to write, which slots are visible) is data, so one compiled function
serves hundreds of tokens. On CUDA the rows of a prompt read the same keys, through a kernel of ours; elsewhere
each row gets a copy of its prompt's keys when it starts.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable
from dataclasses import dataclass, field, replace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...engine import Sampling
from ..adapters.merging import trainable
from ..kernels import cuda
from ..kernels import fused_block as blocks
from ..kernels.fused_block import blocks_of
from ..kernels.fused_linear import View
from ..kernels.patching import patched
from ..read.context import Attention, Context, Group, PromptTree, State, members
from ..read.sizes import size_up
from .sampling import Draw, Sampler

_KEPT = 64  # compiled functions remembered
_NEAR = 8  # copies of the slot's index, see StepState
_ROOM = {mx.cpu: 64, mx.gpu: 256}  # slots are allocated in multiples of this

Arrays = list[mx.array]


@dataclass(frozen=True, slots=True, eq=False)
class StaticRows:
    """The R completions of compiled steps; some may have ended and stay for the shape.

    Row r continues prompt ``parents[r]`` of U and uses slots of its own after it.
    """

    rows: np.ndarray  # (R,) int, the index of each completion
    reads: mx.array  # (R,) int32, the token that each row reads next
    lengths: mx.array  # (R,) int32, position of the next token
    seen: mx.array  # (R, P + C) bool, the slots whose content the row may attend to
    parents: mx.array  # (R,) int32
    common: tuple[Arrays, ...]  # per attention layer, keys and values of U prompts (U, heads, P, D); [] if not shared
    own: tuple[Arrays, ...]  # per layer, (R, heads, C, D); with the P slots in front if not shared; or running states
    attends: tuple[bool, ...]  # per layer, whether it is an attention layer
    prompt_slots: int  # P
    front: int  # slots of the own arrays before the own slots: P, or 0 if prompts are shared
    used: int  # of the C own slots
    start_slot: np.ndarray  # (R,) the first own slot of each row

    @classmethod
    def begin(cls, context: Context, tree: PromptTree, rows: np.ndarray, share: bool) -> StaticRows:
        """Return completions ``rows`` (R,) of the prompts of ``tree``, which ``context`` has read.

        ``share`` keeps one copy of each prompt's keys.
        """
        spelled = context.spelled_out()
        parents, slots = mx.array(tree.parents.astype(np.int32)), context.size
        wide, tall = (_rounded(slots), size_up(context.rows)) if share else (slots, context.rows)
        common: list[Arrays] = []
        own: list[Arrays] = []
        layers = members(context.layers)
        for layer in layers:
            attends = isinstance(layer, Attention)
            held = [a[..., :slots, :] for a in (layer.keys, layer.values)] if attends else list(layer.cache)
            if share and attends:
                pad = [(0, tall - context.rows), (0, 0), (0, wide - slots), (0, 0)]
                common.append([mx.pad(a, pad) for a in held])
                own.append([mx.zeros((len(rows), a.shape[1], 0, a.shape[3]), a.dtype) for a in held])
            else:
                common.append([])
                own.append([a[parents] for a in held])
        begun = cls(
            rows=rows,
            reads=mx.array(tree.last),
            lengths=spelled.lengths[parents],
            seen=mx.pad(spelled.used, [(0, 0), (0, wide - spelled.used.shape[1])])[parents],
            parents=parents,
            common=tuple(common),
            own=tuple(own),
            attends=tuple(isinstance(layer, Attention) for layer in layers),
            prompt_slots=wide,
            front=0 if any(common) else wide,
            used=0,
            start_slot=np.zeros(len(rows), int),
        )
        return begun.with_room()

    def with_room(self) -> StaticRows:
        """Return rows with a free slot, made first by dropping leading own slots that no row uses."""
        here, capacity = self, self.seen.shape[1] - self.prompt_slots
        if self.used < capacity:
            return self
        cut = int(self.start_slot.min())
        if cut > 0:
            p, front = self.prompt_slots, self.front
            here = replace(
                self,
                seen=mx.concatenate([self.seen[:, :p], self.seen[:, p + cut :]], axis=1),
                used=self.used - cut,
                start_slot=self.start_slot - cut,
                own=self._attending(lambda a: mx.concatenate([a[..., :front, :], a[..., front + cut :, :]], axis=2)),
            )
        more = _rounded(here.prompt_slots + here.used + 1) - here.prompt_slots - (capacity - cut)
        if more <= 0:
            return here
        pad = [(0, 0), (0, 0), (0, more), (0, 0)]
        return replace(here, seen=mx.pad(here.seen, [(0, 0), (0, more)]), own=here._attending(lambda a: mx.pad(a, pad)))

    def only(self, kept: np.ndarray) -> StaticRows:
        """Return the completions at ``kept`` (K,)."""
        if len(kept) == len(self.rows):
            return self
        rows = mx.array(kept)
        return replace(
            self,
            rows=self.rows[kept],
            reads=self.reads[rows],
            lengths=self.lengths[rows],
            seen=self.seen[rows],
            parents=self.parents[rows],
            start_slot=self.start_slot[kept],
            own=tuple([a[rows] for a in arrays] for arrays in self.own),
        )

    def joined(self, new: StaticRows) -> StaticRows:
        """Return these completions followed by ``new`` ones, which have no token yet."""
        slots, capacity = max(self.prompt_slots, new.prompt_slots), self.seen.shape[1] - self.prompt_slots
        a, b = self._with_prompts_of(slots), new._with_prompts_of(slots)
        # the new rows get the same own slots, of which they use none so far
        pad = [(0, 0), (0, 0), (0, capacity), (0, 0)]
        seen = mx.pad(b.seen[:, :slots], [(0, 0), (0, capacity)])
        own = b._attending(lambda array: mx.pad(array[..., : b.front, :], pad))
        prompts = next((arrays[0].shape[0] for arrays in a.common if arrays), 0)
        return replace(
            a,
            rows=np.concatenate([a.rows, b.rows]),
            reads=mx.concatenate([a.reads, b.reads]),
            lengths=mx.concatenate([a.lengths, b.lengths]),
            seen=mx.concatenate([a.seen, seen]),
            parents=mx.concatenate([a.parents, b.parents + prompts]),
            common=_joined(a.common, b.common),
            own=_joined(a.own, own),
            start_slot=np.concatenate([a.start_slot, np.full(len(b.start_slot), self.used)]),
        )

    def _with_prompts_of(self, slots: int) -> StaticRows:
        """Return these rows with ``slots`` slots for prompts, the added ones empty."""
        more, p = slots - self.prompt_slots, self.prompt_slots
        if more == 0:
            return self
        hidden = mx.zeros((len(self.start_slot), more), mx.bool_)
        seen = mx.concatenate([self.seen[:, :p], hidden, self.seen[:, p:]], axis=1)
        pad = [(0, 0), (0, 0), (0, more), (0, 0)]
        if any(self.common):
            common = tuple([mx.pad(a, pad) for a in arrays] for arrays in self.common)
            return replace(self, seen=seen, common=common, prompt_slots=slots)
        own = self._attending(lambda a: mx.concatenate([mx.pad(a[..., :p, :], pad), a[..., p:, :]], axis=2))
        return replace(self, seen=seen, own=own, prompt_slots=slots, front=slots)

    def _attending(self, change: Callable[[mx.array], mx.array]) -> tuple[Arrays, ...]:
        """Return the own arrays after ``change`` to those of attention layers."""
        return tuple(
            [change(a) for a in arrays] if attends else arrays
            for attends, arrays in zip(self.attends, self.own, strict=True)
        )


class Steps:
    """The compiled decoding steps of one model."""

    def __init__(self, model: nn.Module, *, compiled: bool, share: bool, patches: dict[str, Any] | None = None):
        self.model, self.compiled, self.share = model, compiled, share
        self.view = View.of(model)
        self.blocks = blocks_of(model, self.view) if share else ()
        self.context = Context(model)  # empty; it tells the kinds of layers and the form of their masks
        self.known: OrderedDict[Hashable, Callable[..., Any]] = OrderedDict()
        self.patches = {**(patches or {}), "scaled_dot_product_attention": _attention}

    def refresh(self) -> None:
        """Read the trained parameters; call it when they have changed."""
        self.trained = {n: v for n, v in trainable(self.model).items() if n not in self.view.consumed}
        # what the model computes in is the type of its output, since a quantised weight does not tell
        self.adapters = self.view.adapters(self.model(mx.zeros((1, 1), mx.int32)).dtype)
        mx.eval(self.adapters)

    def read(self, tree: PromptTree) -> Context:
        """Read the prompts of ``tree`` with the trained parameters as of the last ``refresh``."""
        with self.view.using(self.adapters, {}), patched(self.model, self.patches):
            return tree.read(self.view.model)

    def __call__(self, rows: StaticRows, uniform: mx.array, sampling: Sampling) -> tuple[Draw, StaticRows]:
        """Return a token for each row, drawn with (R,) ``uniform`` numbers, and the rows that read it next."""
        rows = rows.with_room()
        step = self._step(rows, sampling)
        last = mx.array([rows.front + rows.used], mx.int32)  # the slot of the own arrays to write
        drawn, lengths, seen, changed = step(
            self.trained, self.adapters, rows.reads, uniform, last, rows.lengths, rows.seen, rows.parents,
            list(rows.common), list(rows.own),
        )  # fmt: skip
        own = tuple(new or old for new, old in zip(changed, rows.own, strict=True))
        after = replace(rows, reads=drawn[0], lengths=lengths, seen=seen, own=own, used=rows.used + 1)
        return Draw(*drawn), after

    def _step(self, rows: StaticRows, sampling: Sampling) -> Callable[..., Any]:
        """Return the step for the shapes of ``rows``, compiled when these first occur."""
        prompts = next((arrays[0].shape[0] for arrays in rows.common if arrays), 0)
        settings = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        key = (settings, rows.seen.shape, rows.prompt_slots, prompts)  # all other shapes follow from these
        if key in self.known:
            self.known.move_to_end(key)
            return self.known[key]
        prompt_slots, sampler = rows.prompt_slots, Sampler(sampling, compiled=False)  # the step must not hold ``rows``

        def step(
            trained: dict[str, mx.array], adapters: list[Arrays], tokens: mx.array, uniform: mx.array, last: mx.array,
            lengths: mx.array, seen: mx.array, parents: mx.array, common: list[Arrays], own: list[Arrays],
        ) -> Any:  # fmt: skip
            shared = any(common)
            slot = last + prompt_slots if shared else last
            seen = mx.slice_update(seen, mx.ones((len(tokens), 1), mx.bool_), slot, axes=[1])
            near = last + mx.zeros((_NEAR,), mx.int32)
            now = StepState(lengths, seen, last, near, parents, self.context.grouped)
            given = iter(zip(common, own, strict=True))
            layers = [_layer(layer, now, given) for layer in self.context.layers]
            with self.view.using(adapters, trained), patched(self.model, self.patches):
                if shared and self.blocks:
                    attend = [layer.attend_alone for layer in layers]
                    logits = blocks.logits(self.view.model, self.blocks, tokens, lengths, attend)
                else:
                    logits = self.view.model(tokens[:, None], cache=layers)[:, -1]
            drawn = sampler(logits, mx.arange(len(tokens)), uniform)
            # a layer's own arrays after the step; [] if they have been written in place
            changed = [m.written if isinstance(m, _Slots) else list(m.cache) for m in members(layers)]
            return list(drawn), lengths + 1, seen, changed

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
    parents: mx.array
    grouped: bool


@dataclass(eq=False)
class _Slots:
    """The cache of an attention layer during one step, with the interface of mlx-lm's caches."""

    now: StepState
    offset: mx.array  # (R,) int32, the position of the arriving token
    window: int | None
    common: Arrays
    own: Arrays
    written: Arrays  # the own arrays after the step
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
        self.fresh = [a.astype(own.dtype) for a, own in zip((keys, values), self.own, strict=True)]
        self.written = [
            mx.slice_update(own, a, self.now.last, axes=[2]) for own, a in zip(self.own, self.fresh, strict=True)
        ]
        self.fetched = self.written
        if self.common:
            whole = zip(self.common, self.written, strict=True)
            self.fetched = [mx.concatenate([c[self.now.parents], o], axis=2) for c, o in whole]
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Return what the step's ``update_and_fetch`` returned, for layers that read the keys of another."""
        return self.fetched[0], self.fetched[1]

    def attend_alone(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        """Do ``update_and_fetch`` and ``attend`` in one, under the layer's own mask."""
        self.fresh = [a.astype(own.dtype) for a, own in zip((keys, values), self.own, strict=True)]
        return self.attend(queries, scale, self.make_mask(1))

    def attend(self, queries: mx.array, scale: float, mask: mx.array) -> mx.array:
        """Run the kernel, which also writes the arriving keys and values in place."""
        self.written = []
        seen = mask.reshape(mask.shape[0], -1)
        return cuda.attend(queries, self.fresh, self.own, self.common, self.now.parents, seen, self.now.near, scale)


def _attention(
    queries: Any, keys: Any, values: Any, cache: Any, scale: float, mask: Any, sinks: Any = None
) -> mx.array:
    """The replacement of mlx-lm's function: our kernel for the rows of a step that share prompts."""
    known = isinstance(cache, _Slots) and bool(cache.common) and sinks is None and keys is cache.fetched[0]
    if known and mask is not None and cuda.can_attend(queries, values):
        return cache.attend(queries, scale, mask)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


def _layer(layer: Any, now: StepState, given: Any) -> Any:
    """Return what the model gets as the cache of a layer of this kind."""
    if isinstance(layer, Group):
        return Group(*(_layer(member, now, given) for member in layer.caches))
    common, own = next(given)
    if isinstance(layer, State):
        return State.holding(list(own))
    return _Slots(now, now.lengths, layer.window, common, own, written=own)


def _rounded(slots: int) -> int:
    room = _ROOM[mx.default_device().type]
    return -(-slots // room) * room


def _joined(a: tuple[Arrays, ...], b: tuple[Arrays, ...]) -> tuple[Arrays, ...]:
    return tuple([mx.concatenate(list(pair)) for pair in zip(x, y, strict=True)] for x, y in zip(a, b, strict=True))
