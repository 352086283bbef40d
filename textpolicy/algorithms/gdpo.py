"""Normalise each of several rewards on its own before they are summed: GDPO (arXiv:2601.05242)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..types import Floats
from .credit import Rewards
from .grpo import GroupRelative


@dataclass(frozen=True)
class DecoupledRelative:
    """Compute A_i = sum_k w_k (r_ik - mean r_k) / (std r_k + eps) over the rewards k, with statistics of one prompt.

    w are the weights of the rewards. A reward that does not apply to a completion, or on which the group agrees, adds
    0; with one reward it is GRPO's advantage. ``Whiten`` then scales the sum over the batch.
    """

    std_eps: float = 1e-6
    ddof: int = 1

    def __call__(self, rewards: Rewards) -> Floats:
        relative, total = GroupRelative("group", self.std_eps, self.ddof), np.zeros_like(rewards.value)
        for weight, score in rewards.parts or ((1.0, rewards.value),):
            total += weight * relative(Rewards(np.where(rewards.scored, score, np.nan), rewards.group))
        return total
