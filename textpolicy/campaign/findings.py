"""Compare the outcomes of a campaign: tests over runs, answers by problem, costs, and a verdict in words."""

from __future__ import annotations

import shlex
from collections.abc import Sequence
from dataclasses import dataclass
from math import isfinite, isnan
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
from ..report.words import in_points
from .jobs import Job, read_attempts
from .outcomes import Cost, Outcome, read_outcome, solved_by_run
from .settings import SUMMARIES, CampaignSettings


@dataclass(frozen=True, slots=True)
class ArmFindings:
    """The finished runs of one arm."""

    name: str
    outcomes: tuple[Outcome, ...]  # by seed, as planned
    mean: float
    sd: float | None  # over runs; None for a single one
    lowest: float
    highest: float
    cost: Cost
    money: float | None  # None where what has a price was not recorded


@dataclass(frozen=True, slots=True)
class SameModels:
    """The evidence of the answers of these runs about other problems; none about other seeds."""

    clustered: ClusteredDifference | None  # for two runs an arm or more
    mcnemar_p: float | None  # for a single pair of runs
    newcombe: Interval | None  # for a single pair of runs


@dataclass(frozen=True, slots=True)
class Pooled:
    """The answers of all runs as if each were independent: descriptive only."""

    fisher_p: float
    design_effect: float
    answers: int  # in each arm
    effective: float  # independent answers that these are worth


@dataclass(frozen=True, slots=True)
class Contrast:
    """The comparison of one candidate with the baseline, and further descriptions."""

    comparison: Comparison
    same_models: SameModels | None  # None where the runs did not record which problems they solved
    pooled: Pooled | None
    verdict: str


@dataclass(frozen=True, slots=True)
class Findings:
    """The results of a campaign."""

    settings: CampaignSettings
    planned: int  # runs
    complete: bool  # every run that the stopping rule requires is finished
    arms: tuple[ArmFindings, ...]
    contrasts: tuple[Contrast, ...]
    failed: tuple[str, ...]  # runs whose last attempt failed
    wall_seconds: float  # of all attempts, failed ones too

    @property
    def recommendation(self) -> str:
        """The only contrast's recommendation, or "improvement" if any candidate improves."""
        words = [c.comparison.recommendation for c in self.contrasts]
        return next((w for w in (IMPROVEMENT, DECLINE) if w in words), INSUFFICIENT) if self.complete else INSUFFICIENT

    @property
    def verdict(self) -> str:
        """The verdict on the campaign, one paragraph."""
        done, words = sum(len(a.outcomes) for a in self.arms), [c.verdict for c in self.contrasts]
        if done < self.planned and self.complete:
            words.insert(0, f"Stopped after {done} of {self.planned} runs, as the stopping rule allows.")
        elif done < self.planned:
            words.insert(0, f"{done} of {self.planned} runs are finished.")
        return " ".join(words)


def find(settings: CampaignSettings, root: Path, jobs: Sequence[Job]) -> Findings:
    """Read every finished one of the ``jobs`` of the campaign in ``root`` and compare the arms.

    Raises UserError for an arm without a finished run, and for runs on different problems.
    """
    attempts = read_attempts(root)
    seconds = {(a.arm, a.seed): a.seconds for a in attempts if a.returncode == 0}
    done = [j for j in jobs if j.done]
    outcomes = [read_outcome(j.folder, j.arm, j.seed, settings.summary, seconds.get((j.arm, j.seed))) for j in done]
    arms = []
    for name in settings.arms:
        runs = [o for o in outcomes if o.arm == name]
        if not runs:
            command = shlex.join(["textpolicy", "campaign", "run", str(root)])
            raise UserError(f"the arm {name} has no finished run; run the campaign with: {command}")
        values = np.array([o.value for o in runs])
        cost = Cost.total([o.cost for o in runs])
        sd = float(values.std(ddof=1)) if len(values) > 1 else None
        lowest, highest = float(values.min()), float(values.max())
        money = cost.money(settings.prices)
        arms.append(ArmFindings(name, tuple(runs), float(values.mean()), sd, lowest, highest, cost, money))
    if len(problems := sorted({o.problems for o in outcomes})) > 1:
        raise UserError(f"runs were evaluated on {problems} problems; give all the same, because they are paired")
    by_seed = {a.name: {o.seed: o for o in a.outcomes} for a in arms}
    runs_of = {name: {seed: o.value for seed, o in some.items()} for name, some in by_seed.items()}
    comparisons = compare_arms(runs_of, settings.reference, question(settings))
    complete = len(done) == len(jobs) or (settings.stopping == "anytime" and decided(comparisons, settings))
    contrasts = []
    for c in comparisons:
        a, b = (solved_by_run([by_seed[name][seed] for seed in c.seeds]) for name in (c.baseline, c.candidate))
        same, together = None, None
        if a is not None and b is not None and a.shape == b.shape:
            same, together = same_models(a, b, settings.alpha), pooled(a, b)
        contrasts.append(Contrast(c, same, together, verdict(c, settings, complete, len(comparisons))))
    last = {(a.arm, a.seed): a.returncode for a in attempts}
    return Findings(
        settings=settings,
        planned=len(jobs),
        complete=complete,
        arms=tuple(arms),
        contrasts=tuple(contrasts),
        failed=tuple(j.name for j in jobs if not j.done and last.get((j.arm, j.seed), 0)),
        wall_seconds=sum(a.seconds for a in attempts),
    )


def question(settings: CampaignSettings) -> Question:
    """Return the campaign's question for its runs."""
    return Question(settings.alpha, settings.power, settings.stopping, settings.smallest_effect)


def decided(comparisons: Sequence[Comparison], settings: CampaignSettings) -> bool:
    """Return whether the test of every candidate, adjusted for their number, is significant."""
    return all(c.p_adjusted <= settings.alpha for c in comparisons)


def same_models(a: np.ndarray, b: np.ndarray, alpha: float) -> SameModels | None:
    """Compare (S, P) answers, clustered by problem; for one run an arm by McNemar's test and Newcombe's interval.

    One problem is no sample of problems: None.
    """
    if len(a) > 1:
        return SameModels(clustered_difference(a, b), None, None) if a.shape[1] > 1 else None
    only_a, only_b = int(((a == 1) & (b == 0)).sum()), int(((a == 0) & (b == 1)).sum())
    interval = rate_difference_interval(int(a.sum()), a.size, int(b.sum()), b.size, alpha=alpha)
    return SameModels(None, mcnemar_test(only_a, only_b).p, interval)


def pooled(a: np.ndarray, b: np.ndarray) -> Pooled:
    """Run Fisher's test over all (S, P) answers; the design effect is the larger of those by run and by problem."""
    table = [[int(x.sum()), int(x.size - x.sum())] for x in (b, a)]
    effect = max(cluster_design_effect(x.tolist()) for x in (a, b, a.T, b.T))
    return Pooled(fisher_test(table).p, effect, a.size, a.size / effect)


def verdict(c: Comparison, settings: CampaignSettings, complete: bool = True, family: int = 1) -> str:
    """Describe the comparison, one of a ``family``, in a few sentences that end with the recommendation."""
    n, level = len(c.seeds), f"{1 - settings.alpha:.0%} interval"
    [scored] = in_points(abs(c.difference))
    scored = f"scored {scored} points {'above' if c.difference > 0 else 'below'}"
    alone = " of this difference alone" if family > 1 else ""
    if isfinite(c.interval.low):
        kind = {"fixed": "exact ", "anytime": "always valid "}[settings.stopping]
        low, high = in_points(c.interval.low, c.interval.high, sign="+")
        interval = f"{kind}{level}{alone} {low} to {high} points"
    elif n > 1 and c.sd == 0:
        interval = f"no {level}, because all pairs differ by the same amount"
    else:
        interval = f"no {level}, because there are too few pairs"
    adjusted = f", {c.p_adjusted:.3g} adjusted for the number of arms" if c.p_adjusted != c.p else ""
    lead = (
        f"{c.candidate} {scored if c.difference else 'scored exactly as much as'} {c.baseline} in "
        f"{SUMMARIES[settings.summary]}, over {n} paired {'seed' if n == 1 else 'seeds'} "
        f"({interval}; {c.test}, p = {c.p:.3g}{adjusted})."
    )
    recommendation = c.recommendation if complete else INSUFFICIENT
    return " ".join([lead, *_evidence(c, settings, complete, family), f"Recommendation: {recommendation}."])


def _evidence(c: Comparison, settings: CampaignSettings, complete: bool, family: int) -> list[str]:
    """Return sentences on the strength of the evidence, and on the seeds that would add to it."""
    if not complete:
        return ["The campaign is not finished, so this decides nothing yet."]
    if c.recommendation != INSUFFICIENT:
        return ["That is more than the luck of seeds explains."]
    n = len(c.seeds)
    if n == 1:
        return [
            "One seed per arm cannot say whether another seed would agree: nothing is concluded about the methods, "
            "only these two trained models can be compared. Use at least 6 seeds."
        ]
    among = f" among {family + 1} arms" if family > 1 else ""
    words = ["That is not enough evidence for a difference, nor for there being none."]
    if isnan(c.detectable):
        words.append(f"All seeds agree, so the scatter of seeds, and what {n} of them can find, is not known.")
    elif isfinite(c.detectable):
        [found] = in_points(c.detectable)
        words.append(f"{n} seeds find a difference of {found} points{among} {settings.power:.0%} of the time.")
    else:
        words.append(f"{n} seeds cannot find a difference of any size{among}.")
    if c.further_runs:
        kind = "the least that matters" if settings.smallest_effect else "the observed one, if that is the true one"
        size = f"a difference of {in_points(c.difference_that_matters)[0]} points{among}, {kind}"
        where = f"as a new campaign of {c.runs_needed:,}, because these have been evaluated"
        if settings.stopping == "anytime":
            where = "and may add them here"
        words.append(
            f"To find {size}, with {settings.power:.0%} power, takes {c.runs_needed:,} seeds: "
            f"you need {c.further_runs:,} more, {where}."
        )
    return words


def curve_of(arm: ArmFindings) -> list[tuple[int, list[float]]]:
    """Return (step, accuracies of all runs) for the steps at which all of the arm's runs were evaluated."""
    by_step: dict[int, list[float]] = {}
    for point in (p for o in arm.outcomes for p in o.curve):
        by_step.setdefault(point.step, []).append(point.accuracy)
    return [(step, values) for step, values in sorted(by_step.items()) if len(values) == len(arm.outcomes)]
