"""The tests for the difference of two arms: rates, means over runs, ranks, and several tests at once.

The run (its seed) is the unit of analysis: every test takes one number per run, chosen before the runs were made.
Every test over runs is about candidate - baseline.
"""

from __future__ import annotations

import warnings
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Literal

import numpy as np
from scipy import stats

from ..errors import UserError
from ._inputs import (
    ALTERNATIVES,
    Alternative,
    Numbers,
    are_counts,
    differences,
    refuse_counts,
    refuse_unless_known,
    refuse_unless_share,
    sample,
    statsmodels,
    varies,
)

Table = Sequence[Sequence[int]]  # (2, 2): a row per arm, (correct, wrong)
RANK_METHODS = ("auto", "exact", "asymptotic")
CORRECTIONS = (
    *("bonferroni", "sidak", "holm", "holm-sidak", "simes-hochberg", "hommel"),  # any false rejection at most alpha
    *("fdr_bh", "fdr_by", "fdr_tsbh", "fdr_tsbky", "fdr_gbs"),  # share of false rejections at most alpha
)


@dataclass(frozen=True, slots=True)
class Outcome:
    """The statistic of a test and its p-value."""

    statistic: float
    p: float


@dataclass(frozen=True, slots=True)
class TTest:
    """The two-sided t-test on the difference of two means, and the interval of that difference."""

    t: float
    p: float
    df: float
    low: float  # in the units of the runs
    high: float


@dataclass(frozen=True, slots=True)
class Corrected:
    """The p-values of one family after a correction for their number."""

    reject: tuple[bool, ...]
    p: tuple[float, ...]  # adjusted


# ---- rates: two arms of independent answers, or one set of problems answered by both


def fisher_test(table: Table, alternative: Alternative = "two-sided") -> Outcome:
    """Run Fisher's exact test (scipy.stats.fisher_exact) with the sample odds ratio; conservative.

    ``alternative`` compares the first row with the second. Raises UserError.
    """
    refuse_unless_known("alternative", alternative, ALTERNATIVES)
    found = stats.fisher_exact(_counts(table), alternative)
    return Outcome(float(found.statistic), float(found.pvalue))


def barnard_test(table: Table, alternative: Alternative = "two-sided", *, mirrored: bool = True) -> Outcome:
    """Run Barnard's exact test (scipy.stats.barnard_exact) with its Wald statistic; more power than Fisher's.

    scipy may miss by rounding that the mirrored table, wrong for correct, is as extreme, and so return too
    small a two-sided p (scipy issue 18798): the larger p of both tables is taken, scipy's own with
    ``mirrored=False``. ``alternative`` as in ``fisher_test``; seconds from a thousand answers per arm on.
    Raises UserError.
    """
    refuse_unless_known("alternative", alternative, ALTERNATIVES)
    by_column = _counts(table).T  # scipy takes columns for arms
    found = stats.barnard_exact(by_column, alternative)
    p = float(found.pvalue)
    if alternative == "two-sided" and mirrored:
        p = max(p, float(stats.barnard_exact(np.flip(by_column, axis=0), alternative).pvalue))
    return Outcome(float(found.statistic), p)


def mcnemar_test(
    only_baseline: int, only_candidate: int, method: Literal["exact", "mid-p", "chi2"] = "exact"
) -> Outcome:
    """Run McNemar's test on the problems that exactly one of two models solved, one answer each; two-sided.

    "exact" is the binomial test on the smaller count (statsmodels mcnemar), "mid-p" counts ties with
    the observed split by half (Fagerland et al. 2013, doi:10.1186/1471-2288-13-91), "chi2" is the
    asymptotic test with continuity correction. Without such a problem p = 1. Raises UserError.
    """
    b, c = only_baseline, only_candidate
    refuse_unless_known("McNemar method", method, ("exact", "mid-p", "chi2"))
    if not are_counts([b, c]):
        raise UserError(f"the counts are {b} and {c}; give how many problems only one of the models solved")
    if b + c == 0:
        return Outcome(0.0, 1.0)
    found = statsmodels("contingency_tables").mcnemar([[0, b], [c, 0]], exact=method != "chi2", correction=True)
    as_extreme = sum(stats.binom.pmf(k, b + c, 0.5) for k in {b, c}) if method == "mid-p" else 0.0
    return Outcome(float(found.statistic), float(found.pvalue - as_extreme / 2))


def pooled_z_test(correct_a: int, total_a: int, correct_b: int, total_b: int) -> Outcome:
    """Test rate b - rate a with the pooled variance (statsmodels proportions_ztest), two-sided; for large counts.

    Arms that are both all wrong or all correct do not differ: z = 0, p = 1. Raises UserError.
    """
    refuse_counts(correct_a, total_a)
    refuse_counts(correct_b, total_b)
    if correct_a + correct_b in (0, total_a + total_b):
        return Outcome(0.0, 1.0)
    z, p = statsmodels("proportion").proportions_ztest([correct_b, correct_a], [total_b, total_a])
    return Outcome(float(z), float(p))


def _counts(table: Table) -> np.ndarray:
    """Return the (2, 2) counts. Raises UserError for anything else."""
    try:
        counts = np.asarray(table)
    except ValueError:  # rows of several lengths
        counts = np.empty(0)
    if counts.shape != (2, 2) or not are_counts(counts):
        raise UserError(f"the table is {table}; give counts as [[correct, wrong], [correct, wrong]], a row per arm")
    return counts.astype(np.int64)


# ---- means over runs


def student_test(baseline: Numbers, candidate: Numbers, level: float = 0.95) -> TTest:
    """Run Student's t-test on runs of different seeds, one variance for both arms (scipy.stats.ttest_ind).

    The arms are (n,) and (m,) runs. Raises UserError, also when no arm varies.
    """
    return _unpaired_test(baseline, candidate, level, equal_var=True)


def welch_test(baseline: Numbers, candidate: Numbers, level: float = 0.95) -> TTest:
    """Run Welch's t-test on runs of different seeds, a variance for each arm (scipy.stats.ttest_ind).

    The arms are (n,) and (m,) runs. Raises UserError, also when no arm varies.
    """
    return _unpaired_test(baseline, candidate, level, equal_var=False)


def paired_test(baseline: Numbers, candidate: Numbers, level: float = 0.95) -> TTest:
    """Run the paired t-test on (n,) runs of the same seeds in one order (scipy.stats.ttest_rel). Raises UserError."""
    refuse_unless_share("level", level)
    if not varies(differences(baseline, candidate)):
        raise UserError("every pair differs by the same amount, which leaves t undefined; use sign_flip_test")
    return _t_test(stats.ttest_rel(candidate, baseline), level)


def cohens_d(baseline: Numbers, candidate: Numbers) -> float:
    """Return d = (mean b - mean a) / s with s^2 = ((n-1) s_a^2 + (m-1) s_b^2) / (n+m-2), in pooled SD (Cohen 1988).

    Raises UserError, also when no arm varies.
    """
    a, b = _unpaired(baseline, candidate)
    n, m = len(a), len(b)
    s = np.sqrt(((n - 1) * a.var(ddof=1) + (m - 1) * b.var(ddof=1)) / (n + m - 2))
    return float((b.mean() - a.mean()) / s)


def cohens_dz(baseline: Numbers, candidate: Numbers) -> float:
    """Return d_z = mean(b - a) / SD(b - a) of paired runs, in SD of the differences (Cohen 1988). Raises UserError."""
    d = differences(baseline, candidate)
    if not varies(d):
        raise UserError("every pair differs by the same amount, which leaves d_z undefined; report the difference")
    return float(d.mean() / d.std(ddof=1))


def _unpaired_test(baseline: Numbers, candidate: Numbers, level: float, equal_var: bool) -> TTest:
    """Run the t-test of two independent arms. Raises UserError."""
    refuse_unless_share("level", level)
    a, b = _unpaired(baseline, candidate)
    with warnings.catch_warnings():
        warnings.filterwarnings("ignore", "Precision loss", RuntimeWarning)  # one arm may be constant
        return _t_test(stats.ttest_ind(b, a, equal_var=equal_var), level)


def _unpaired(baseline: Numbers, candidate: Numbers) -> tuple[np.ndarray, np.ndarray]:
    """Return both arms. Raises UserError where neither varies."""
    a, b = sample("baseline", baseline), sample("candidate", candidate)
    if not varies(a) and not varies(b):
        raise UserError(
            "the runs of each arm are all alike, which leaves t and d undefined; use label_permutation_test"
        )
    return a, b


def _t_test(found: Any, level: float) -> TTest:
    """Return scipy's result with its interval."""
    ci = found.confidence_interval(level)
    return TTest(float(found.statistic), float(found.pvalue), float(found.df), float(ci.low), float(ci.high))


# ---- ranks over runs


def mann_whitney_test(
    baseline: Numbers,
    candidate: Numbers,
    alternative: Alternative = "two-sided",
    method: Literal["auto", "exact", "asymptotic"] = "auto",
) -> Outcome:
    """Test Mann-Whitney's U of the candidate, on (n,) and (m,) runs of different seeds (scipy.stats.mannwhitneyu).

    "auto" is exact for few runs without ties. Raises UserError.
    """
    refuse_unless_known("alternative", alternative, ALTERNATIVES)
    refuse_unless_known("Mann-Whitney method", method, RANK_METHODS)
    a, b = sample("baseline", baseline, 1), sample("candidate", candidate, 1)
    found = stats.mannwhitneyu(b, a, alternative=alternative, method=method)
    return Outcome(float(found.statistic), float(found.pvalue))


def wilcoxon_test(
    baseline: Numbers,
    candidate: Numbers,
    alternative: Alternative = "two-sided",
    method: Literal["auto", "exact", "asymptotic"] = "auto",
) -> Outcome:
    """Test Wilcoxon's signed ranks on (n,) runs of the same seeds (scipy.stats.wilcoxon).

    Pairs without difference are left out; p = 1 if there are no others. Raises UserError.
    """
    refuse_unless_known("alternative", alternative, ALTERNATIVES)
    refuse_unless_known("Wilcoxon method", method, RANK_METHODS)
    d = differences(baseline, candidate, 1)
    if not d.any():
        return Outcome(0.0, 1.0)
    d = (d / np.abs(d).max()).round(12)  # equal differences stay tied despite rounding
    found = stats.wilcoxon(d, alternative=alternative, method=method)
    return Outcome(float(found.statistic), float(found.pvalue))


# ---- several metrics or arms


def correct_p_values(p: Numbers, alpha: float = 0.05, method: str = "holm") -> Corrected:
    """Adjust (n,) p-values of one family (statsmodels multipletests); ``method`` is one of CORRECTIONS.

    Holm for confirmatory claims, "fdr_bh" (Benjamini-Hochberg) for exploration. Raises UserError.
    """
    refuse_unless_known("correction", method, CORRECTIONS)
    refuse_unless_share("alpha", alpha)
    values = sample("p", p, 1)
    if (values < 0).any() or (values > 1).any():
        raise UserError(f"p is {list(p)}; give p-values from 0 to 1")
    with np.errstate(divide="ignore"):  # Sidak's log(1 - p) at p = 1
        reject, adjusted, *_ = statsmodels("multitest").multipletests(values, alpha, method)
    return Corrected(tuple(map(bool, reject)), tuple(map(float, adjusted)))
