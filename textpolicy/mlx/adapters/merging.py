"""Adapters on a model: put on, switched off for a while, merged into the weights or taken away."""

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
    """Freeze ``model`` and give every linear layer of its last ``layers`` blocks (0: all) a LoRA.

    y = W x + (alpha / rank) (x A) B with A ~ U(+-1/sqrt(in)) drawn from ``seed`` and B = 0, so the
    model starts unchanged. All linear layers and alpha 32 follow "LoRA without regret" (2025). ``attach`` takes
    every other kind of adapter.
    """
    return attach(model, LoRA(rank=rank, alpha=alpha, layers=layers), seed)


@contextmanager
def adapters_off(model: nn.Module) -> Iterator[None]:
    """Within it ``model`` is the frozen model underneath its adapters. Raises UserError if it has none."""
    adapted = wrapped(model)
    if not adapted:
        raise UserError("the KL reference is the model with its adapters off and it has none; attach a LoRA adapter")
    model.update_modules(tree_unflatten([(name, inner(module)) for name, module in adapted]))
    try:
        yield
    finally:
        model.update_modules(tree_unflatten(adapted))


def merge_adapters(model: nn.Module, *, dequantize: bool = False) -> nn.Module:
    """Add what the adapters do to the weights, W + dW, in place; ``model`` has plain layers then, all frozen.

    A quantised layer is dequantised, added to and quantised as it was, which rounds dW to its few bits;
    with ``dequantize`` every quantised layer of the model becomes one of floats instead, and the log-probs
    stay those of the adapted model. Weights that were trained in full are in place already. Raises
    UserError for a model without an adapter.
    """
    from mlx_lm.utils import dequantize_model

    adapted = wrapped(model)
    if not adapted and attached(model) is None:
        raise UserError("the model has no adapter to merge; load one with it, or attach and train one")
    for name, module in adapted:
        fused = _fused(module, dequantize)
        mx.eval(fused.parameters())  # a layer at a time, so that little memory is used twice
        model.update_modules(tree_unflatten([(name, fused)]))
    detach(model)
    if dequantize:
        dequantize_model(model)
    model.freeze()
    model.eval()
    return model


def _fused(module: nn.Module, dequantize: bool) -> nn.Module:
    """One plain layer in the precision of the one inside."""
    fused, kept = module.fuse(dequantize=dequantize), inner(module)
    floats = kept.scales.dtype if "scales" in kept else kept.weight.dtype
    fused.set_dtype(floats, lambda dtype: mx.issubdtype(dtype, mx.floating))
    return fused
