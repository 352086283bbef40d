"""``Credit``: the sampled tokens of a step, as baselines and stages see them."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from .rewards import Rewards


@dataclass(frozen=True, slots=True, eq=False)
class Credit:
    """The sampled tokens of a step, completion after completion: N tokens of B completions."""

    advantage: np.ndarray  # (N,) float64
    uncertainty: np.ndarray  # (N,) float64, nats: surprisal or exact entropy, as the recipe asks; SEPA pools it
    entropy: np.ndarray | None  # (N,) float64, nats, exact; None when the engine could not see it
    planning: np.ndarray  # (N,) bool, True on strategic grams
    penalty: np.ndarray  # (N,) float64, of a KL in the reward
    row: np.ndarray  # (N,) int, non-decreasing: the completion of each token
    position: np.ndarray  # (N,) int, 0 at a completion's first token
    reward: np.ndarray  # (B,) float64, NaN where unscorable
    group: np.ndarray  # (B,) int, dense: 0..G-1
    baseline: np.ndarray | None = None  # (B,) float64, advantages before any stage; None where they come per token

    @property
    def uniform(self) -> np.ndarray:
        """(B,) bool, True where the completion's group agrees on the reward."""
        return Rewards(self.reward, self.group).uniform

    @property
    def silent(self) -> np.ndarray:
        """(B,) bool, True where that is so or the completion has no reward: it says nothing of who did better."""
        return self.uniform | np.isnan(self.reward)


def row_sum(values: np.ndarray, row: np.ndarray, rows: int) -> np.ndarray:
    """(N,) -> (rows,): the sum over each completion's tokens, 0 for an empty one."""
    return np.bincount(row, values, rows)


def row_mean(values: np.ndarray, row: np.ndarray, rows: int) -> np.ndarray:
    """(N,) -> (rows,): the mean over each completion's tokens, 0 for an empty one."""
    return row_sum(values, row, rows) / np.maximum(np.bincount(row, minlength=rows), 1)
