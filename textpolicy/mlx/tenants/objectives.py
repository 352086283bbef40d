"""The losses of the Tinker API, sums over positions and data, once for any array namespace (numpy, mlx.core)."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import mlx.core as mx

from ...errors import UserError, refuse_outside, unknown_name
from ...losses import Array, importance_ratio

_THRESHOLDS = {"clip_low_threshold": 0.8, "clip_high_threshold": 1.2}
CONFIG: dict[str, dict[str, float]] = {  # the settings of each loss, with their defaults
    "cross_entropy": {},
    "importance_sampling": {},
    "ppo": _THRESHOLDS,
    "cispo": {"clip_low_threshold": 0.0, "clip_high_threshold": 4.0},
    "dro": {"beta": math.nan},  # must be given
    "gspo": _THRESHOLDS,
}
MASK = "sequence_ratio_mask"


@dataclass(frozen=True)
class Loss:
    """The loss of a name and settings; equal ones share a compiled function."""

    name: str
    low: float = 0.0  # bounds of the ratio
    high: float = math.inf
    beta: float = 0.0

    @classmethod
    def of(cls, name: str, config: Mapping[str, Any]) -> Loss:
        """Return the loss that a client asks for. Raises UserError."""
        if name == "stable_reinforce":
            raise UserError("the loss stable_reinforce is unpublished; pass loss_fn='importance_sampling'")
        if name not in CONFIG:
            raise unknown_name("loss", name, CONFIG)
        for key, value in config.items():
            if key not in CONFIG[name]:
                known = ", ".join(CONFIG[name]) or "none"
                raise UserError(f"the loss {name} has no setting {key!r}; leave it out (its settings: {known})")
            refuse_outside(key, value)
        settings = {**CONFIG[name], **{key: float(value) for key, value in config.items()}}
        if math.isnan(beta := settings.get("beta", 0.0)):
            raise UserError(f"the loss {name} needs beta, the weight of its quadratic term; give loss_fn_config it")
        low, high = settings.get("clip_low_threshold", 0.0), settings.get("clip_high_threshold", math.inf)
        if low > high:
            raise UserError(
                f"clip_low_threshold is {low} and clip_high_threshold {high}; set the first below the other"
            )
        return cls(name, low, high, beta)

    @property
    def inputs(self) -> tuple[str, ...]:
        """The arrays that a datum must have, the targets first."""
        rest = ("weights",) if self.name == "cross_entropy" else ("logprobs", "advantages")
        return ("target_tokens", *rest)

    def total(self, l: Array, rows: Any, xp: Any) -> Array:
        """Return the loss of log-probs l (B, T) under the policy, or (B, T, K), a sum.

        ``rows`` is a batch whose ``weights`` are 1 where a position counts, whose ``advantages`` are those of the
        datum or, in cross_entropy, its weights, and whose ``old`` marks the positions of GSPO's ratio,
        or those that count in DRO: not a prompt's, whose log-probs and advantages are all 0.
        """
        a, b, counts = rows.advantages, rows.logprobs, rows.weights != 0
        if self.name == "cross_entropy":
            return -(a * l).sum()
        d = xp.where(counts, l - b, 0)
        if self.name == "dro":
            return -xp.where(counts & (rows.old != 0), l * a - self.beta / 2 * d * d, 0).sum()
        if self.name == "gspo":  # GSPO-token, arXiv:2507.18071, eq. 13-14
            r = importance_ratio(d, counts & (rows.old != 0), "sequence-token", xp)
        else:
            r = importance_ratio(d, counts, "token", xp)
        bounded = xp.clip(r, self.low, self.high)
        match self.name:
            case "importance_sampling":
                j = r * a
            case "cispo":
                j = (bounded if xp is not mx else mx.stop_gradient(bounded)) * a * l
            case _:
                j = xp.minimum(bounded * a, r * a)
        return -xp.where(counts, j, 0).sum()

    def __call__(self, logprobs: mx.array, rows: Any) -> tuple[mx.array, dict[str, mx.array]]:
        """Return the loss, and the log-probs for the client."""
        return self.total(logprobs, rows, mx), {"logprobs": mx.stop_gradient(logprobs)}
