"""Learn from a teacher token by token: on-policy distillation, and self-distillation where the teacher is the policy.

The teacher scores what the policy sampled, so every token has a signal, also where all rewards of a group agree
(tinker-cookbook; the teacher with privileged context: arXiv:2601.19897, arXiv:2601.20802).
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError, refuse_outside
from ..types import Episode, Floats
from .reinforce import returns_to_go


@dataclass(frozen=True)
class Distillation:
    """Set A_t <- weight A_t + coefficient sum_{s >= t} discount^(s - t) (q_s - l_s), over the positions of a sequence.

    q is the teacher's log-prob of the sampled token and l the policy's. Without a discount the mean gradient is that
    of the reverse KL at each token, with what it changes later left out; with a discount of 1 that of the sequence.
    """

    coefficient: float = 1.0
    discount: float = 0.0
    reward_weight: float = 0.0

    def __post_init__(self) -> None:
        refuse_outside("coefficient", self.coefficient, 0)
        refuse_outside("discount", self.discount, 0, 1)
        refuse_outside("reward_weight", self.reward_weight, 0)

    def __call__(self, advantage: Floats, episodes: Sequence[Episode]) -> NDArray[np.float64]:
        """Return the advantages of the sampled tokens, (N,), from those of the rewards. Raises UserError."""
        taught = []
        for e in episodes:
            if e.lead is None:
                raise UserError("the recipe distils and an episode has no log-probs of a teacher; score them first")
            lead = self.coefficient * np.where(e.mask, e.lead, 0).astype(np.float64)
            row, position = np.zeros(len(lead), int), np.arange(len(lead))
            taught.append(returns_to_go(lead, row, position, self.discount)[e.mask])
        # what is not weighed must not count, not even where it is not finite
        return np.concatenate(taught) + (self.reward_weight * advantage if self.reward_weight else 0.0)
