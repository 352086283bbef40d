"""Compare arms with a baseline, from one number per run, chosen beforehand: test, interval, power and advice.

Runs of the same seed are paired. The run is the unit: the completions of one run are samples of that run alone.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import comb, inf, nan, sqrt
from typing import Any, Literal

import numpy as np

from ..errors import UserError, unknown_name
from ._inputs import differences, refuse_unless_known, refuse_unless_share, settled, varies
from .exact import (
    MOST_PAIRS,
    detectable_by_anytime,
    detectable_by_labels,
    detectable_by_sign_flips,
    pairs_needed_by_sign_flips,
    runs_needed_by_labels,
    sign_flip_interval,
)
from .intervals import Bootstrap, Interval, bootstrap_difference
from .permutation import (
    MOST_ARRANGEMENTS,
    Permutation,
    label_permutation_test,
    sign_flip_test,
    smallest_sign_flip_p,
)
from .sequential import Anytime, anytime_interval, anytime_test, pairs_needed_by_anytime, smallest_anytime_p
from .statistics import correct_p_values, welch_test

Stopping = Literal["fixed", "anytime"]
Runs = Mapping[int, float]  # the summary of each run, by its seed
IMPROVEMENT = "statistically_significant_improvement"
DECLINE = "statistically_significant_decline"
INSUFFICIENT = "insufficient_statistical_evidence"
RECOMMENDATIONS = (IMPROVEMENT, DECLINE, INSUFFICIENT)
_SIGNS = 99_999  # drawn where there are too many to enumerate
_LABELS = 9_999  # drawn, one by one
_BOOTSTRAP = 9_999


@dataclass(frozen=True, slots=True)
class Comparison:
    """The comparison of a candidate with the baseline, in the units of the runs."""

    baseline: str
    candidate: str
    paired: bool
    seeds: tuple[int, ...]  # of the pairs; () if unpaired
    baseline_runs: tuple[float, ...]  # in the order of the seeds
    candidate_runs: tuple[float, ...]
    unmatched: tuple[int, ...]  # seeds that only one of the arms has, which a paired test leaves out
    difference: float
    p: float  # of the test that decides; 1 where the runs are too few for any
    p_adjusted: float  # for the number of candidates (Holm)
    test: str  # the name of that test
    interval: Interval  # of this difference alone, by the same test where it has one; unbounded where it has no end
    bootstrap: Bootstrap | None  # BCa over runs; None where they do not vary
    anytime: Anytime | None  # for pairs
    sd: float | None  # of the paired differences, or of a run; None for fewer than two
    detectable: float  # the difference that as many runs find with the wanted power, in the family; inf for none, NaN
    # where runs that all agree leave it unknown
    runs_needed: int | None  # per arm, for the difference that matters; None where it is unknown
    difference_that_matters: float  # the smallest effect of the question, else the one observed
    recommendation: str

    @property
    def further_runs(self) -> int | None:
        """The runs to add to each arm for the wanted power."""
        return None if self.runs_needed is None else max(0, self.runs_needed - len(self.candidate_runs))


@dataclass(frozen=True, slots=True)
class Question:
    """The question for the runs, written down before there are any."""

    alpha: float = 0.05
    power: float = 0.8
    stopping: Stopping = "fixed"  # the number of seeds is fixed, or the test may be evaluated after every pair
    smallest_effect: float | None = None  # the least difference that matters, in the units of the runs
    resamples: int | None = None  # draws of the permutation test and the bootstrap, instead of the defaults
    seed: int = 0  # of those draws

    def __post_init__(self) -> None:
        refuse_unless_share("alpha", self.alpha)
        refuse_unless_share("power", self.power)
        refuse_unless_known("stopping rule", self.stopping, ("fixed", "anytime"))
        if self.power <= self.alpha:
            raise UserError(f"power is {self.power} with alpha {self.alpha}; set it above alpha")
        if self.smallest_effect is not None and not self.smallest_effect > 0:
            raise UserError(f"smallest_effect is {self.smallest_effect}; set it above 0, in the units of the runs")
        if self.resamples is not None and self.resamples < 100:
            raise UserError(f"resamples is {self.resamples}; set it to at least 100, 20000 for a p near 0.05")


def compare_arms(
    arms: Mapping[str, Runs], baseline: str, question: Question | None = None, *, paired: bool = True
) -> list[Comparison]:
    """Compare every other arm with ``baseline``, with p adjusted for their number by Holm's procedure.

    Power is that of Holm's first step, alpha / candidates: what one of them is found with, whatever the others show.
    Raises UserError for an unknown baseline or an arm without a run.
    """
    if baseline not in arms:
        raise unknown_name("arm", baseline, arms)
    question = question or Question()
    found = [
        compare(arms[baseline], runs, question, paired=paired, names=(baseline, name), family=len(arms) - 1)
        for name, runs in arms.items()
        if name != baseline
    ]
    adjusted = correct_p_values([c.p for c in found], question.alpha).p if found else ()
    return [
        replace(c, p_adjusted=p, recommendation=_recommendation(p, c.difference, question))
        for c, p in zip(found, adjusted, strict=True)
    ]


def compare(
    baseline: Runs,
    candidate: Runs,
    question: Question | None = None,
    *,
    paired: bool = True,
    names: tuple[str, str] = ("baseline", "candidate"),
    family: int = 1,
) -> Comparison:
    """Compare one candidate with the baseline by sign flips of pairs, or labels of unpaired runs.

    It is one of ``family`` candidates, among which alpha is divided for its power. Raises UserError.
    """
    question = question or Question()
    for name, runs in zip(names, (baseline, candidate), strict=True):
        if not runs:
            raise UserError(f"the arm {name} has no finished run; run it first")
    seeds = tuple(seed for seed in baseline if seed in candidate) if paired else ()
    if paired and not seeds:
        raise UserError(f"{names[0]} and {names[1]} share no seed; run both on the same, or compare them unpaired")
    a = np.array([baseline[s] for s in seeds or baseline], np.float64)
    b = np.array([candidate[s] for s in seeds or candidate], np.float64)
    found = (_paired if paired else _unpaired)(a, b, question, question.alpha / family)
    difference = float(settled(b.mean() - a.mean(), a, b))
    return Comparison(
        *names,
        paired=paired,
        seeds=seeds,
        baseline_runs=tuple(map(float, a)),
        candidate_runs=tuple(map(float, b)),
        unmatched=tuple(sorted(set(baseline) ^ set(candidate))) if paired else (),
        difference=difference,
        p_adjusted=found["p"],
        difference_that_matters=question.smallest_effect or abs(difference),
        recommendation=_recommendation(found["p"], difference, question),
        **found,
    )


def _recommendation(p_adjusted: float, difference: float, question: Question) -> str:
    """Return one of RECOMMENDATIONS."""
    if p_adjusted <= question.alpha and difference:
        return IMPROVEMENT if difference > 0 else DECLINE
    return INSUFFICIENT


def _paired(a: np.ndarray, b: np.ndarray, question: Question, alpha: float) -> dict[str, Any]:
    """Return the fields of Comparison that depend on pairing, for pairs; ``alpha`` is its share of the family's."""
    d, n, level = differences(a, b, 1), len(a), 1 - question.alpha
    draws: dict[str, Any] = {"resamples": question.resamples or _BOOTSTRAP, "rng": question.seed}
    sd = _sd(d) if n > 1 else None
    drawn = None if n <= MOST_PAIRS else question.resamples or _SIGNS
    test = sign_flip_test(a, b, resamples=drawn, rng=question.seed) if n > 1 else None
    anytime = anytime_test(a, b, alpha=alpha)
    if question.stopping == "anytime":
        p, name, interval = anytime.p, "e-process over pairs, valid after every pair", anytime_interval(d, level=level)
        detectable, needed, least = detectable_by_anytime, pairs_needed_by_anytime, smallest_anytime_p(n)
    else:
        p, name = _p(test, "signs")
        interval = sign_flip_interval(d, level=level)
        detectable, needed, least = detectable_by_sign_flips, pairs_needed_by_sign_flips, smallest_sign_flip_p(n)
    return {
        "p": p,
        "test": name,
        "interval": interval,
        "bootstrap": bootstrap_difference(a, b, paired=True, level=level, **draws) if sd else None,
        "anytime": anytime,
        "sd": sd,
        "detectable": _detectable(detectable, n, sd, least, question.power, alpha),
        "runs_needed": _needed(needed, float(settled(d.mean(), a, b)), sd, question, alpha),
    }


def _unpaired(a: np.ndarray, b: np.ndarray, question: Question, alpha: float) -> dict[str, Any]:
    """Return the same for runs of different seeds."""
    if question.stopping == "anytime":
        raise UserError("stopping is 'anytime', which needs pairs; run both arms on the same seeds")
    n, level = min(len(a), len(b)), 1 - question.alpha
    draws: dict[str, Any] = {"resamples": question.resamples or _BOOTSTRAP, "rng": question.seed}
    sd = float(np.hypot(_sd(a), _sd(b)) / sqrt(2)) if n > 1 else None
    least = 2 / comb(2 * n, n)  # p
    few = comb(len(a) + len(b), len(a)) <= MOST_ARRANGEMENTS
    drawn, rng = None if few else question.resamples or _LABELS, np.random.default_rng(question.seed)
    p, name = _p(label_permutation_test(a, b, resamples=drawn, rng=rng) if n > 1 else None, "labels")
    difference = float(settled(b.mean() - a.mean(), a, b))
    welch = welch_test(a, b, level) if sd else None
    return {
        "p": p,
        "test": name,
        "interval": Interval(difference, welch.low, welch.high) if welch else Interval(difference, -inf, inf),
        "bootstrap": bootstrap_difference(a, b, paired=False, level=level, **draws) if sd else None,
        "anytime": None,
        "sd": sd,
        "detectable": _detectable(detectable_by_labels, n, sd, least, question.power, alpha),
        "runs_needed": _needed(runs_needed_by_labels, difference, sd, question, alpha),
    }


def _p(test: Permutation | None, what: str) -> tuple[float, str]:
    """Return p and the name of the test."""
    if test is None:
        return 1.0, "no test, because there is one run"
    name = f"permutation of {what}"
    return test.p_two_sided, f"exact {name}" if test.exact else f"{name}, {test.arrangements} drawn"


def _sd(x: np.ndarray) -> float:
    """Return the SD of the values; 0 where they differ by rounding alone."""
    return float(x.std(ddof=1)) if varies(x) else 0.0


def _detectable(
    effect: Callable[..., float], n: int, sd: float | None, least: float, power: float, alpha: float
) -> float:
    """Return the difference found with the power: inf where even the ``least`` p is above alpha, NaN for no SD."""
    if least > alpha:
        return inf
    return sd * effect(n, alpha=alpha, power=power) if sd else nan


def _needed(
    needed: Callable[..., int | None], observed: float, sd: float | None, question: Question, alpha: float
) -> int | None:
    """Return the runs per arm for the difference that matters; None where it or the SD is 0 or unknown."""
    matters = question.smallest_effect or abs(observed)
    return needed(matters / sd, alpha=alpha, power=question.power) if sd and matters else None
