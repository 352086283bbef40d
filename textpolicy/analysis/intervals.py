"""The intervals and standard errors: bootstrap over runs, rates and their difference, answers clustered by problem."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from ..errors import UserError
from ._inputs import (
    Numbers,
    differences,
    refuse_counts,
    refuse_unless_known,
    refuse_unless_share,
    sample,
    statsmodels,
    varies,
)
from .permutation import mean_difference

BootstrapMethod = Literal["percentile", "basic", "BCa"]
RATE_METHODS = ("wilson", "beta", "jeffreys", "agresti_coull", "normal")
RATE_DIFFERENCE_METHODS = {"newcombe": "newcomb", "agresti-caffo": "agresti-caffo", "wald": "wald"}  # to statsmodels'
MOST_EXHAUSTIVE = 7  # runs: 7^7 resamples are 824 thousand


@dataclass(frozen=True, slots=True)
class Interval:
    """The estimate of a rate or a difference, with its interval."""

    estimate: float
    low: float
    high: float


@dataclass(frozen=True, slots=True)
class Bootstrap:
    """The mean, or a difference of means, over runs with its bootstrap interval, in the units of the runs."""

    estimate: float
    low: float
    high: float
    se: float
    resamples: int


@dataclass(frozen=True, slots=True)
class ClusteredDifference:
    """The mean of b - a over runs and problems, with the standard errors of three views of the same answers."""

    mean: float
    per_run: tuple[float, ...]
    se_by_problem: float  # the problems are a sample, the runs are given
    se_by_run: float  # the runs are a sample, the problems are given
    se_iid: float  # every answer independent, unpaired: for comparison only


# ---- means over runs


def bootstrap_mean(
    values: Numbers,
    *,
    level: float = 0.95,
    method: BootstrapMethod = "BCa",
    resamples: int = 9999,
    rng: int | np.random.Generator = 0,
) -> Bootstrap:
    """Resample (n,) runs for an interval of their mean (scipy.stats.bootstrap). Raises UserError.

    BCa needs runs that vary. With fewer than about ten runs every bootstrap interval is too short.
    """
    return _bootstrap((sample("values", values),), np.mean, level, method, resamples, rng)


def bootstrap_difference(
    baseline: Numbers,
    candidate: Numbers,
    *,
    paired: bool,
    level: float = 0.95,
    method: BootstrapMethod = "BCa",
    resamples: int = 9999,
    rng: int | np.random.Generator = 0,
) -> Bootstrap:
    """Resample mean(candidate) - mean(baseline): pairs of one seed, or each arm by itself.

    Raises UserError.
    """
    if paired:
        return _bootstrap((differences(baseline, candidate),), np.mean, level, method, resamples, rng)
    arms = (sample("baseline", baseline), sample("candidate", candidate))
    return _bootstrap(arms, mean_difference, level, method, resamples, rng)


def bootstrap_exhaustive(values: Numbers, *, level: float = 0.95) -> Bootstrap:
    """Enumerate the percentile bootstrap of the mean of (n,) runs: all n^n resamples, n <= 7. Raises UserError."""
    refuse_unless_share("level", level)
    x = sample("values", values)
    if len(x) > MOST_EXHAUSTIVE:
        raise UserError(f"{len(x)} runs have {len(x)}^{len(x)} resamples; use bootstrap_mean above {MOST_EXHAUSTIVE}")
    draws = np.indices((len(x),) * len(x)).reshape(len(x), -1)  # (n, n^n) which run each draw takes
    means = x[draws].mean(axis=0)  # (n^n,)
    low, high = np.quantile(means, [(1 - level) / 2, (1 + level) / 2])
    return Bootstrap(float(x.mean()), float(low), float(high), float(means.std()), len(means))


def bootstrap_standard_error(values: Numbers) -> float:
    """Return SD(x) / sqrt(n), with n in the SD: the limit of the bootstrap s.e. of a mean of (n,) runs.

    Raises UserError.
    """
    return float(stats.sem(sample("values", values), ddof=0))


def _bootstrap(arms: tuple[np.ndarray, ...], statistic: Any, level: float, method: str, n: int, rng: Any) -> Bootstrap:
    """Check the settings and resample the ``arms`` with scipy. Raises UserError."""
    refuse_unless_known("bootstrap method", method, ("percentile", "basic", "BCa"))
    refuse_unless_share("level", level)
    if n < 100:
        raise UserError(f"resamples is {n}, too few to place an end of the interval; set it to 9999")
    if method == "BCa" and not any(map(varies, arms)):
        raise UserError('the runs are all alike, which leaves BCa undefined; use method="percentile"')
    found = stats.bootstrap(arms, statistic, confidence_level=level, method=method, n_resamples=n, rng=rng)
    low, high = map(float, found.confidence_interval)
    return Bootstrap(float(statistic(*arms, axis=-1)), low, high, float(found.standard_error), n)


# ---- rates of independent answers


def rate_interval(correct: int, total: int, *, alpha: float = 0.05, method: str = "wilson") -> Interval:
    """Return the 1 - alpha interval of one rate (statsmodels proportion_confint); ``method`` is one of RATE_METHODS.

    "beta" is Clopper-Pearson; "normal" (Wald) has no width at 0 and at all correct. Raises UserError.
    """
    refuse_unless_known("rate interval", method, RATE_METHODS)
    refuse_unless_share("alpha", alpha)
    refuse_counts(correct, total)
    low, high = statsmodels("proportion").proportion_confint(correct, total, alpha, method)
    return Interval(correct / total, float(low), float(high))


def rate_difference_interval(
    correct_a: int, total_a: int, correct_b: int, total_b: int, *, alpha: float = 0.05, method: str = "newcombe"
) -> Interval:
    """Return the 1 - alpha interval of rate b - rate a, independent (statsmodels confint_proportions_2indep).

    ``method`` is one of RATE_DIFFERENCE_METHODS; "wald" has no width where both rates are 0 or 1.
    Raises UserError.
    """
    refuse_unless_known("rate difference interval", method, RATE_DIFFERENCE_METHODS)
    refuse_unless_share("alpha", alpha)
    refuse_counts(correct_a, total_a)
    refuse_counts(correct_b, total_b)
    low, high = statsmodels("proportion").confint_proportions_2indep(
        correct_b, total_b, correct_a, total_a, method=RATE_DIFFERENCE_METHODS[method], compare="diff", alpha=alpha
    )
    return Interval(correct_b / total_b - correct_a / total_a, float(low), float(high))


# ---- answers clustered by problem


def clustered_difference(a: np.ndarray, b: np.ndarray) -> ClusteredDifference:
    """Average b - a of (S, P) scores: S runs of the same seeds on the same P problems, S and P at least 2.

    se_by_problem = SD_p(mean_s(b - a)) / sqrt(P), clustered and paired (arXiv:2411.00640), with P - 1 in the SD.
    se_iid = sqrt((var a + var b) / (S P)). Raises UserError.
    """
    a, b = _scores("a", a), _scores("b", b)
    if a.shape != b.shape:
        raise UserError(f"a has shape {a.shape} and b {b.shape}; give both arms the same runs and problems")
    d = b - a  # (S, P)
    return ClusteredDifference(
        mean=float(d.mean()),
        per_run=tuple(map(float, d.mean(axis=1))),
        se_by_problem=float(stats.sem(d.mean(axis=0))),
        se_by_run=float(stats.sem(d.mean(axis=1))),
        se_iid=float(np.sqrt((a.var() + b.var()) / d.size)),
    )


def observed_design_effect(scores: np.ndarray) -> float:
    """Return how many times the variance of a mean of (S, P) scores is that of S P independent answers.

    That is the square of the s.e. clustered by problem over the s.e. of independent answers; the scores must vary.
    Raises UserError.
    """
    x = _scores("scores", scores)
    if not x.var():
        raise UserError(f"every score is {x[0, 0]}, which leaves the design effect undefined; give scores that vary")
    return float(stats.sem(x.mean(axis=0)) ** 2 / (x.var() / x.size))


def cluster_design_effect(clusters: Sequence[Sequence[bool]]) -> float:
    """Return the variance of cluster means over that of as many independent answers, at least 1.

    s^2 of the (K,) means / (p (1 - p) / m), with m the mean size of a cluster (Kish 1965); 1 where nothing varies.
    """
    means = np.array([np.mean(c) for c in clusters])
    p, m = float(np.mean([x for c in clusters for x in c])), float(np.mean([len(c) for c in clusters]))
    if len(means) < 2 or not 0 < p < 1:
        return 1.0
    return max(1.0, float(means.var(ddof=1) / (p * (1 - p) / m)))


def _scores(what: str, values: np.ndarray) -> np.ndarray:
    """Return (runs, problems) float64. Raises UserError for another shape."""
    x = np.asarray(values, np.float64)
    if x.ndim != 2 or min(x.shape) < 2 or not np.isfinite(x).all():
        raise UserError(f"{what} has shape {x.shape}; give finite scores as (runs, problems), at least two of each")
    return x
