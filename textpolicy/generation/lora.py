"""The documented functions that attach a LoRA or QLoRA to a model, freeze, extract and merge, and count its memory."""

from __future__ import annotations

import logging
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten

from ..config.adapters import LoRA, QLoRA
from ..errors import UserError, unknown_name
from ..mlx.adapters.attach import TRAINED, attach, attached, remember, trainable
from ..mlx.adapters.merging import merge_adapters

logger = logging.getLogger(__name__)

_LORA_KEYS = {"lora_layers": 8, "lora_rank": 8, "lora_scale": 20.0, "lora_dropout": 0.0, "lora_keys": None}
_QUANTIZATION_KEYS = {"bits": None, "group_size": 64}


def apply_lora(
    model: nn.Module,
    lora_layers: int = 8,
    lora_rank: int = 8,
    lora_scale: float = 20.0,
    lora_dropout: float = 0.0,
    lora_keys: Sequence[str] | None = None,
) -> nn.Module:
    """Freeze ``model`` and attach LoRAs to the linear layers, experts included, of its last ``lora_layers`` blocks.

    y = W x + lora_scale (x A) B; in the terms of the paper lora_scale is alpha / rank. ``lora_layers`` 0 means all
    blocks, and ``lora_keys`` names modules ("q_proj", "mlp.down_proj"); None means all. The change is in place. The
    model is left in evaluation mode, in which dropout does nothing: sampler and learner must be one network. A is
    drawn from MLX's random state. Raises UserError.
    """
    return _apply(model, LoRA, lora_layers, lora_rank, lora_scale, lora_dropout, lora_keys)


def freeze_base(model: nn.Module) -> nn.Module:
    """Freeze all parameters except the adapter's, in place. Raises UserError if there is no adapter."""
    adapters = [module for module in model.modules() if type(module) in TRAINED]
    if not adapters:
        raise UserError("the model has no adapter, so nothing would be left to train; call apply_lora first")
    model.freeze()
    for module in adapters:
        module.unfreeze(recurse=False, keys=TRAINED[type(module)])
    return model


def extract_params(model: nn.Module) -> dict[str, mx.array]:
    """Return the adapter's parameters by dotted name; an empty dict if the model has no adapter."""
    found = {}
    for name, module in model.named_modules():
        found.update({f"{name}.{key}": module[key] for key in TRAINED.get(type(module), ())})
    return found


def merge_weights(model: nn.Module, requantize: bool = False) -> nn.Module:
    """Merge the adapters into the weights, in place, as ``merge_adapters``; the log-probs stay the same.

    A quantised model becomes one in floats; with ``requantize`` the adapted layers are quantised again as
    before, which rounds. Raises UserError if there is no adapter.
    """
    return merge_adapters(model, dequantize=not requantize)


def create_lora_setup(
    model: nn.Module,
    lora_config: Mapping[str, Any],
    auto_reload: bool = True,
    adapter_save_path: str | Path = "./lora_adapters.safetensors",
) -> tuple[nn.Module, dict[str, float]]:
    """Attach LoRAs to ``model``, in place, and return it with its figures of size.

    ``lora_config`` may contain lora_layers (8), lora_rank (8), lora_scale (20.0), lora_dropout (0.0) and lora_keys
    (None), as in ``apply_lora``. With ``auto_reload`` the model remembers ``adapter_save_path``, to which
    ``Trainer(auto_save_lora=True)`` writes. All figures are counted from the model's arrays:
    total_parameters (of the base), estimated_lora_parameters and trainable_parameters (both the exact number of
    trainable ones), memory_ratio (trainable to all), memory_savings_percent (the share of parameters that needs no
    gradient and no optimiser state), bytes_before and bytes_after (of the model), trainable_bytes.
    Raises UserError.
    """
    before = Size.of(model)
    apply_lora(model, **_settings(lora_config, _LORA_KEYS, "lora_config"))
    record = attached(model)
    assert record is not None
    remember(model, replace(record, save_path=Path(adapter_save_path) if auto_reload else None))
    return model, _figures(before, Size.of(model))


def create_qlora_setup(
    model: nn.Module,
    lora_config: Mapping[str, Any],
    quantization_config: Mapping[str, Any],
) -> tuple[nn.Module, dict[str, float]]:
    """Attach LoRAs that train in floats to a quantised base, in place; otherwise as ``create_lora_setup``.

    ``quantization_config`` may contain bits (4) and group_size (64) for a base in floats; a quantised base
    stays as it is, and must have those bits if they are given. The figures add quantization_factor (bytes
    of the base before to bytes after) and total_memory_savings (percent of the model's bytes that are saved,
    adapters counted). Raises UserError.
    """
    before = Size.of(model)
    lora = _settings(lora_config, _LORA_KEYS, "lora_config")
    quantization = _settings(quantization_config, _QUANTIZATION_KEYS, "quantization_config")
    _apply(model, QLoRA, *(lora[key] for key in _LORA_KEYS), **quantization)
    after = Size.of(model)
    return model, {
        **_figures(before, after),
        "quantization_factor": before.bytes / (after.bytes - after.trainable_bytes),
        "total_memory_savings": 100 * (1 - after.bytes / before.bytes),
    }


# ---- figures


@dataclass(frozen=True, slots=True)
class Size:
    """The parameters and bytes of a model's arrays."""

    parameters: int  # a quantised weight counts as the numbers it encodes
    bytes: int
    trainable_parameters: int
    trainable_bytes: int

    @classmethod
    def of(cls, model: nn.Module) -> Size:
        """Count the arrays of ``model``."""
        from mlx_lm.utils import get_total_parameters

        arrays: Any = tree_flatten(model.parameters())
        trained = trainable(model).values()
        return cls(
            parameters=get_total_parameters(model),
            bytes=sum(a.nbytes for _, a in arrays),
            trainable_parameters=sum(a.size for a in trained),
            trainable_bytes=sum(a.nbytes for a in trained),
        )


def _figures(before: Size, after: Size) -> dict[str, float]:
    """Return the figures that ``create_lora_setup`` documents."""
    ratio = after.trainable_parameters / before.parameters
    return {
        "total_parameters": before.parameters,
        "estimated_lora_parameters": after.trainable_parameters,
        "trainable_parameters": after.trainable_parameters,
        "memory_ratio": ratio,
        "memory_savings_percent": 100 * (1 - ratio),
        "bytes_before": before.bytes,
        "bytes_after": after.bytes,
        "trainable_bytes": after.trainable_bytes,
    }


# ---- settings


def _apply(
    model: nn.Module,
    kind: type[LoRA],
    layers: int,
    rank: int,
    scale: float,
    dropout: float,
    keys: Sequence[str] | None,
    **more: Any,
) -> nn.Module:
    """Attach a LoRA given in mlx-lm's terms, in which the scale is a plain factor."""
    if dropout:
        logger.warning("lora_dropout is %s and acts in model.train() only; rollouts and updates ignore it", dropout)
    adapter = kind(layers=layers, modules=tuple(keys or ()), rank=rank, alpha=scale * rank, dropout=dropout, **more)
    return attach(model, adapter, None)


def _settings(given: Mapping[str, Any], defaults: Mapping[str, Any], where: str) -> dict[str, Any]:
    """Return ``given`` over ``defaults``. Raises UserError for an unknown key."""
    for key in given:
        if key not in defaults:
            raise unknown_name(f"key of {where}", key, defaults)
    return {**defaults, **given}
