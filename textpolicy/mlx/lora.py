"""LoRA adapters: attach them to every linear layer, write and read them in mlx-lm's layout."""

from __future__ import annotations

import json
import os
import shutil
import tempfile
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from ..errors import UserError
from .low_rank import in_the_models_type


def attach_lora(model: nn.Module, rank: int = 16, alpha: float = 32.0, layers: int = 0, seed: int = 0) -> nn.Module:
    """Freeze ``model`` and give every linear layer of its last ``layers`` blocks (0: all) a LoRA.

    y = W x + (alpha / rank) (x A) B with A ~ U(+-1/sqrt(in)) drawn from ``seed`` and B = 0, so the
    model starts unchanged. All linear layers and alpha 32 follow "LoRA without regret" (2025).
    """
    if rank < 1:
        raise UserError(f"the LoRA rank is {rank}; set it to 1 or more")
    model.freeze()
    blocks = model.layers[-layers:] if layers else model.layers
    mx.random.seed(seed)
    names = _linear_names(blocks)
    config = {"rank": rank, "scale": alpha / rank, "dropout": 0.0, "keys": names}
    linear_to_lora_layers(model, len(blocks), config)
    in_the_models_type(model)
    model.adapter_config = {  # read by save_adapter; plain values are not parameters
        "fine_tune_type": "lora",
        "num_layers": len(blocks),
        "lora_parameters": {**config, "keys": sorted(names)},
    }
    mx.eval(model.parameters())
    return model


def _linear_names(blocks: list[nn.Module]) -> set[str]:
    return {
        name
        for block in blocks
        for name, module in block.named_modules()
        if isinstance(module, nn.Linear | nn.QuantizedLinear)
    }


def save_adapter(model: nn.Module, path: Path) -> None:
    """Write ``adapters.safetensors`` and ``adapter_config.json`` to the folder ``path`` by one rename.

    The folder loads with ``load_model(name, adapter_path=path)`` and with mlx-lm.
    """
    path = Path(path)
    path.parent.mkdir(parents=True, exist_ok=True)
    folder = Path(tempfile.mkdtemp(prefix=f".{path.name}-", dir=path.parent))
    try:
        mx.save_safetensors(str(folder / "adapters.safetensors"), trainable(model))
        (folder / "adapter_config.json").write_text(json.dumps(model.adapter_config, indent=2) + "\n")
        folder.chmod(0o755)
        _replace_folder(folder, path)
    finally:
        shutil.rmtree(folder, ignore_errors=True)


def _replace_folder(new: Path, path: Path) -> None:
    """Rename ``new`` to ``path``; an older folder there is moved aside first and then removed."""
    old = Path(f"{new}.old")
    if path.exists():
        os.replace(path, old)
    os.replace(new, path)
    shutil.rmtree(old, ignore_errors=True)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within it ``model`` is the frozen model underneath its adapters. Raises UserError if it has none."""
    adapted = [(name, module) for name, module in model.named_modules() if "lora_a" in module and "linear" in module]
    if not adapted:
        raise UserError("the KL reference is the model with its adapters off and it has none; attach a LoRA adapter")
    model.update_modules(tree_unflatten([(name, module.linear) for name, module in adapted]))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(adapted))


def trainable(model: nn.Module) -> dict[str, mx.array]:
    """The trained parameters by their dotted names."""
    return dict(tree_flatten(model.trainable_parameters()))
