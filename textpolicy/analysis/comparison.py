"""Arms against a baseline: one number per run goes in, chosen beforehand; test, interval, power and advice come out.

Runs of the same seed are paired. The run is the unit: completions of one run are not a sample of anything but that run.
"""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, replace
from math import comb, inf, sqrt
from typing import Literal

import numpy as np

from ..errors import UserError, unknown_name
from ._inputs import refuse_unless_known, refuse_unless_share, varies
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
from .permutation import MOST_ARRANGEMENTS, Permutation, label_permutation_test, sign_flip_test
from .sequential import Anytime, anytime_interval, anytime_test, pairs_needed_by_anytime
from .statistics import correct_p_values, welch_test

Stopping = Literal["fixed", "anytime"]
Runs = Mapping[int, float]  # the summary of each run, by its seed
IMPROVEMENT = "statistically_significant_improvement"
DECLINE = "statistically_significant_decline"
INSUFFICIENT = "insufficient_statistical_evidence"
RECOMMENDATIONS = (IMPROVEMENT, DECLINE, INSUFFICIENT)
_RESAMPLES = 99_999  # signs drawn where there are too many to go through
_SHUFFLES = 9_999  # labels drawn, one by one


@dataclass(frozen=True, slots=True)
class Comparison:
    """A candidate against the baseline, everything in the units of the runs."""

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
    test: str  # what p is of, in words
    interval: Interval  # of the difference, of the same test where that has one; without bounds below six pairs
    bootstrap: Bootstrap | None  # BCa over runs; None where they do not vary
    anytime: Anytime | None  # of pairs
    sd: float | None  # of the paired differences, or of a run; None of fewer than two
    detectable: float  # the difference that as many runs find with the wanted power; inf if none is
    runs_needed: int | None  # per arm, for the difference that matters; None where it cannot be said
    difference_that_matters: float  # the smallest effect that was asked for, else the one observed
    recommendation: str

    @property
    def further_runs(self) -> int | None:
        """Runs to add to each arm for the wanted power."""
        return None if self.runs_needed is None else max(0, self.runs_needed - len(self.candidate_runs))


@dataclass(frozen=True, slots=True)
class Question:
    """What is asked of the runs, written down before there are any."""

    alpha: float = 0.05
    power: float = 0.8
    stopping: Stopping = "fixed"  # the number of seeds is fixed, or one may look after every pair
    smallest_effect: float | None = None  # the least difference that matters, in the units of the runs

    def __post_init__(self) -> None:
        refuse_unless_share("alpha", self.alpha)
        refuse_unless_share("power", self.power)
        refuse_unless_known("stopping rule", self.stopping, ("fixed", "anytime"))
        if self.smallest_effect is not None and not self.smallest_effect > 0:
            raise UserError(f"smallest_effect is {self.smallest_effect}; set it above 0, in the units of the runs")


def compare_arms(
    arms: Mapping[str, Runs], baseline: str, question: Question | None = None, *, paired: bool = True
) -> list[Comparison]:
    """Every other arm against ``baseline``, with p adjusted for their number by Holm's procedure.

    Raises UserError for an unknown baseline or an arm without a run.
    """
    if baseline not in arms:
        raise unknown_name("arm", baseline, arms)
    asked = question or Question()
    found = [
        compare(arms[baseline], runs, asked, paired=paired, names=(baseline, name))
        for name, runs in arms.items()
        if name != baseline
    ]
    adjusted = correct_p_values([c.p for c in found], asked.alpha).p if found else ()
    return [_decided(replace(c, p_adjusted=p), asked) for c, p in zip(found, adjusted, strict=True)]


def compare(
    baseline: Runs,
    candidate: Runs,
    question: Question | None = None,
    *,
    paired: bool = True,
    names: tuple[str, str] = ("baseline", "candidate"),
) -> Comparison:
    """One candidate against the baseline: sign flips of the pairs, or labels of unpaired runs. Raises UserError."""
    asked = question or Question()
    for name, runs in zip(names, (baseline, candidate), strict=True):
        if not runs:
            raise UserError(f"the arm {name} has no finished run; run it first")
    seeds = tuple(seed for seed in baseline if seed in candidate) if paired else ()
    if paired and not seeds:
        raise UserError(f"{names[0]} and {names[1]} share no seed; run both on the same, or compare them unpaired")
    a = np.array([baseline[s] for s in seeds or baseline], np.float64)
    b = np.array([candidate[s] for s in seeds or candidate], np.float64)
    found = _paired(a, b, asked) if paired else _unpaired(a, b, asked)
    difference = float(b.mean() - a.mean())
    return _decided(
        Comparison(
            *names,
            paired=paired,
            seeds=seeds,
            baseline_runs=tuple(map(float, a)),
            candidate_runs=tuple(map(float, b)),
            unmatched=tuple(sorted(set(baseline) ^ set(candidate))) if paired else (),
            difference=difference,
            p=found.p,
            p_adjusted=found.p,
            test=found.test,
            interval=found.interval,
            bootstrap=found.bootstrap,
            anytime=found.anytime,
            sd=found.sd,
            detectable=found.detectable,
            runs_needed=found.runs_needed,
            difference_that_matters=asked.smallest_effect or abs(difference),
            recommendation=INSUFFICIENT,
        ),
        asked,
    )


def _decided(c: Comparison, asked: Question) -> Comparison:
    significant = c.p_adjusted <= asked.alpha
    word = (IMPROVEMENT if c.difference > 0 else DECLINE) if significant else INSUFFICIENT
    return replace(c, recommendation=word)


@dataclass(frozen=True, slots=True)
class _Found:
    """What depends on whether the runs are paired; the fields of Comparison."""

    p: float
    test: str
    interval: Interval
    bootstrap: Bootstrap | None
    anytime: Anytime | None
    sd: float | None
    detectable: float
    runs_needed: int | None


def _paired(a: np.ndarray, b: np.ndarray, asked: Question) -> _Found:
    d, n = b - a, len(a)
    sd = _sd(d) if n > 1 else None
    test = sign_flip_test(a, b, resamples=None if n <= MOST_PAIRS else _RESAMPLES) if n > 1 else None
    anytime = anytime_test(a, b, alpha=asked.alpha)
    looked = asked.stopping == "anytime"
    detectable = detectable_by_anytime if looked else detectable_by_sign_flips
    needed = pairs_needed_by_anytime if looked else pairs_needed_by_sign_flips
    return _Found(
        p=anytime.p if looked else _p(test),
        test="e-process over pairs, valid at every look" if looked else _words(test, "signs"),
        interval=(anytime_interval if looked else sign_flip_interval)(d, level=1 - asked.alpha),
        bootstrap=bootstrap_difference(a, b, paired=True, level=1 - asked.alpha) if sd else None,
        anytime=anytime,
        sd=sd,
        detectable=sd * detectable(n, alpha=asked.alpha, power=asked.power) if sd else inf,
        runs_needed=_needed(needed, float(d.mean()), sd, asked),
    )


def _unpaired(a: np.ndarray, b: np.ndarray, asked: Question) -> _Found:
    if asked.stopping == "anytime":
        raise UserError("stopping is 'anytime', which needs pairs; run both arms on the same seeds")
    n = min(len(a), len(b))
    sd = float(np.hypot(_sd(a), _sd(b)) / sqrt(2)) if n > 1 else None
    few = comb(len(a) + len(b), len(a)) <= MOST_ARRANGEMENTS
    test = label_permutation_test(a, b, resamples=None if few else _SHUFFLES) if n > 1 else None
    difference = float(b.mean() - a.mean())
    welch = welch_test(a, b, 1 - asked.alpha) if sd else None
    return _Found(
        p=_p(test),
        test=_words(test, "labels"),
        interval=Interval(difference, welch.low, welch.high) if welch else Interval(difference, -inf, inf),
        bootstrap=bootstrap_difference(a, b, paired=False, level=1 - asked.alpha) if sd else None,
        anytime=None,
        sd=sd,
        detectable=sd * detectable_by_labels(n, alpha=asked.alpha, power=asked.power) if sd else inf,
        runs_needed=_needed(runs_needed_by_labels, difference, sd, asked),
    )


def _p(test: Permutation | None) -> float:
    return 1.0 if test is None else test.p_two_sided


def _words(test: Permutation | None, what: str) -> str:
    if test is None:
        return "no test, for there is one run"
    return f"exact permutation of {what}" if test.exact else f"permutation of {what}, {test.arrangements} drawn"


def _sd(x: np.ndarray) -> float:
    """0 where the values differ by rounding alone."""
    return float(x.std(ddof=1)) if varies(x) else 0.0


def _needed(needed: Callable[..., int | None], observed: float, sd: float | None, asked: Question) -> int | None:
    matters = asked.smallest_effect or abs(observed)
    return needed(matters / sd, alpha=asked.alpha, power=asked.power) if sd and matters else None
