"""REINFORCE++ (arXiv:2501.03262): no baseline of its own; advantages are whitened over the tokens of the batch."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from .credit import Credit, row_sum
from .rewards import Rewards


@dataclass(frozen=True)
class NoBaseline:
    """A_i = r_i; 0 where unscorable."""

    def __call__(self, rewards: Rewards) -> np.ndarray:
        return np.where(rewards.scored, rewards.value, 0.0)


@dataclass(frozen=True)
class ReturnToGo:
    """A_t <- sum_{k >= t} gamma^(k - t) (r_k - penalty_k), the reward falling on the last token."""

    gamma: float = 1.0

    def __call__(self, credit: Credit) -> Credit:
        last = np.append(credit.row[1:] != credit.row[:-1], True)[: len(credit.row)]
        reward = credit.advantage + row_sum(credit.penalty, credit.row, len(credit.reward))[credit.row]
        token_rewards = np.where(last, reward, 0.0) - credit.penalty
        return replace(credit, advantage=returns_to_go(token_rewards, credit.row, credit.position, self.gamma))


@dataclass(frozen=True)
class Whiten:
    """A_t <- (A_t - mean A) / sqrt(var A + 1e-8), over every sampled token of the batch that could be scored."""

    def __call__(self, credit: Credit) -> Credit:
        scored = ~np.isnan(credit.reward)[credit.row]
        advantage = np.zeros_like(credit.advantage)
        advantage[scored] = whiten(credit.advantage[scored])
        return replace(credit, advantage=advantage)


def whiten(values: np.ndarray, eps: float = 1e-8) -> np.ndarray:
    """(N,) -> (N,): mean 0 and sample (Bessel) variance 1; exactly 0 where all are equal.

    Over tokens, so that long completions weigh more, as in the paper.
    """
    if len(values) < 2 or (values == values[0]).all():
        return np.zeros_like(values)
    return (values - values.mean()) / np.sqrt(values.var(ddof=1) + eps)


def returns_to_go(rewards: np.ndarray, row: np.ndarray, position: np.ndarray, gamma: float = 1.0) -> np.ndarray:
    """R_t = sum_{k >= t} gamma^(k - t) r_k within each completion, (N,) token rewards -> (N,).

    ``row`` (N,) is the completion of each token, ``position`` (N,) its place in it.
    """
    grid = np.zeros((row.max(initial=-1) + 1, position.max(initial=-1) + 1))
    grid[row, position] = rewards
    for t in range(grid.shape[1] - 2, -1, -1):
        grid[:, t] += gamma * grid[:, t + 1]
    return grid[row, position]
