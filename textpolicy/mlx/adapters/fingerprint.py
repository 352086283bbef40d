"""Fingerprint a base model, so that an adapter is not put on the wrong one."""

from __future__ import annotations

import logging
from dataclasses import dataclass
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .quantised import dense_weight

logger = logging.getLogger(__name__)

SAMPLED = 32  # entries of each of the two weights compared
OTHER = 0.5  # relative distance between different weights; quantising to 4 bits gives about 0.1, unrelated ones 1.4
SAME = 0.02  # between the same weights in another precision; 8 bits give less than 0.01


@dataclass(frozen=True, slots=True)
class Fingerprint:
    """The architecture of a model, and a few of its weights."""

    model_type: str
    blocks: int
    shapes: tuple[tuple[int, ...], ...]  # of the first and the last linear weight in the blocks
    weights: tuple[float, ...]  # entries of these two, evenly spaced

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Return the fingerprint of a model without adapters."""
        leaves: Any = tree_flatten([b.leaf_modules() for b in model.layers], is_leaf=nn.Module.is_module)
        linear = [module for _, module in leaves if isinstance(module, nn.Linear | nn.QuantizedLinear)]
        compared = [dense_weight(m) for m in (linear[0], linear[-1])] if linear else []
        weights: list[float] = []
        for weight in compared:
            flat = weight.reshape(-1)
            places = mx.array(np.linspace(0, flat.size - 1, SAMPLED).astype(np.int64))
            weights += [float(f"{x:.5g}") for x in np.array(flat[places].astype(mx.float32)).tolist()]
        return cls(model.model_type, len(model.layers), tuple(w.shape for w in compared), tuple(weights))

    def difference(self, other: Fingerprint) -> str | None:
        """Describe how ``other`` is a different model; None if it is the same one, perhaps in another precision."""
        if (self.model_type, self.blocks) != (other.model_type, other.blocks):
            return f"a {self.model_type} of {self.blocks} blocks and not a {other.model_type} of {other.blocks}"
        if self.shapes != other.shapes:
            return f"a {self.model_type} with weights of the shapes {self.shapes} and not {other.shapes}"
        distance = float("inf")  # |a - b| / |a|
        if len(self.weights) == len(other.weights):
            x, y = np.array(self.weights), np.array(other.weights)
            distance = float(np.linalg.norm(x - y)) / max(float(np.linalg.norm(x)), 1e-30)
        if not distance <= OTHER:  # also true of NaN
            return f"a {self.model_type} of this size with other weights"
        if distance > SAME:
            logger.warning("the base's weights are %.0f%% off those the adapter was trained on", 100 * distance)
        return None
