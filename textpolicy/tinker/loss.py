"""Which of the Tinker service's losses a surrogate is, and a refusal where none is."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass

from ..errors import UserError
from ..losses import Clip, ClippedWeight, ImportanceSampling, Surrogate

_UNBOUNDED = math.exp(20)  # a ratio that no bound reaches; the local loss keeps ratios within it, too


@dataclass(frozen=True, slots=True)
class TinkerLoss:
    """A loss of the service: its name, thresholds of the ratio, and whether it reads ``sequence_ratio_mask``."""

    name: str
    config: Mapping[str, float] | None = None
    masked: bool = False


def tinker_loss(how: Surrogate) -> TinkerLoss:
    """ppo, gspo, cispo or importance_sampling; its thresholds are ratios, 1 - clip_low and 1 + clip_high.

    The service's gspo is GSPO-token (arXiv:2507.18071, eq. 13-14), whose gradient is that of a ratio per sequence
    where the advantage is the same for all tokens of a completion. Raises UserError for what no loss there says.
    """
    _refuse_additions(how)
    match how.objective:
        case Clip(delta=None, dual_clip=None) if how.ratio == "token":
            return TinkerLoss("ppo", _band(1 - how.objective.clip_low, 1 + how.objective.clip_high))
        case Clip(delta=None, dual_clip=None) if how.ratio in ("sequence", "sequence-token"):
            return TinkerLoss("gspo", _band(1 - how.objective.clip_low, 1 + how.objective.clip_high), masked=True)
        case ClippedWeight() if how.ratio == "token":
            high = how.objective.weight_high
            return TinkerLoss("cispo", _band(how.objective.weight_low or 0.0, _UNBOUNDED if high is None else high))
        case ImportanceSampling() if how.ratio == "token":
            return TinkerLoss("importance_sampling")
    raise UserError(
        f"the Tinker service has no loss for {how.objective} with a ratio per {how.ratio}; choose a recipe with plain "
        "clipping, clipped weights or importance sampling and a ratio per token, gspo, or --engine mlx"
    )


def _band(low: float, high: float) -> dict[str, float]:
    return {"clip_low_threshold": max(low, 0.0), "clip_high_threshold": high}


def _refuse_additions(how: Surrogate) -> None:
    for there, name, instead in (
        (how.kl is not None, "algorithm.kl", "set algorithm.kl.place to reward"),
        (how.correction is not None, "algorithm.correction", "leave it out: the ratio is taken to the sampler"),
        (how.off_policy_limit is not None, "algorithm.off_policy_limit", "leave it out"),
    ):
        if there:
            raise UserError(f"{name} is set and no loss of the Tinker service has it; {instead}, or take --engine mlx")
