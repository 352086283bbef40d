"""Switch a model's adapters off for a while, or merge them into its weights."""

from __future__ import annotations

from collections.abc import Iterator
from contextlib import contextmanager

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_unflatten

from ...config.adapters import LoRA
from ...errors import UserError
from .attach import attach as attach
from .attach import attached, detach, inner, wrapped
from .attach import trainable as trainable
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
    """Merge the adapters into the weights, W + dW, in place; ``model`` then has plain layers, all frozen.

    A quantised layer is dequantised, merged and quantised as it was, which rounds dW to its few bits; with
    ``dequantize`` every quantised layer of the model becomes a floating-point one instead, and the log-probs stay
    those of the adapted model. Weights that were trained in full need no merging. Raises UserError for a model
    without an adapter.
    """
    from mlx_lm.utils import dequantize_model

    adapted = wrapped(model)
    if not adapted and attached(model) is None:
        raise UserError("the model has no adapter to merge; load one with it, or attach and train one")
    for name, module in adapted:
        fused, kept = module.fuse(dequantize=dequantize), inner(module)
        floats = kept.scales.dtype if "scales" in kept else kept.weight.dtype
        fused.set_dtype(floats, lambda dtype: mx.issubdtype(dtype, mx.floating))
        mx.eval(fused.parameters())  # layer by layer, so that little of the model is in memory twice
        model.update_modules(tree_unflatten([(name, fused)]))
    detach(model)
    if dequantize:
        dequantize_model(model)
    model.freeze()
    model.eval()
    return model
