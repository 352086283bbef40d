"""Export an adapter for peft: LoRA, DoRA, and TinyLoRA and LoRA-XS as the LoRA they are equal to.

peft computes y = W x + (alpha / r) B A x with A (r, in) and B (out, r); under DoRA the rows of the sum are
scaled to the lengths m. mlx-lm stores the transposes. TinyLoRA and LoRA-XS add (left R) right x: B = left R,
A = right, alpha = r, exactly.
"""

from __future__ import annotations

import re
from dataclasses import dataclass
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear

from ...errors import UserError
from ..adapters.attach import LowRankLinear, wrapped
from ..adapters.tinylora import SVDLinear
from ..files.safetensors import save_arrays
from ..models import MODELS
from .files import DTYPES, cast, check_layout, read_config, write_json, written_whole


@dataclass(frozen=True, slots=True, eq=False)
class LowRank:
    """The change of one layer by an adapter: scale B A x, and the new lengths of the rows under DoRA."""

    a: mx.array  # (r, in)
    b: mx.array  # (out, r)
    scale: float
    lengths: mx.array | None = None  # (out,)


def check_base(name: str, base: str | None) -> str:
    """Return the base for peft: ``base`` if given, else the model ``name`` if transformers can load it.

    Raises UserError for a built-in, a GGUF file, a folder in MLX's quantization, or a folder that does not exist.
    """
    base = base or name
    path = Path(base).expanduser()
    fault = ""
    if base in MODELS or path.suffix.lower() == ".gguf":
        fault = "is made from a GGUF file"
    elif path.is_dir() and "quantization" in read_config(path):
        fault = "is quantised in a format that only MLX reads"
    if fault:
        raise UserError(
            f"peft cannot load the base {base!r}, which {fault}; write one it can load with 'textpolicy export "
            f"--model {base} --to hf --out BASE' and add --base BASE"
        )
    if not path.is_dir() and not re.fullmatch(r"[\w-][\w.-]*/[\w.-]+", base):
        raise UserError(f"the base {base!r} is neither a folder nor a hub id; check --base")
    return str(path.resolve()) if path.is_dir() else base


def export_peft(model: nn.Module, source: Path, out: Path, base: str, *, dtype: str = "float32") -> None:
    """Write the adapters of ``model`` to the new folder ``out`` in peft's layout.

    ``source`` is the folder the model was loaded from (see ``find_model``), ``base`` the folder or hub id of the
    model that peft is to put the adapter on (see ``check_base``), ``dtype`` a name in ``DTYPES``. Raises UserError if
    ``out`` exists, for a model without adapters, with layers for which peft has no layout, or of an unknown type.
    """
    check_layout(read_config(source), "peft")
    layers = _read_layers(model)
    scale = next(iter(layers.values())).scale
    rank = max(layer.a.shape[0] for layer in layers.values())
    arrays: dict[str, mx.array] = {}
    for name, layer in layers.items():  # padded with zeros to a common rank, and brought to one scale
        prefix, missing = f"base_model.model.{name}", rank - layer.a.shape[0]
        arrays[f"{prefix}.lora_A.weight"] = mx.pad(layer.a, [(0, missing), (0, 0)])
        arrays[f"{prefix}.lora_B.weight"] = mx.pad(layer.b * (layer.scale / scale), [(0, 0), (0, missing)])
        if layer.lengths is not None:
            arrays[f"{prefix}.lora_magnitude_vector"] = layer.lengths
    alpha = scale * rank
    settings = {
        "peft_type": "LORA",
        "task_type": "CAUSAL_LM",
        "base_model_name_or_path": base,
        "r": rank,
        "lora_alpha": round(alpha) if round(alpha) / rank == scale else alpha,
        "lora_dropout": 0.0,
        "bias": "none",
        "fan_in_fan_out": False,
        "use_rslora": False,  # lora_alpha / r is the scale
        "use_dora": any(layer.lengths is not None for layer in layers.values()),
        "target_modules": _targets(model, set(layers)),
        "inference_mode": True,
    }
    with written_whole(out) as folder:
        folder.mkdir()
        stored = {name: mx.contiguous(cast(name, array, DTYPES[dtype])) for name, array in arrays.items()}
        save_arrays(folder / "adapter_model.safetensors", stored, {"format": "pt"})
        write_json(settings, folder / "adapter_config.json")


def _read_layers(model: nn.Module) -> dict[str, LowRank]:
    """Return the adapted layers by name. Raises UserError if there are none, or peft has no layout for one."""
    layers = {}
    for name, module in wrapped(model):
        if type(module) in (LoRALinear, LowRankLinear):
            layers[name] = LowRank(module.lora_a.T, module.lora_b.T, module.scale)
        elif type(module) is DoRALinear:
            layers[name] = LowRank(module.lora_a.T, module.lora_b.T, module.scale, module.m)
        elif type(module) is SVDLinear:
            layers[name] = LowRank(module.right, module.left @ module.core(), 1.0)
        else:
            raise UserError(
                f"the layer {name!r} has a {type(module).__name__}, for which peft has no layout; "
                "merge it with --to mlx or --to hf"
            )
    if not layers:
        raise UserError("the model has no adapter for --to peft to write; merge it with --to mlx, hf or gguf")
    return layers


def _targets(model: nn.Module, adapted: set[str]) -> list[str]:
    """Return last names such as q_proj if they select exactly the ``adapted`` layers, else full names."""
    linear = {name for name, m in model.named_modules() if isinstance(m, nn.Linear | nn.QuantizedLinear)}
    linear = {name.removesuffix(".linear") for name in linear}  # the layer inside an adapted one
    last = {name.split(".")[-1] for name in adapted}
    picked = {name for name in linear if name.split(".")[-1] in last}
    return sorted(last if picked == adapted else adapted)
