"""Compare a completion with the mean reward per token of its prompt: OPO (arXiv:2505.23585)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..types import Floats
from .credit import Rewards


@dataclass(frozen=True)
class LengthWeighted:
    """Compute A_i = r_i - sum_j n_j r_j / sum_j n_j, with n_j the sampled tokens of the prompt's completions.

    It is the baseline of least variance where the squared gradient of a completion grows with its length. A group of
    one, a group of equal rewards and an unscored completion get 0.
    """

    def __call__(self, rewards: Rewards) -> Floats:
        n = np.where(rewards.scored, 1.0 if rewards.length is None else rewards.length, 0.0)
        tokens, total = (np.bincount(rewards.group, x) for x in (n, np.where(n > 0, n * rewards.value, 0.0)))
        mean = (total / np.maximum(tokens, 1))[rewards.group]
        return np.where(rewards.uniform | ~rewards.scored, 0.0, rewards.value - mean)
