"""How varied planning is: the entropy of strategic grams (arXiv:2509.03646), and an older measure of dispersion."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import UserError, unknown_name

Series = Literal["batch", "ema"]


@dataclass(frozen=True, slots=True)
class SemanticEntropy:
    """The entropy of one distribution over grams, in three units."""

    nats: float
    bits: float
    normalised: float  # nats / ln(number of grams), from 0 (one gram only) to 1 (all alike)


def semantic_entropy(counts: Sequence[float] | np.ndarray) -> SemanticEntropy:
    """H = -sum_g p_g ln p_g with p_g = counts_g / sum(counts), for (K,) counts of K grams (arXiv:2509.03646).

    0 where nothing was counted, and of a single gram. Raises UserError for counts that are negative or no numbers.
    """
    c = np.asarray(counts, np.float64)
    if c.ndim != 1 or not np.isfinite(c).all() or (c < 0).any():
        raise UserError(f"the counts are {counts!r}; give one number of 0 or more per gram")
    p = c[c > 0] / c.sum() if c.any() else np.ones(1)
    nats = max(0.0, float(-(p * np.log(p)).sum()))  # 0, not -0, for a single gram
    return SemanticEntropy(nats, nats / math.log(2), nats / math.log(len(c)) if len(c) > 1 else 0.0)


# ---- dispersion


@dataclass(frozen=True, slots=True)
class Dispersion:
    """What one step told a ``PlanningDispersionTracker``."""

    batch: float  # mean over groups of the mean pairwise cosine distance, 0 to 2
    ema: float
    delta: float  # |ema - the one before|, 0 at the first step
    groups: int  # that counted
    stable: bool
    stable_steps: int


class PlanningDispersionTracker:
    """Follows how far apart the planning tokens of a group's successful completions are.

    ema <- x at first, then decay ema + (1 - decay) x, where x is the mean of ``planning_dispersion``.
    Stable means ``patience`` counted steps in a row with |x - ema before| <= tolerance. With
    ``series="ema"`` the change of the ema itself is held against the tolerance, as version 0.1.11 did:
    that is (1 - decay) |x - ema before|, so at a decay of 0.99 almost any series passes.
    """

    def __init__(
        self,
        decay: float = 0.99,
        tolerance: float = 0.02,
        patience: int = 20,
        series: Series = "batch",
        success: float = 0.5,
    ) -> None:
        """Start without a value; ``success`` is the reward from which a completion counts. Raises UserError."""
        if not 0 <= decay < 1:
            raise UserError(f"decay is {decay}; set it to 0 or more and below 1")
        if not 0 <= tolerance < math.inf:
            raise UserError(f"tolerance is {tolerance}; set it to 0 or more")
        if patience < 1:
            raise UserError(f"patience is {patience}; set it to 1 or more")
        if series not in ("batch", "ema"):
            raise unknown_name("series", series, ("batch", "ema"))
        self.decay, self.tolerance, self.patience = decay, tolerance, patience
        self.series, self.success = series, success
        self.ema: float | None = None
        self.stable_steps = 0

    @property
    def stable(self) -> bool:
        """Whether the last ``patience`` counted steps were all within the tolerance."""
        return self.stable_steps >= self.patience

    def update(self, embeddings: np.ndarray, reward: np.ndarray, group: np.ndarray) -> Dispersion | None:
        """Take in one step of B completions: embeddings (B, d), rewards (B,), groups (B,).

        None, and nothing changes, when no group has two successful completions.
        """
        kept = reward >= self.success  # False where the reward is NaN
        distances = planning_dispersion(embeddings[kept], group[kept])
        if not len(distances):
            return None
        batch = float(distances.mean())
        before = self.ema
        self.ema = batch if before is None else self.decay * before + (1 - self.decay) * batch
        delta = 0.0 if before is None else abs(self.ema - before)
        self._count(None if before is None else delta if self.series == "ema" else abs(batch - before))
        return Dispersion(batch, self.ema, delta, len(distances), self.stable, self.stable_steps)

    def state_dict(self) -> dict[str, float | int | None]:
        """All that ``update`` changes, fit for JSON."""
        return {"ema": self.ema, "stable_steps": self.stable_steps}

    def load_state_dict(self, state: Mapping[str, float | int | None]) -> None:
        """Go on from a ``state_dict``. Raises UserError, and changes nothing, for one that cannot be."""
        if set(state) != {"ema", "stable_steps"}:
            raise UserError(f"the state holds {sorted(state)}; give one that state_dict returned")
        ema, steps = state["ema"], state["stable_steps"]
        if steps is None or steps < 0 or (ema is not None and not 0 <= ema < math.inf):
            raise UserError(f"the state is {dict(state)}; give one that state_dict returned")
        self.ema, self.stable_steps = ema, int(steps)

    def _count(self, change: float | None) -> None:
        calm = change is not None and change <= self.tolerance
        self.stable_steps = self.stable_steps + 1 if calm else 0


def planning_dispersion(embeddings: np.ndarray, group: np.ndarray) -> np.ndarray:
    """Mean over pairs of 1 - cos(u_i, u_j) in each group of two or more: embeddings (B, d), group (B,) -> (G,).

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


def planning_token_bags(
    tokens: np.ndarray, planning: np.ndarray, row: np.ndarray, rows: int, bins: int = 256
) -> np.ndarray:
    """(rows, bins) float64: how often each token id, modulo ``bins``, is planned with; rows of length 1, or zero.

    tokens, planning and row are flat, (N,): id, mask and completion (0..rows-1) of each sampled token.
    Raises UserError for less than one bin.
    """
    if bins < 1:
        raise UserError(f"bins is {bins}; set it to 1 or more")
    cells = row[planning] * bins + tokens[planning] % bins
    return _unit(np.bincount(cells, minlength=rows * bins).reshape(rows, bins))


def pool_planning_states(hidden: np.ndarray, planning: np.ndarray, row: np.ndarray, rows: int) -> np.ndarray:
    """(rows, d) float64: the mean hidden state of each completion's planning tokens; rows of length 1, or zero.

    hidden is (N, d); planning and row are (N,), as for ``planning_token_bags``.
    """
    total = np.zeros((rows, hidden.shape[1]))
    np.add.at(total, row[planning], hidden[planning])  # the mean has the direction of the sum
    return _unit(total)


def _unit(rows: np.ndarray) -> np.ndarray:
    """(B, d) -> (B, d) float64 of length 1, zero rows as they are."""
    rows = rows.astype(np.float64)
    length = np.linalg.norm(rows, axis=1, keepdims=True)
    return np.divide(rows, length, out=np.zeros_like(rows), where=length > 0)
