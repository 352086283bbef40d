"""HICRA (arXiv:2509.03646): planning tokens take more of the credit for success and less of the blame for failure."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..errors import UserError
from ..losses import Array
from .arrays import like, refuse_unlike, values_of
from .credit import Credit, row_mean
from .selection import Lengths, row_and_position
from .top_entropy import entropy_threshold, exact_entropy


@dataclass(frozen=True, slots=True)
class AmplifyPlanning:
    """A_t <- A_t + alpha |A_t| on planning tokens, alpha being ``hicra_alpha``; see ``amplify``.

    ``hicra_top_entropy`` above 0 also amplifies that share of tokens as ``reported_selection``
    does (0.3 there). It is unverified, so it is off.
    """

    hicra_alpha: float = 0.2
    hicra_top_entropy: float = 0.0

    def __post_init__(self) -> None:
        _refuse_negative("hicra_alpha", self.hicra_alpha)
        if not 0 <= self.hicra_top_entropy <= 1:
            raise UserError(f"hicra_top_entropy is {self.hicra_top_entropy}; set it from 0 (off) to 1")

    def __call__(self, credit: Credit) -> Credit:
        return replace(credit, advantage=amplify(credit.advantage, self._selected(credit), self.hicra_alpha))

    def _selected(self, credit: Credit) -> np.ndarray:
        if not self.hicra_top_entropy:
            return credit.planning
        entropy = exact_entropy(credit, "hicra_top_entropy", "set it to 0")
        return reported_selection(credit.planning, entropy, credit.advantage, credit.row, self.hicra_top_entropy)


@dataclass(frozen=True, slots=True)
class BoostPlanning:
    """H_t <- H_t + gamma mean H on planning tokens, gamma being ``hicra_gamma``; see ``boost_entropy``.

    Put before ``ShapeByEntropy``, it gives planning tokens more of GTPO's entropy bonus and less of its blame.
    """

    hicra_gamma: float = 0.3

    def __post_init__(self) -> None:
        _refuse_negative("hicra_gamma", self.hicra_gamma)

    def __call__(self, credit: Credit) -> Credit:
        entropy = exact_entropy(credit, "boosting planning tokens")
        return replace(credit, entropy=boost_entropy(entropy, credit.planning, credit.row, self.hicra_gamma))


def amplify(advantage: np.ndarray, planning: np.ndarray, alpha: float = 0.2) -> np.ndarray:
    """A_t + alpha |A_t| m_t, with m (N,) bool True on planning tokens; (N,) -> (N,).

    A factor of 1 + alpha where A > 0 and of 1 - alpha where A < 0: alpha < 1 keeps every sign,
    alpha = 1 silences the planning tokens of failures, alpha > 1 rewards them. Raises UserError for a
    negative alpha. The paper has 0.2 on A = r - mean r, without a standard deviation.
    """
    _refuse_negative("alpha", alpha)
    return advantage + alpha * np.abs(advantage) * planning


def boost_entropy(entropy: np.ndarray, planning: np.ndarray, row: np.ndarray, gamma: float = 0.3) -> np.ndarray:
    """H_t + gamma mean(H) m_t, nats, the mean over the completion; (N,) -> (N,). Not in the paper.

    Raises UserError for a negative gamma.
    """
    _refuse_negative("gamma", gamma)
    mean = row_mean(entropy, row, row.max(initial=-1) + 1)
    return entropy + gamma * mean[row] * planning


def reported_selection(
    planning: np.ndarray, entropy: np.ndarray, advantage: np.ndarray, row: np.ndarray, share: float = 0.3
) -> np.ndarray:
    """What the authors' code is said to amplify: planning tokens, and uncertain ones of long successes; (N,) bool.

    Uncertain: among the ``share`` of highest entropies (N,) in the batch. A long success has A > 0 and
    more tokens than the completions of the batch on average. A third-party port reports this of code
    that is not published; we could not verify it.
    """
    length = np.bincount(row)
    long = (length > length[length > 0].mean())[row] if len(row) else np.zeros(0, bool)
    uncertain = entropy >= entropy_threshold(entropy, share)
    return planning | (uncertain & long & (advantage > 0))


# ---- the same over arrays of NumPy or MLX, under their documented names


def apply_hicra_amplification(advantages: Array, planning_mask: Array, alpha: float = 0.2) -> Array:
    """``amplify`` of (N,) advantages by an (N,) mask of 0 and 1, constant in the gradient. Raises UserError."""
    refuse_unlike(advantages=advantages, planning_mask=planning_mask)
    return like(advantages, amplify(values_of(advantages), np.asarray(planning_mask) != 0, alpha))


def boost_entropy_with_planning(
    token_entropies: Array, planning_mask: Array, gamma: float = 0.3, episode_lengths: Lengths | None = None
) -> Array:
    """``boost_entropy`` of (N,) entropies by an (N,) mask; without ``episode_lengths`` all tokens are one completion.

    Constant in the gradient. Raises UserError.
    """
    refuse_unlike(token_entropies=token_entropies, planning_mask=planning_mask)
    count = token_entropies.size
    row, _ = row_and_position([count] if episode_lengths is None else episode_lengths, count)
    boosted = boost_entropy(values_of(token_entropies), np.asarray(planning_mask) != 0, row, gamma)
    return like(token_entropies, boosted)


def _refuse_negative(name: str, value: float) -> None:
    if not 0 <= value < np.inf:
        raise UserError(f"{name} is {value}; set it to 0 or more")
