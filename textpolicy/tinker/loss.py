"""The Tinker service's loss for a surrogate, and a refusal of surrogates that it has no loss for."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import UserError
from ..losses import Clip, ClippedWeight, CrossEntropy, ImportanceSampling, Surrogate

_UNBOUNDED = math.exp(20)  # the local loss keeps ratios below it, so it is no bound


@dataclass(frozen=True, slots=True)
class TinkerLoss:
    """The loss of the service: its name, thresholds of the ratio, and whether it reads ``sequence_ratio_mask``."""

    name: str
    config: Mapping[str, float] | None = None
    masked: bool = False
    weighted: bool = False  # its data have weights in place of log-probs and advantages


def tinker_loss(surrogate: Surrogate) -> TinkerLoss:
    """Return the loss of the service; its thresholds are ratios, 1 - clip_low and 1 + clip_high.

    The service's gspo is GSPO-token (arXiv:2507.18071, eq. 13-14), whose gradient is that of a ratio per sequence
    where the advantage is the same for all tokens of a completion. Raises UserError for any other surrogate.
    """
    for there, name, instead in (
        (surrogate.kl is not None, "algorithm.kl", "set algorithm.kl.place to reward"),
        (surrogate.correction is not None, "algorithm.correction", "leave it out: the ratio is taken to the sampler"),
        (surrogate.off_policy_limit is not None, "algorithm.off_policy_limit", "leave it out"),
        (surrogate.drift is not None, "algorithm.drift", "choose a recipe without it"),
    ):
        if there:
            raise UserError(
                f"{name} is set, which no loss of the Tinker service supports; {instead}, or use --engine mlx"
            )
    match surrogate.objective:
        case Clip(delta=None, dual_clip=None, clip_low=low, clip_high=high):
            band = {"clip_low_threshold": max(1 - low, 0.0), "clip_high_threshold": 1 + high}
            if surrogate.ratio == "token":
                return TinkerLoss("ppo", band)
            if surrogate.ratio in ("sequence", "sequence-token"):
                return TinkerLoss("gspo", band, masked=True)
        case ClippedWeight(weight_low=low, weight_high=high) if surrogate.ratio == "token":
            most = _UNBOUNDED if high is None else high
            return TinkerLoss("cispo", {"clip_low_threshold": max(low or 0.0, 0.0), "clip_high_threshold": most})
        case CrossEntropy():
            return TinkerLoss("cross_entropy", weighted=True)
        case ImportanceSampling() if surrogate.ratio == "token":
            return TinkerLoss("importance_sampling")
    raise UserError(
        f"the Tinker service has no loss for {surrogate.objective} with a ratio per {surrogate.ratio}; choose a recipe "
        "with plain clipping, clipped weights or importance sampling and a ratio per token, gspo, or use --engine mlx"
    )
