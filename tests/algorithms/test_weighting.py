"""Weights by uncertainty: hand-worked values, a slow loop, and what a weight never does."""

import numpy as np
import pytest
from made_credit import make_credit, random_lengths

from textpolicy.algorithms.weighting import WeightByUncertainty, uncertainty_weights
from textpolicy.errors import UserError


def test_a_token_twice_as_uncertain_as_the_mean_gains_beta():
    credit = make_credit([3], advantage=[2.0, 2.0, 2.0], uncertainty=[1.0, 1.0, 4.0])
    assert WeightByUncertainty(0.5)(credit).advantage == pytest.approx([1.5, 1.5, 3.0], abs=1e-7)


def by_loop(uncertainty, row, beta):
    out = []
    for s, r in zip(uncertainty, row, strict=True):
        mine = [u for u, q in zip(uncertainty, row, strict=True) if q == r]
        mean = sum(mine) / len(mine)
        out.append(1.0 if mean < 1e-7 else max(0.0, 1 + beta * (s / (mean + 1e-8) - 1)))
    return out


@pytest.mark.parametrize("beta", [0.0, 0.1, 1.0, 2.5])
def test_every_completion_is_measured_by_its_own_mean(beta):
    rng = np.random.default_rng(3)
    credit = make_credit(random_lengths(rng))
    uncertainty = rng.exponential(size=len(credit.row))
    uncertainty[credit.row == 2] = 0.0
    weights = uncertainty_weights(uncertainty, credit.row, beta)
    assert weights == pytest.approx(by_loop(uncertainty, credit.row, beta), rel=1e-12)


def test_up_to_beta_1_no_weight_is_cut_off_and_a_completion_keeps_its_mean():
    uncertainty = np.array([0.0, 0.0, 0.0, 9.0])
    weights = uncertainty_weights(uncertainty, np.zeros(4, int), 1.0)
    assert weights.min() == 0.0
    assert weights.mean() == pytest.approx(1.0, abs=1e-7)


def test_beyond_beta_1_a_weight_stops_at_zero_and_never_turns_the_sign():
    credit = make_credit([4], advantage=[-1.0] * 4, uncertainty=[0.0, 0.0, 0.0, 9.0])
    assert WeightByUncertainty(3.0)(credit).advantage == pytest.approx([0, 0, 0, -10], abs=1e-6)


def test_a_certain_completion_and_beta_0_leave_every_weight_at_exactly_1():
    assert uncertainty_weights(np.zeros(3), np.zeros(3, int), 0.7).tolist() == [1.0] * 3
    assert uncertainty_weights(np.array([0.3, 7.0]), np.zeros(2, int), 0.0).tolist() == [1.0] * 2


def test_the_angle_to_uniform_weights_follows_from_the_coefficient_of_variation():
    uncertainty = np.random.default_rng(0).exponential(size=500)
    weights = uncertainty_weights(uncertainty, np.zeros(500, int), 0.1)
    cosine = weights.sum() / np.sqrt(500) / np.linalg.norm(weights)
    cv = uncertainty.std() / uncertainty.mean()
    assert cosine == pytest.approx(1 / np.sqrt(1 + 0.01 * cv**2), abs=1e-9)


def test_a_step_without_tokens_has_no_weights():
    assert uncertainty_weights(np.zeros(0), np.zeros(0, int)).shape == (0,)


@pytest.mark.parametrize("beta", [-0.1, np.nan, np.inf])
def test_a_beta_that_is_no_strength_is_refused(beta):
    with pytest.raises(UserError, match=r"entropy_beta is .*; set it to 0 or more"):
        WeightByUncertainty(beta)
    with pytest.raises(UserError, match="beta is"):
        uncertainty_weights(np.ones(1), np.zeros(1, int), beta)
