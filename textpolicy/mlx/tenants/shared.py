"""The models of several adapters on one base: modules of their own, around the same arrays."""

from __future__ import annotations

from collections.abc import Collection
from copy import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

from ...config.adapters import LoRA
from ...errors import UserError
from ...serving import Adapter
from ..kernels.patching import StandIn, with_modules

Linear = nn.Linear | nn.QuantizedLinear | SwitchLinear | QuantizedSwitchLinear

# parts of the names of layers that mix tokens, in mlx-lm's families; the other linear layers of a block are its MLP
_MIXING = ("attn", "attention", "mamba", "mixer", "ssm", "conv", "time_mix", "temporal", "kda", "gdn", "rec")


def twin(part: Any, made: dict[int, Any] | None = None) -> Any:
    """Return a copy of a model: other modules, the same arrays. Adapting one does not change the other."""
    made = {} if made is None else made
    if id(part) in made:
        return made[id(part)]
    if isinstance(part, nn.Module):
        other = made[id(part)] = copy(part)
        for name, value in part.items():
            other[name] = twin(value, made)
        return other
    if isinstance(part, dict):
        return {name: twin(value, made) for name, value in part.items()}
    if isinstance(part, list | tuple):
        return type(part)(twin(value, made) for value in part)
    return part


def lora(model: nn.Module, adapter: Adapter) -> LoRA:
    """Return the LoRA that ``adapter`` asks for, of alpha 32, with the layers by their names. Raises UserError.

    An embedding that is also the output layer is adapted as both. Layers whose weights the model reads itself are left
    out: an adapter around them would not be seen.
    """
    names: dict[str, None] = {}
    for block in model.layers:
        for name, module in block.named_modules():
            mixes = any(part in name.lower() for part in _MIXING)
            if isinstance(module, Linear) and (adapter.attention if mixes else adapter.mlp):
                names[name] = None
    for name in _read_by_the_model(model, names):
        del names[name]
    inside = {id(module) for block in model.layers for module in block.modules()}
    last: list[str] = []

    def watched(where: tuple[str | int, ...], module: nn.Module) -> Any:
        if id(module) in inside or not isinstance(module, Linear | nn.Embedding | nn.QuantizedEmbedding):
            return module if id(module) in inside else None
        call: Any = module.as_linear if isinstance(module, nn.Embedding | nn.QuantizedEmbedding) else module

        def seen(x: mx.array) -> Any:
            last.append(_dotted(where))
            return call(x)

        if call is module:
            return StandIn(module, seen)
        table: Any = StandIn(module, module)
        table.as_linear = seen
        return table

    if adapter.unembed:
        with_modules(model, watched)(mx.zeros((1, 1), mx.int32))
        if not last:
            raise UserError("this model's output layer cannot be adapted; set train_unembed to false")
        names[last[-1]] = None
    if not names:
        raise UserError("an adapter on no layer trains nothing; set train_mlp, train_attn or train_unembed to true")
    return LoRA(rank=adapter.rank, alpha=32.0, modules=tuple(names))


def _read_by_the_model(model: nn.Module, names: Collection[str]) -> set[str]:
    """Return those of the layers of ``model.layers`` called ``names`` that cannot hide their weights from it.

    Nothing is computed: the passes end at their graphs. In training mode models keep no products of their weights.
    """
    model = twin(model).train()
    blocks = {id(block) for block in model.layers}

    def fails(hidden: Collection[str]) -> bool:
        def stand_in(where: tuple[str | int, ...], module: nn.Module) -> Any:
            if id(module) not in blocks:
                return None
            return with_modules(module, lambda inner, layer: _hidden(layer) if _dotted(inner) in hidden else None)

        try:
            with_modules(model, stand_in)(mx.zeros((1, 2), mx.int32))
        except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError):
            return True
        return False

    return {name for name in names if fails([name])} if fails(names) else set()


def _hidden(layer: nn.Module) -> StandIn:
    """Return the layer without its attributes."""
    return StandIn(nn.Module(), layer)


def _dotted(where: tuple[str | int, ...]) -> str:
    return ".".join(map(str, where))
