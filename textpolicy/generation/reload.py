"""The documented functions that save adapters, load them again, and keep a policy up to date with what is saved."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import mlx.nn as nn

from ..errors import UserError
from ..mlx.adapters.attach import attached
from ..mlx.adapters.saving import reread_adapter, save_adapter
from ..mlx.models import load_model
from .lora import create_lora_setup
from .mlx_generation import Policy, create_policy

Reload = Callable[..., None]  # (adapter_path=None): None is the path it read from last


def save_adapters(model: nn.Module, adapter_path: str | Path) -> None:
    """Write the adapter of ``model`` to ``adapter_path``: a folder, or one file if it ends in .safetensors.

    Either is read by ``reload_model`` and ``load_model(adapter_path=...)``; a folder also by mlx-lm. It is there
    whole or not at all. Raises UserError for a model without an adapter.
    """
    save_adapter(model, adapter_path)


def reload_model(
    base_model_path: str | Path, adapter_path: str | Path, tokenizer_config: dict[str, Any] | None = None
) -> tuple[nn.Module, Any]:
    """``load_model`` with an adapter, a folder or a file: the model that was saved, and its tokenizer."""
    return load_model(base_model_path, adapter_path, tokenizer_config)


def create_reloadable_policy(
    base_model_path: str | Path,
    initial_adapter_path: str | Path | None,
    generation_params: Mapping[str, Any] | None = None,
) -> tuple[Policy, Reload]:
    """A policy, and ``reload(adapter_path=None)``, which gives it the adapter that is there now.

    The base is loaded once. Without an initial adapter the policy is the base until the first reload. A later
    adapter must have the kind and settings of the first; UserError names what differs.
    """
    model, tokenizer = load_model(base_model_path, initial_adapter_path)
    return create_policy(model, tokenizer, generation_params), _reload(model, initial_adapter_path)


def create_auto_reload_setup(
    model_path: str | Path,
    adapter_save_path: str | Path = "./lora_adapters.safetensors",
    *,
    lora_layers: int = 8,
    lora_rank: int = 8,
    lora_scale: float = 20.0,
    **generation_params: Any,
) -> tuple[Policy, Reload, nn.Module, Any]:
    """``(policy, reload, model, tokenizer)``: a model with a fresh LoRA, and a policy that is this very model.

    What ``Trainer`` does to the model the policy says at once. ``reload()`` reads ``adapter_save_path``, which
    ``Trainer(auto_save_lora=True)`` or another process writes. The base is loaded once. Raises UserError.
    """
    model, tokenizer = load_model(model_path)
    lora = {"lora_layers": lora_layers, "lora_rank": lora_rank, "lora_scale": lora_scale}
    create_lora_setup(model, lora, adapter_save_path=adapter_save_path)
    return create_policy(model, tokenizer, generation_params), _reload(model, adapter_save_path), model, tokenizer


def auto_save_path(model: nn.Module, asked: bool | str | Path | None) -> Path | None:
    """Where ``Trainer(auto_save_lora=asked)`` writes the adapter after a step; None for nowhere. Raises UserError."""
    record = attached(model)
    if not asked:
        return None
    if record is None:
        raise UserError(f"auto_save_lora is {asked} and the model has no adapter; call create_lora_setup first")
    path = record.save_path if asked is True else Path(asked)
    if path is None:
        raise UserError("auto_save_lora is True and the model knows no path; give one as auto_save_lora")
    return path


def _reload(model: nn.Module, path: str | Path | None) -> Reload:
    place = path

    def reload(adapter_path: str | Path | None = None) -> None:
        nonlocal place
        place = adapter_path or place
        if place is None:
            raise UserError("there is no adapter to reload yet; pass its path")
        reread_adapter(model, place)

    return reload
