"""Linear layers that read the same input, run as one product, their LoRAs included: fewer and larger kernels."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from copy import copy
from dataclasses import dataclass
from itertools import accumulate
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.lora import LoRALinear

from ..adapters.attach import WRAPPERS
from ..adapters.lora_linear import LowRankLinear
from . import cuda
from .module_copies import StandIn, exchanged

Where = tuple[str | int, ...]  # from the model to a module in it

_AT_ONCE = 16  # groups whose weights move together; until that is done they are there twice


class Together:
    """Linear layers called one after the other with one and the same input.

    With the kernel for it (cuda.py) one product makes the outputs of all and what their LoRAs' A give; then the
    rows of these A stand below the layers' weights, whose arrays become parts of the whole. Otherwise they
    take a product of their own, and so does B.
    """

    def __init__(self, layers: Sequence[nn.Module]):
        self.layers = layers
        self.widths = [_outs(layer) for layer in layers]
        self.base = _joined([_base(layer) for layer in layers])
        self.loras = [(i, layer) for i, layer in enumerate(layers) if isinstance(layer, LoRALinear)]
        self.by_kernel = self._suits_kernel()
        self.arrays: Sequence[mx.array] = ()  # of the LoRAs: [W; A] or A, and B
        self._input: mx.array | None = None
        self._outputs: Sequence[mx.array] = ()

    def part(self, i: int) -> Callable[[mx.array], mx.array]:
        """What stands in for layer ``i``; the first that is called computes for all, the last lets go."""

        def call(x: mx.array) -> mx.array:
            if self._input is not x:
                flat = self._compute(x.reshape(-1, x.shape[-1]))  # addmm takes leading axes for a batch of products
                self._input, self._outputs = x, [y.reshape(*x.shape[:-1], -1) for y in flat]
            out = self._outputs[i]
            if i == len(self.layers) - 1:
                self._input, self._outputs = None, ()
            return out

        return call

    def _compute(self, x: mx.array) -> Sequence[mx.array]:
        if self.arrays and self.by_kernel:
            return cuda.add_lora(*self.product(x), self.widths)
        y = self.base(x)
        if self.arrays:
            a, b = self.arrays
            y = mx.addmm(y, x @ a, b)
        ends = list(accumulate(self.widths))
        return [y[..., end - width : end] for end, width in zip(ends, self.widths, strict=True)]

    def product(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Of (N, inputs): what the kernels take as y and b (cuda.py)."""
        whole, b = self.arrays
        return x @ whole.T, b

    def read_adapters(self, dtype: mx.Dtype) -> list[mx.array]:
        """The LoRAs as they are now, in the type that the model computes in; [] if there are none."""
        if not self.loras:
            return []
        a = mx.concatenate([layer.lora_a for _, layer in self.loras], axis=1).astype(dtype)
        if not self.by_kernel:
            return [a, self._diagonal_b().astype(dtype)]
        self._move_weights(mx.concatenate([self.base.weight[: sum(self.widths)], a.T]))
        return [self.base.weight, mx.concatenate([m.scale * m.lora_b for _, m in self.loras], axis=1).astype(dtype)]

    def _suits_kernel(self) -> bool:
        ranks = {layer.lora_b.shape[0] for _, layer in self.loras}
        return (
            cuda.is_default()
            and len(self.loras) == len(self.layers)
            and len(ranks) == 1
            and type(self.base) is nn.Linear
            and "bias" not in self.base
            and all(n % 8 == 0 for n in (*self.widths, len(self.layers) * max(ranks)))
        )

    def _move_weights(self, whole: mx.array) -> None:
        """``whole`` holds the weights of all layers and more below; those of each become a part of it."""
        self.base = copy(self.base)
        self.base.weight = whole
        for layer, start, width in zip(self.layers, [0, *accumulate(self.widths)], self.widths, strict=False):
            _base(layer).weight = whole[start : start + width]

    def _diagonal_b(self) -> mx.array:
        """Each layer's B times its scale, at the layer's own ranks and outputs; zero elsewhere."""
        ranks, starts = [layer.lora_b.shape[0] for _, layer in self.loras], [0, *accumulate(self.widths)]
        b = mx.zeros((sum(ranks), sum(self.widths)))
        for (i, layer), rank, low in zip(self.loras, ranks, [0, *accumulate(ranks)], strict=False):
            b[low : low + rank, starts[i] : starts[i + 1]] = layer.scale * layer.lora_b
        return b


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """A model for sampling: the same weights, some of its linear layers run together."""

    model: nn.Module
    groups: tuple[Together, ...]
    consumed: frozenset[str]  # names of the trained parameters that ``adapters`` holds

    @classmethod
    def of(cls, model: nn.Module) -> View:
        """Found with a pass over one token. Joined weights replace those of the layers, which become views of them."""
        groups = [group for group in _groups(model) if not any(_base_is_trained(layer) for _, layer in group)]
        together = [Together([layer for _, layer in group]) for group in groups]
        places = {
            where: (t, i) for t, group in zip(together, groups, strict=True) for i, (where, _) in enumerate(group)
        }

        def stand_in(where: Where, module: nn.Module) -> Any:
            if where not in places:
                return module if isinstance(module, WRAPPERS) else None
            t, i = places[where]
            return StandIn(module, t.part(i))

        loras = [".".join(map(str, where)) for where, (t, i) in places.items() if isinstance(t.layers[i], LoRALinear)]
        names = frozenset(f"{name}.lora_{x}" for name in loras for x in "ab")
        return cls(exchanged(model, stand_in), tuple(together), names)

    def adapters(self, dtype: mx.Dtype) -> list[list[mx.array]]:
        """What the LoRAs say now: arrays to hand to ``using``."""
        read: list[list[mx.array]] = []
        for start in range(0, len(self.groups), _AT_ONCE):
            some = self.groups[start : start + _AT_ONCE]
            read += [t.read_adapters(dtype) for t in some]
            mx.eval(read[start:], [_base(layer).parameters() for t in some for layer in t.layers])
        return read

    @contextmanager
    def using(self, adapters: Sequence[Sequence[mx.array]], trained: Mapping[str, mx.array]) -> Iterator[None]:
        """Within it ``model`` has these adapters, and ``trained`` for the parameters of those names."""
        for t, arrays in zip(self.groups, adapters, strict=True):
            t.arrays = arrays
        before = [(module, name, module[name]) for module, name in map(self._holder, trained)]
        for (module, name, _), value in zip(before, trained.values(), strict=True):
            module[name] = value
        try:
            yield
        finally:
            for module, name, value in before:
                module[name] = value
            for t in self.groups:
                t.arrays = ()

    def _holder(self, path: str) -> tuple[Any, str]:
        """Where ``model`` keeps the parameter of this dotted name."""
        *way, name = path.split(".")
        module: Any = self.model
        for step in way:
            module = module.module if isinstance(module, StandIn) else module
            module = module[int(step)] if isinstance(module, list) else module[step]
        return module, name


def _groups(model: nn.Module) -> list[list[tuple[Where, nn.Module]]]:
    """Linear layers by the array that they read, in the order in which they read it; alone where only one LoRA does."""
    calls: list[tuple[Where, nn.Module, mx.array]] = []

    def watched(where: Where, module: nn.Module) -> Any:
        if not _is_known(module):
            return module if isinstance(module, WRAPPERS) else None  # what an adapter holds is its own business

        def call(x: mx.array) -> mx.array:
            calls.append((where, module, x))
            return module(x)

        return StandIn(module, call)

    exchanged(model, watched)(mx.zeros((1, 1), mx.int32))
    once = [c for c in calls if sum(c[0] == other[0] for other in calls) == 1] if _repeats(calls) else calls
    groups: dict[tuple[Where, int, str], list[tuple[Where, nn.Module]]] = {}
    for where, module, x in once:
        groups.setdefault((where[:-1], id(x), _kind(module)), []).append((where, module))
    return [g for g in groups.values() if len(g) > 1 or isinstance(g[0][1], LoRALinear)]


def _repeats(calls: Sequence[tuple[Where, Any, Any]]) -> bool:
    return len({where for where, _, _ in calls}) < len(calls)


def _is_known(module: nn.Module) -> bool:
    kind = type(module)
    if kind in (LoRALinear, LowRankLinear):
        return type(module.linear) in (nn.Linear, nn.QuantizedLinear) and module.dropout._p_1 == 1
    return kind in (nn.Linear, nn.QuantizedLinear)


def _kind(layer: nn.Module) -> str:
    """What layers must have in common to be joined."""
    base = _base(layer)
    form = (base.group_size, base.bits, base.mode) if isinstance(base, nn.QuantizedLinear) else ()
    return str((type(base).__name__, form, sorted((k, str(v.dtype)) for k, v in base.parameters().items())))


def _base(layer: nn.Module) -> nn.Module:
    return layer.linear if isinstance(layer, LoRALinear) else layer


def _base_is_trained(layer: nn.Module) -> bool:
    return bool(tree_flatten(_base(layer).trainable_parameters()))


def _outs(layer: nn.Module) -> int:
    return int(_base(layer).weight.shape[0])


def _joined(bases: Sequence[nn.Module]) -> nn.Module:
    """One layer with the outputs of all; theirs become parts of its arrays, so that nothing is stored twice."""
    if len(bases) == 1:
        return bases[0]
    whole, sizes = copy(bases[0]), [_outs(base) for base in bases]
    for name in bases[0].parameters():
        whole[name] = mx.concatenate([base[name] for base in bases])
        mx.eval(whole[name])
        for i, base in enumerate(bases):
            base[name] = whole[name][sum(sizes[:i]) : sum(sizes[: i + 1])]
            mx.eval(base[name])
    return whole
