"""Weigh tokens by uncertainty, GTPO's multiplicative form: a more uncertain token takes more credit."""

from __future__ import annotations

from dataclasses import dataclass, replace

import numpy as np

from ..errors import refuse_outside
from ..types import Floats, Ints
from .credit import Credit, row_mean


@dataclass(frozen=True, slots=True)
class WeightByUncertainty:
    """Set A_t <- w_t A_t, with the weights of ``uncertainty_weights``."""

    entropy_beta: float = 0.1

    def __post_init__(self) -> None:
        refuse_outside("entropy_beta", self.entropy_beta)

    def __call__(self, credit: Credit) -> Credit:
        weights = uncertainty_weights(credit.uncertainty, credit.row, self.entropy_beta)
        return replace(credit, advantage=weights * credit.advantage)


def uncertainty_weights(uncertainty: Floats, row: Ints, beta: float = 0.1) -> Floats:
    """Return w_t = max(0, 1 + beta (S_t / (mean S + 1e-8) - 1)), the mean per completion; (N,) -> (N,).

    ``uncertainty`` (N,) is S in nats, ``row`` (N,) the completion of each token. A completion whose
    mean S is below 1e-7 has weights of 1. With beta <= 1 no weight reaches the bound of 0, and the
    weights of a completion have mean 1. Raises UserError for a negative beta.

    Surprisal and entropy are two algorithms, not two estimates of one. Because
    sum_y pi(y) (-log pi(y)) grad log pi(y) = grad H, weighting by the surprisal of the sampled token
    adds A beta / mean(S) grad H_t in expectation: an entropy bonus on completions with A > 0, a
    penalty where A < 0. Weighting by the entropy itself adds nothing in expectation. Either way the
    change is small: with CV = std S / mean S, cos(w, 1) = 1 / sqrt(1 + beta^2 CV^2), which at
    beta = 0.1 is 0.994 for CV = 1.1.
    """
    refuse_outside("beta", beta)
    mean = row_mean(uncertainty, row, row.max(initial=-1) + 1)[row]
    weights = np.maximum(0.0, 1 + beta * (uncertainty / (mean + 1e-8) - 1))
    return np.where(mean < 1e-7, 1.0, weights)
