"""Measure how varied planning is: the entropy of strategic grams (arXiv:2509.03646), and an older dispersion."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError, refuse_outside
from ..types import Bools, Floats, Ints


@dataclass(frozen=True, slots=True)
class SemanticEntropy:
    """The entropy of one distribution over grams, in three units."""

    nats: float
    bits: float
    normalised: float  # nats / ln(number of grams), from 0 (one gram only) to 1 (all equally frequent)


def semantic_entropy(counts: Sequence[float] | NDArray[Any]) -> SemanticEntropy:
    """Return H = -sum_g p_g ln p_g with p_g = counts_g / sum(counts), for (K,) counts of K grams (arXiv:2509.03646).

    It is 0 without counts, and for a single gram. Raises UserError for counts that are negative or not finite.
    """
    c = np.asarray(counts, np.float64)
    if c.ndim != 1 or not np.isfinite(c).all() or (c < 0).any():
        raise UserError(f"the counts are {counts!r}; give one number of 0 or more per gram")
    p = c[c > 0] / c.sum() if c.any() else np.ones(1)
    nats = max(0.0, float(-(p * np.log(p)).sum()))  # 0, not -0, for a single gram
    return SemanticEntropy(nats, nats / math.log(2), nats / math.log(len(c)) if len(c) > 1 else 0.0)


# ---- dispersion


def dispersion_trend(
    values: Sequence[float], decay: float = 0.99, tolerance: float = 1e-3
) -> list[tuple[float, float, int]]:
    """Smooth a series of dispersions, ema <- decay ema + (1 - decay) x, and count how long it has been stable.

    Returns for every value the ema, its change |ema - previous ema| (0 at first), and the number of
    changes in a row that were at most ``tolerance``. A change is (1 - decay) |x - previous ema|, so with
    a decay of 0.99 almost any series is stable. Raises UserError.
    """
    if not 0 <= decay < 1:
        raise UserError(f"decay is {decay}; set it to 0 or more and below 1")
    refuse_outside("tolerance", tolerance)
    trend: list[tuple[float, float, int]] = []
    for x in values:
        if not trend:
            trend.append((x, 0.0, 0))
            continue
        before, _, calm = trend[-1]
        ema = decay * before + (1 - decay) * x
        change = abs(ema - before)
        trend.append((ema, change, calm + 1 if change <= tolerance else 0))
    return trend


def planning_dispersion(embeddings: Floats, group: Ints) -> Floats:
    """Return the mean over pairs of 1 - cos(u_i, u_j) in each group of two or more: (B, d), (B,) -> (G,).

    A zero row is a completion without planning tokens: the distance between two of them is 0, to any other 1.
    """
    u = _unit(embeddings)
    _, g = np.unique(group, return_inverse=True)
    rows, n = len(u), np.bincount(g)
    empty = np.bincount(g, ~u.any(axis=1), len(n))
    total = np.zeros((len(n), u.shape[1]))
    np.add.at(total, g, u)
    several = n >= 2
    pairs = np.maximum(n * (n - 1), 1)  # ordered ones, as in |sum_i u_i|^2 - sum_i |u_i|^2 = sum_{i != j} u_i u_j
    cosines = (total**2).sum(axis=1) - (n - empty)
    distances = 1 - (cosines + empty * (empty - 1)) / pairs
    return np.maximum(distances, 0.0)[several] if rows else np.zeros(0)


def planning_token_bags(tokens: Ints, planning: Bools, row: Ints, rows: int, bins: int = 256) -> Floats:
    """Count each completion's planning tokens by id modulo ``bins``, scaled to length 1: (rows, bins) float64.

    tokens, planning and row are flat, (N,): id, mask and completion (0..rows-1) of each sampled token.
    A completion without planning tokens is zero. Raises UserError for less than one bin.
    """
    refuse_outside("bins", bins, 1)
    cells = row[planning] * bins + tokens[planning] % bins
    return _unit(np.bincount(cells, minlength=rows * bins).reshape(rows, bins))


def pool_planning_states(hidden: Floats, planning: Bools, row: Ints, rows: int) -> Floats:
    """Return the mean hidden state of each completion's planning tokens, scaled to length 1: (rows, d) float64.

    hidden is (N, d); planning, row and zero rows are as in ``planning_token_bags``.
    """
    total = np.zeros((rows, hidden.shape[1]))
    np.add.at(total, row[planning], hidden[planning])  # the mean has the direction of the sum
    return _unit(total)


def _unit(rows: NDArray[Any]) -> Floats:
    """Scale rows to length 1, (B, d) -> (B, d) float64; zero rows stay zero."""
    rows = rows.astype(np.float64)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    unit: Floats = np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)
    return unit
