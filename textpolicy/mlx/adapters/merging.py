"""Switch a model's adapters off for a while, or merge them into its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager
from copy import copy

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ...config.adapters import LoRA
from ...errors import UserError
from .attach import attach as attach
from .attach import attached, detach, inner, wrapped
from .attach import trainable as trainable
from .quantised import compute_dtype, dequantise, in_floats, is_floating, quantised_as, stored_dtype
from .saving import load_adapter as load_adapter
from .saving import save_adapter as save_adapter


def attach_lora(model: nn.Module, rank: int = 16, alpha: float = 32.0, layers: int = 0, seed: int = 0) -> nn.Module:
    """Freeze ``model`` and attach a LoRA to every linear layer of its last ``layers`` blocks (0: all).

    y = W x + (alpha / rank) (x A) B with A ~ U(+-1/sqrt(in)) drawn from ``seed`` and B = 0, so the
    model starts unchanged. All linear layers and alpha 32 follow "LoRA without regret" (2025). ``attach`` supports
    every other kind of adapter.
    """
    return attach(model, LoRA(rank=rank, alpha=alpha, layers=layers), seed)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Turn ``model`` into the frozen model under its adapters, within the context; without any, raise UserError."""
    adapted = wrapped(model)
    if not adapted:
        raise UserError(
            "the model has no adapter to switch off for the KL reference; attach a LoRA, or set the KL coefficient to 0"
        )
    model.update_modules(tree_unflatten([(name, inner(module)) for name, module in adapted]))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(adapted))


def merge_adapters(model: nn.Module, *, dequantize: bool = False) -> nn.Module:
    """Merge the adapters into the weights, W + dW in float32, in place; ``model`` then has plain layers, all frozen.

    Layers keep the type they were stored in. A quantised layer is dequantised, merged and quantised as it was (mode,
    group, bits), which rounds dW to its few bits; with ``dequantize`` every quantised layer of the model becomes a
    floating-point one instead, and the log-probs stay those of the adapted model. Weights that were trained in full
    need no merging. Raises UserError for a model without an adapter.
    """
    adapted = wrapped(model)
    if not adapted and attached(model) is None:
        raise UserError("the model has no adapter to merge; load one with it, or attach and train one")
    detach(model)
    common = compute_dtype(model)
    while adapted:  # layer by layer, so that little of the model is in memory twice
        name, module = adapted.pop()
        kept, exact = inner(module), copy(module)
        exact.update({key: value.astype(mx.float32) for key, value in module.items() if is_floating(value)})
        exact["embedding" if "embedding" in module else "linear"] = in_floats(kept, mx.float32)
        merged = exact.fuse()
        if "scales" in kept and not dequantize:
            merged = quantised_as(kept, merged)
        else:
            merged.weight = merged.weight.astype(stored_dtype(kept, common))
        mx.eval(merged.parameters())
        model.update_modules(tree_unflatten([(name, merged)]))
    if dequantize:
        dequantise(model)
    model.freeze()
    model.eval()
    return model
