"""The model of the MLX peers with the adapter of the task, and the number that tells when the adapter moved."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers
from worker import Task


def linear_names(model: Any) -> set[str]:
    return {n for block in model.layers for n, m in block.named_modules() if isinstance(m, nn.Linear)}


def attach_lora(model: Any, task: Task) -> Any:
    """LoRA on every linear layer of every block; the base is frozen."""
    model.freeze()
    how = {"rank": task.rank, "scale": task.alpha / task.rank, "dropout": 0.0, "keys": linear_names(model)}
    linear_to_lora_layers(model, len(model.layers), how)
    mx.eval(model.parameters())
    return model


def weights_sum(model: Any) -> Callable[[], float]:
    """Sum of the magnitudes of what is trained."""
    return lambda: sum(mx.abs(value).sum().item() for _, value in tree_flatten(model.trainable_parameters()))
