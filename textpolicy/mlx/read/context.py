"""The text that a model has read, for many rows at once: compute a prefix once, fork it, continue every row.

Rollouts and updates both run a model in levels: first what all rows begin with (one row), then each
distinct prompt (one row each), then each completion (one row each). Between levels the keys, values
and running states are gathered, which is differentiable, so the same code serves sampling and
gradients. The layers below have the interface of mlx-lm's caches, one class for each kind of cache.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from copy import copy
from dataclasses import dataclass, replace
from typing import Any
from weakref import ref

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx_lm.models.cache import (
    ArraysCache,
    CacheList,
    ConcatenateKVCache,
    KVCache,
    RotatingKVCache,
    make_prompt_cache,
)

from ...errors import UserError
from ..kernels.gathers import take_rows
from .sizes import slot_block

# Models whose caches are of a known kind but that use them in a way that forking or padding would change.
_REFUSED = {
    "afm7": "takes the position of a token from the size of its cache, so padding would change its output",
    "gpt_bigcode": "takes one position for all rows, so rows of unequal length cannot continue together",
    "minimax_m3_vl": "selects the keys it attends to by blocks of its cache, so padding would change its output",
    "olmo": "adds its causal mask to the scores as zeros and ones in mlx-lm, so tokens see those that follow them",
    "phi3small": "adds its causal mask to the scores as zeros and ones in mlx-lm, so tokens see those that follow them",
}


class Context:
    """The text that a model has read: B rows of S slots, each of which a row uses for a token or leaves unused.

    ``spare`` slots are allocated ahead when it grows, for decoding token by token; 0 concatenates,
    which gradients need. Raises UserError for a model whose caches cannot be forked correctly.
    """

    def __init__(self, model: nn.Module, spare: int = 0):
        if model.model_type in _REFUSED:
            raise UserError(f"{model.model_type} {_REFUSED[model.model_type]}; choose another model")
        if any(type(module).__name__ == "DynamicNTKScalingRoPE" for module in model.layers[0].modules()):
            raise UserError(
                "this model's rotary embedding (DynamicNTKScalingRoPE) takes one position for all rows, so rows of "
                "unequal length cannot continue together; set another rope_scaling in its config.json, or choose "
                "another model"
            )
        self.spare = spare
        # whether attention scores have an axis for groups of heads, which a mask per row then needs, too
        self.grouped = model.model_type == "gemma2" and model.args.num_attention_heads > model.args.num_key_value_heads
        self.windows: dict[int, int] = {}  # size of mlx-lm's sliding cache -> the window that the model asks for
        self.rows, self.size, self.arriving = 1, 0, 0
        self.ragged: Ragged | None = None  # None while every row uses every slot
        self.layers = [_layer(cache, self) for cache in make_prompt_cache(model)]

    @property
    def recurrent(self) -> bool:
        """Return whether a layer keeps a running state, which a token of padding would change for good."""
        return any(isinstance(layer, State) for layer in members(self.layers))

    @property
    def complete(self) -> bool:
        """Return whether what has been read filled every running state; a model may leave one unused."""
        return all(s is not None for layer in members(self.layers) if isinstance(layer, State) for s in layer.cache)

    def read(self, model: Callable[..., mx.array], tokens: mx.array, lengths: mx.array | None = None) -> mx.array:
        """Run (B, N) ``tokens`` after the text so far; return logits (B, N, V), evaluated only if used.

        ``lengths`` (B,) int gives the number of real tokens when rows are padded on the right. A recurrent model
        refuses them: read rows of equal length together and ``join`` the contexts. Padding after the last
        token that matters needs no ``lengths``, since no real token follows it.
        """
        if lengths is not None and self.recurrent:
            raise UserError(
                "this model keeps running states (ArraysCache), so rows of unequal length cannot be read together; "
                "read rows of equal length together and join their contexts"
            )
        self.rows, self.arriving = tokens.shape
        logits = model(tokens, cache=self.layers)
        if lengths is not None:
            before, arrived = self.spelled_out(), mx.arange(self.arriving) < lengths[:, None]
            used = mx.concatenate([before.used, arrived], axis=1)
            self.ragged = Ragged(before.lengths + lengths, used, before.gap + self.arriving, before.front)
        elif self.ragged is not None:
            self.ragged = replace(self.ragged, lengths=self.ragged.lengths + self.arriving)
        self.size, self.arriving = self.size + self.arriving, 0
        return logits

    def take_back(self, read: int, kept: np.ndarray) -> None:
        """Keep, of the ``read`` tokens that every row read last, the first ``kept`` (B,) of each, at least one.

        The others were not read as far as anything that follows is concerned. A model with running states cannot.
        """
        start, most = self.size - read, int(kept.max())
        self.size = start + most
        if self.ragged is None:
            if int(kept.min()) == most:
                return
            lengths, used = mx.full((self.rows,), start, mx.int32), mx.ones((self.rows, start), mx.bool_)
            before = Ragged(lengths, used, gap=0, front=np.zeros(self.rows, np.int32))
        else:
            before = replace(
                self.ragged, lengths=self.ragged.lengths - read, used=self.ragged.used_until(start)[:, :start]
            )
        own = mx.array(kept.astype(np.int32))
        used = mx.concatenate([before.used, mx.arange(most) < own[:, None]], axis=1)
        self.ragged = Ragged(before.lengths + own, used, before.gap + most - int(kept.min()), before.front)

    def packed(self, lengths: Sequence[int]) -> Context:
        """Return the same rows, which have read so many tokens each, without the slots between that none uses."""
        return Context.join([self._alone(row, length) for row, length in enumerate(lengths)], self.spare)

    def fork(self, parents: np.ndarray | mx.array) -> Context:
        """Return a context whose row b continues row ``parents[b]``; this one does not change.

        Every array is gathered once. With a NumPy array it also detects, without asking the device, when
        ``parents`` changes nothing (then nothing is gathered) and when leading slots have become unused (then
        they are dropped), so pass one where you can.
        """
        child, known = copy(self), isinstance(parents, np.ndarray)
        child.rows = len(parents)
        cut = 0  # leading slots that none of the child's rows uses
        if self.ragged is not None:
            front = None
            if self.ragged.front is not None and known:
                front = self.ragged.front[parents]
                cut = int(front.min())
                front = front - cut
            if front is not None and self.ragged.gap == 0 and not front.any():
                child.ragged = None
            else:
                rows = mx.array(parents)
                lengths, used = self.ragged.lengths[rows], self.ragged.used[:, cut:][rows]
                child.ragged = Ragged(lengths, used, self.ragged.gap, front)
        child.size = self.size - cut
        unchanged = known and np.array_equal(parents, np.arange(self.rows))
        gathered = None if unchanged else mx.array(parents)
        child.layers = [_forked(layer, child, gathered, cut) for layer in self.layers]
        return child

    def alone(self, row: int, length: int) -> Context | None:
        """Return a context of ``row`` after the first ``length`` tokens that it has read, in memory of its own.

        It is None where more were read into a running state.
        """
        if self.recurrent and len(self._slots(row)) != length:
            return None
        return self._alone(row, length)

    def _slots(self, row: int) -> np.ndarray:
        """Return the slots that a row uses."""
        used = np.ones(self.size, bool) if self.ragged is None else np.array(self.ragged.used_until(self.size)[row])
        return np.flatnonzero(used)

    def _alone(self, row: int, length: int) -> Context:
        slots = self._slots(row)
        kept, here = mx.array(slots[:length]), mx.array([row])
        return self.of_one_row(
            length,
            [
                [None if a is None else mx.take(a[row], kept, axis=1)[None] for a in _held(layer)]
                if isinstance(layer, Attention)
                else [None if a is None else mx.take(a, here, axis=0) for a in _held(layer)]
                for layer in members(self.layers)
            ],
        )

    def of_one_row(self, length: int, held: Sequence[Sequence[mx.array | None]]) -> Context:
        """Return a context of this model that has read ``length`` tokens, of which its layers hold ``held``."""
        mx.eval([a for arrays in held for a in arrays if a is not None])
        one, given = copy(self), iter(held)
        one.rows, one.size, one.ragged = 1, length, None
        one.layers = [_holding(layer, one, given) for layer in self.layers]
        return one

    def evaluate(self) -> None:
        """Compute the keys, values and running states now."""
        mx.eval([a for layer in members(self.layers) for a in _held(layer) if a is not None])

    @property
    def nbytes(self) -> int:
        """The bytes of keys, values and running states."""
        return sum(a.nbytes for layer in members(self.layers) for a in _held(layer) if a is not None)

    @classmethod
    def join(cls, contexts: Sequence[Context], room: int = 0) -> Context:
        """Return one context with the rows of all in order; the given ones do not change.

        All are of one model and may differ in size: shorter ones get unused slots in front, so that
        these can be dropped when the long rows have left (see ``fork``). ``room`` slots are allocated ahead, without
        gradients, for what is read next.
        """
        if len(contexts) == 1:
            return contexts[0]
        joined = copy(contexts[0])
        joined.rows, joined.size = sum(c.rows for c in contexts), max(c.size for c in contexts)
        if all(c.ragged is None and c.size == joined.size for c in contexts):
            joined.ragged = None
        else:
            parts = [c.spelled_out() for c in contexts]
            missing = [joined.size - part.used.shape[1] for part in parts]
            used = [mx.pad(part.used, [(0, 0), (m, 0)]) for part, m in zip(parts, missing, strict=True)]
            fronts = [part.front + m for part, m in zip(parts, missing, strict=True) if part.front is not None]
            joined.ragged = Ragged(
                lengths=mx.concatenate([part.lengths for part in parts]),
                used=mx.concatenate(used),
                gap=max(part.gap for part in parts),
                front=np.concatenate(fronts) if len(fronts) == len(parts) else None,
            )
        joined.layers = [
            _joined(layers, joined, contexts, room) for layers in zip(*(c.layers for c in contexts), strict=True)
        ]
        return joined

    def first_seen(self, own: int | None) -> int:
        """Return the first slot that a layer with the window ``own`` (None: without one) still needs."""
        if own is None:
            return 0
        gap = 0 if self.ragged is None else self.ragged.gap
        return max(0, self.size - gap - (self.windows.get(own, own) - 1))

    def mask(self, n: int, return_array: bool, window: int | None, own: int | None = None) -> Any:
        """Return which slots each of n arriving tokens may attend to: None (all), "causal" or a bool array.

        It covers the slots that a layer with the window ``own`` hands out and the arriving ones. ``window`` is
        what the model asks for, if it does; it may be larger than ``own`` (PLaMo-3) and takes precedence.
        """
        if own is not None:
            self.windows[own] = max(self.windows.get(own, own), window or own)
        first = self.first_seen(own)
        count = self.size - first + n
        window = window or own or count
        hides = count > window
        if self.ragged is None and not hides and (n == 1 or not return_array):
            return None if n == 1 else "causal"
        slots = mx.arange(count)
        seen = slots <= slots[-n:, None]  # (n, count)
        if self.ragged is None:
            return seen & (slots[-n:, None] - slots < window) if hides else seen
        used = self.ragged.used_until(self.size + n)[:, first:]  # what arrives counts as used: padding comes last
        seen = seen & used[:, None] if n > 1 else used[:, None]
        if hides:
            position = mx.cumsum(used.astype(mx.int32), axis=1)
            seen = seen & (position[:, -n:, None] - position[:, None] < window)
        return seen[:, None, None] if self.grouped else seen[:, None]

    def spelled_out(self) -> Ragged:
        """Return lengths and all used slots, also while all rows are alike."""
        if self.ragged is not None:
            return replace(self.ragged, used=self.ragged.used_until(self.size))
        lengths, used = mx.full((self.rows,), self.size, mx.int32), mx.ones((self.rows, self.size), mx.bool_)
        return Ragged(lengths, used, gap=0, front=np.zeros(self.rows, np.int32))


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """The slots that each of B rows uses, once they differ."""

    lengths: mx.array  # (B,) int32, slots used, which is the position of the next token
    used: mx.array  # (B, V) bool; every row uses all slots after the first V
    gap: int  # no row has more unused slots than this between used ones
    front: np.ndarray | None  # (B,) int32, unused slots before the first used one; None if unknown

    def used_until(self, size: int) -> mx.array:
        """Return which of the first ``size`` slots are used, (B, size) bool."""
        return mx.pad(self.used, [(0, 0), (0, size - self.used.shape[1])], constant_values=True)


class Attention:
    """The keys and values of an attention layer; a ``window`` limits it to that many positions, its own included.

    All are kept, since rows of different length pass the window at different times. While no mask is needed
    otherwise, only the window's last slots are handed out, so that the window needs no mask either.
    """

    def __init__(self, context: Context, window: int | None = None):
        self._context, self.window = ref(context), window  # a cycle would keep keys until garbage collection
        self.holds: Context | None = None  # the same context, where nothing else holds it
        self.keys: mx.array | None = None  # (B, heads, S or more, D)
        self.values: mx.array | None = None

    @property
    def context(self) -> Context:
        """The context it is a layer of, which its reader must hold."""
        context = self._context()
        assert context is not None
        return context

    @property
    def offset(self) -> mx.array | int:
        """The position of the next token: an int while all rows agree, else (B,) int32."""
        context = self.context
        return context.size if context.ragged is None else context.ragged.lengths

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Any:
        return self.context.mask(n, return_array, window_size, self.window)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        """Append ``keys`` and ``values``; return those of the slots that ``make_mask`` covers."""
        context = self.context
        start, end = context.size, context.size + keys.shape[2]
        grown: list[mx.array] = []
        for old, new in ((self.keys, keys), (self.values, values)):
            if old is None:
                grown.append(new)
            elif context.spare == 0:
                grown.append(mx.concatenate([old, new], axis=2))
            else:
                if end > old.shape[2]:
                    slots = -(-(end + context.spare) // slot_block()) * slot_block()
                    room = mx.zeros((*old.shape[:2], slots - start, old.shape[3]), old.dtype)
                    old = mx.concatenate([old[..., :start, :], room], axis=2)
                grown.append(old[...])  # a new array, since a fork may hold ``old``; MLX copies only if one still does
                grown[-1][..., start:end, :] = new
        self.keys, self.values = grown
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Return what the last ``update_and_fetch`` returned, for layers that read the keys of another (Gemma 3n)."""
        assert self.keys is not None
        assert self.values is not None
        first, end = self.context.first_seen(self.window), self.context.size + self.context.arriving
        return self.keys[..., first:end, :], self.values[..., first:end, :]


class State(ArraysCache):
    """The running state of a layer: arrays whose first axis is the row, replaced by each read."""

    @classmethod
    def holding(cls, arrays: list[Any]) -> State:
        """Return a state of ``arrays``, None where the layer has read nothing."""
        state = cls(len(arrays))
        state.cache = arrays
        return state


class Group(CacheList):
    """The caches of one layer that has several."""


Layer = Attention | State | Group


def members(layers: Sequence[Any]) -> list[Any]:
    """Return ``layers`` with the members of each group in its place."""
    return [m for layer in layers for m in (members(layer.caches) if isinstance(layer, Group) else [layer])]


def _layer(cache: Any, context: Context) -> Layer:
    """Return the layer that replaces one of mlx-lm's caches, if it is of a kind known to fork correctly."""
    kind = type(cache)
    if kind in (KVCache, ConcatenateKVCache):
        return Attention(context)
    if kind is RotatingKVCache and cache.keep == 0:
        return Attention(context, cache.max_size)
    if kind is ArraysCache:
        return State(len(cache.cache))
    if kind is CacheList:
        return Group(*(_layer(member, context) for member in cache.caches))
    name = f"{kind.__name__} with keep={cache.keep}" if kind is RotatingKVCache else kind.__name__
    raise UserError(
        f"this model keeps what it has read in {name}, which textpolicy cannot share among rows; choose a model with "
        "KVCache, ConcatenateKVCache, ArraysCache, CacheList or RotatingKVCache with keep=0"
    )


def _held(layer: Attention | State) -> list[Any]:
    """Return the arrays of a layer, None where it has read nothing."""
    return list(layer.cache) if isinstance(layer, State) else [layer.keys, layer.values]


def _holding(layer: Layer, context: Context, given: Iterator[Sequence[Any]]) -> Layer:
    """Return a layer of the kind of ``layer`` for ``context``, with the next of the ``given`` arrays."""
    if isinstance(layer, Group):
        return Group(*(_holding(member, context, given) for member in layer.caches))
    if isinstance(layer, State):
        return State.holding(list(next(given)))
    child = Attention(context, layer.window)
    child.keys, child.values = next(given)
    return child


def _forked(layer: Layer, context: Context, rows: mx.array | None, cut: int) -> Layer:
    """Return ``layer`` for the forked ``context``: its ``rows`` (None: all) without the first ``cut`` slots."""
    if isinstance(layer, Group):
        return Group(*(_forked(member, context, rows, cut) for member in layer.caches))
    held = _held(layer)
    if cut and isinstance(layer, Attention):
        held = [None if a is None else a[..., cut:, :] for a in held]
    return _holding(layer, context, iter([[a if a is None or rows is None else take_rows(a, rows) for a in held]]))


def _joined(layers: Sequence[Any], context: Context, contexts: Sequence[Context], room: int) -> Layer:
    """Return ``layers``, one from each of ``contexts``, as one layer of ``context`` with ``room`` for more slots."""
    if isinstance(layers[0], Group):
        caches = zip(*(layer.caches for layer in layers), strict=True)
        return Group(*(_joined(members, context, contexts, room) for members in caches))
    joined: list[mx.array | None] = []
    if isinstance(layers[0], State):
        for states in zip(*(layer.cache for layer in layers), strict=True):
            begun = [s for s in states if s is not None]
            if begun and (len(begun) < len(states) or len({s.shape[1:] for s in begun}) > 1):
                shapes = ", ".join("none" if s is None else str(s.shape[1:]) for s in states)
                raise UserError(
                    f"rows with running states of different shapes ({shapes}) cannot continue together, since some "
                    "have read too little to fill theirs; give every prompt a few tokens more, or all the same length"
                )
            joined.append(mx.concatenate(begun) if begun else None)
        return State.holding(joined)
    for arrays in ([layer.keys for layer in layers], [layer.values for layer in layers]):
        like = next((a for a in arrays if a is not None), None)
        if like is None:
            joined.append(None)
            continue
        parts = [
            mx.zeros((part.rows, like.shape[1], part.size, like.shape[3]), like.dtype) if a is None else a
            for a, part in zip(arrays, contexts, strict=True)
        ]
        moved = [context.size - part.size for part in contexts]  # each to the end of the joined slots
        if room:  # written once, where none asks for gradients
            slots = -(-(context.size + room) // slot_block()) * slot_block()
            whole, row = mx.zeros((context.rows, like.shape[1], slots, like.shape[3]), like.dtype), 0
            for array, part, first in zip(parts, contexts, moved, strict=True):
                whole[row : row + part.rows, :, first : context.size] = array[..., : part.size, :]
                row += part.rows
        else:
            pads = [[(0, 0), (0, 0), (first, 0), (0, 0)] for first in moved]
            whole = mx.concatenate(
                [mx.pad(a[..., : c.size, :], pad) for a, c, pad in zip(parts, contexts, pads, strict=True)]
            )
        joined.append(whole)
    return _holding(layers[0], context, iter([joined]))
