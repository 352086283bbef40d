"""Whiten advantages over the tokens of the batch, without a baseline: REINFORCE++ (arXiv:2501.03262)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..types import Floats, Ints
from .credit import Credit, Rewards


@dataclass(frozen=True)
class NoBaseline:
    """Compute A_i = r_i; 0 where scoring failed."""

    def __call__(self, rewards: Rewards) -> Floats:
        return np.where(rewards.scored, rewards.value, 0.0)


@dataclass(frozen=True)
class ReturnToGo:
    """Set A_t <- sum_{k >= t} gamma^(k - t) (r_k - penalty_k), with the reward on the last token."""

    gamma: float = 1.0

    def __call__(self, credit: Credit) -> Credit:
        last = np.append(credit.row[1:] != credit.row[:-1], True)[: len(credit.row)]
        penalty = np.bincount(credit.row, credit.penalty, len(credit.reward))
        reward = credit.advantage + penalty[credit.row]  # the baseline has subtracted the penalties
        token_rewards = np.where(last, reward, 0.0) - credit.penalty
        return replace(credit, advantage=returns_to_go(token_rewards, credit.row, credit.position, self.gamma))


@dataclass(frozen=True)
class Whiten:
    """Set A_t <- (A_t - mean A) / sqrt(var A + 1e-8), over every sampled token of scored completions."""

    def __call__(self, credit: Credit) -> Credit:
        scored = ~np.isnan(credit.reward)[credit.row]
        advantage = np.zeros_like(credit.advantage)
        advantage[scored] = whiten(credit.advantage[scored])
        return replace(credit, advantage=advantage)


def whiten(values: Floats, eps: float = 1e-8) -> Floats:
    """Scale values to mean 0 and sample (Bessel) variance 1, (N,) -> (N,); exactly 0 where all are equal.

    Statistics are over tokens, so long completions weigh more, as in the paper.
    """
    if len(values) < 2 or (values == values[0]).all():
        return np.zeros_like(values)
    whitened: Floats = (values - values.mean()) / np.sqrt(values.var(ddof=1) + eps)
    return whitened


def returns_to_go(rewards: Floats, row: Ints, position: Ints, gamma: float = 1.0) -> Floats:
    """Return R_t = sum_{k >= t} gamma^(k - t) r_k within each completion, (N,) token rewards -> (N,).

    ``row`` (N,) is the completion of each token, ``position`` (N,) its place in it.
    """
    grid = np.zeros((row.max(initial=-1) + 1, position.max(initial=-1) + 1))
    grid[row, position] = rewards
    for t in range(grid.shape[1] - 2, -1, -1):
        grid[:, t] += gamma * grid[:, t + 1]
    returns: Floats = grid[row, position]
    return returns
