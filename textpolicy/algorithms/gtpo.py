"""Share a prompt's reward out over tokens, or completions, by exact entropy: GTPO and GRPO-S (arXiv:2508.04349)."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from ..errors import refuse_outside, unknown_name
from ..types import Bools, Floats, Ints
from .credit import Credit, Rewards, row_mean
from .top_entropy import exact_entropy

Normalisation = Literal["joint", "separate"]


@dataclass(frozen=True, slots=True)
class ShapeByEntropy:
    """Set A_t <- ``normalize(shaped_rewards)``, in place of the baseline's advantage.

    A group whose rewards are all equal, or that failed throughout, gets 0: its shaped rewards differ by
    entropy alone. So does an unscored completion, which no sum includes either. ``normalisation``
    "joint" keeps success above failure; "separate" is the paper's, for replication.
    """

    alpha_1: float = 1.0  # of the outcome
    alpha_2: float = 0.1  # of the entropy
    reward_threshold: float = 0.5  # a reward above it is a success
    normalisation: Normalisation = "joint"

    def __post_init__(self) -> None:
        refuse_outside("alpha_1", self.alpha_1)
        refuse_outside("alpha_2", self.alpha_2)
        if self.normalisation not in get_args(Normalisation):
            raise unknown_name("normalisation", self.normalisation, get_args(Normalisation))

    def __call__(self, credit: Credit) -> Credit:
        entropy = exact_entropy(credit, "gtpo_paper", "the recipe gtpo with uncertainty = 'surprisal'")
        # a completion counts if it is scored and outcomes differ in its group, all failures being the same outcome
        outcomes = Rewards(np.maximum(credit.reward, self.reward_threshold), credit.group)
        kept = (outcomes.scored & ~outcomes.uniform)[credit.row]
        row = credit.row[kept]
        shaped = shaped_rewards(
            entropy[kept], row, credit.position[kept], credit.reward, credit.group,
            alpha_1=self.alpha_1, alpha_2=self.alpha_2, reward_threshold=self.reward_threshold,
        )  # fmt: skip
        success = credit.reward > self.reward_threshold
        advantage = np.zeros_like(credit.advantage)
        advantage[kept] = normalize(shaped, success[row], credit.group[row], self.normalisation)
        return replace(credit, advantage=advantage)


def shaped_rewards(
    entropy: Floats,
    row: Ints,
    position: Ints,
    reward: Floats,
    group: Ints,
    *,
    alpha_1: float = 1.0,
    alpha_2: float = 0.1,
    reward_threshold: float = 0.5,
    eps: float = 1e-8,
) -> Floats:
    """Return the token rewards of eq. 3 and 5, (N,).

    O+_t are the completions of the prompt with a reward above the threshold that are longer than t,
    O-_t the others that are longer; d_t and h_t are the numbers of them:

        i in O+:  alpha_1 r_i + alpha_2 d_t H_it / sum_{k in O+_t} H_kt
        j in O-: -alpha_1     - alpha_2 h_t (1/H_jt) / sum_{k in O-_t} (1/H_kt)

    ``entropy`` (N,) is H in nats, of the policy that sampled; ``row`` (N,) the completion of each token,
    ``position`` (N,) its place in it; ``reward`` (B,), not NaN for a completion with tokens; ``group`` (B,)
    the prompt. Where all H of O+_t are 0 they share nothing. alpha_1 + alpha_2 = 1 keeps the mean reward of
    O+ (proposition 2.2).
    """
    success = reward > reward_threshold
    h = np.maximum(entropy, 0.0)  # rounding in the engine may leave -1e-8
    part = np.where(success[row], h, 1 / (h + eps))
    cell = _cells(row, position, success, group)
    share = part / np.maximum(np.bincount(cell, part), eps)[cell] * np.bincount(cell)[cell]
    outcome = alpha_1 * np.where(success, reward, -1.0)
    return outcome[row] + alpha_2 * np.where(success, 1.0, -1.0)[row] * share


def live_counts(row: Ints, position: Ints, reward: Floats, group: Ints, reward_threshold: float = 0.5) -> Ints:
    """Return d_t at a token of a success and h_t at one of a failure, (N,) int; see ``shaped_rewards``."""
    cell = _cells(row, position, reward > reward_threshold, group)
    return np.bincount(cell)[cell]


def sequence_rewards(
    entropy: Floats,
    row: Ints,
    reward: Floats,
    group: Ints,
    *,
    beta_1: float = 1.0,
    beta_2: float = 0.1,
    reward_threshold: float = 0.5,
    eps: float = 1e-8,
) -> Floats:
    """Return the shaped reward of each completion for GRPO-S, (B,), 0 for one without tokens.

    The formulas are those of ``shaped_rewards``, with the mean of a completion's entropies, at least
    ``eps``, in place of H_it, and whole completions counted. Use ``Surrogate(ratio="sequence-mean")``.
    """
    live = np.unique(row)
    mean = np.maximum(row_mean(entropy, row, len(reward))[live], eps)
    shaped = np.zeros(len(reward))
    shaped[live] = shaped_rewards(
        mean, live, np.zeros_like(live), reward, group,
        alpha_1=beta_1, alpha_2=beta_2, reward_threshold=reward_threshold, eps=0.0,
    )  # fmt: skip
    return shaped


def normalize(
    shaped: Floats,
    success: Bools,
    group: Ints,
    normalisation: Normalisation = "joint",
    eps: float = 1e-8,
) -> Floats:
    """Return (x - mean x) / sqrt(var x + eps), with the population variance, over each group's tokens; (N,) -> (N,).

    ``success`` (N,) bool and ``group`` (N,) int are those of the token's completion. "joint" takes one mean
    per group, so success stays above failure unless alpha_2 is large. "separate", eq. 6, takes one mean of
    successes and one of failures: with 0/1 rewards both alphas then cancel, each side sums to 0, and
    advantages follow entropy whatever the outcome. Raises UserError for another name.
    """
    match normalisation:
        case "joint":
            part = group
        case "separate":
            part = 2 * group + success
        case _:
            raise unknown_name("normalisation", normalisation, get_args(Normalisation))
    count = np.maximum(np.bincount(part), 1)
    first = np.zeros(len(count))
    first[part] = shaped
    x = shaped - first[part]  # equal values become exactly 0, which a mean's rounding would not
    x = x - (np.bincount(part, x) / count)[part]
    normalised: Floats = x / np.sqrt(np.bincount(part, x * x) / count + eps)[part]
    return normalised


def _cells(row: Ints, position: Ints, success: Bools, group: Ints) -> Ints:
    """Return a number per token, (N,) int, equal for tokens of the same group, outcome and position."""
    positions = int(position.max(initial=-1)) + 1
    return (2 * group + success)[row] * positions + position
