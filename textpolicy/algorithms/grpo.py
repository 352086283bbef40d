"""The group-relative baseline of GRPO (arXiv:2402.03300) and Dr. GRPO (arXiv:2503.20783), and documented functions.

The functions, including GTPO's, accept arrays of NumPy, MLX or any library with the same function names.
"""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import numpy as np

from ..errors import UserError, unknown_name
from ..losses import Array, Clip, Surrogate, policy_objective
from ..types import Floats
from .arrays import like, namespace, refuse_unlike, values_of
from .credit import Rewards
from .gtpo import Normalisation, normalize, shaped_rewards
from .maxrl import compute_advantages_maxrl as compute_advantages_maxrl
from .selection import Lengths, row_and_position
from .selection import compute_prompt_group_stats as compute_prompt_group_stats
from .selection import filter_informative_prompts as filter_informative_prompts
from .selection import select_all_data as select_all_data
from .selection import select_informative_data as select_informative_data
from .selection import select_recent_data as select_recent_data
from .weighting import uncertainty_weights

SCALES = ("group", "batch", "none")


@dataclass(frozen=True)
class GroupRelative:
    """Compute A_i = (r_i - mean r) / (std r + eps), with the mean over the completions of one prompt.

    The std is the sample (Bessel) one of the group (GRPO, sec. 4.1.2), that of the whole batch (Lite PPO,
    arXiv:2508.08221), or left out (Dr. GRPO, sec. 3, where the scale reflects a problem's difficulty).
    A group of one, a group of equal rewards and an unscored completion get 0.
    """

    scale_rewards: Literal["group", "batch", "none"] = "group"
    std_eps: float = 1e-6
    ddof: int = 1

    def __post_init__(self) -> None:
        if self.scale_rewards not in SCALES:
            raise unknown_name("scale of rewards", self.scale_rewards, SCALES)

    def __call__(self, rewards: Rewards) -> Floats:
        match self.scale_rewards:
            case "group":
                return rewards.centered / (rewards.std(self.ddof) + self.std_eps)
            case "batch":
                batch = Rewards(rewards.value, np.zeros_like(rewards.group))
                return rewards.centered / (batch.std(self.ddof) + self.std_eps)
        return rewards.centered


# ---- public functions over one group's rewards, or over flat arrays of sampled tokens


def compute_advantages(rewards: Array) -> Array:
    """Return A_i = r_i - mean(r) over one group, (G,) -> (G,); exactly 0 if all are equal.

    An array gives an array of its own kind, a list a NumPy array. Raises TypeError for anything else.
    """
    values = values_of(rewards)
    if values.ndim != 1:
        raise UserError(f"rewards have shape {values.shape}; give the rewards of one group, (G,)")
    return like(rewards, GroupRelative("none")(Rewards.of(values)))


def compute_advantages_dr_grpo(rewards: Array) -> Array:
    """Return Dr. GRPO's advantages, r - mean(r) without a standard deviation: those of ``compute_advantages``."""
    return compute_advantages(rewards)


def policy_loss(
    old_logprobs: Array,
    new_logprobs: Array,
    advantages: Array,
    clip_ratio: float | None = None,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.28,
    normalize_constant: float | None = None,
) -> Array:
    """Return -mean_t min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t) with r_t = exp(new_t - old_t), all (N,).

    ``clip_ratio`` sets both bounds. ``normalize_constant`` divides the sum by itself instead of by N
    (arXiv:2503.20783). The wider upper bound is DAPO's (arXiv:2503.14476). Raises UserError.
    """
    refuse_unlike(old_logprobs=old_logprobs, new_logprobs=new_logprobs, advantages=advantages)
    if normalize_constant is not None and not normalize_constant > 0:
        raise UserError(f"normalize_constant is {normalize_constant}; set it above 0, or leave it out")
    xp = namespace(new_logprobs)
    weight = 1 / (normalize_constant or max(new_logprobs.size, 1))
    row = FlatBatch(old_logprobs[None], advantages[None], xp.full(new_logprobs[None].shape, weight))
    surrogate = Surrogate(clip_range(clip_ratio, clip_ratio_low, clip_ratio_high))
    return policy_objective(new_logprobs[None], row, xp, surrogate)


def compute_metrics(
    old_logprobs: Array,
    new_logprobs: Array,
    advantages: Array,
    clip_ratio: float | None = None,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.28,
) -> dict[str, float]:
    """Return statistics of a policy update over N tokens, as plain floats.

    The clip fractions are shares of tokens whose ratio r is outside the clip range. kl_divergence
    estimates KL(old || new) by mean(r - 1 - log r), which is never negative. Raises UserError.
    """
    refuse_unlike(old_logprobs=old_logprobs, new_logprobs=new_logprobs, advantages=advantages)
    clip = clip_range(clip_ratio, clip_ratio_low, clip_ratio_high)
    old, new, a = values_of(old_logprobs), values_of(new_logprobs), values_of(advantages)
    if not a.size:
        raise UserError("there are no tokens to measure; give at least one")
    log_r = np.clip(new - old, -20, 20)
    r = np.exp(log_r)
    lower, upper = float((r < 1 - clip.clip_low).mean()), float((r > 1 + clip.clip_high).mean())
    return {
        "mean_advantage": float(a.mean()),
        "std_advantage": float(a.std()),
        "min_advantage": float(a.min()),
        "max_advantage": float(a.max()),
        "mean_ratio": float(r.mean()),
        "clip_fraction": lower + upper,
        "clip_fraction_lower": lower,
        "clip_fraction_upper": upper,
        "kl_divergence": float((r - 1 - log_r).mean()),
        "clip_ratio_low": clip.clip_low,
        "clip_ratio_high": clip.clip_high,
    }


def compute_token_entropy(logits: Array) -> Array:
    """Return H = -sum_y p_y log p_y in nats, p = softmax of the last axis: (..., V) -> (...); -inf has p = 0."""
    xp = namespace(logits)
    shifted = logits - logits.max(axis=-1, keepdims=True)
    p = xp.exp(shifted)
    total = p.sum(axis=-1)
    return xp.log(total) - (p * xp.where(p > 0, shifted, 0)).sum(axis=-1) / total


# ---- weights by entropy


def apply_entropy_weighting(
    advantages: Array, token_entropies: Array, entropy_weight: float = 0.1, episode_lengths: Lengths | None = None
) -> Array:
    """Return A_t max(0, 1 + beta (H_t / mean H - 1)), (N,) -> (N,), constant in the gradient.

    beta is ``entropy_weight``; see ``uncertainty_weights``. The mean is per completion; without
    ``episode_lengths`` all tokens are one completion. Raises UserError.
    """
    refuse_unlike(advantages=advantages, token_entropies=token_entropies)
    count = token_entropies.size
    row, _ = row_and_position([count] if episode_lengths is None else episode_lengths, count)
    weights = uncertainty_weights(values_of(token_entropies), row, entropy_weight)
    return like(advantages, weights * values_of(advantages))


def compute_advantages_gtpo(
    rewards: Array, token_entropies: Array, entropy_weight: float = 0.1, episode_lengths: Lengths | None = None
) -> Array:
    """Return ``compute_advantages`` of one group (G,) per token, weighted by ``apply_entropy_weighting``: (N,).

    Without ``episode_lengths`` every completion has one token. Raises UserError.
    """
    lengths = np.ones(len(rewards), int) if episode_lengths is None else episode_lengths
    row, _ = row_and_position(lengths, token_entropies.size, len(rewards))
    spread = like(token_entropies, values_of(compute_advantages(rewards))[row])
    return apply_entropy_weighting(spread, token_entropies, entropy_weight, lengths)


# ---- GTPO's shaped rewards (arXiv:2508.04349)


def compute_gtpo_shaped_rewards(
    rewards: Array,
    token_entropies: Array,
    episode_lengths: Lengths,
    alpha_1: float = 1.0,
    alpha_2: float = 0.1,
    reward_threshold: float = 0.5,
    eps: float = 1e-8,
    prompt_ids: Sequence[int] | Array | None = None,
) -> tuple[Array, Array]:
    """Return the shaped reward of each token, and whether its completion succeeded: (N,) and (N,) bool.

    The formulas are those of ``gtpo.shaped_rewards``, for rewards (B,) of completions that share a prompt,
    or have the ``prompt_ids`` (B,). Constant in the gradient. Raises UserError.
    """
    r = values_of(rewards)
    row, position = row_and_position(episode_lengths, token_entropies.size, len(r))
    shaped = shaped_rewards(
        values_of(token_entropies), row, position, r, Rewards.of(r, prompt_ids).group,
        alpha_1=alpha_1, alpha_2=alpha_2, reward_threshold=reward_threshold, eps=eps,
    )  # fmt: skip
    return like(token_entropies, shaped), namespace(token_entropies).array((r > reward_threshold)[row])


def normalize_gtpo_advantages(
    shaped_rewards: Array,
    is_positive: Array,
    eps: float = 1e-8,
    normalisation: Normalisation = "joint",
    prompt_ids: Sequence[int] | Array | None = None,
) -> Array:
    """Return (x - mean x) / sqrt(var x + eps) over the tokens of a prompt, (N,) -> (N,); see ``gtpo.normalize``.

    A prompt whose completions all succeeded, or all failed, gets 0: only entropy would remain.
    ``prompt_ids`` (N,) are those of the tokens; without them all share one. ``normalisation``
    "separate" is the paper's, which ignores the outcome. Raises UserError.
    """
    refuse_unlike(shaped_rewards=shaped_rewards, is_positive=is_positive)
    success = np.asarray(is_positive) != 0
    outcome = Rewards.of(success.astype(float), prompt_ids)
    a = normalize(values_of(shaped_rewards), success, outcome.group, normalisation, eps)
    return like(shaped_rewards, np.where(outcome.uniform, 0.0, a))


def gtpo_loss(
    old_logprobs: Array,
    new_logprobs: Array,
    rewards: Array,
    token_entropies: Array,
    episode_lengths: Lengths,
    alpha_1: float = 1.0,
    alpha_2: float = 0.1,
    clip_epsilon: float = 0.2,
    reward_threshold: float = 0.5,
    eps: float = 1e-8,
    prompt_ids: Sequence[int] | Array | None = None,
) -> Array:
    """Return ``policy_loss`` of the shaped and normalised rewards, bounds 1 -+ ``clip_epsilon``; 0 without tokens."""
    settings = {"alpha_1": alpha_1, "alpha_2": alpha_2, "reward_threshold": reward_threshold, "eps": eps}
    shaped, success = compute_gtpo_shaped_rewards(
        rewards, token_entropies, episode_lengths, prompt_ids=prompt_ids, **settings
    )
    row, _ = row_and_position(episode_lengths, token_entropies.size)
    of_tokens = None if prompt_ids is None else np.asarray(prompt_ids)[row]
    advantages = normalize_gtpo_advantages(shaped, success, eps, prompt_ids=of_tokens)
    return policy_loss(old_logprobs, new_logprobs, advantages, clip_ratio=clip_epsilon)


# ---- shared


@dataclass(frozen=True, slots=True, eq=False)
class FlatBatch:
    """The part of a batch that ``policy_objective`` reads."""

    logprobs: Array  # (B, T), of the policy that sampled
    advantages: Array  # (B, T) or (B, 1)
    weights: Array  # (B, T), 0 where there is no token


def clip_range(both: float | None, low: float, high: float) -> Clip:
    """Return the range [1 - low, 1 + high], or one with the bound ``both`` on either side."""
    return Clip(low, high) if both is None else Clip(both, both)
