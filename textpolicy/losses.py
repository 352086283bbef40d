"""Policy-gradient losses, written once for any array namespace (numpy, mlx.core)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from .errors import UserError

Array = Any


@dataclass(frozen=True)
class Surrogate:
    """How a policy update reads a batch; the only thing an engine knows of an algorithm."""

    ratio: Literal["token", "sequence"] = "token"
    clip_low: float = 0.2
    clip_high: float = 0.2

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low <= 1 or self.clip_high < 0:
            raise UserError(
                f"the clip range is [1 - {self.clip_low}, 1 + {self.clip_high}]; "
                "set clip_low between 0 and 1 and clip_high to 0 or more"
            )


def log_ratio(logprobs: Array, batch: Any, how: Surrogate) -> Array:
    """log r, (B, T), or (B, 1) for a sequence ratio: GSPO's mean over a row's sampled tokens."""
    difference = logprobs - batch.logprobs
    if how.ratio == "token":
        return difference
    live = (batch.weights != 0) * 1.0
    count = live.sum(axis=1, keepdims=True)
    return (difference * live).sum(axis=1, keepdims=True) / (count + (count == 0))  # an empty row has ratio 1


def clipped_surrogate(logprobs: Array, batch: Any, xp: Any, how: Surrogate) -> Array:
    """-sum_t w_t min(r_t A_t, clip(r_t, 1 - clip_low, 1 + clip_high) A_t).

    ``logprobs`` is (B, T), under the policy being trained; ``batch`` holds arrays of the namespace
    ``xp``. The token ratio is PPO's (arXiv:1707.06347) and GRPO's (arXiv:2402.03300, eq. 3); the
    sequence ratio is GSPO's geometric mean (arXiv:2507.18071, eq. 5-7). The minimum is taken after
    clipping, which keeps the gradient of every token that clipping would make look better.
    """
    r = xp.exp(xp.clip(log_ratio(logprobs, batch, how), -20, 20))
    clipped = xp.clip(r, 1 - how.clip_low, 1 + how.clip_high)
    surrogate = xp.minimum(r * batch.advantages, clipped * batch.advantages)
    return -(batch.weights * surrogate).sum()
