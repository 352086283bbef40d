"""How many runs or answers a comparison needs, and what the ones at hand can show.

Sizes are real numbers: round them up. All tests are two-sided.
"""

from __future__ import annotations

import warnings
from math import isnan, sqrt
from typing import Any

from ..errors import UserError
from ._inputs import refuse_unless_share, statsmodels

# Looking after every run and stopping at p <= 0.05 finds an effect more often than once in 20 where there is none.
STOPPING_RULE = "fix n in advance or use alpha spending; no optional stopping"


# ---- runs: effects in standard deviations


def power_of_pairs(dz: float, pairs: float, *, alpha: float = 0.05) -> float:
    """The chance that a paired t-test on ``pairs`` seeds finds ``dz`` SD of the differences (statsmodels TTestPower).

    Raises UserError.
    """
    _refuse_levels(alpha)
    _refuse_few_runs("pairs", pairs)
    return _power(_pairs().power(dz, pairs, alpha), dz)


def power_of_runs(d: float, per_arm: float, *, alpha: float = 0.05) -> float:
    """The chance that a t-test on ``per_arm`` runs in each arm finds ``d`` SD (statsmodels TTestIndPower).

    Raises UserError.
    """
    _refuse_levels(alpha)
    _refuse_few_runs("per_arm", per_arm)
    return _power(_arms().power(d, per_arm, alpha), d)


def pairs_needed(dz: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Paired seeds for a t-test to find ``dz`` SD of the differences, at least 2. Raises UserError."""
    _refuse_levels(alpha, power)
    _refuse_no_effect(dz)
    return _size(_pairs(), "nobs", abs(dz), alpha, power)


def runs_needed_per_arm(d: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Runs in each arm for a t-test to find ``d`` SD, at least 2. Raises UserError."""
    _refuse_levels(alpha, power)
    _refuse_no_effect(d)
    return _size(_arms(), "nobs1", abs(d), alpha, power)


def runs_needed_per_arm_normal(d: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """2 ((z_{1-alpha/2} + z_power) / d)^2 (statsmodels normal_sample_size_one_tail), too few where runs are few.

    To compare with reports that use it. Raises UserError.
    """
    _refuse_levels(alpha, power)
    _refuse_no_effect(d)
    return float(statsmodels("power").normal_sample_size_one_tail(abs(d), power, alpha / 2, sqrt(2), sqrt(2)))


def detectable_with_pairs(pairs: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """The effect that ``pairs`` seeds find with ``power``, in SD of the differences. Raises UserError."""
    _refuse_levels(alpha, power)
    _refuse_few_runs("pairs", pairs)
    return _solved(_pairs(), "effect_size", {"nobs": pairs, "alpha": alpha}, power)


def detectable_with_runs(per_arm: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """The effect that ``per_arm`` runs in each arm find with ``power``, in SD. Raises UserError."""
    _refuse_levels(alpha, power)
    _refuse_few_runs("per_arm", per_arm)
    return _solved(_arms(), "effect_size", {"nobs1": per_arm, "alpha": alpha}, power)


# ---- rates of independent answers


def cohens_h(p1: float, p2: float) -> float:
    """h = 2 asin sqrt(p2) - 2 asin sqrt(p1) (statsmodels proportion_effectsize; Cohen 1988). Raises UserError."""
    for what, p in (("p1", p1), ("p2", p2)):
        if not 0 <= p <= 1:
            raise UserError(f"{what} is {p}; set it from 0 to 1")
    return float(statsmodels("proportion").proportion_effectsize(p2, p1))


def answers_needed_per_arm(p1: float, p2: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Independent answers in each arm to tell rate ``p1`` from ``p2``, by Cohen's h (statsmodels NormalIndPower).

    At least 2. Multiply by ``design_effect`` where several answers share a problem. Raises UserError.
    """
    _refuse_levels(alpha, power)
    h = cohens_h(p1, p2)
    _refuse_no_effect(h)
    return _size(statsmodels("power").NormalIndPower(), "nobs1", abs(h), alpha, power)


def answers_needed_per_arm_pooled_z(p1: float, p2: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """As ``answers_needed_per_arm``, for ``pooled_z_test`` (statsmodels samplesize_proportions_2indep_onetail).

    Raises UserError.
    """
    _refuse_levels(alpha, power)
    refuse_unless_share("p1", p1)
    refuse_unless_share("p2", p2)
    _refuse_no_effect(p2 - p1)
    size = statsmodels("proportion").samplesize_proportions_2indep_onetail
    return float(size(abs(p2 - p1), min(p1, p2), power, alpha=alpha))


# ---- clusters


def design_effect(cluster: float, icc: float) -> float:
    """1 + (m - 1) ICC for m answers per problem or run (Kish 1965): the factor on a sample size. Raises UserError."""
    if cluster < 1 or not 0 <= icc <= 1:
        raise UserError(f"the cluster size is {cluster} and icc {icc}; set them to at least 1 and from 0 to 1")
    return 1 + (cluster - 1) * icc


def effective_answers(n: float, cluster: float, icc: float) -> float:
    """n / design_effect: the independent answers that n clustered ones are worth. Raises UserError."""
    return n / design_effect(cluster, icc)


# ---- statsmodels' solver


def _pairs() -> Any:
    return statsmodels("power").TTestPower()


def _arms() -> Any:
    return statsmodels("power").TTestIndPower()


def _size(test: Any, unknown: str, effect: float, alpha: float, wanted: float) -> float:
    """How many it takes, or 2 where 2 give more power than is wanted."""
    given = {"effect_size": effect, "alpha": alpha}
    return 2.0 if test.power(**given, **{unknown: 2}) >= wanted else _solved(test, unknown, given, wanted)


def _solved(test: Any, unknown: str, given: dict[str, float], wanted: float) -> float:
    """The ``unknown`` that gives the wanted power, tried out: where it fails, statsmodels may return its start."""
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")  # what it says when it fails; the next line finds out
        x = float(test.solve_power(power=wanted, **given))
    if not abs(test.power(**given, **{unknown: x}) - wanted) < 1e-3:
        raise UserError(f"no {unknown} is found that gives power {wanted} with {given}; choose a less extreme setting")
    return x


def _power(power: float, effect: float) -> float:
    if isnan(power):
        raise UserError(f"the power to find {effect} SD is beyond floating point; give a smaller effect")
    return float(power)


def _refuse_levels(alpha: float, power: float = 0.8) -> None:
    refuse_unless_share("alpha", alpha)
    refuse_unless_share("power", power)
    if power <= alpha:
        raise UserError(f"power is {power} with alpha {alpha}; set it above alpha, which no effect at all reaches")


def _refuse_no_effect(effect: float) -> None:
    if not abs(effect) > 0:
        raise UserError(f"the effect is {effect}, which no number of runs can find; give the smallest one that matters")


def _refuse_few_runs(what: str, n: float) -> None:
    if n < 2:
        raise UserError(f"{what} is {n}; a t-test needs at least 2")
