"""Shape rewards by length: DAPO's soft penalty on overlong completions, and the documented shaping functions."""

from __future__ import annotations

from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..types import Floats


def overlong_penalty(
    lengths: NDArray[Any], max_length: float, cache_length: float, scale: float = 1.0, floor: bool = True
) -> Floats:
    """Return penalties for (B,) lengths in tokens: 0 up to L - c, then (L - c - n) / c, and -1 beyond L; (B,).

    L is ``max_length``, c ``cache_length`` (arXiv:2503.14476, eq. 13, where they are 20,480 and 4,096).
    ``scale`` multiplies the penalty; without ``floor`` it keeps falling beyond L. Raises UserError.
    """
    if not 0 < cache_length <= max_length:
        raise UserError(f"the overlong cache is {cache_length} of {max_length} tokens; set it above 0 and at most that")
    over: Floats = np.minimum(0.0, (max_length - cache_length - np.asarray(lengths, np.float64)) / cache_length)
    return scale * (np.maximum(over, -1.0) if floor else over)


def compute_length_penalty(
    sequence_length: int, max_length: int, cache_length: int = 100, max_penalty: float = 0.5
) -> float:
    """Return the penalty of one completion of ``sequence_length`` tokens, 0 to -max_penalty. Raises UserError."""
    return float(overlong_penalty(np.array([sequence_length]), max_length, cache_length, max_penalty)[0])


def apply_length_shaping(
    rewards: Floats,
    sequence_lengths: NDArray[Any],
    max_length: int,
    cache_length: int = 100,
    max_penalty: float = 0.5,
) -> Floats:
    """Return (B,) rewards plus their length penalties. Raises UserError."""
    return np.asarray(rewards) + overlong_penalty(np.asarray(sequence_lengths), max_length, cache_length, max_penalty)


def compute_length_shaping_stats(
    sequence_lengths: NDArray[Any], max_length: int, cache_length: int = 100
) -> dict[str, float]:
    """Return the mean and greatest length, and the shares truncated (>= max_length) and penalised; 0 without any."""
    n = np.asarray(sequence_lengths, np.float64)
    if not n.size:
        return dict.fromkeys(("mean_length", "max_length_observed", "truncation_rate", "penalty_zone_rate"), 0.0)
    return {
        "mean_length": float(n.mean()),
        "max_length_observed": float(n.max()),
        "truncation_rate": float((n >= max_length).mean()),
        "penalty_zone_rate": float((n > max_length - cache_length).mean()),
    }
