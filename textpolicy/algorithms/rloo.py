"""Compare every completion with the others of its prompt: RLOO (arXiv:2402.14740)."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ..types import Floats
from .credit import Rewards


@dataclass(frozen=True)
class LeaveOneOut:
    """Compute A_i = r_i - mean_{j != i} r_j = n / (n - 1) (r_i - mean r); a group of one gets 0.

    ``normalize_advantages`` then scales the whole batch to mean 0 and sample std 1.
    """

    normalize_advantages: bool = False
    advantage_eps: float = 1e-4

    def __call__(self, rewards: Rewards) -> Floats:
        n = rewards.count
        a: Floats = rewards.centered * n / np.maximum(n - 1, 1)
        if self.normalize_advantages and len(a) > 1:
            a = (a - a.mean()) / (a.std(ddof=1) + self.advantage_eps)
        return a
