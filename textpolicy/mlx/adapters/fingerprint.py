"""What tells one base model from another, so that an adapter is not put on the wrong one."""

from __future__ import annotations

import logging
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from typing import Any, Self

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten

from .tinylora import dense_weight

logger = logging.getLogger(__name__)

SAMPLED = 32  # entries of each of the two weights that are looked at
OTHER = 0.5  # relative distance of other weights; 4 bits are about 0.1 off, unrelated weights about 1.4
SAME = 0.02  # of the same weights in another precision; 8 bits are below 0.01 off


@dataclass(frozen=True, slots=True)
class Base:
    """The form of a model, and a few of its weights."""

    model_type: str
    blocks: int
    shapes: tuple[tuple[int, ...], ...]  # of the first and the last linear weight in the blocks
    weights: tuple[float, ...]  # entries of these two, evenly spaced

    @classmethod
    def of(cls, model: nn.Module) -> Self:
        """Of a model without adapters."""
        found: list[Any] = [m for block in model.layers for m in _linears(block)]
        looked_at = [dense_weight(m) for m in (found[0], found[-1])] if found else []
        weights = [float(f"{x:.5g}") for w in looked_at for x in _spread(w)]
        shapes = tuple(w.shape for w in looked_at)
        return cls(model.model_type, len(model.layers), shapes, tuple(weights))

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Self:
        """What ``written`` gave. Raises ValueError, TypeError or KeyError for anything else."""
        shapes = tuple(tuple(int(n) for n in shape) for shape in values["shapes"])
        return cls(str(values["model_type"]), int(values["blocks"]), shapes, tuple(map(float, values["weights"])))

    def written(self) -> dict[str, Any]:
        """Fit for JSON."""
        return asdict(self)

    def difference(self, other: Base) -> str | None:
        """How ``other`` is another model, in words; None if it is the same one, perhaps in another precision."""
        if (self.model_type, self.blocks) != (other.model_type, other.blocks):
            return f"a {self.model_type} of {self.blocks} blocks and not a {other.model_type} of {other.blocks}"
        if self.shapes != other.shapes:
            return f"a {self.model_type} with weights of the shapes {self.shapes} and not {other.shapes}"
        distance = _distance(self.weights, other.weights)
        if not distance <= OTHER:  # which not-a-number is not either
            return f"a {self.model_type} of this size with other weights"
        if distance > SAME:
            logger.warning("the base's weights are %.0f%% off those the adapter was trained on", 100 * distance)
        return None


def _linears(block: nn.Module) -> list[nn.Module]:
    modules: Any = tree_flatten(block.leaf_modules(), is_leaf=nn.Module.is_module)
    return [m for _, m in modules if isinstance(m, nn.Linear | nn.QuantizedLinear)]


def _spread(weight: mx.array) -> list[float]:
    flat = weight.reshape(-1)
    places = np.linspace(0, flat.size - 1, SAMPLED).astype(np.int64)
    return np.array(flat[mx.array(places)].astype(mx.float32)).tolist()


def _distance(a: tuple[float, ...], b: tuple[float, ...]) -> float:
    """|a - b| / |a|."""
    if not a:
        return 0.0
    if len(a) != len(b):
        return float("inf")
    x, y = np.array(a), np.array(b)
    return float(np.linalg.norm(x - y)) / max(float(np.linalg.norm(x)), 1e-30)
