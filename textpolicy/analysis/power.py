"""The runs or answers that a comparison needs, and the effects that a given number can detect.

Sizes are real numbers: round them up. All tests are two-sided.
"""

from __future__ import annotations

import warnings
from math import isnan, sqrt
from typing import Any

import numpy as np

from ..errors import UserError
from ._inputs import refuse_unless_share, statsmodels

# Testing after every run and stopping at p <= 0.05 finds an effect that does not exist more often than once in 20.
STOPPING_RULE = "fix n in advance or use alpha spending; no optional stopping"


# ---- runs: effects in standard deviations


def power_of_pairs(dz: float, pairs: float, *, alpha: float = 0.05) -> float:
    """Return the chance that a paired t-test on ``pairs`` seeds finds ``dz`` SD of the differences.

    statsmodels TTestPower. Raises UserError.
    """
    _refuse(alpha, pairs=pairs)
    return _power(statsmodels("power").TTestPower().power(dz, pairs, alpha), dz)


def power_of_runs(d: float, per_arm: float, *, alpha: float = 0.05) -> float:
    """Return the chance that a t-test on ``per_arm`` runs in each arm finds ``d`` SD (statsmodels TTestIndPower).

    Raises UserError.
    """
    _refuse(alpha, per_arm=per_arm)
    return _power(statsmodels("power").TTestIndPower().power(d, per_arm, alpha), d)


def pairs_needed(dz: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the paired seeds for a t-test to find ``dz`` SD of the differences, at least 2. Raises UserError."""
    _refuse(alpha, power, effect=dz)
    return _size(statsmodels("power").TTestPower(), "nobs", abs(dz), alpha, power)


def runs_needed_per_arm(d: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the runs in each arm for a t-test to find ``d`` SD, at least 2. Raises UserError."""
    _refuse(alpha, power, effect=d)
    return _size(statsmodels("power").TTestIndPower(), "nobs1", abs(d), alpha, power)


def runs_needed_per_arm_normal(d: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return 2 ((z_{1-alpha/2} + z_power) / d)^2 (statsmodels normal_sample_size_one_tail).

    Too few where runs are few; use it to compare with reports that do. Raises UserError.
    """
    _refuse(alpha, power, effect=d)
    return float(statsmodels("power").normal_sample_size_one_tail(abs(d), power, alpha / 2, sqrt(2), sqrt(2)))


def detectable_with_pairs(pairs: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the effect that ``pairs`` seeds find with ``power``, in SD of the differences. Raises UserError."""
    _refuse(alpha, power, pairs=pairs)
    return _solved(statsmodels("power").TTestPower(), "effect_size", {"nobs": pairs, "alpha": alpha}, power)


def detectable_with_runs(per_arm: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the effect that ``per_arm`` runs in each arm find with ``power``, in SD. Raises UserError."""
    _refuse(alpha, power, per_arm=per_arm)
    return _solved(statsmodels("power").TTestIndPower(), "effect_size", {"nobs1": per_arm, "alpha": alpha}, power)


# ---- rates of independent answers


def cohens_h(p1: float, p2: float) -> float:
    """Return h = 2 asin sqrt(p2) - 2 asin sqrt(p1) (statsmodels proportion_effectsize; Cohen 1988).

    Raises UserError.
    """
    for what, p in (("p1", p1), ("p2", p2)):
        if not 0 <= p <= 1:
            raise UserError(f"{what} is {p}; set it from 0 to 1")
    return float(statsmodels("proportion").proportion_effectsize(p2, p1))


def answers_needed_per_arm(p1: float, p2: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the independent answers in each arm to tell rate ``p1`` from ``p2``, by Cohen's h.

    statsmodels NormalIndPower; at least 2. Multiply by ``design_effect`` where several answers share a problem.
    Raises UserError.
    """
    h = cohens_h(p1, p2)
    _refuse(alpha, power, effect=h)
    return _size(statsmodels("power").NormalIndPower(), "nobs1", abs(h), alpha, power)


def answers_needed_per_arm_pooled_z(p1: float, p2: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the answers in each arm for ``pooled_z_test`` (statsmodels samplesize_proportions_2indep_onetail).

    Raises UserError.
    """
    refuse_unless_share("p1", p1)
    refuse_unless_share("p2", p2)
    _refuse(alpha, power, effect=p2 - p1)
    size = statsmodels("proportion").samplesize_proportions_2indep_onetail
    return float(size(abs(p2 - p1), min(p1, p2), power, alpha=alpha))


# ---- clusters


def design_effect(cluster: float, icc: float) -> float:
    """Return 1 + (m - 1) ICC for m answers per problem or run; multiply sizes by it (Kish 1965). Raises UserError."""
    if cluster < 1 or not 0 <= icc <= 1:
        raise UserError(f"the cluster size is {cluster} and icc {icc}; set them to at least 1 and from 0 to 1")
    return 1 + (cluster - 1) * icc


def effective_answers(n: float, cluster: float, icc: float) -> float:
    """Return n / design_effect, the independent answers that n clustered ones are worth. Raises UserError."""
    return n / design_effect(cluster, icc)


# ---- statsmodels' solver


def _size(test: Any, unknown: str, effect: float, alpha: float, wanted: float) -> float:
    """Return the size with the ``wanted`` power, or 2 where 2 give more. Raises UserError."""
    given = {"effect_size": effect, "alpha": alpha}
    return 2.0 if test.power(**given, **{unknown: 2}) >= wanted else _solved(test, unknown, given, wanted)


def _solved(test: Any, unknown: str, given: dict[str, float], wanted: float) -> float:
    """Return the ``unknown`` that gives the wanted power. Raises UserError.

    The result is checked: a solver that fails may return its start.
    """
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")  # failures are found by the check below
        x = float(test.solve_power(power=wanted, **given))
        if abs(test.power(**given, **{unknown: x}) - wanted) < 1e-3:
            return x
        if unknown == "effect_size":  # the power is NaN for some effects: interpolate between the others
            effects = np.arange(0.01, 32, 0.01)
            powers = test.power(effect_size=effects, **given)
            known = np.isfinite(powers)
            if powers[known].max(initial=0) >= wanted:
                return float(np.interp(wanted, powers[known], effects[known]))
    raise UserError(f"no {unknown} gives power {wanted} with {given}; choose a less extreme setting")


def _power(power: float, effect: float) -> float:
    """Return the power. Raises UserError where statsmodels' overflowed to NaN."""
    if isnan(power):
        raise UserError(f"the power to find {effect} SD is beyond floating point; give a smaller effect")
    return float(power)


def _refuse(alpha: float, power: float = 0.8, *, effect: float | None = None, **runs: float) -> None:
    """Raise UserError unless 0 < alpha < power < 1, the effect is not 0 and the runs are enough for a t-test."""
    refuse_unless_share("alpha", alpha)
    refuse_unless_share("power", power)
    if power <= alpha:
        raise UserError(f"power is {power} with alpha {alpha}; set it above alpha")
    if effect is not None and not abs(effect) > 0:
        raise UserError(f"the effect is {effect}, which no number of runs can find; give the smallest one that matters")
    for what, n in runs.items():
        if n < 2:
            raise UserError(f"{what} is {n}; a t-test needs at least 2")
