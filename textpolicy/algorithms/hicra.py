"""Give planning tokens more credit for success and less blame for failure: HICRA (arXiv:2509.03646)."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..errors import refuse_outside
from ..losses import Array
from ..types import Bools, Floats, Ints
from .arrays import like, refuse_unlike, values_of
from .credit import Credit, row_mean
from .selection import Lengths, row_and_position
from .top_entropy import entropy_threshold, exact_entropy


@dataclass(frozen=True, slots=True)
class AmplifyPlanning:
    """Set A_t <- A_t + alpha |A_t| on planning tokens, alpha being ``hicra_alpha``; see ``amplify``.

    ``hicra_top_entropy`` above 0 also amplifies that share of tokens, as ``reported_selection`` does
    with 0.3. That is unverified, so the default is off.
    """

    hicra_alpha: float = 0.2
    hicra_top_entropy: float = 0.0

    def __post_init__(self) -> None:
        refuse_outside("hicra_alpha", self.hicra_alpha)
        refuse_outside("hicra_top_entropy", self.hicra_top_entropy, 0, 1)

    def __call__(self, credit: Credit) -> Credit:
        selected = credit.planning
        if self.hicra_top_entropy:
            entropy = exact_entropy(credit, "hicra_top_entropy", "set it to 0")
            selected = reported_selection(selected, entropy, credit.advantage, credit.row, self.hicra_top_entropy)
        return replace(credit, advantage=amplify(credit.advantage, selected, self.hicra_alpha))


@dataclass(frozen=True, slots=True)
class BoostPlanning:
    """Set H_t <- H_t + gamma mean H on planning tokens, gamma being ``hicra_gamma``; see ``boost_entropy``.

    Before ``ShapeByEntropy`` it gives planning tokens more of GTPO's entropy bonus and less of its blame.
    """

    hicra_gamma: float = 0.3

    def __post_init__(self) -> None:
        refuse_outside("hicra_gamma", self.hicra_gamma)

    def __call__(self, credit: Credit) -> Credit:
        entropy = exact_entropy(credit, "boosting planning tokens")
        return replace(credit, entropy=boost_entropy(entropy, credit.planning, credit.row, self.hicra_gamma))


def amplify(advantage: Floats, planning: Bools, alpha: float = 0.2) -> Floats:
    """Return A_t + alpha |A_t| m_t, with m (N,) bool True on planning tokens; (N,) -> (N,).

    The factor is 1 + alpha where A > 0 and 1 - alpha where A < 0: alpha < 1 keeps every sign,
    alpha = 1 silences the planning tokens of failures, alpha > 1 rewards them. Raises UserError for a
    negative alpha. The paper uses 0.2 on A = r - mean r, without a standard deviation.
    """
    refuse_outside("alpha", alpha)
    return advantage + alpha * np.abs(advantage) * planning


def boost_entropy(entropy: Floats, planning: Bools, row: Ints, gamma: float = 0.3) -> Floats:
    """Return H_t + gamma mean(H) m_t in nats, the mean per completion; (N,) -> (N,). It is not in the paper.

    Raises UserError for a negative gamma.
    """
    refuse_outside("gamma", gamma)
    mean = row_mean(entropy, row, row.max(initial=-1) + 1)
    return entropy + gamma * mean[row] * planning


def reported_selection(planning: Bools, entropy: Floats, advantage: Floats, row: Ints, share: float = 0.3) -> Bools:
    """Return planning tokens and the uncertain tokens of long successes, as a port of HICRA selects; (N,) bool.

    A token is uncertain if it is among the ``share`` of highest entropies (N,) in the batch. A long
    success has A > 0 and more tokens than the average completion of the batch. A third-party port
    reports this selection of the authors' unpublished code; we could not verify it.
    """
    length = np.bincount(row)
    long: Bools = (length > length[length > 0].mean())[row] if len(row) else np.zeros(0, bool)
    uncertain = entropy >= entropy_threshold(entropy, share)
    return planning | (uncertain & long & (advantage > 0))


# ---- the same over arrays of NumPy or MLX, under their documented names


def apply_hicra_amplification(advantages: Array, planning_mask: Array, alpha: float = 0.2) -> Array:
    """Apply ``amplify`` to (N,) advantages with an (N,) mask of 0 and 1, constant in the gradient. Raises UserError."""
    refuse_unlike(advantages=advantages, planning_mask=planning_mask)
    return like(advantages, amplify(values_of(advantages), np.asarray(planning_mask) != 0, alpha))


def boost_entropy_with_planning(
    token_entropies: Array, planning_mask: Array, gamma: float = 0.3, episode_lengths: Lengths | None = None
) -> Array:
    """Apply ``boost_entropy`` to (N,) entropies with an (N,) mask, constant in the gradient. Raises UserError.

    Without ``episode_lengths`` all tokens are one completion.
    """
    refuse_unlike(token_entropies=token_entropies, planning_mask=planning_mask)
    count = token_entropies.size
    row, _ = row_and_position([count] if episode_lengths is None else episode_lengths, count)
    boosted = boost_entropy(values_of(token_entropies), np.asarray(planning_mask) != 0, row, gamma)
    return like(token_entropies, boosted)
