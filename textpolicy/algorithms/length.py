"""Rewards for length: DAPO's soft punishment of overlong completions, and the documented shaping functions."""

from __future__ import annotations

import numpy as np

from ..errors import UserError


def overlong_penalty(
    lengths: np.ndarray, max_length: float, cache_length: float, scale: float = 1.0, floor: bool = True
) -> np.ndarray:
    """(B,) tokens -> (B,) penalties: 0 up to L - c, then (L - c - n) / c, and -1 beyond L.

    L is ``max_length``, c ``cache_length`` (arXiv:2503.14476, eq. 13, where they are 20,480 and 4,096).
    ``scale`` multiplies it; without ``floor`` it goes on falling beyond L. Raises UserError.
    """
    if not 0 < cache_length <= max_length:
        raise UserError(f"the overlong cache is {cache_length} of {max_length} tokens; set it above 0 and at most that")
    over = np.minimum(0.0, (max_length - cache_length - np.asarray(lengths, np.float64)) / cache_length)
    return scale * (np.maximum(over, -1.0) if floor else over)


def compute_length_penalty(
    sequence_length: int, max_length: int, cache_length: int = 100, max_penalty: float = 0.5
) -> float:
    """The penalty of one completion of ``sequence_length`` tokens, from 0 to -max_penalty. Raises UserError."""
    return float(overlong_penalty(np.array([sequence_length]), max_length, cache_length, max_penalty)[0])


def apply_length_shaping(
    rewards: np.ndarray,
    sequence_lengths: np.ndarray,
    max_length: int,
    cache_length: int = 100,
    max_penalty: float = 0.5,
) -> np.ndarray:
    """(B,) rewards plus their length penalties. Raises UserError."""
    return np.asarray(rewards) + overlong_penalty(np.asarray(sequence_lengths), max_length, cache_length, max_penalty)


def compute_length_shaping_stats(lengths: np.ndarray, max_length: int, cache_length: int = 100) -> dict[str, float]:
    """mean_length, max_length_observed, and the shares truncated (>= max_length) and in the penalty zone; 0 of none."""
    n = np.asarray(lengths, np.float64)
    if not n.size:
        return dict.fromkeys(("mean_length", "max_length_observed", "truncation_rate", "penalty_zone_rate"), 0.0)
    return {
        "mean_length": float(n.mean()),
        "max_length_observed": float(n.max()),
        "truncation_rate": float((n >= max_length).mean()),
        "penalty_zone_rate": float((n > max_length - cache_length).mean()),
    }
