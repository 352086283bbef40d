"""Decoding steps of one shape, compiled: R rows, each after a prompt that it may share, with room to grow.

What changes from token to token (where to write, what may be seen) is data, so one compiled function
serves hundreds of tokens. On CUDA rows of one prompt read the same keys, by a kernel of ours; elsewhere
each row gets its prompt's keys once, at its beginning.
"""

from __future__ import annotations

from collections import OrderedDict
from collections.abc import Callable, Hashable, Sequence
from dataclasses import dataclass, replace
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
from ..read.context import Attention, Context, Group, State, _groups_heads
from ..read.sizes import size_up
from ..read.tree import PromptTree
from .sampling import Draw, Sampler

_KEPT = 64  # compiled functions remembered
_NEAR = 8
_ROOM = {mx.cpu: 64, mx.gpu: 256}  # slots are allocated in so many at a time

Arrays = list[mx.array]


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """R completions being written. Row r continues prompt ``parents[r]`` of U and uses slots of its own after it."""

    layers: tuple[Any, ...]  # what the model asks for, by layer: Attention, State or Group, for their kinds alone
    lengths: mx.array  # (R,) int32, position of the next token
    seen: mx.array  # (R, P + C) bool, which slots hold something that the row may attend to
    parents: mx.array  # (R,) int32
    common: tuple[
        Arrays, ...
    ]  # per attention layer, keys and values of the U prompts (U, heads, P, D); [] if not shared
    own: tuple[Arrays, ...]  # per layer, (R, heads, C, D); with the P slots in front if not shared; or running states
    prompt_slots: int  # P
    used: int  # of the C own slots
    born: np.ndarray  # (R,) the first own slot of each row

    @property
    def capacity(self) -> int:
        """C, own slots."""
        return self.seen.shape[1] - self.prompt_slots

    @property
    def last(self) -> int:
        """The slot, of those the own arrays have, that the next token goes to."""
        return self.used if self.shared else self.prompt_slots + self.used

    @property
    def shared(self) -> bool:
        return any(self.common)

    @classmethod
    def begin(cls, context: Context, parents: np.ndarray, share: bool) -> Rows:
        """R rows after the prompts that ``context`` has read; ``share`` keeps one copy of each prompt's keys."""
        spelled = context._spelled_out()
        flat = _flat(context.layers)
        rows, slots = mx.array(parents.astype(np.int32)), context.size
        held = [_held(layer, slots) for layer in flat]
        common: list[Arrays] = [[] for _ in flat]
        if share:
            wide, tall = _rounded(slots), size_up(context.rows)
            for i, layer in enumerate(flat):
                if isinstance(layer, Attention):
                    common[i] = [_grown(a, tall, wide) for a in held[i]]
                    held[i] = [mx.zeros((len(parents), a.shape[1], 0, a.shape[3]), a.dtype) for a in held[i]]
                else:
                    held[i] = [a[rows] for a in held[i]]
            slots = wide
        else:
            held = [[a[rows] for a in arrays] for arrays in held]
        seen = mx.pad(spelled.used, [(0, 0), (0, slots - spelled.used.shape[1])])[rows]
        kinds = tuple(_kind(layer) for layer in context.layers)
        begun = cls(
            layers=kinds, lengths=spelled.lengths[rows], seen=seen, parents=rows, common=tuple(common),
            own=tuple(held), prompt_slots=slots, used=0, born=np.zeros(len(parents), int),
        )  # fmt: skip
        return begun.with_room()

    def with_room(self) -> Rows:
        """At least one free slot; leading slots that no row uses make room first."""
        if self.used < self.capacity:
            return self
        here = self._without(int(self.born.min()))
        more = _rounded(here.prompt_slots + here.used + 1) - here.prompt_slots - here.capacity
        if more <= 0:
            return here
        pad = [(0, 0), (0, 0), (0, more), (0, 0)]
        return replace(
            here,
            seen=mx.pad(here.seen, [(0, 0), (0, more)]),
            own=here._attending(lambda a: mx.pad(a, pad)),
        )

    def only(self, kept: np.ndarray) -> Rows:
        """The rows ``kept`` (K,)."""
        rows = mx.array(kept)
        return replace(
            self, lengths=self.lengths[rows], seen=self.seen[rows], parents=self.parents[rows], born=self.born[kept],
            own=tuple([a[rows] for a in arrays] for arrays in self.own),
        )  # fmt: skip

    def joined(self, new: Rows) -> Rows:
        """With rows that have just begun after these."""
        slots = max(self.prompt_slots, new.prompt_slots)
        a, b = self._with_prompts_of(slots), new._with_prompts_of(slots)._with_own(self.used, self.capacity)
        prompts = next((arrays[0].shape[0] for arrays in a.common if arrays), 0)
        return replace(
            a,
            lengths=mx.concatenate([a.lengths, b.lengths]),
            seen=mx.concatenate([a.seen, b.seen]),
            parents=mx.concatenate([a.parents, b.parents + prompts]),
            common=_joined(a.common, b.common),
            own=_joined(a.own, b.own),
            born=np.concatenate([a.born, b.born]),
        )  # fmt: skip

    def _without(self, cut: int) -> Rows:
        """Without the first ``cut`` own slots."""
        if cut == 0:
            return self
        p, front = self.prompt_slots, 0 if self.shared else self.prompt_slots

        def shortened(a: mx.array) -> mx.array:
            return mx.concatenate([a[..., :front, :], a[..., front + cut :, :]], axis=2)

        return replace(
            self, seen=mx.concatenate([self.seen[:, :p], self.seen[:, p + cut :]], axis=1), used=self.used - cut,
            born=self.born - cut, own=self._attending(shortened),
        )  # fmt: skip

    def _with_prompts_of(self, slots: int) -> Rows:
        """With ``slots`` for prompts, of which the new ones stay empty."""
        more, p = slots - self.prompt_slots, self.prompt_slots
        if more == 0:
            return self
        seen = mx.concatenate([self.seen[:, :p], mx.zeros((len(self.born), more), mx.bool_), self.seen[:, p:]], axis=1)
        pad = [(0, 0), (0, 0), (0, more), (0, 0)]
        if self.shared:
            common = tuple([mx.pad(a, pad) for a in arrays] for arrays in self.common)
            return replace(self, seen=seen, common=common, prompt_slots=slots)
        own = self._attending(lambda a: mx.concatenate([mx.pad(a[..., :p, :], pad), a[..., p:, :]], axis=2))
        return replace(self, seen=seen, own=own, prompt_slots=slots)

    def _with_own(self, used: int, capacity: int) -> Rows:
        """Of rows that have just begun: as if others had already used so many of the own slots."""
        front = 0 if self.shared else self.prompt_slots
        seen = mx.pad(self.seen[:, : self.prompt_slots], [(0, 0), (0, capacity)])
        own = self._attending(lambda a: mx.pad(a[..., :front, :], [(0, 0), (0, 0), (0, capacity), (0, 0)]))
        return replace(self, seen=seen, own=own, used=used, born=np.full(len(self.born), used))

    def _attending(self, change: Callable[[mx.array], mx.array]) -> tuple[Arrays, ...]:
        """The own arrays, those of attention layers changed."""
        kinds = _flat(self.layers)
        return tuple(
            [change(a) for a in arrays] if isinstance(kind, Attention) else arrays
            for kind, arrays in zip(kinds, self.own, strict=True)
        )


class Steps:
    """Compiled decoding steps of one model."""

    def __init__(self, model: nn.Module, *, compiled: bool, share: bool, patches: dict[str, Any] | None = None):
        self.model, self.compiled, self.share = model, compiled, share
        self.view = View.of(model)
        self.blocks = blocks_of(model, self.view) if share else ()
        self.grouped = _groups_heads(model)
        self.known: OrderedDict[Hashable, Callable[..., Any]] = OrderedDict()
        self.patches = {**(patches or {}), "scaled_dot_product_attention": _attention}

    def refresh(self) -> None:
        """Read the trained parameters: call it when they have changed."""
        self.trained = {n: v for n, v in trainable(self.model).items() if n not in self.view.consumed}
        self.adapters = self.view.adapters(_dtype(self.model))
        mx.eval(self.adapters)

    def read(self, tree: PromptTree) -> Context:
        """The prompts of ``tree``, read with the trained parameters as they were at ``refresh``."""
        with self.view.using(self.adapters, {}), patched(self.model, self.patches):
            return tree.read(self.view.model)

    def __call__(self, rows: Rows, tokens: mx.array, uniform: mx.array, sampling: Sampling) -> tuple[Draw, Rows]:
        """The token after (R,) ``tokens`` for every row, drawn with (R,) ``uniform`` numbers, and the rows with it."""
        rows = rows.with_room()
        step = self._step(rows, sampling)
        last = mx.array([rows.last], mx.int32)
        drawn, lengths, seen, changed = step(
            self.trained, self.adapters, tokens, uniform, last, rows.lengths, rows.seen, rows.parents,
            list(rows.common), list(rows.own),
        )  # fmt: skip
        own = tuple(new or old for new, old in zip(changed, rows.own, strict=True))
        return Draw(*drawn), replace(rows, lengths=lengths, seen=seen, own=own, used=rows.used + 1)

    def _step(self, rows: Rows, sampling: Sampling) -> Callable[..., Any]:
        prompts = next((arrays[0].shape[0] for arrays in rows.common if arrays), 0)
        how = (sampling.temperature, sampling.top_k, sampling.top_p, sampling.min_p)
        key = (how, rows.seen.shape, rows.prompt_slots, prompts)  # all other shapes follow from these
        if key not in self.known:
            traced = self._traced(rows.layers, rows.prompt_slots, Sampler(sampling, compiled=False))
            self.known[key] = mx.compile(traced) if self.compiled else traced
        self.known.move_to_end(key)
        if len(self.known) > _KEPT:
            self.known.popitem(last=False)
        return self.known[key]

    def _traced(self, kinds: tuple[Any, ...], prompt_slots: int, sampler: Sampler) -> Callable[..., Any]:
        def step(
            trained: dict[str, mx.array], adapters: list[Arrays], tokens: mx.array, uniform: mx.array, last: mx.array,
            lengths: mx.array, seen: mx.array, parents: mx.array, common: list[Arrays], own: list[Arrays],
        ) -> Any:  # fmt: skip
            shared = any(common)
            slot = last + prompt_slots if shared else last
            seen = mx.slice_update(seen, mx.ones((len(tokens), 1), mx.bool_), slot, axes=[1])
            near = last + mx.zeros((_NEAR,), mx.int32)
            now = _Now(lengths, seen, last, near, parents, self.grouped)
            given = iter(zip(common, own, strict=True))
            layers = [_layer(kind, now, given) for kind in kinds]
            with self.view.using(adapters, trained), patched(self.model, self.patches):
                if shared and self.blocks:
                    attend = [layer.attend_alone for layer in layers]
                    logits = blocks.logits(self.view.model, self.blocks, tokens, lengths, attend)
                else:
                    logits = self.view.model(tokens[:, None], cache=layers)[:, -1]
            drawn = sampler(logits, mx.arange(len(tokens)), uniform)
            return list(drawn), lengths + 1, seen, [_changed(layer) for layer in _flat(layers)]

        return step


@dataclass(frozen=True, slots=True, eq=False)
class _Now:
    """What all layers of one step have in common."""

    lengths: mx.array
    seen: mx.array  # the arriving token included
    last: mx.array  # (1,) int32
    near: mx.array  # (n,) int32, the same in the memory of a GPU, where arrays of a few bytes are not
    parents: mx.array
    grouped: bool

    def mask(self, window: int | None) -> mx.array:
        seen = self.seen
        if window is not None:
            position = mx.cumsum(seen.astype(mx.int32), axis=1)
            seen = seen & (position[:, -1:] - position < window)
        return seen[:, None, None, None] if self.grouped else seen[:, None, None]


class _Slots:
    """One attention layer during one step; it speaks the interface of mlx-lm's caches."""

    def __init__(self, now: _Now, window: int | None, common: Arrays, own: Arrays):
        self.now, self.window, self.common, self.own = now, window, common, own
        self.fresh: Arrays = []
        self.fetched: Arrays = []
        self.written = own  # afterwards

    @property
    def offset(self) -> mx.array:
        return self.now.lengths

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> mx.array:
        return self.now.mask(window_size or self.window)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """All that may be attended to. Where the kernel takes its parts instead, the whole is never computed."""
        self.fresh = [a.astype(own.dtype) for a, own in zip((keys, values), self.own, strict=True)]
        self.written = [
            mx.slice_update(own, a, self.now.last, axes=[2]) for own, a in zip(self.own, self.fresh, strict=True)
        ]
        self.fetched = self.written
        if self.common:
            whole = zip(self.common, self.written, strict=True)
            self.fetched = [mx.concatenate([c[self.now.parents], o], axis=2) for c, o in whole]
        return self.fetched[0], self.fetched[1]

    def attend_alone(self, queries: mx.array, keys: mx.array, values: mx.array, scale: float) -> mx.array:
        """``update_and_fetch`` and ``attend`` in one, under the layer's own mask."""
        self.fresh = [a.astype(own.dtype) for a, own in zip((keys, values), self.own, strict=True)]
        return self.attend(queries, scale, self.make_mask(1))

    def attend(self, queries: mx.array, scale: float, mask: mx.array) -> mx.array:
        """By the kernel, which writes what arrived in place."""
        self.written = []
        seen = mask.reshape(mask.shape[0], -1)
        return cuda.attend(queries, self.fresh, self.own, self.common, self.now.parents, seen, self.now.near, scale)


def _attention(
    queries: Any, keys: Any, values: Any, cache: Any, scale: float, mask: Any, sinks: Any = None
) -> mx.array:
    """In place of mlx-lm's: our kernel for the rows of a step that share prompts."""
    known = isinstance(cache, _Slots) and bool(cache.common) and sinks is None and keys is cache.fetched[0]
    if known and mask is not None and cuda.can_attend(queries, values):
        return cache.attend(queries, scale, mask)
    return mx.fast.scaled_dot_product_attention(queries, keys, values, scale=scale, mask=mask, sinks=sinks)


def _layer(kind: Any, now: _Now, given: Any) -> Any:
    """What the model is handed for a layer of this kind."""
    if isinstance(kind, Group):
        return Group(*(_layer(member, now, given) for member in kind.caches))
    common, own = next(given)
    if isinstance(kind, Attention):
        return _Slots(now, kind.window, common, own)
    state = State(len(kind.cache))
    state.cache = list(own)
    return state


def _changed(layer: Any) -> Arrays:
    """Its own arrays after the step; [] if they have been written in place."""
    return layer.written if isinstance(layer, _Slots) else list(layer.cache)


def _flat(layers: Sequence[Any]) -> list[Any]:
    """Those of groups, too."""
    return [m for layer in layers for m in (_flat(layer.caches) if isinstance(layer, Group) else [layer])]


def _kind(layer: Any) -> Any:
    """A layer of this kind that holds nothing."""
    if isinstance(layer, Group):
        return Group(*map(_kind, layer.caches))
    return State(len(layer.cache)) if isinstance(layer, State) else layer.empty()


def _held(layer: Any, slots: int) -> Arrays:
    if isinstance(layer, Attention):
        assert layer.keys is not None
        assert layer.values is not None
        return [layer.keys[..., :slots, :], layer.values[..., :slots, :]]
    return list(layer.cache)


def _grown(array: mx.array, rows: int, slots: int) -> mx.array:
    return mx.pad(array, [(0, rows - array.shape[0]), (0, 0), (0, slots - array.shape[2]), (0, 0)])


def _rounded(slots: int) -> int:
    room = _ROOM[mx.default_device().type]
    return -(-slots // room) * room


def _joined(a: tuple[Arrays, ...], b: tuple[Arrays, ...]) -> tuple[Arrays, ...]:
    return tuple([mx.concatenate(list(pair)) for pair in zip(x, y, strict=True)] for x, y in zip(a, b, strict=True))


def _dtype(model: nn.Module) -> mx.Dtype:
    """What the model computes in: the type of its norms and biases, as a quantised weight does not say."""
    tokens = mx.zeros((1, 1), mx.int32)
    return model(tokens).dtype
