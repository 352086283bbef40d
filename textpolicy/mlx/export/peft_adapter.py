"""An adapter as peft reads it: LoRA, DoRA, and TinyLoRA and LoRA-XS as the LoRA that they are.

peft computes y = W x + (alpha / r) B A x with A (r, in) and B (out, r); under DoRA the rows of the whole are
scaled to the lengths m. mlx-lm stores the transposes. TinyLoRA and LoRA-XS add (left R) right x: B = left R,
A = right, alpha = r, exactly.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from ...errors import UserError
from ..adapters.attach import LowRankLinear, wrapped
from ..adapters.tinylora import SVDLinear
from ..files.safetensors import save_arrays
from ..models import MODELS
from .files import DTYPES, check_layout, read_config, write_json, written_whole


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """What an adapter adds to one layer: scale B A x, and the new lengths of the rows under DoRA."""

    a: mx.array  # (r, in)
    b: mx.array  # (out, r)
    scale: float
    lengths: mx.array | None = None  # (out,)


def check_base(name: str, base: str | None) -> str:
    """What peft should load the adapter on: ``base`` if given, else the model ``name`` if transformers can load it.

    Raises UserError for a built-in, a GGUF file, a folder in MLX's quantization, or a folder that is not there.
    """
    base = base or name
    path = Path(base).expanduser()
    if base in MODELS or path.suffix.lower() == ".gguf":
        raise UserError(_no_base(base, "is made from a GGUF file"))
    if path.is_dir() and "quantization" in read_config(path):
        raise UserError(_no_base(base, "is quantised as only MLX reads it"))
    if not path.is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base):
        raise UserError(f"there is no folder {base!r} for the base and it is no hub id; check --base")
    return str(path.resolve()) if path.is_dir() else base


def _no_base(name: str, why: str) -> str:
    return (
        f"peft cannot load the base {name!r}, which {why}; write one it can with 'textpolicy export --model {name} "
        "--to hf --out BASE' and add --base BASE"
    )


def export_peft(model: nn.Module, source: Path, out: Path, base: str, *, dtype: str = "float32") -> None:
    """Write the adapters of ``model`` to the new folder ``out`` in peft's layout.

    ``source`` is the folder that the model was loaded from (see ``find_model``), ``base`` the folder or hub id
    that peft is to load the adapter on (see ``check_base``), ``dtype`` a name in ``DTYPES``. Raises UserError if
    ``out`` exists, for a model without adapters, one with layers for which peft has no layout, or one of an
    unknown type.
    """
    check_layout(read_config(source), "peft")
    layers = _read_layers(model)
    scale = next(iter(layers.values())).scale
    rank = max(layer.a.shape[0] for layer in layers.values())
    arrays: dict[str, mx.array] = {}
    for name, layer in layers.items():
        arrays |= _named(name, layer, scale, rank)
    settings = _settings(model, layers, base, rank, scale)
    with written_whole(out) as folder:
        folder.mkdir()
        cast = {name: mx.contiguous(array.astype(DTYPES[dtype])) for name, array in arrays.items()}
        save_arrays(folder / "adapter_model.safetensors", cast, {"format": "pt"})
        write_json(settings, folder / "adapter_config.json")


def _read_layers(model: nn.Module) -> dict[str, LowRank]:
    layers = {}
    for name, module in wrapped(model):
        if type(module) not in _READERS:
            raise UserError(
                f"the layer {name!r} has a {type(module).__name__}, for which peft has no layout; "
                "merge it with --to mlx or --to hf"
            )
        layers[name] = _READERS[type(module)](module)
    if not layers:
        raise UserError("the model has no adapter for --to peft to write; merge it with --to mlx, hf or gguf")
    return layers


def _of_lora(layer: LoRALinear) -> LowRank:
    return LowRank(layer.lora_a.T, layer.lora_b.T, layer.scale)


def _of_dora(layer: DoRALinear) -> LowRank:
    return LowRank(layer.lora_a.T, layer.lora_b.T, layer.scale, layer.m)


def _of_svd(layer: SVDLinear) -> LowRank:
    return LowRank(layer.right, layer.left @ layer.core(), 1.0)


_READERS: dict[type, Any] = {LoRALinear: _of_lora, LowRankLinear: _of_lora, DoRALinear: _of_dora, SVDLinear: _of_svd}


def _named(name: str, layer: LowRank, scale: float, rank: int) -> dict[str, mx.array]:
    """The arrays under peft's names, filled up with zeros to the common ``rank`` and brought to one ``scale``."""
    missing = rank - layer.a.shape[0]
    prefix = f"base_model.model.{name}"
    arrays = {
        f"{prefix}.lora_A.weight": mx.pad(layer.a, [(0, missing), (0, 0)]),
        f"{prefix}.lora_B.weight": mx.pad(layer.b * (layer.scale / scale), [(0, 0), (0, missing)]),
    }
    return arrays if layer.lengths is None else arrays | {f"{prefix}.lora_magnitude_vector": layer.lengths}


def _settings(model: nn.Module, layers: dict[str, LowRank], base: str, rank: int, scale: float) -> dict[str, Any]:
    alpha = scale * rank
    return {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": round(alpha) if round(alpha) / rank == scale else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,  # lora_alpha / r says it all
        "use_dora": any(layer.lengths is not None for layer in layers.values()),
        "target_modules": _targets(model, set(layers)),
        "inference_mode": True,
    }


def _targets(model: nn.Module, adapted: set[str]) -> list[str]:
    """Last names such as q_proj if they pick out just the ``adapted`` layers, else their full names."""
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.QuantizedLinear)}
    linear = {name.removesuffix(".linear") for name in linear}  # of an adapted layer the one inside
    last = {name.split(".")[-1] for name in adapted}
    picked = {name for name in linear if name.split(".")[-1] in last}
    return sorted(last if picked == adapted else adapted)
