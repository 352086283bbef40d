"""Test two arms of runs with emergence logs over runs; numbers that pool their completions only describe."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import inf, isfinite, isnan
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from .._inputs import varies
from ..comparison import DECLINE, IMPROVEMENT, INSUFFICIENT, Question, Runs, compare
from ..intervals import cluster_design_effect, rate_difference_interval
from ..plain import plain
from ..statistics import cohens_d, fisher_test
from .emergence_runs import EmergenceRunStats, read_run

METRICS = ("step_mean_reward", "gen_reward", "gen_gram_entropy_delta", "gen_correct_rate")
DECIDING = ("step_mean_reward", "gen_correct_rate")  # both must be significant, on one side


@dataclass(frozen=True, slots=True)
class MeanTest:
    """The test of candidate - baseline of one number per run."""

    metric: str
    baseline_mean: float
    candidate_mean: float
    difference: float
    ci_low: float  # bootstrap over runs; infinite where they are too few or do not vary
    ci_high: float
    p_value: float  # permutation of labels, or of signs if paired; 1 where there is one run
    cohens_d: float | None
    baseline_runs: int
    candidate_runs: int


@dataclass(frozen=True, slots=True)
class PooledRate:
    """The completions of all runs as if each were independent: a description, with its design effect."""

    metric: str
    baseline_correct: int
    baseline_total: int
    candidate_correct: int
    candidate_total: int
    difference: float
    ci_low: float  # Newcombe
    ci_high: float
    fisher_p: float
    design_effect: float  # times the variance of independent answers; n / design_effect answers are worth as much


@dataclass(frozen=True, slots=True)
class SampleSize:
    """The runs per arm for 80% power, if the true difference and spread are those observed; None where unknown."""

    metric: str
    runs_per_arm: int | None


@dataclass(frozen=True, slots=True)
class SEPASignificanceReport:
    """The evidence of the runs of two arms about their difference."""

    alpha: float
    num_resamples: int
    seed: int
    paired: bool
    baseline_run_dirs: tuple[str, ...]
    candidate_run_dirs: tuple[str, ...]
    mean_tests: tuple[MeanTest, ...]
    pooled_correct_rate: PooledRate | None  # None without a completion in both arms
    sample_sizes: tuple[SampleSize, ...]
    recommendation: str
    reason: str

    def to_dict(self) -> dict[str, Any]:
        """Return plain JSON values; numbers that are not finite become None."""
        return plain(self)


def evaluate_sepa_significance(
    baseline_run_dirs: Sequence[str | Path],
    candidate_run_dirs: Sequence[str | Path],
    *,
    alpha: float = 0.05,
    num_resamples: int = 20_000,
    seed: int = 0,
    paired: bool = False,
) -> SEPASignificanceReport:
    """Compare two lists of run folders; with ``paired`` the i-th of both have the same seed.

    Reads ``<run>/emergence/{steps,generations}.jsonl``; a missing file counts as empty. Arrangements too many to
    enumerate are drawn ``num_resamples`` times. Improvement needs both DECIDING numbers significant and above 0.
    Raises UserError for an empty list, fewer than 100 resamples, or pairs that do not match.
    """
    if num_resamples < 100:
        raise UserError(f"num_resamples is {num_resamples}; set it to at least 100, 20000 for a p near 0.05")
    question = Question(alpha, resamples=num_resamples, seed=seed)
    if not baseline_run_dirs or not candidate_run_dirs:
        raise UserError("an arm has no run folder; give at least one baseline and one candidate")
    if paired and len(baseline_run_dirs) != len(candidate_run_dirs):
        raise UserError(
            f"there are {len(baseline_run_dirs)} baseline and {len(candidate_run_dirs)} candidate runs; "
            "give the same seeds to both, in one order"
        )
    arms = [read_run(d) for d in baseline_run_dirs], [read_run(d) for d in candidate_run_dirs]
    tests, sizes = [], []
    for metric in METRICS:
        baseline, candidate = (
            {i: x for i, run in enumerate(arm) if not isnan(x := getattr(run, metric))} for arm in arms
        )
        if baseline.keys() & candidate.keys() if paired else baseline and candidate:
            test, runs_needed = _mean_test(metric, baseline, candidate, question, paired)
            tests.append(test)
            sizes.append(SampleSize(metric, runs_needed))
    recommendation, reason = _recommended([t for t in tests if t.metric in DECIDING], alpha)
    return SEPASignificanceReport(
        alpha=alpha,
        num_resamples=num_resamples,
        seed=seed,
        paired=paired,
        baseline_run_dirs=tuple(map(str, baseline_run_dirs)),
        candidate_run_dirs=tuple(map(str, candidate_run_dirs)),
        mean_tests=tuple(tests),
        pooled_correct_rate=_pooled(*arms, alpha),
        sample_sizes=tuple(sizes),
        recommendation=recommendation,
        reason=reason,
    )


def build_sepa_significance_markdown(report: SEPASignificanceReport) -> str:
    """Return the report as a Markdown page, with a heading for each part."""
    permuted = "the signs of paired differences" if report.paired else "the labels of the runs"
    lines = ["# SEPA significance", "", f"Recommendation: `{report.recommendation}`. {report.reason}", ""]
    lines += ["## Mean tests", "", f"The run is the unit; p permutes {permuted}.", ""]
    level = f"{1 - report.alpha:.0%}"
    lines += [f"| metric | baseline | candidate | difference | {level} interval over runs | p | d |", "|---" * 7 + "|"]
    for t in report.mean_tests:
        means = f"{t.baseline_mean:.4f} ({t.baseline_runs} runs) | {t.candidate_mean:.4f} ({t.candidate_runs} runs)"
        interval = f"{t.ci_low:+z.4f} to {t.ci_high:+z.4f}" if isfinite(t.ci_low) else "too few runs"
        d = "" if t.cohens_d is None else f"{t.cohens_d:.2f}"
        lines.append(f"| {t.metric} | {means} | {t.difference:+z.4f} | {interval} | {t.p_value:.4f} | {d} |")
    lines += ["", "## Correctness test", ""]
    if (pooled := report.pooled_correct_rate) is None:
        lines.append("No completion was logged.")
    else:
        a, b, effect = pooled.baseline_total, pooled.candidate_total, pooled.design_effect
        lines += [
            "Descriptive only: completions of one run are not independent, and this test finds differences where "
            "there are none.",
            "",
            f"- baseline {pooled.baseline_correct}/{a}, candidate {pooled.candidate_correct}/{b}: "
            f"{pooled.difference:+z.4f} (Newcombe {pooled.ci_low:+z.4f} to {pooled.ci_high:+z.4f}), "
            f"Fisher p {pooled.fisher_p:.4f}",
            f"- design effect {effect:.1f}: {a} and {b} completions are worth {a / effect:.0f} and {b / effect:.0f} "
            "independent ones",
        ]
    lines += ["", "## Sample sizes", ""]
    lines += ["Runs per arm for 80% power, if the observed difference and spread are true.", ""]
    lines += ["| metric | runs per arm |", "|---|---|"]
    for size in report.sample_sizes:
        lines.append(f"| {size.metric} | {'unknown' if size.runs_per_arm is None else size.runs_per_arm} |")
    return "\n".join(lines) + "\n"


def _mean_test(
    metric: str, baseline: Runs, candidate: Runs, question: Question, paired: bool
) -> tuple[MeanTest, int | None]:
    """Return the comparison of one metric, and the runs per arm that it needs."""
    found = compare(baseline, candidate, question, paired=paired)
    a, b = np.array(found.baseline_runs), np.array(found.candidate_runs)
    low, high = (-inf, inf) if found.bootstrap is None else (found.bootstrap.low, found.bootstrap.high)
    test = MeanTest(
        metric=metric,
        baseline_mean=float(a.mean()),
        candidate_mean=float(b.mean()),
        difference=found.difference,
        ci_low=low,
        ci_high=high,
        p_value=found.p,
        cohens_d=cohens_d(a, b) if min(len(a), len(b)) > 1 and (varies(a) or varies(b)) else None,
        baseline_runs=len(a),
        candidate_runs=len(b),
    )
    return test, found.runs_needed


def _recommended(deciding: Sequence[MeanTest], alpha: float) -> tuple[str, str]:
    """Return the recommendation and its reason."""
    if len(deciding) < len(DECIDING):
        return INSUFFICIENT, "A deciding number is missing from every log of one of the arms."
    if min(min(t.baseline_runs, t.candidate_runs) for t in deciding) < 2:
        return INSUFFICIENT, "One run per arm says nothing about other seeds, however many completions it has."
    if all(t.p_value <= alpha and t.ci_low > 0 for t in deciding):
        return IMPROVEMENT, "Reward and correct rate are both higher, run for run, than chance explains."
    if all(t.p_value <= alpha and t.ci_high < 0 for t in deciding):
        return DECLINE, "Reward and correct rate are both lower, run for run, than chance explains."
    return INSUFFICIENT, "Reward and correct rate do not both differ by more than the runs of one arm do."


def _pooled(
    baseline: Sequence[EmergenceRunStats], candidate: Sequence[EmergenceRunStats], alpha: float
) -> PooledRate | None:
    """Return Fisher's test over all completions of all runs; None where an arm has none."""
    counts, effects = [], []
    for arm in (baseline, candidate):
        counts.append((sum(run.correct for run in arm), sum(run.generations for run in arm)))
        if not counts[-1][1]:
            return None
        clusters = defaultdict(list)  # the answers of each run; of a single run, those of each prompt
        for i, run in enumerate(arm):
            for prompt, right in run.answers:
                clusters[prompt if len(arm) == 1 else i].append(right)
        effects.append(cluster_design_effect([*clusters.values()]))
    (k_a, n_a), (k_b, n_b) = counts
    interval = rate_difference_interval(k_a, n_a, k_b, n_b, alpha=alpha)
    return PooledRate(
        metric="gen_correct_rate",
        baseline_correct=k_a,
        baseline_total=n_a,
        candidate_correct=k_b,
        candidate_total=n_b,
        difference=interval.estimate,
        ci_low=interval.low,
        ci_high=interval.high,
        fisher_p=fisher_test([[k_a, n_a - k_a], [k_b, n_b - k_b]]).p,
        design_effect=max(effects),
    )
