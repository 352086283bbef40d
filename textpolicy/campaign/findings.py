"""A campaign's outcomes -> what they show: comparisons over runs, answers by problem, costs, and a verdict in words."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite
from pathlib import Path

import numpy as np

from ..analysis.comparison import DECLINE, IMPROVEMENT, INSUFFICIENT, Comparison, Question, compare_arms
from ..analysis.intervals import (
    ClusteredDifference,
    Interval,
    cluster_design_effect,
    clustered_difference,
    rate_difference_interval,
)
from ..analysis.statistics import fisher_test, mcnemar_test
from ..errors import UserError
from ..loop.evaluation import Rate
from .jobs import Job, read_attempts
from .outcomes import Cost, Outcome, Point, read_outcome, solved_by_run
from .settings import SUMMARIES, CampaignSettings


@dataclass(frozen=True, slots=True)
class ArmFindings:
    """The finished runs of one arm."""

    name: str
    outcomes: tuple[Outcome, ...]  # by seed, as planned
    mean: float
    sd: float | None  # over runs; None of a single one
    lowest: float
    highest: float
    cost: Cost
    money: float


@dataclass(frozen=True, slots=True)
class SameModels:
    """What the answers of these very runs say about other problems; it says nothing about other seeds."""

    clustered: ClusteredDifference | None  # of two runs an arm or more
    mcnemar_p: float | None  # of a single pair of runs
    newcombe: Interval | None  # of a single pair of runs


@dataclass(frozen=True, slots=True)
class Pooled:
    """All answers of all runs as if each were independent: descriptive only."""

    fisher_p: float
    design_effect: float
    answers: int  # in each arm
    effective: float  # independent answers that these are worth


@dataclass(frozen=True, slots=True)
class Contrast:
    """One candidate against the baseline: the comparison that decides, and what describes it further."""

    comparison: Comparison
    same_models: SameModels | None  # None where the runs did not say which problems they solved
    pooled: Pooled | None
    verdict: str


@dataclass(frozen=True, slots=True)
class Findings:
    """All of it."""

    settings: CampaignSettings
    planned: int  # runs
    complete: bool  # every run that the stopping rule asks for is finished
    arms: tuple[ArmFindings, ...]
    contrasts: tuple[Contrast, ...]
    failed: tuple[str, ...]  # runs whose last attempt failed
    wall_seconds: float  # of all attempts, failed ones too

    @property
    def recommendation(self) -> str:
        """Of the whole: the only contrast's, or improvement where any candidate is one."""
        words = [c.comparison.recommendation for c in self.contrasts]
        return next((w for w in (IMPROVEMENT, DECLINE) if w in words), INSUFFICIENT) if self.complete else INSUFFICIENT

    @property
    def verdict(self) -> str:
        """One paragraph."""
        return " ".join([*_early(self), *(c.verdict for c in self.contrasts)])


def find(settings: CampaignSettings, root: Path, jobs: Sequence[Job]) -> Findings:
    """Read every finished one of the ``jobs`` of the campaign in ``root`` and compare the arms.

    Raises UserError where an arm has none.
    """
    attempts = read_attempts(root)
    seconds = {(a.arm, a.seed): a.seconds for a in attempts if a.returncode == 0}
    done = [j for j in jobs if j.done]
    outcomes = [read_outcome(j.folder, j.arm, j.seed, settings.summary, seconds.get((j.arm, j.seed))) for j in done]
    last = {(a.arm, a.seed): a.returncode for a in attempts}
    arms = tuple(_arm(name, [o for o in outcomes if o.arm == name], settings) for name in settings.arms)
    _refuse_other_problems(outcomes)
    values = {a.name: {o.seed: o.value for o in a.outcomes} for a in arms}
    comparisons = compare_arms(values, settings.reference, question(settings))
    complete = len(done) == len(jobs) or (settings.stopping == "anytime" and decided(comparisons, settings))
    return Findings(
        settings=settings,
        planned=len(jobs),
        complete=complete,
        arms=arms,
        contrasts=tuple(_contrast(c, arms, settings, complete) for c in comparisons),
        failed=tuple(j.name for j in jobs if not j.done and last.get((j.arm, j.seed), 0)),
        wall_seconds=sum(a.seconds for a in attempts),
    )


def question(settings: CampaignSettings) -> Question:
    """What the campaign asks of its runs."""
    return Question(settings.alpha, settings.power, settings.stopping, settings.smallest_effect)


def decided(comparisons: Sequence[Comparison], settings: CampaignSettings) -> bool:
    """Whether the e-process of every candidate has reached what it takes, for as many candidates as there are."""
    return all(c.p_adjusted <= settings.alpha for c in comparisons)


def _arm(name: str, outcomes: Sequence[Outcome], settings: CampaignSettings) -> ArmFindings:
    if not outcomes:
        raise UserError(f"the arm {name} has no finished run; 'textpolicy campaign run' goes on with the campaign")
    values = np.array([o.value for o in outcomes])
    cost = Cost(
        sum(o.cost.sampled_tokens for o in outcomes),
        sum(o.cost.trained_tokens for o in outcomes),
        sum(o.cost.seconds for o in outcomes),
    )
    return ArmFindings(
        name=name,
        outcomes=tuple(outcomes),
        mean=float(values.mean()),
        sd=float(values.std(ddof=1)) if len(values) > 1 else None,
        lowest=float(values.min()),
        highest=float(values.max()),
        cost=cost,
        money=cost.money(settings.prices),
    )


def _refuse_other_problems(outcomes: Sequence[Outcome]) -> None:
    numbers = {o.problems for o in outcomes}
    if len(numbers) > 1:
        raise UserError(f"runs were judged on {sorted(numbers)} problems; give all the same, or they cannot be paired")


def _contrast(c: Comparison, arms: Sequence[ArmFindings], settings: CampaignSettings, complete: bool) -> Contrast:
    by_seed = [{o.seed: o for o in arm.outcomes} for n in (c.baseline, c.candidate) for arm in arms if arm.name == n]
    a, b = (solved_by_run([runs[s] for s in c.seeds]) for runs in by_seed)
    known = a is not None and b is not None and a.shape == b.shape
    return Contrast(
        comparison=c,
        same_models=same_models(a, b, settings.alpha) if known else None,  # type: ignore[arg-type]
        pooled=pooled(a, b) if known else None,  # type: ignore[arg-type]
        verdict=verdict(c, settings, complete),
    )


def same_models(a: np.ndarray, b: np.ndarray, alpha: float) -> SameModels:
    """Of (S, P) answers: clustered by problem, or for one run an arm McNemar's test and Newcombe's interval."""
    if len(a) > 1:
        return SameModels(clustered_difference(a, b), None, None)
    only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    interval = rate_difference_interval(int(a.sum()), a.size, int(b.sum()), b.size, alpha=alpha)
    return SameModels(None, mcnemar_test(only_a, only_b).p, interval)


def pooled(a: np.ndarray, b: np.ndarray) -> Pooled:
    """Fisher's test over all (S, P) answers, and what they are worth, clustered by run or by problem, as is worse."""
    table = [[int(x.sum()), int(x.size - x.sum())] for x in (b, a)]
    effect = max(cluster_design_effect(x.tolist()) for x in (a, b, a.T, b.T))
    return Pooled(fisher_test(table).p, effect, a.size, a.size / effect)


# ---- words


def verdict(c: Comparison, settings: CampaignSettings, complete: bool = True) -> str:
    """What the comparison shows, in a few sentences that end with the recommendation."""
    n = len(c.seeds)
    lead = (
        f"{c.candidate} {_scored(c.difference)} {c.baseline} in {SUMMARIES[settings.summary]}, "
        f"over {n} paired {'seed' if n == 1 else 'seeds'} "
        f"({_interval_words(c, settings)}; {c.test}, p = {c.p:.3g}{_holm(c)})."
    )
    return " ".join([lead, *_evidence(c, settings, complete), f"Recommendation: {_recommended(c, complete)}."])


def _scored(difference: float) -> str:
    if not difference:
        return "scored exactly as much as"
    return f"scored {100 * abs(difference):.1f} points {'above' if difference > 0 else 'below'}"


def _interval_words(c: Comparison, settings: CampaignSettings) -> str:
    level = f"{1 - settings.alpha:.0%} interval"
    if not isfinite(c.interval.low):
        return f"no {level}, for which there are too few pairs"
    kind = {"fixed": "exact ", "anytime": "at every look valid "}[settings.stopping]
    return f"{kind}{level} {100 * c.interval.low:+.1f} to {100 * c.interval.high:+.1f} points"


def _holm(c: Comparison) -> str:
    return f", {c.p_adjusted:.3g} adjusted for the number of arms" if c.p_adjusted != c.p else ""


def _recommended(c: Comparison, complete: bool) -> str:
    return c.recommendation if complete else INSUFFICIENT


def _evidence(c: Comparison, settings: CampaignSettings, complete: bool) -> list[str]:
    if not complete:
        return ["The campaign is not finished, so this decides nothing yet."]
    if c.recommendation != INSUFFICIENT:
        return ["That is more than the luck of seeds explains."]
    if len(c.seeds) == 1:
        return [
            "One seed per arm cannot say whether another seed would agree: nothing is concluded about the methods, "
            "only these two trained models can be compared. Use at least 6 seeds."
        ]
    return ["That is not enough evidence for a difference, nor for there being none.", *_advice(c, settings)]


def _advice(c: Comparison, settings: CampaignSettings) -> list[str]:
    n, words = len(c.seeds), []
    if isfinite(c.detectable):
        words.append(
            f"{n} seeds find a difference of {100 * c.detectable:.1f} points {settings.power:.0%} of the time."
        )
    else:
        words.append(f"{n} seeds cannot find a difference of any size.")
    if c.further_runs:
        kind = "the least that matters" if settings.smallest_effect else "the observed one, if that is the true one"
        size = f"a difference of {100 * c.difference_that_matters:.1f} points, {kind}"
        words.append(
            f"To find {size}, {settings.power:.0%} of the time takes {c.runs_needed} seeds: {_further(c, settings)}."
        )
    return words


def _further(c: Comparison, settings: CampaignSettings) -> str:
    if settings.stopping == "anytime":
        return f"you need {c.further_runs} more, and may add them here"
    return f"you need {c.further_runs} more, as a new campaign of {c.runs_needed}, for these were looked at"


def _early(found: Findings) -> list[str]:
    done = sum(len(a.outcomes) for a in found.arms)
    if done == found.planned:
        return []
    if found.complete:
        return [f"Stopped after {done} of {found.planned} runs, as the stopping rule allows."]
    return [f"{done} of {found.planned} runs are finished."]


def curve_of(arm: ArmFindings) -> list[tuple[int, list[float]]]:
    """(step, accuracies of all runs) where all of the arm's runs looked."""
    by_step: dict[int, list[float]] = {}
    for point in (p for o in arm.outcomes for p in o.curve):
        by_step.setdefault(point.step, []).append(point.accuracy)
    return [(step, values) for step, values in sorted(by_step.items()) if len(values) == len(arm.outcomes)]


def rate_of(point: Point) -> Rate:
    """With its Wilson interval, over problems."""
    return Rate(round(point.accuracy * point.problems), point.problems)
