"""The recipes' credit as functions of plain lists, for loops written against the Tinker service."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..algorithms.credit import Rewards
from ..algorithms.grams import DEFAULT_STRATEGIC_GRAMS as DEFAULT_STRATEGIC_GRAMS
from ..algorithms.grpo import GroupRelative
from ..algorithms.hicra import AmplifyPlanning, amplify
from ..algorithms.maxrl import MeanNormalized
from ..algorithms.pipeline import Algorithm, Baseline, Stage
from ..algorithms.planning import PlanningGrams
from ..algorithms.sepa import Pooling, pool_execution
from ..algorithms.sepa import SEPAController as SEPAController
from ..algorithms.weighting import WeightByUncertainty, uncertainty_weights
from ..environment.text.pieces import Pieces, text_decode
from ..environment.text.pieces import identify_planning_tokens as identify_planning_tokens
from ..errors import UserError, unknown_name
from ..types import Episode

BASELINES: dict[str, Baseline] = {"grpo": GroupRelative("none"), "maxrl": MeanNormalized()}
TRANSFORMS: dict[str, tuple[str, ...]] = {
    "none": (),
    "gtpo": ("gtpo",),
    "gtpo_hicra": ("gtpo", "hicra"),
    "gtpo_sepa": ("sepa", "gtpo"),
    "gtpo_sepa_hicra": ("sepa", "gtpo", "hicra"),
}


def compute_grpo_advantages(rewards: Sequence[float]) -> list[float]:
    """Return A_i = r_i - mean r over the completions of one prompt; 0 where a reward is NaN."""
    return BASELINES["grpo"](Rewards.of(rewards)).tolist()


def compute_maxrl_advantages(rewards: Sequence[float], eps: float = 1e-6) -> list[float]:
    """Return A_i = (r_i - mean r) / (mean r + eps), all 0 if mean r <= eps. Raises UserError for negative rewards."""
    return MeanNormalized(eps)(Rewards.of(rewards)).tolist()


def apply_gtpo_weighting(advantage: float, entropies: Sequence[float], beta: float = 0.1) -> list[float]:
    """Return A max(0, 1 + beta (H_t / mean H - 1)) for each token of one completion; A itself if mean H < 1e-7.

    ``entropies`` are in nats, exact or surprisals: see ``uncertainty_weights``. Raises UserError.
    """
    weights = uncertainty_weights(np.array(entropies, float), np.zeros(len(entropies), int), beta)
    return (advantage * weights).tolist()


def apply_hicra(token_advs: Sequence[float], planning_mask: Sequence[int], alpha: float = 0.2) -> list[float]:
    """Return A_t + alpha |A_t| on the tokens that ``planning_mask`` marks by 1, A_t elsewhere. Raises UserError."""
    return amplify(np.array(token_advs, float), _mask(planning_mask, len(token_advs)), alpha).tolist()


def apply_sepa_pooling(entropies: Sequence[float], planning_mask: Sequence[int], lambda_t: float) -> list[float]:
    """Return lam mean(H_exec) + (1 - lam) H_t for execution tokens and H_t for planning ones, lam = ``lambda_t``.

    Raises UserError.
    """
    planning = _mask(planning_mask, len(entropies))
    return pool_execution(np.array(entropies, float), planning, np.zeros(len(entropies), int), lambda_t).tolist()


def compute_composable_advantages(
    rewards_G: Sequence[float],  # noqa: N803  (documented names)
    sampled_tokens_G: Sequence[Sequence[int]],  # noqa: N803
    logprobs_G: Sequence[Sequence[float]],  # noqa: N803
    tokenizer: Any,
    *,
    advantage_mode: str,
    transform_mode: str,
    gtpo_beta: float = 0.1,
    hicra_alpha: float = 0.2,
    sepa_lambda: float = 0.0,
    strategic_grams: Sequence[str] | None = None,
) -> tuple[list[list[float]], dict[str, float] | None]:
    """Return the token advantages of the G completions of one prompt, and statistics of their surprisals.

    ``advantage_mode`` is grpo or maxrl; ``transform_mode`` none, gtpo, gtpo_hicra, gtpo_sepa or
    gtpo_sepa_hicra: SEPA pools with ``sepa_lambda`` before GTPO weighs, and HICRA comes last. ``tokenizer``
    needs decode(ids) -> text, and is not used without SEPA or HICRA. The statistics, in nats and before
    pooling, are mean and variance over execution and planning tokens; None for a mode without planning tokens.
    Raises UserError.
    """
    if not len(rewards_G) == len(sampled_tokens_G) == len(logprobs_G):
        counts = f"{len(rewards_G)} rewards, {len(sampled_tokens_G)} token lists and {len(logprobs_G)} log-prob lists"
        raise UserError(f"there are {counts}; give one of each per completion")
    for i, (ids, l) in enumerate(zip(sampled_tokens_G, logprobs_G, strict=True)):
        if len(ids) != len(l):
            raise UserError(f"completion {i} has {len(ids)} tokens and {len(l)} log-probs; give one for each token")
    algorithm = recipe(
        advantage_mode, transform_mode, gtpo_beta=gtpo_beta, hicra_alpha=hicra_alpha, grams=strategic_grams
    )
    if len(rewards_G) == 0:
        return [], None
    spell = None if algorithm.grams is None else Pieces(text_decode(tokenizer))
    episodes = []
    for ids, l, reward in zip(sampled_tokens_G, logprobs_G, rewards_G, strict=True):
        tokens = np.array([0, *ids], np.int64)  # one token stands for the prompt
        mask = np.arange(len(tokens)) > 0
        logprobs = np.array([0.0, *l])
        pieces = () if spell is None else spell(ids)
        episodes.append(Episode(tokens, mask, logprobs, entropy=None, reward=reward, group=0, pieces=pieces))
    credit = algorithm.tokens(episodes, _Constant(sepa_lambda))
    ends = np.cumsum([len(ids) for ids in sampled_tokens_G])
    stats = None if algorithm.grams is None else surprisal_statistics(np.concatenate(logprobs_G), credit.planning)
    return [part.tolist() for part in np.split(credit.advantage, ends)[:-1]], stats


@dataclass(frozen=True)
class _Constant:
    """The controller that always pools with one strength."""

    strength: float

    def advance(self, correct_rate: float | None, execution: np.ndarray) -> float:
        return self.strength


def recipe(
    advantage_mode: str,
    transform_mode: str,
    *,
    gtpo_beta: float = 0.1,
    hicra_alpha: float = 0.2,
    pooling: Pooling | None = None,
    grams: Sequence[str] | None = None,
) -> Algorithm:
    """Return the recipe of an advantage mode and a transform mode; maxrl with gtpo_sepa_hicra is "full".

    ``pooling`` applies to modes with SEPA; ``grams`` are strategic phrases, None the built-in ones. Raises UserError.
    """
    if advantage_mode not in BASELINES:
        raise unknown_name("advantage mode", advantage_mode, BASELINES)
    if transform_mode not in TRANSFORMS:
        raise unknown_name("transform mode", transform_mode, TRANSFORMS)
    named = TRANSFORMS[transform_mode]
    pools, amplifies = "sepa" in named, "hicra" in named
    stages: dict[str, Stage] = {"gtpo": WeightByUncertainty(gtpo_beta), "hicra": AmplifyPlanning(hicra_alpha)}
    return Algorithm(
        BASELINES[advantage_mode],
        tuple(stage for name, stage in stages.items() if name in named),
        pooling=(pooling or Pooling()) if pools else None,
        grams=PlanningGrams(DEFAULT_STRATEGIC_GRAMS if grams is None else grams) if pools or amplifies else None,
    )


def surprisal_statistics(logprobs: np.ndarray, planning: np.ndarray) -> dict[str, float]:
    """Return mean and variance of the surprisals of execution and of planning tokens; absent kinds are left out."""
    parts = {"exec": -logprobs[~planning], "plan": -logprobs[planning]}
    seen = {name: part for name, part in parts.items() if part.size}
    means = {f"{name}_entropy_mean": float(part.mean()) for name, part in seen.items()}
    return means | {f"{name}_entropy_var": float(part.var()) for name, part in seen.items()}


def _mask(planning_mask: Sequence[int], count: int) -> np.ndarray:
    if len(planning_mask) != count:
        raise UserError(f"the planning mask has {len(planning_mask)} entries for {count} tokens; give one per token")
    return np.array(planning_mask) != 0
