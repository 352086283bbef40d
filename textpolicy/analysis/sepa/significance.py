"""Two arms of runs with emergence logs, tested over runs; what pools their completions only describes."""

from __future__ import annotations

from collections import defaultdict
from collections.abc import Sequence
from dataclasses import dataclass
from math import comb, inf, isfinite, sqrt
from pathlib import Path
from typing import Any

import numpy as np

from ...errors import UserError
from .._inputs import refuse_unless_share, varies
from ..comparison import DECLINE, IMPROVEMENT, INSUFFICIENT
from ..exact import pairs_needed_by_sign_flips, runs_needed_by_labels
from ..intervals import Interval, bootstrap_difference, rate_difference_interval
from ..permutation import MOST_ARRANGEMENTS, Permutation, label_permutation_test, sign_flip_test
from ..plain import plain
from ..statistics import cohens_d, fisher_test
from .emergence_runs import EmergenceRunStats, read_run

METRICS = ("step_mean_reward", "gen_reward", "gen_gram_entropy_delta", "gen_correct_rate")
DECIDING = ("step_mean_reward", "gen_correct_rate")  # both must be significant, on one side


@dataclass(frozen=True, slots=True)
class MeanTest:
    """candidate - baseline of one number per run."""

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
    """Completions of all runs as if each were independent: a description, and how far from the truth that is."""

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
    """Runs per arm for 80% power, if the true difference and spread are those observed; None where unknown."""

    metric: str
    runs_per_arm: int | None


@dataclass(frozen=True, slots=True)
class SEPASignificanceReport:
    """What the runs of two arms say about each other."""

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
        """Plain JSON values; numbers that are not finite are None."""
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

    Reads ``<run>/emergence/{steps,generations}.jsonl``; a missing file is an empty one. Arrangements too many to go
    through are drawn ``num_resamples`` times. Improvement needs both DECIDING numbers significant and above 0.
    Raises UserError for an empty list, fewer than 100 resamples, or pairs that do not match.
    """
    refuse_unless_share("alpha", alpha)
    if num_resamples < 100:
        raise UserError(f"num_resamples is {num_resamples}; set it to at least 100, 20000 for a p near 0.05")
    if not baseline_run_dirs or not candidate_run_dirs:
        raise UserError("an arm has no run folder; give at least one baseline and one candidate")
    if paired and len(baseline_run_dirs) != len(candidate_run_dirs):
        raise UserError(
            f"there are {len(baseline_run_dirs)} baseline and {len(candidate_run_dirs)} candidate runs; "
            "give the same seeds to both, in one order"
        )
    arms = [read_run(d) for d in baseline_run_dirs], [read_run(d) for d in candidate_run_dirs]
    how = _How(alpha, num_resamples, seed, paired)
    tests = tuple(found for metric in METRICS if (found := _mean_test(metric, *arms, how)))
    recommendation, reason = _judged(tests, alpha)
    return SEPASignificanceReport(
        alpha=alpha,
        num_resamples=num_resamples,
        seed=seed,
        paired=paired,
        baseline_run_dirs=tuple(map(str, baseline_run_dirs)),
        candidate_run_dirs=tuple(map(str, candidate_run_dirs)),
        mean_tests=tests,
        pooled_correct_rate=_pooled(*arms, alpha),
        sample_sizes=tuple(SampleSize(t.metric, _runs_needed(t.metric, *arms, how)) for t in tests),
        recommendation=recommendation,
        reason=reason,
    )


def build_sepa_significance_markdown(report: SEPASignificanceReport) -> str:
    """The report as a page with the headings of its parts."""
    level = f"{1 - report.alpha:.0%}"
    lines = ["# SEPA significance", "", f"Recommendation: `{report.recommendation}`. {report.reason}", ""]
    lines += ["## Mean tests", "", f"The run is the unit; {_test_words(report)}.", ""]
    lines += [f"| metric | baseline | candidate | difference | {level} interval over runs | p | d |", "|---" * 7 + "|"]
    lines += [_mean_row(t) for t in report.mean_tests]
    lines += ["", "## Correctness test", "", *_pooled_lines(report.pooled_correct_rate), ""]
    lines += ["## Sample sizes", "", "Runs per arm for 80% power, if the observed difference and spread are true.", ""]
    lines += ["| metric | runs per arm |", "|---|---|"]
    lines += [
        f"| {s.metric} | {'unknown' if s.runs_per_arm is None else s.runs_per_arm} |" for s in report.sample_sizes
    ]
    return "\n".join(lines) + "\n"


# ---- over runs


@dataclass(frozen=True, slots=True)
class _How:
    alpha: float
    resamples: int
    seed: int
    paired: bool


def _mean_test(
    metric: str, baseline: Sequence[EmergenceRunStats], candidate: Sequence[EmergenceRunStats], how: _How
) -> MeanTest | None:
    a, b = _values(metric, baseline, candidate, how.paired)
    if not len(a) or not len(b):
        return None
    few = min(len(a), len(b)) < 2
    moves = not few and (varies(b - a) if how.paired else varies(a) or varies(b))
    interval = _interval(a, b, how) if moves else Interval(float(b.mean() - a.mean()), -inf, inf)
    return MeanTest(
        metric=metric,
        baseline_mean=float(a.mean()),
        candidate_mean=float(b.mean()),
        difference=float(b.mean() - a.mean()),
        ci_low=interval.low,
        ci_high=interval.high,
        p_value=1.0 if few else _permuted(a, b, how).p_two_sided,
        cohens_d=cohens_d(a, b) if not few and (varies(a) or varies(b)) else None,
        baseline_runs=len(a),
        candidate_runs=len(b),
    )


def _values(
    metric: str, baseline: Sequence[EmergenceRunStats], candidate: Sequence[EmergenceRunStats], paired: bool
) -> tuple[np.ndarray, np.ndarray]:
    """The metric of each run that has it; of pairs, of both or of none."""
    a, b = (np.array([getattr(run, metric) for run in arm], np.float64) for arm in (baseline, candidate))
    if paired:
        known = ~np.isnan(a) & ~np.isnan(b)
        return a[known], b[known]
    return a[~np.isnan(a)], b[~np.isnan(b)]


def _permuted(a: np.ndarray, b: np.ndarray, how: _How) -> Permutation:
    rng = np.random.default_rng(how.seed)
    if how.paired:
        return sign_flip_test(a, b, resamples=_draws(2 ** len(a), how), rng=rng)
    return label_permutation_test(a, b, resamples=_draws(comb(len(a) + len(b), len(a)), how), rng=rng)


def _draws(arrangements: int, how: _How) -> int | None:
    return None if arrangements <= MOST_ARRANGEMENTS else how.resamples


def _interval(a: np.ndarray, b: np.ndarray, how: _How) -> Interval:
    found = bootstrap_difference(a, b, paired=how.paired, level=1 - how.alpha, resamples=how.resamples, rng=how.seed)
    return Interval(found.estimate, found.low, found.high)


def _runs_needed(
    metric: str, baseline: Sequence[EmergenceRunStats], candidate: Sequence[EmergenceRunStats], how: _How
) -> int | None:
    a, b = _values(metric, baseline, candidate, how.paired)
    difference = b.mean() - a.mean()
    if min(len(a), len(b)) < 2 or not difference:
        return None
    if how.paired:
        return pairs_needed_by_sign_flips(difference / (b - a).std(ddof=1), alpha=how.alpha) if varies(b - a) else None
    spread = np.hypot(a.std(ddof=1), b.std(ddof=1)) / sqrt(2)
    return runs_needed_by_labels(difference / spread, alpha=how.alpha) if varies(a) or varies(b) else None


def _judged(tests: Sequence[MeanTest], alpha: float) -> tuple[str, str]:
    """The recommendation, and why."""
    deciding = [t for t in tests if t.metric in DECIDING]
    if len(deciding) < len(DECIDING):
        return INSUFFICIENT, "A number that decides is in no log of one of the arms."
    if min(min(t.baseline_runs, t.candidate_runs) for t in deciding) < 2:
        return INSUFFICIENT, "One run per arm says nothing about other seeds, however many completions it has."
    if all(t.p_value <= alpha and t.ci_low > 0 for t in deciding):
        return IMPROVEMENT, "Reward and correct rate are both higher, run for run, than chance explains."
    if all(t.p_value <= alpha and t.ci_high < 0 for t in deciding):
        return DECLINE, "Reward and correct rate are both lower, run for run, than chance explains."
    return INSUFFICIENT, "Reward and correct rate do not both differ by more than the runs of one arm do."


# ---- pooled over runs


def _pooled(
    baseline: Sequence[EmergenceRunStats], candidate: Sequence[EmergenceRunStats], alpha: float
) -> PooledRate | None:
    (k_a, n_a), (k_b, n_b) = (
        (sum(r.correct for r in arm), sum(r.generations for r in arm)) for arm in (baseline, candidate)
    )
    if not n_a or not n_b:
        return None
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
        design_effect=max(cluster_design_effect(_clusters(arm)) for arm in (baseline, candidate)),
    )


def cluster_design_effect(clusters: Sequence[Sequence[bool]]) -> float:
    """The variance of cluster means over that of as many independent answers, at least 1; 1 where nothing varies.

    s^2 of the (K,) means / (p (1 - p) / m), with m the mean size of a cluster (Kish 1965).
    """
    means = np.array([np.mean(c) for c in clusters])
    p, m = float(np.mean([x for c in clusters for x in c])), float(np.mean([len(c) for c in clusters]))
    if len(means) < 2 or not 0 < p < 1:
        return 1.0
    return max(1.0, float(means.var(ddof=1) / (p * (1 - p) / m)))


def _clusters(arm: Sequence[EmergenceRunStats]) -> list[list[bool]]:
    """The answers of each run; of a single run, those of each prompt."""
    if len(arm) > 1:
        return [[right for _, right in run.answers] for run in arm if run.answers]
    by_prompt = defaultdict(list)
    for prompt, right in arm[0].answers:
        by_prompt[prompt].append(right)
    return list(by_prompt.values())


# ---- words


def _test_words(report: SEPASignificanceReport) -> str:
    return f"p permutes {'the signs of paired differences' if report.paired else 'the labels of the runs'}"


def _mean_row(t: MeanTest) -> str:
    d = "" if t.cohens_d is None else f"{t.cohens_d:.2f}"
    interval = f"{t.ci_low:+.4f} to {t.ci_high:+.4f}" if isfinite(t.ci_low) else "too few runs"
    means = f"{t.baseline_mean:.4f} ({t.baseline_runs} runs) | {t.candidate_mean:.4f} ({t.candidate_runs} runs)"
    return f"| {t.metric} | {means} | {t.difference:+.4f} | {interval} | {t.p_value:.4f} | {d} |"


def _pooled_lines(pooled: PooledRate | None) -> list[str]:
    if pooled is None:
        return ["No completion was logged."]
    a, b = pooled.baseline_total, pooled.candidate_total
    return [
        "Descriptive only: completions of one run are not independent, and this test finds differences where there "
        "are none.",
        "",
        f"- baseline {pooled.baseline_correct}/{a}, candidate {pooled.candidate_correct}/{b}: "
        f"{pooled.difference:+.4f} (Newcombe {pooled.ci_low:+.4f} to {pooled.ci_high:+.4f}), "
        f"Fisher p {pooled.fisher_p:.4f}",
        f"- design effect {pooled.design_effect:.1f}: {a} and {b} completions are worth "
        f"{a / pooled.design_effect:.0f} and {b / pooled.design_effect:.0f} independent ones",
    ]
