"""Divide the advantage by the success rate, which approaches maximum likelihood: MaxRL (arXiv:2602.02710)."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from ..errors import UserError
from ..losses import Array
from ..types import Floats
from .arrays import like, values_of
from .credit import Rewards


@dataclass(frozen=True)
class MeanNormalized:
    """Compute A_i = (r_i - mean r) / (mean r + eps), 0 where mean r <= eps (eq. 10, Alg. 1).

    Over 0/1 rewards it is unbiased for the likelihood truncated at order G - 1 (docs/algorithms.md).
    """

    mean_eps: float = 1e-6

    def __call__(self, rewards: Rewards) -> Floats:
        lowest = np.nanmin(rewards.value, initial=0.0)
        if lowest < 0:
            raise UserError(
                f"MaxRL divides by the mean reward and got a reward of {lowest:g}; give rewards of 0 or more, or "
                "return is_correct from the reward and set algorithm.signal to correctness"
            )
        mean = rewards.mean
        return np.where(mean > self.mean_eps, rewards.centered / np.maximum(mean + self.mean_eps, 1e-300), 0.0)


def compute_advantages_maxrl(
    rewards: Array,
    eps: float = 1e-6,
    prompt_ids: Sequence[int] | Array | None = None,
    num_prompt_groups: int | None = None,
) -> Array:
    """Return (r - m) / (m + eps) with m the mean reward of the prompt, (B,) -> (B,); 0 where m <= eps.

    ``prompt_ids`` (B,) are the same for completions of one prompt; without them all share one.
    ``num_prompt_groups`` is accepted and ignored. An array gives an array of its own kind, a list
    a NumPy array. Raises UserError for negative rewards.
    """
    ids = None if prompt_ids is None else np.asarray(prompt_ids)
    return like(rewards, MeanNormalized(eps)(Rewards.of(values_of(rewards), ids)))


compute_advantages_maxrl.accepts_prompt_groups = True  # type: ignore[attr-defined]  # as Trainer of 0.1.11 expects
