"""What a model has read, for many rows at once: compute a prefix once, fork it, continue every row.

Rollouts and updates both run a model in levels: what all rows begin with (one row), then each
distinct prompt (one row each), then each completion (one row each). Between levels the keys, values
and running states are gathered, which is differentiable, so the same code serves sampling and
gradients. The layers below speak the interface of mlx-lm's caches, one class for each kind that it has.
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

# Models whose caches are of a known kind and that use them in a way that forking or padding would change.
_REFUSED = {
    "afm7": "takes the position of a token from the size of its cache, so padding would change what it says",
    "gpt_bigcode": "takes one position for all rows, so rows of unequal length cannot continue together",
    "minimax_m3_vl": "picks the keys that it attends to by blocks of its cache, so padding would change what it says",
    "olmo": "adds its causal mask to the scores as zeros and ones in mlx-lm, so tokens see those that follow them",
    "phi3small": "adds its causal mask to the scores as zeros and ones in mlx-lm, so tokens see those that follow them",
}


class Context:
    """What a model has read: B rows of S slots, each of which a row uses for a token or leaves unused.

    ``spare`` slots are allocated ahead when it grows, for decoding token by token; 0 concatenates,
    which is what a gradient wants. Raises UserError for a model whose caches it cannot fork rightly.
    """

    def __init__(self, model: nn.Module, spare: int = 0):
        _check(model)
        self.spare = spare
        self.grouped = _groups_heads(model)
        self.windows: dict[int, int] = {}  # of sliding layers: the size of mlx-lm's cache, what the model asks for
        self.rows, self.size, self.arriving = 1, 0, 0
        self.ragged: Ragged | None = None  # None while every row uses every slot
        self.layers = [_layer(cache, self) for cache in make_prompt_cache(model)]

    @property
    def offset(self) -> mx.array | int:
        """Position of the next token: an int while all rows agree, else (B,) int32."""
        return self.size if self.ragged is None else self.ragged.lengths

    @property
    def recurrent(self) -> bool:
        """Whether a layer keeps a running state, which a token of padding would change for good."""
        return any(layer.recurrent for layer in self.layers)

    def read(self, model: Callable[..., mx.array], tokens: mx.array, lengths: mx.array | None = None) -> mx.array:
        """Run (B, N) ``tokens`` after what was read; returns logits (B, N, V), evaluated only if used.

        ``lengths`` (B,) int says how many of the N are real, when rows are padded on the right. A recurrent
        model refuses them: read equal lengths together and ``join`` the contexts. Padding after the last
        token that matters needs no ``lengths``: nothing real follows it.
        """
        if lengths is not None and self.recurrent:
            raise UserError(
                "this model keeps running states (ArraysCache), so rows of unequal length cannot be read together; "
                "read rows of equal length together and join their contexts"
            )
        self.rows, self.arriving = tokens.shape
        logits = model(tokens, cache=self.layers)
        if lengths is not None:
            self.ragged = self._spelled_out().padded(self.arriving, lengths)
        elif self.ragged is not None:
            self.ragged = replace(self.ragged, lengths=self.ragged.lengths + self.arriving)
        self.size, self.arriving = self.size + self.arriving, 0
        return logits

    def fork(self, parents: np.ndarray | mx.array) -> Context:
        """A context whose row b continues row ``parents[b]``; this one stays as it is.

        Every array is gathered once. From a NumPy array it also sees, without asking the device, when
        ``parents`` changes nothing (then nothing is gathered) and when slots have become useless (then
        they are dropped): give it one where you can.
        """
        child = copy(self)
        child.rows = len(parents)
        cut = 0  # slots that none of the child's rows uses, at their start
        if self.ragged is not None:
            cut, child.ragged = self.ragged.fork(parents)
        child.size = self.size - cut
        rows = None if _changes_nothing(parents, self.rows) else mx.array(parents)
        child.layers = [layer.fork(child, rows, cut) for layer in self.layers]
        return child

    @classmethod
    def join(cls, contexts: Sequence[Context]) -> Context:
        """One context with the rows of all, in order; those stay as they are.

        All are of one model and may differ in size: shorter ones get unused slots in front, so that
        these can go again when the long rows have left (see ``fork``).
        """
        if len(contexts) == 1:
            return contexts[0]
        joined = copy(contexts[0])
        joined.rows, joined.size = sum(c.rows for c in contexts), max(c.size for c in contexts)
        even = all(c.ragged is None and c.size == joined.size for c in contexts)
        joined.ragged = None if even else Ragged.join([c._spelled_out() for c in contexts], joined.size)
        groups = zip(*(c.layers for c in contexts), strict=True)
        joined.layers = [layers[0].join(joined, layers) for layers in groups]
        return joined

    def first_seen(self, own: int | None) -> int:
        """The first slot that a layer with the window ``own`` (None: none) still needs."""
        if own is None:
            return 0
        gap = 0 if self.ragged is None else self.ragged.gap
        return max(0, self.size - gap - (self.windows.get(own, own) - 1))

    def mask(self, n: int, return_array: bool, window: int | None, own: int | None = None) -> Any:
        """Which slots each of n arriving tokens may attend to: None (all), "causal" or a bool array.

        It covers the slots that a layer with the window ``own`` hands out and those arriving;
        ``window`` is what the model asks for, if it does; that may be more than ``own`` (PLaMo-3) and wins.
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

    def _spelled_out(self) -> Ragged:
        """Lengths and used slots, also while all rows are alike."""
        if self.ragged is not None:
            return replace(self.ragged, used=self.ragged.used_until(self.size))
        lengths, used = mx.full((self.rows,), self.size, mx.int32), mx.ones((self.rows, self.size), mx.bool_)
        return Ragged(lengths, used, gap=0, front=np.zeros(self.rows, np.int32))


@dataclass(frozen=True, slots=True, eq=False)
class Ragged:
    """Which slots each of B rows uses, once they differ."""

    lengths: mx.array  # (B,) int32, slots used, which is the position of the next token
    used: mx.array  # (B, V) bool; every row uses all slots after the first V
    gap: int  # no row has more unused slots than this between used ones
    front: np.ndarray | None  # (B,) int32, unused slots before the first used one; None: not known here

    def used_until(self, size: int) -> mx.array:
        """(B, size) bool."""
        return mx.pad(self.used, [(0, 0), (0, size - self.used.shape[1])], constant_values=True)

    def padded(self, n: int, lengths: mx.array) -> Ragged:
        """After n more slots, of which each row uses the first ``lengths`` (B,)."""
        arrived = mx.arange(n) < lengths[:, None]
        used = mx.concatenate([self.used, arrived], axis=1)
        return Ragged(self.lengths + lengths, used, self.gap + n, self.front)

    def fork(self, parents: np.ndarray | mx.array) -> tuple[int, Ragged | None]:
        """How many leading slots no row of ``parents`` uses, and its rows without those; None if all are alike."""
        front, cut = None, 0
        if self.front is not None and isinstance(parents, np.ndarray):
            front = self.front[parents]
            cut = int(front.min())
            if self.gap == 0 and (front == cut).all():
                return cut, None
            front = front - cut
        rows = mx.array(parents)
        return cut, Ragged(self.lengths[rows], self.used[:, cut:][rows], self.gap, front)

    @classmethod
    def join(cls, parts: Sequence[Ragged], size: int) -> Ragged:
        """The rows of ``parts``, of which each spells out all its slots, moved to the end of ``size`` slots."""
        missing = [size - part.used.shape[1] for part in parts]
        used = [mx.pad(part.used, [(0, 0), (m, 0)]) for part, m in zip(parts, missing, strict=True)]
        fronts = [part.front + m for part, m in zip(parts, missing, strict=True) if part.front is not None]
        return cls(
            lengths=mx.concatenate([part.lengths for part in parts]),
            used=mx.concatenate(used),
            gap=max(part.gap for part in parts),
            front=np.concatenate(fronts) if len(fronts) == len(parts) else None,
        )


class Attention:
    """One attention layer's keys and values; with a ``window`` it sees only so many positions back, itself included.

    All are kept, since rows that differ in length pass the window at different times. While no mask
    is needed otherwise, only the window's last slots are handed out, so that none is needed for it either.
    """

    recurrent = False

    def __init__(self, context: Context, window: int | None = None):
        self._context, self.window = ref(context), window  # a cycle would keep keys until Python looks for garbage
        self._held: Context | None = None
        self.keys: mx.array | None = None  # (B, heads, S or more, D)
        self.values: mx.array | None = None

    @property
    def context(self) -> Context:
        """What it is a layer of; whoever reads with the layer holds that."""
        context = self._context()
        assert context is not None
        return context

    def empty(self) -> Attention:
        """One like it that has read nothing."""
        twin = copy(self)
        twin.keys = twin.values = None
        return twin

    def in_context(self, context: Context) -> Attention:
        """A copy that is a layer of ``context`` and holds it."""
        twin = copy(self)
        twin._held, twin._context = context, ref(context)
        return twin

    @property
    def offset(self) -> mx.array | int:
        return self.context.offset

    def make_mask(self, n: int, return_array: bool = False, window_size: int | None = None) -> Any:
        return self.context.mask(n, return_array, window_size, self.window)

    def update_and_fetch(self, keys: mx.array, values: mx.array) -> tuple[mx.array, mx.array]:
        self.keys, self.values = self._append(self.keys, keys), self._append(self.values, values)
        return self.keys_and_values()

    def keys_and_values(self) -> tuple[mx.array, mx.array]:
        """Those of the slots that ``make_mask`` speaks of."""
        assert self.keys is not None
        assert self.values is not None
        first, end = self.context.first_seen(self.window), self.context.size + self.context.arriving
        return self.keys[..., first:end, :], self.values[..., first:end, :]

    def _append(self, old: mx.array | None, new: mx.array) -> mx.array:
        if old is None:
            return new
        start, end = self.context.size, self.context.size + new.shape[2]
        if self.context.spare == 0:
            return mx.concatenate([old, new], axis=2)
        if end > old.shape[2]:
            slots = _rounded(end + self.context.spare)
            room = mx.zeros((*old.shape[:2], slots - start, old.shape[3]), old.dtype)
            old = mx.concatenate([old[..., :start, :], room], axis=2)
        grown = old[...]  # a name of its own, since a fork may hold ``old``; MLX copies only if one still does
        grown[..., start:end, :] = new
        return grown

    def fork(self, context: Context, rows: mx.array | None, cut: int) -> Attention:
        child = Attention(context, self.window)
        if self.keys is not None and self.values is not None:
            keys, values = (a[..., cut:, :] if cut else a for a in (self.keys, self.values))
            child.keys, child.values = _take(keys, rows), _take(values, rows)
        return child

    def join(self, context: Context, layers: Sequence[Attention]) -> Attention:
        child = Attention(context, self.window)
        contexts = [layer.context for layer in layers]
        child.keys = _stack([layer.keys for layer in layers], contexts, context.size)
        child.values = _stack([layer.values for layer in layers], contexts, context.size)
        return child


class State(ArraysCache):
    """One layer's running state: arrays whose first axis is the row, replaced by each read."""

    recurrent = True

    def fork(self, context: Context, rows: mx.array | None, cut: int) -> State:
        return self._holding([None if a is None else _take(a, rows) for a in self.cache])

    def join(self, context: Context, layers: Sequence[State]) -> State:
        return self._holding([_concatenate(arrays) for arrays in zip(*(layer.cache for layer in layers), strict=True)])

    def _holding(self, arrays: list[Any]) -> State:
        state = State(len(arrays))
        state.cache = arrays
        return state


class Group(CacheList):
    """What one layer with several caches keeps."""

    @property
    def recurrent(self) -> bool:
        return any(member.recurrent for member in self.caches)

    def fork(self, context: Context, rows: mx.array | None, cut: int) -> Group:
        return Group(*(member.fork(context, rows, cut) for member in self.caches))

    def join(self, context: Context, layers: Sequence[Group]) -> Group:
        members = zip(*(layer.caches for layer in layers), strict=True)
        return Group(*(group[0].join(context, group) for group in members))


def _check(model: nn.Module) -> None:
    if model.model_type in _REFUSED:
        raise UserError(f"{model.model_type} {_REFUSED[model.model_type]}; choose another model")
    if any(type(module).__name__ == "DynamicNTKScalingRoPE" for module in model.layers[0].modules()):
        raise UserError(
            "this model's rotary embedding (DynamicNTKScalingRoPE) takes one position for all rows, so rows of "
            "unequal length cannot continue together; set another rope_scaling in its config.json, or choose another"
        )


def _groups_heads(model: nn.Module) -> bool:
    """Whether its attention scores have an axis of their own for groups of heads; a mask per row then needs it, too."""
    return model.model_type == "gemma2" and model.args.num_attention_heads > model.args.num_key_value_heads


def _layer(cache: Any, context: Context) -> Any:
    """What stands in for one of mlx-lm's caches, if it is of a kind known to fork rightly."""
    kind = type(cache)
    if kind is RotatingKVCache and cache.keep == 0:
        return Attention(context, cache.max_size)
    if kind not in _KINDS:
        name = f"{kind.__name__} with keep={cache.keep}" if kind is RotatingKVCache else kind.__name__
        raise UserError(
            f"this model keeps what it has read in {name}, which textpolicy cannot share among rows; "
            f"choose a model with {', '.join(known.__name__ for known in _KINDS)} or RotatingKVCache with keep=0"
        )
    return _KINDS[kind](cache, context)


_KINDS: dict[type, Callable[[Any, Context], Any]] = {
    KVCache: lambda cache, context: Attention(context),
    ConcatenateKVCache: lambda cache, context: Attention(context),
    ArraysCache: lambda cache, context: State(len(cache.cache)),
    CacheList: lambda cache, context: Group(*(_layer(member, context) for member in cache.caches)),
}


def _rounded(slots: int) -> int:
    """Slots to allocate: CUDA's fast attention for decoding wants them in blocks of 256."""
    return slots if mx.default_device() == mx.Device(mx.cpu) else -(-slots // 256) * 256


def _changes_nothing(parents: np.ndarray | mx.array, rows: int) -> bool:
    return isinstance(parents, np.ndarray) and np.array_equal(parents, np.arange(rows))


def _take(array: mx.array, rows: mx.array | None) -> mx.array:
    return array if rows is None else mx.take(array, rows, axis=0)


def _stack(arrays: Sequence[mx.array | None], contexts: Sequence[Context], size: int) -> mx.array | None:
    """Keys or values of several contexts, each moved to the end of ``size`` slots; None where nothing was read."""
    like = next((a for a in arrays if a is not None), None)
    if like is None:
        return None
    return mx.concatenate(list(_moved(arrays, contexts, size, like)))


def _moved(
    arrays: Sequence[mx.array | None], contexts: Sequence[Context], size: int, like: mx.array
) -> Iterator[mx.array]:
    for array, context in zip(arrays, contexts, strict=True):
        if array is None:
            yield mx.zeros((context.rows, like.shape[1], size, like.shape[3]), like.dtype)
        else:
            yield mx.pad(array[..., : context.size, :], [(0, 0), (0, 0), (size - context.size, 0), (0, 0)])


def _concatenate(states: Sequence[mx.array | None]) -> mx.array | None:
    """Running states of several contexts; None if none has begun."""
    begun = [s for s in states if s is not None]
    if begun and (len(begun) < len(states) or len({s.shape[1:] for s in begun}) > 1):
        shapes = ", ".join("none" if s is None else str(s.shape[1:]) for s in states)
        raise UserError(
            f"rows with running states of different shapes ({shapes}) cannot continue together, since some "
            "have read too little to fill theirs; give every prompt a few tokens more, or all the same length"
        )
    return mx.concatenate(begun) if begun else None
