"""Say whether runs learned: how far held-out accuracy moved, how sure that is, and what stands in its way."""

from __future__ import annotations

import math
from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np
from scipy.special import ndtri, stdtrit

from ..doctor import examine
from ..doctor.facts import Evaluation, evaluations, mean
from ..record.reader import RecordedRun, ended, marks
from .words import in_points


@dataclass(frozen=True, slots=True)
class Outcome:
    """The first and last evaluation of a run on the test problems or, where there are not two, on validation."""

    split: str
    before: Evaluation
    after: Evaluation | None  # None: there is one evaluation so far

    @property
    def points(self) -> float | None:
        """The difference in percentage points."""
        return None if self.after is None else 100 * (self.after.rate.value - self.before.rate.value)


@dataclass(frozen=True, slots=True)
class Obstacle:
    """The finding of the doctor on one or several runs."""

    what: str
    change: str
    runs: int


@dataclass(frozen=True, slots=True)
class Learning:
    """The answers about one arm, in words."""

    answer: str
    reason: str
    obstacles: Sequence[Obstacle]
    rules: int  # of the doctor that could be checked on every run


def outcome(run: RecordedRun) -> Outcome | None:
    """Return what a run's greedy evaluations say; None before the first."""
    found = evaluations(run)
    for split in ("test", "validation"):
        of_split = [evaluation for evaluation in found if evaluation.split == split]
        if len(of_split) > 1:
            return Outcome(split, of_split[0], of_split[-1])
    return Outcome(found[0].split, found[0], None) if found else None


def learning(runs: Sequence[RecordedRun]) -> Learning:
    """Answer for the runs of one arm whether they learned. Raises UserError for damaged completions."""
    answer, reason = _answered(runs)
    reports = [examine(run.folder) for run in runs]
    count = Counter(finding.name for report in reports for finding in report.findings)
    first = {finding.name: finding for report in reversed(reports) for finding in report.findings}
    obstacles = [Obstacle(first[name].what, first[name].change, number) for name, number in count.items()]
    return Learning(answer, reason, obstacles, min(len(report.looked) for report in reports))


def _answered(runs: Sequence[RecordedRun]) -> tuple[str, str]:
    """Return whether the runs learned, and by how much, in words."""
    outcomes = [(run, found) for run in runs if (found := outcome(run)) is not None and found.after is not None]
    if not outcomes:
        once = next((found for run in runs if (found := outcome(run)) is not None), None)
        so_far = f"{once.before.rate} of {once.before.total} right" if once else "none yet"
        return "Not known", f"Two evaluations on held-out problems would tell; so far: {so_far}. {_in_training(runs)}"
    split = max(("test", "validation"), key=lambda name: sum(found.split == name for _, found in outcomes))
    judged = [(run, found) for run, found in outcomes if found.split == split]
    rates = np.array([[e.rate.value for e in (found.before, found.after) if e is not None] for _, found in judged])
    before, after = rates.mean(axis=0)
    difference = float(after - before)
    total = judged[0][1].before.total
    if len(judged) == 1:
        low, high = _over_problems(*judged[0])
        over = f"over {total} problem{'' if total == 1 else 's'}; another seed may end elsewhere"
    else:
        low, high = _over_seeds(rates[:, 1] - rates[:, 0])
        over = f"over {len(judged)} seeds"
    moved = "rose" if difference > 0 else "fell" if difference < 0 else "stayed"
    how = f"at {after:.1%}"
    if difference:
        how = f"from {before:.1%} to {after:.1%}, by {in_points(abs(difference))[0]} points"
    ends = "no interval, because all changed by the same amount"
    if math.isfinite(low):
        ends = "95% interval {} to {}".format(*in_points(low, high, sign="+"))
    unfinished = "" if all(ended(run.folder) for run in runs) else " so far"
    reason = f"The share of held-out {split} problems solved {moved}{unfinished} {how} ({ends}, {over})."
    if low > 0 or (not math.isfinite(low) and difference > 0):
        return ("Yes" if low > 0 else f"Yes, all {len(judged)} seeds alike"), reason
    if high < 0 or (not math.isfinite(low) and difference < 0):
        return "No, it got worse", reason
    if not math.isfinite(low):
        return "No, no seed did", reason
    return "Not shown", f"{reason} The interval includes no change at all."


def _over_problems(run: RecordedRun, found: Outcome) -> tuple[float, float]:
    """Return the 95% interval of after - before over the problems, paired where it is recorded which were solved.

    Of pairs that of Bonett and Price (2012, doi:10.1002/sim.5334), on (gained + 1) / (N + 2) and (lost + 1) / (N + 2);
    otherwise Newcombe's (1998) from Wilson's two intervals. Neither ever has no width.
    """
    assert found.after is not None
    rows = [row for row in run.rows if row["kind"] == "eval" and row["split"] == found.split]
    a, b = (np.array([mark == "1" for mark in marks(row) or ""], bool) for row in (rows[0], rows[-1]))
    if len(a) == len(b) > 0:
        n, z = len(a) + 2, float(ndtri(0.975))
        gained, lost = (float((x & ~y).sum() + 1) / n for x, y in ((b, a), (a, b)))
        half = z * math.sqrt((gained + lost - (gained - lost) ** 2) / n)
        return max(-1.0, gained - lost - half), min(1.0, gained - lost + half)
    (p, (p_low, p_high)), (q, (q_low, q_high)) = ((e.rate.value, e.rate.interval) for e in (found.before, found.after))
    return q - p - math.hypot(q - q_low, p_high - p), q - p + math.hypot(q_high - q, p - p_low)


def _over_seeds(differences: np.ndarray) -> tuple[float, float]:
    """Return Student's 95% interval of the mean of (S,) differences; unbounded where all seeds agree."""
    if np.ptp(differences) < 1e-12:
        return -math.inf, math.inf
    n, center = len(differences), float(differences.mean())
    half = float(stdtrit(n - 1, 0.975) * differences.std(ddof=1) / math.sqrt(n))
    return center - half, center + half


def _in_training(runs: Sequence[RecordedRun]) -> str:
    """Return a sentence on the mean reward in the first and last third of training."""
    ends: list[tuple[float, float]] = []
    for run in runs:
        rows = [row for row in run.rows if row["kind"] == "train" and math.isfinite(row.get("reward_mean", math.nan))]
        third = max(1, len(rows) // 3)
        if len(rows) > 1:
            ends.append((mean(rows[:third], "reward_mean"), mean(rows[-third:], "reward_mean")))
    if not ends:
        return "No step of training has a reward."
    first, last = np.mean(ends, axis=0)
    return f"In training the mean reward went from {first:.3g} in the first third to {last:.3g} in the last."
