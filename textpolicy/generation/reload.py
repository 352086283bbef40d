"""The documented functions that save adapters, load them again, and let a policy reload them while it runs."""

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

Reload = Callable[..., None]  # (adapter_path=None): None is the path of the last reload


def save_adapters(model: nn.Module, adapter_path: str | Path) -> None:
    """Write the adapter of ``model`` to ``adapter_path``: a folder, or one file if it ends in .safetensors.

    ``reload_model`` and ``load_model(adapter_path=...)`` read either; mlx-lm reads a folder too. The write is
    atomic. Raises UserError for a model without an adapter.
    """
    save_adapter(model, adapter_path)


def reload_model(
    base_model_path: str | Path, adapter_path: str | Path, tokenizer_config: dict[str, Any] | None = None
) -> tuple[nn.Module, Any]:
    """Load a model with a saved adapter, a folder or a file, as ``load_model``; returns it with its tokenizer."""
    return load_model(base_model_path, adapter_path, tokenizer_config)


def create_reloadable_policy(
    base_model_path: str | Path,
    initial_adapter_path: str | Path | None,
    generation_params: Mapping[str, Any] | None = None,
) -> tuple[Policy, Reload]:
    """Return a policy, and ``reload(adapter_path=None)``, which gives it the adapter now at that path.

    The base is loaded once. Without an initial adapter the policy is the base model until the first reload. A later
    adapter must have the kind and settings of the first; UserError names the difference.
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
    """Return ``(policy, reload, model, tokenizer)``: a model with a fresh LoRA, and a policy that samples from it.

    The policy follows every change that ``Trainer`` makes to the model. ``reload()`` reads ``adapter_save_path``,
    which ``Trainer(auto_save_lora=True)`` or another process writes. The base is loaded once. Raises UserError.
    """
    model, tokenizer = load_model(model_path)
    lora = {"lora_layers": lora_layers, "lora_rank": lora_rank, "lora_scale": lora_scale}
    create_lora_setup(model, lora, adapter_save_path=adapter_save_path)
    return create_policy(model, tokenizer, generation_params), _reload(model, adapter_save_path), model, tokenizer


def auto_save_path(model: nn.Module, setting: bool | str | Path | None) -> Path | None:
    """Return the path to which ``Trainer(auto_save_lora=setting)`` writes the adapter; None: it does not.

    Raises UserError for a model without an adapter, or True for a model without a path.
    """
    if not setting:
        return None
    record = attached(model)
    if record is None:
        raise UserError(f"auto_save_lora is {setting} and the model has no adapter; call create_lora_setup first")
    path = record.save_path if setting is True else Path(setting)
    if path is None:
        raise UserError("auto_save_lora is True and the model has no path for it; give one as auto_save_lora")
    return path


def _reload(model: nn.Module, path: str | Path | None) -> Reload:
    """Return the function that reloads the adapter of ``model``, at first from ``path``."""

    def reload(adapter_path: str | Path | None = None) -> None:
        nonlocal path
        path = adapter_path or path
        if path is None:
            raise UserError("there is no adapter to reload yet; pass its path")
        reread_adapter(model, path)

    return reload
