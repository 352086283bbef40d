"""Running the package's loss on a vector: its value in NumPy, its value and gradient through MLX."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from vectors import Answer

from textpolicy.losses import Surrogate, policy_objective
from textpolicy.types import Aggregation, Batch, loss_weights


def rows(old, advantages, weights, reference=None) -> Batch:
    """The arrays of a vector as a batch; what it does not name is empty. Advantages may be (B,) or (B, T)."""
    spread = advantages[:, None] * np.ones_like(old) if advantages.ndim == 1 else advantages
    nothing = np.zeros(old.shape, np.int32)
    ones = np.ones((len(old), 1))
    return Batch(nothing, nothing, old, spread, weights, ones, reference=reference)


def answers(logprobs, batch: Batch, how: Surrogate) -> list[Answer]:
    """``loss`` from NumPy in float64 and from MLX in float32, ``grad`` from MLX."""
    inside = batch.map(lambda array: mx.array(array.astype(np.float32)))
    loss, grad = mx.value_and_grad(lambda l: policy_objective(l, inside, mx, how))(mx.array(logprobs, mx.float32))
    return [
        Answer("loss", policy_objective(logprobs, batch, np, how)),
        Answer("loss", loss.item(), "float32"),
        Answer("grad", np.array(grad), "float32"),
    ]


def weights_of(mask, aggregation: Aggregation, length=None, empty_rows=None) -> np.ndarray:
    """``loss_weights`` under the vectors' two names for each treatment of empty rows."""
    counted = empty_rows in ("in_denominator",)
    return loss_weights(mask, aggregation, length, "counted" if counted else "excluded")
