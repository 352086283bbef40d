"""Run linear layers that read the same input as one product, LoRAs included: fewer and larger kernels."""

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

from ..adapters.attach import WRAPPERS, LowRankLinear
from . import operations
from .patching import StandIn, with_modules

Where = tuple[str | int, ...]  # from the model to a module in it

_AT_ONCE = 4  # groups whose weights are joined at a time, as many as a block has; meanwhile they are in memory twice


class FusedLinear:
    """The linear layers called one after the other with the same input, computed as one.

    Where all have LoRAs and float weights, one product gives all outputs and the LoRAs' x A; the LoRAs' A are then
    rows below the layers' weights, and each layer's weight is a slice of the joined array. Otherwise A and B each
    take a product of their own.
    """

    def __init__(self, layers: Sequence[nn.Module], kernels: Any = operations):
        self.layers, self.kernels = layers, kernels
        self.widths = [_outputs(layer) for layer in layers]
        self.base = _joined([_base(layer) for layer in layers])
        self.loras = [(i, layer) for i, layer in enumerate(layers) if isinstance(layer, LoRALinear)]
        ranks = {layer.lora_b.shape[0] for _, layer in self.loras}
        self.is_joined = (
            len(self.loras) == len(self.layers)
            and type(self.base) is nn.Linear
            and "bias" not in self.base
            and (
                kernels is operations
                or (len(ranks) == 1 and all(n % 8 == 0 for n in (*self.widths, len(layers) * max(ranks))))
            )
        )
        self.arrays: Sequence[mx.array] = ()  # of the LoRAs: [W; A] or A, and B
        self._input: mx.array | None = None
        self._outputs: Sequence[mx.array] = ()

    def output(self, i: int) -> Callable[[mx.array], mx.array]:
        """Return the function that stands in for layer ``i``.

        The first one called computes the outputs of all layers; the last layer's releases them.
        """

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
        if self.arrays and self.is_joined:
            return self.kernels.add_lora(*self.product(x), self.widths)
        y = self.base(x)
        if self.arrays:
            a, b = self.arrays
            y = mx.addmm(y, x @ a, b)
        ends = list(accumulate(self.widths))
        return [y[..., end - width : end] for end, width in zip(ends, self.widths, strict=True)]

    def product(self, x: mx.array) -> tuple[mx.array, mx.array]:
        """Return the y and b of ``kernels`` for ``x`` (N, inputs)."""
        whole, b = self.arrays
        return x @ whole.T, b

    def read_adapters(self, dtype: mx.Dtype) -> list[mx.array]:
        """Return the LoRAs' current arrays in ``dtype``, the type the model computes in; [] without LoRAs."""
        if not self.loras:
            return []
        a = mx.concatenate([layer.lora_a for _, layer in self.loras], axis=1).astype(dtype)
        scaled = {i: (layer.scale * layer.lora_b).astype(dtype) for i, layer in self.loras}
        bs = [scaled.get(i, mx.zeros((0, width), dtype)) for i, width in enumerate(self.widths)]
        if not self.is_joined:
            return [a, operations.spread(bs)]
        # one array holds the weights of all layers and A below; each layer's weight is a slice
        whole = mx.concatenate([self.base.weight[: sum(self.widths)], a.T])
        self.base = copy(self.base)
        self.base.weight = whole
        for layer, width, end in zip(self.layers, self.widths, accumulate(self.widths), strict=True):
            _base(layer).weight = whole[end - width : end]
        return [whole, operations.spread(bs) if self.kernels is operations else mx.concatenate(bs, axis=1)]


@dataclass(frozen=True, slots=True, eq=False)
class View:
    """The model as sampling runs it: the same weights, with some of its linear layers fused."""

    model: nn.Module
    groups: tuple[FusedLinear, ...]
    consumed: frozenset[str]  # names of the trained parameters that ``adapters`` holds

    @classmethod
    def of(cls, model: nn.Module, kernels: Any = operations) -> View:
        """Return the view of ``model``, found by a pass over one token.

        Joined weights replace those of the layers, which become slices of them.
        """
        groups = [
            group
            for group in _groups(model)
            if not any(tree_flatten(_base(layer).trainable_parameters()) for _, layer in group)
        ]
        fused = [FusedLinear([layer for _, layer in group], kernels) for group in groups]
        places = {where: (t, i) for t, group in zip(fused, groups, strict=True) for i, (where, _) in enumerate(group)}

        def stand_in(where: Where, module: nn.Module) -> Any:
            if where not in places:
                return module if isinstance(module, WRAPPERS) else None
            t, i = places[where]
            return StandIn(module, t.output(i))

        loras = [".".join(map(str, where)) for where, (t, i) in places.items() if isinstance(t.layers[i], LoRALinear)]
        names = frozenset(f"{name}.lora_{x}" for name in loras for x in "ab")
        return cls(with_modules(model, stand_in), tuple(fused), names)

    def adapters(self, dtype: mx.Dtype) -> list[list[mx.array]]:
        """Return the LoRAs' current values, the arrays to hand to ``using``."""
        read: list[list[mx.array]] = []
        for start in range(0, len(self.groups), _AT_ONCE):
            some = self.groups[start : start + _AT_ONCE]
            read += [t.read_adapters(dtype) for t in some]
            mx.eval(read[start:], [_base(layer).parameters() for t in some for layer in t.layers])
        return read

    @contextmanager
    def using(self, adapters: Sequence[Sequence[mx.array]], trained: Mapping[str, mx.array]) -> Iterator[None]:
        """Give ``model`` these adapters and the parameters ``trained`` (by dotted names), within the context."""
        for t, arrays in zip(self.groups, adapters, strict=True):
            t.arrays = arrays
        before = []
        for path in trained:
            *way, name = path.split(".")
            module: Any = self.model
            for step in way:
                module = module.module if isinstance(module, StandIn) else module
                module = module[int(step)] if isinstance(module, list) else module[step]
            before.append((module, name, module[name]))
        for (module, name, _), value in zip(before, trained.values(), strict=True):
            module[name] = value
        try:
            yield
        finally:
            for module, name, value in before:
                module[name] = value
            for t in self.groups:
                t.arrays = ()


def _groups(model: nn.Module) -> list[list[tuple[Where, nn.Module]]]:
    """Return the linear layers that read the same array, in reading order; a single layer only if it has a LoRA."""
    calls: list[tuple[Where, nn.Module, mx.array]] = []

    def recorded(where: Where, module: nn.Module) -> Any:
        if not _is_supported(module):
            return module if isinstance(module, WRAPPERS) else None  # never descend into an adapter

        def call(x: mx.array) -> mx.array:
            calls.append((where, module, x))
            return module(x)

        return StandIn(module, call)

    with_modules(model, recorded)(mx.zeros((1, 1), mx.int32))
    if len({where for where, _, _ in calls}) < len(calls):  # leave out modules that are called more than once
        calls = [c for c in calls if sum(c[0] == other[0] for other in calls) == 1]
    groups: dict[tuple[Where, int, str], list[tuple[Where, nn.Module]]] = {}
    for where, module, x in calls:
        groups.setdefault((where[:-1], id(x), _kind(module)), []).append((where, module))
    return [g for g in groups.values() if len(g) > 1 or isinstance(g[0][1], LoRALinear)]


def _is_supported(module: nn.Module) -> bool:
    kind = type(module)
    if kind in (LoRALinear, LowRankLinear):
        return type(module.linear) in (nn.Linear, nn.QuantizedLinear) and module.dropout._p_1 == 1
    return kind in (nn.Linear, nn.QuantizedLinear)


def _kind(layer: nn.Module) -> str:
    """Return the properties that layers must share to be joined."""
    base = _base(layer)
    form = (base.group_size, base.bits, base.mode) if isinstance(base, nn.QuantizedLinear) else ()
    return str((type(base).__name__, form, sorted((k, str(v.dtype)) for k, v in base.parameters().items())))


def _base(layer: nn.Module) -> nn.Module:
    return layer.linear if isinstance(layer, LoRALinear) else layer


def _outputs(layer: nn.Module) -> int:
    return int(_base(layer).weight.shape[0])


def _joined(bases: Sequence[nn.Module]) -> nn.Module:
    """Return one layer with the outputs of all ``bases``, whose arrays become slices of its own, stored once."""
    if len(bases) == 1:
        return bases[0]
    whole, sizes = copy(bases[0]), [_outputs(base) for base in bases]
    for name in bases[0].parameters():
        whole[name] = mx.concatenate([base[name] for base in bases])
        mx.eval(whole[name])
        for i, base in enumerate(bases):
            base[name] = whole[name][sum(sizes[:i]) : sum(sizes[: i + 1])]
            mx.eval(base[name])
    return whole
