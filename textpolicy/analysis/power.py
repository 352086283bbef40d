"""The runs or answers that a comparison needs, and the effects that a given number can detect.

Sizes are real numbers: round them up. All tests are two-sided.
"""

from __future__ import annotations

import warnings
from collections.abc import Callable
from math import sqrt

import numpy as np
from scipy import stats
from scipy.optimize import brentq

from ..errors import UserError
from ._inputs import refuse_unless_share, statsmodels

# Testing after every run and stopping at p <= 0.05 finds an effect that does not exist more often than once in 20.
STOPPING_RULE = "fix n in advance or use alpha spending; no optional stopping"


# ---- runs: effects in standard deviations


def power_of_pairs(dz: float, pairs: float, *, alpha: float = 0.05) -> float:
    """Return the chance that a paired t-test on ``pairs`` seeds finds ``dz`` SD of differences. Raises UserError."""
    _refuse(alpha, pairs=pairs)
    return _power_of_t(abs(dz) * sqrt(pairs), float(pairs) - 1, alpha)


def power_of_runs(d: float, per_arm: float, *, alpha: float = 0.05) -> float:
    """Return the chance that Student's t-test on ``per_arm`` runs in each arm finds ``d`` SD. Raises UserError."""
    _refuse(alpha, per_arm=per_arm)
    return _power_of_t(abs(d) * sqrt(per_arm / 2), 2 * float(per_arm) - 2, alpha)


def pairs_needed(dz: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the paired seeds for a t-test to find ``dz`` SD of the differences, at least 2. Raises UserError."""
    _refuse(alpha, power, effect=dz)
    given = {"effect_size": abs(dz), "alpha": alpha}
    return _solved("TTestPower", "nobs", given, lambda pairs: power_of_pairs(dz, pairs, alpha=alpha), power)


def runs_needed_per_arm(d: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the runs in each arm for a t-test to find ``d`` SD, at least 2. Raises UserError."""
    _refuse(alpha, power, effect=d)
    given = {"effect_size": abs(d), "alpha": alpha}
    return _solved("TTestIndPower", "nobs1", given, lambda per_arm: power_of_runs(d, per_arm, alpha=alpha), power)


def runs_needed_per_arm_normal(d: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return 2 ((z_{1-alpha/2} + z_power) / d)^2 (statsmodels normal_sample_size_one_tail).

    Too few where runs are few; use it to compare with reports that do. Raises UserError.
    """
    _refuse(alpha, power, effect=d)
    return float(statsmodels("power").normal_sample_size_one_tail(abs(d), power, alpha / 2, sqrt(2), sqrt(2)))


def detectable_with_pairs(pairs: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the effect that ``pairs`` seeds find with ``power``, in SD of the differences. Raises UserError."""
    _refuse(alpha, power, pairs=pairs)
    given = {"nobs": pairs, "alpha": alpha}
    return _solved("TTestPower", "effect_size", given, lambda dz: power_of_pairs(dz, pairs, alpha=alpha), power, 0.0)


def detectable_with_runs(per_arm: float, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the effect that ``per_arm`` runs in each arm find with ``power``, in SD. Raises UserError."""
    _refuse(alpha, power, per_arm=per_arm)
    given = {"nobs1": per_arm, "alpha": alpha}
    return _solved("TTestIndPower", "effect_size", given, lambda d: power_of_runs(d, per_arm, alpha=alpha), power, 0.0)


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
    z, one = stats.norm.isf(alpha / 2), abs(h) / sqrt(2)  # the limit; the difference of one answer an arm, in its s.e.
    return _solved(
        "NormalIndPower",
        "nobs1",
        {"effect_size": abs(h), "alpha": alpha},
        lambda n: float(stats.norm.sf(z - one * sqrt(n)) + stats.norm.sf(z + one * sqrt(n))),
        power,
    )


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


# ---- the noncentral t, and solvers


def _power_of_t(shift: float, df: float, alpha: float) -> float:
    """Return P(|T| > t_{1-alpha/2}) of a noncentral T = (Z + shift) / sqrt(chi2 / df); ``shift`` is at least 0.

    T < -t needs Z < -shift: where scipy's chance of that is NaN, it is too small to count. With one degree of freedom
    scipy warns of a series that it ends within 0.001.
    """
    limit = stats.t.isf(alpha / 2, df)
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", RuntimeWarning)
        return float(stats.nct.sf(limit, df, shift) + np.nan_to_num(stats.nct.cdf(-limit, df, shift)))


def _solved(
    test: str,
    unknown: str,
    given: dict[str, float],
    power_of: Callable[[float], float],
    wanted: float,
    low: float = 2.0,
) -> float:
    """Return the ``unknown``, from ``low`` on, at which ``power_of`` it, which grows with it, is the ``wanted`` power.

    Solved by statsmodels' ``test``, and by bisection where its solver fails, which may return its start.
    """
    if power_of(low) >= wanted:
        return low
    with warnings.catch_warnings(record=True):
        warnings.simplefilter("always")  # a failure is found by the check below
        x = float(np.ravel(getattr(statsmodels("power"), test)().solve_power(power=wanted, **given))[0])
    if x > low and abs(power_of(x) - wanted) < 1e-6:
        return x
    high = max(2 * low, 1.0)
    while power_of(high) < wanted:
        low, high = high, 2 * high
    return float(brentq(lambda x: power_of(x) - wanted, low, high, xtol=1e-12, rtol=1e-12))


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
