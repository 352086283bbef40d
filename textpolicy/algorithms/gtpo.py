"""GTPO and GRPO-S (arXiv:2508.04349): a prompt's reward is shared out over tokens, or completions, by exact entropy."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Literal, get_args

import numpy as np

from ..errors import UserError, unknown_name
from .credit import Credit, row_mean
from .rewards import Rewards
from .top_entropy import exact_entropy

Normalisation = Literal["joint", "separate"]


@dataclass(frozen=True, slots=True)
class ShapeByEntropy:
    """A_t <- ``normalize(shaped_rewards)``, in place of the baseline's advantage.

    A group whose rewards all agree, or that failed throughout, gets 0: its shaped rewards differ by
    entropy alone. So does an unscorable completion, which no sum counts either. ``normalisation``
    "joint" tells success from failure; "separate" is the paper's, for replication.
    """

    alpha_1: float = 1.0  # of the outcome
    alpha_2: float = 0.1  # of the entropy
    reward_threshold: float = 0.5  # a reward above it is a success
    normalisation: Normalisation = "joint"

    def __post_init__(self) -> None:
        for name, value in (("alpha_1", self.alpha_1), ("alpha_2", self.alpha_2)):
            if not 0 <= value < np.inf:
                raise UserError(f"{name} is {value}; set it to 0 or more")
        if self.normalisation not in get_args(Normalisation):
            raise unknown_name("normalisation", self.normalisation, get_args(Normalisation))

    def __call__(self, credit: Credit) -> Credit:
        entropy = exact_entropy(credit, "gtpo_paper", "the recipe gtpo with uncertainty = 'surprisal'")
        kept = self._informative(credit)[credit.row]
        row = credit.row[kept]
        shaped = shaped_rewards(
            entropy[kept], row, credit.position[kept], credit.reward, credit.group,
            alpha_1=self.alpha_1, alpha_2=self.alpha_2, reward_threshold=self.reward_threshold,
        )  # fmt: skip
        success = credit.reward > self.reward_threshold
        advantage = np.zeros_like(credit.advantage)
        advantage[kept] = normalize(shaped, success[row], credit.group[row], self.normalisation)
        return replace(credit, advantage=advantage)

    def _informative(self, credit: Credit) -> np.ndarray:
        """(B,) bool: scored, in a group whose outcomes, all failures being one, differ."""
        outcomes = Rewards(np.maximum(credit.reward, self.reward_threshold), credit.group)
        return outcomes.scored & ~outcomes.uniform


def shaped_rewards(
    entropy: np.ndarray,
    row: np.ndarray,
    position: np.ndarray,
    reward: np.ndarray,
    group: np.ndarray,
    *,
    alpha_1: float = 1.0,
    alpha_2: float = 0.1,
    reward_threshold: float = 0.5,
    eps: float = 1e-8,
) -> np.ndarray:
    """The token rewards of eq. 3 and 5, (N,).

    O+_t are the completions of the prompt with a reward above the threshold that are longer than t,
    O-_t the others that are; d_t and h_t count them:

        i in O+:  alpha_1 r_i + alpha_2 d_t H_it / sum_{k in O+_t} H_kt
        j in O-: -alpha_1     - alpha_2 h_t (1/H_jt) / sum_{k in O-_t} (1/H_kt)

    ``entropy`` (N,) is H in nats, of the policy that sampled; ``row`` (N,) each token's completion,
    ``position`` (N,) its place there; ``reward`` (B,) without NaN where a token is, ``group`` (B,) the
    prompt. Where all H of O+_t are 0 they share nothing. alpha_1 + alpha_2 = 1 keeps the mean reward of
    O+ (proposition 2.2).
    """
    success = reward > reward_threshold
    h = np.maximum(entropy, 0.0)  # rounding in the engine may leave -1e-8
    part = np.where(success[row], h, 1 / (h + eps))
    cell = _cells(row, position, success, group)
    share = part / np.maximum(np.bincount(cell, part), eps)[cell] * np.bincount(cell)[cell]
    outcome = alpha_1 * np.where(success, reward, -1.0)
    return outcome[row] + alpha_2 * np.where(success, 1.0, -1.0)[row] * share


def live_counts(
    row: np.ndarray, position: np.ndarray, reward: np.ndarray, group: np.ndarray, reward_threshold: float = 0.5
) -> np.ndarray:
    """(N,) int: d_t at a token of a success, h_t at one of a failure; arguments as in ``shaped_rewards``."""
    cell = _cells(row, position, reward > reward_threshold, group)
    return np.bincount(cell)[cell]


def sequence_rewards(
    entropy: np.ndarray,
    row: np.ndarray,
    reward: np.ndarray,
    group: np.ndarray,
    *,
    beta_1: float = 1.0,
    beta_2: float = 0.1,
    reward_threshold: float = 0.5,
    eps: float = 1e-8,
) -> np.ndarray:
    """GRPO-S: the shaped reward of each completion, (B,), 0 for one without tokens.

    The formulas of ``shaped_rewards`` with the mean of a completion's entropies, at least ``eps``, in
    place of H_it and whole completions counted. It goes with ``Surrogate(ratio="sequence-mean")``.
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
    shaped: np.ndarray,
    success: np.ndarray,
    group: np.ndarray,
    normalisation: Normalisation = "joint",
    eps: float = 1e-8,
) -> np.ndarray:
    """(x - mean x) / sqrt(var x + eps), with the population variance, over each group's tokens; (N,) -> (N,).

    ``success`` (N,) bool and ``group`` (N,) int are those of the token's completion. "joint" takes one mean
    per group, so success stays above failure unless alpha_2 is large. "separate", eq. 6, takes one for
    successes and one for failures: with 0/1 rewards both alphas then cancel, each side sums to 0, and
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
    return x / np.sqrt(np.bincount(part, x * x) / count + eps)[part]


def _cells(row: np.ndarray, position: np.ndarray, success: np.ndarray, group: np.ndarray) -> np.ndarray:
    """(N,) int: tokens of one group, one outcome and one position share a number."""
    return (2 * group + success)[row] * (position.max(initial=-1) + 1) + position
