"""Measure how often every test finds a difference, with and without a true one, on simulated campaigns.

A campaign is hierarchical: seeds, problems, groups and completions, each with luck of its own. 90 s on one idle core:

    python benchmarks/stats_calibration.py
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable, Iterator
from dataclasses import asdict, dataclass
from functools import cache
from pathlib import Path

import numpy as np
from machine import describe
from scipy import stats

from textpolicy import analysis

RESULTS = Path(__file__).parent / "results" / "stats_calibration.jsonl"
ALPHA = 0.05
BAND = (0.035, 0.065)  # of a test that is not exact
PROBLEMS, GROUP = 64, 4  # judged on in each run; completions of each


@dataclass(frozen=True)
class Luck:
    """Standard deviations in logits: what makes runs differ."""

    problem: float = 1.5  # some problems are hard, for all runs
    seed: float = 0.2  # shared by the arms of one seed
    run: float = 0.3  # of one run alone: the luck of its training
    knack: float = 0.8  # of one run for one problem


TRAINED = Luck()
GIVEN = Luck(seed=0.0, run=0.0)  # two models of the same skill, which differ problem by problem


@dataclass(frozen=True)
class Row:
    """One test on null campaigns. ``bound`` is what it promises: exact (at most alpha), band, or none of misuse."""

    test: str
    data: str
    campaigns: int
    type_1: float
    bound: str

    @property
    def holds(self) -> bool:
        low, high = {"exact": (0.0, ALPHA), "band": BAND, "misuse": (0.0, 1.0)}[self.bound]
        return low <= self.type_1 <= high


@dataclass(frozen=True)
class Power:
    """One test on campaigns with a true effect, and what the power formula says."""

    test: str
    effect_in_sd: float
    predicted: float
    simulated: float


def simulate(
    rng: np.random.Generator,
    campaigns: int,
    seeds: int,
    *,
    arms: int = 2,
    effect: float = 0.0,
    luck: Luck = TRAINED,
    problems: int = PROBLEMS,
    group: int = GROUP,
) -> np.ndarray:
    """(campaigns, seeds, arms, problems) correct completions out of ``group``; the last arm is better by ``effect``."""

    def normal(sd: float, *shape: int) -> np.ndarray:
        return sd * rng.standard_normal(shape, np.float32)

    logits = (
        normal(luck.problem, campaigns, 1, 1, problems)
        + normal(luck.seed, campaigns, seeds, 1, 1)
        + normal(luck.run, campaigns, seeds, arms, 1)
        + normal(luck.knack, campaigns, seeds, arms, problems)
    )
    logits[:, :, -1] += effect
    return rng.binomial(group, 1 / (1 + np.exp(-logits)))  # fmt: skip


def runs_of(rng: np.random.Generator, campaigns: int, seeds: int, *, arms: int = 2, effect: float = 0.0) -> np.ndarray:
    """(campaigns, seeds, arms): the summary of each run, the share of its completions that are correct."""
    parts = [min(1000, campaigns - start) for start in range(0, campaigns, 1000)]
    return np.concatenate([simulate(rng, n, seeds, arms=arms, effect=effect).mean(axis=-1) / GROUP for n in parts])


# ---- type-I error


def null_rows(rng: np.random.Generator, n: int) -> Iterator[Row]:
    yield from paired_rows(rng, n)
    yield from unpaired_rows(rng, n)
    yield from sequential_rows(rng, n)
    yield from given_models_rows(rng, n)
    yield from independent_rows(rng, n)
    yield from misuse_rows(rng, n)


def paired_rows(rng: np.random.Generator, n: int) -> Iterator[Row]:
    for seeds in (6, 8):
        d = differences(runs_of(rng, 5 * n, seeds))
        agree(analysis.sign_flip_p_values, lambda x: analysis.sign_flip_test(0 * x, x).p_two_sided, d)
        yield rate("sign flips, all", f"{seeds} pairs", analysis.sign_flip_p_values(d), "exact")
    d = differences(runs_of(rng, n, 20))
    drawn = [analysis.sign_flip_test(0 * x, x, resamples=999, rng=i).p_two_sided for i, x in enumerate(d)]
    yield rate("sign flips, 999 drawn", "20 pairs", drawn, "band")
    for seeds in (6, 12):
        d = differences(runs_of(rng, n, seeds))
        yield rate("paired t", f"{seeds} pairs", stats.ttest_1samp(d, 0, axis=1).pvalue, "band")
    d = differences(runs_of(rng, n, 8))
    yield rate("Wilcoxon", "8 pairs", [analysis.wilcoxon_test(0 * x, x).p for x in d], "exact")
    runs = runs_of(rng, 5 * n, 8, arms=4)
    p = np.transpose([analysis.sign_flip_p_values(runs[:, :, arm] - runs[:, :, 0]) for arm in (1, 2, 3)])
    least = np.minimum(1, 3 * p.min(axis=1))  # Holm's procedure rejects any of three if it rejects the least
    agree(lambda x: np.minimum(1, 3 * x.min(axis=1)), lambda x: min(analysis.correct_p_values(x, ALPHA, "holm").p), p)
    yield rate("sign flips, Holm over 3 arms", "8 pairs, any arm found", least, "exact")


def unpaired_rows(rng: np.random.Generator, n: int) -> Iterator[Row]:
    a, b = unpaired(rng, 5 * n, 5, 5)
    agree_two(analysis.label_permutation_p_values, lambda x, y: analysis.label_permutation_test(x, y).p_two_sided, a, b)
    yield rate("labels, all", "5 and 5 runs", analysis.label_permutation_p_values(a, b), "exact")
    yield rate("Student's t", "5 and 5 runs", stats.ttest_ind(b, a, axis=1).pvalue, "band")
    yield rate("Welch's t", "5 and 5 runs", stats.ttest_ind(b, a, axis=1, equal_var=False).pvalue, "band")
    yield rate(
        "Mann-Whitney",
        "5 and 5 runs",
        [analysis.mann_whitney_test(*x).p for x in zip(a[:n], b[:n], strict=True)],
        "exact",
    )
    a, b = unpaired(rng, n, 12, 8)
    drawn = [
        analysis.label_permutation_test(x, y, resamples=199, rng=np.random.default_rng(i)).p_two_sided
        for i, (x, y) in enumerate(zip(a, b, strict=True))
    ]
    yield rate("labels, 199 drawn", "12 and 8 runs", drawn, "band")


def sequential_rows(rng: np.random.Generator, n: int) -> Iterator[Row]:
    d = differences(runs_of(rng, n, 30))
    p = 1 / analysis.e_process(d).max(axis=1)
    agree(
        lambda x: np.minimum(1, 1 / analysis.e_process(x).max(axis=1)), lambda x: analysis.anytime_test(0 * x, x).p, d
    )
    yield rate("e-process, every look", "30 pairs, stopped at the first find", p, "exact")


def given_models_rows(rng: np.random.Generator, n: int) -> Iterator[Row]:
    correct = simulate(rng, n, 2, luck=GIVEN, problems=200) / GROUP
    a, b = correct[:, :, 0], correct[:, :, 1]
    found = [analysis.clustered_difference(x, y) for x, y in zip(a, b, strict=True)]
    t = np.array([f.mean / f.se_by_problem for f in found])
    yield rate("clustered by problem, t", "2 given models an arm, 200 problems", 2 * stats.t.sf(np.abs(t), 199), "band")
    parts = [simulate(rng, n, 1, luck=GIVEN, problems=200, group=1)[:, 0] for _ in range(5)]
    one = np.concatenate(parts)
    only = [((x > y).sum(), (y > x).sum()) for x, y in one]
    for method, bound in (("exact", "exact"), ("mid-p", "band"), ("chi2", "exact")):
        p = [mcnemar(int(x), int(y), method) for x, y in only]
        yield rate(f"McNemar, {method}", "2 given models, 200 problems", p, bound)


def independent_rows(rng: np.random.Generator, n: int) -> Iterator[Row]:
    k = rng.binomial(20, 0.4, (5 * n, 2))
    yield rate("Fisher", "20 and 20 independent answers", [fisher(*map(int, x), 20) for x in k], "exact")
    yield rate("Barnard", "20 and 20 independent answers", [barnard(*map(int, x), 20) for x in k], "exact")
    k = rng.binomial(200, 0.4, (n, 2))
    yield rate("pooled z", "200 and 200 independent answers", [pooled_z(*map(int, x), 200) for x in k], "band")
    outside = [0.0 if newcombe_excludes_0(*map(int, x), 200) else 1.0 for x in k]
    yield rate("Newcombe excludes 0", "200 and 200 independent answers", outside, "band")


def misuse_rows(rng: np.random.Generator, n: int) -> Iterator[Row]:
    correct = simulate(rng, n, 6)
    total = 6 * PROBLEMS * GROUP
    k = correct.sum(axis=(1, 3))
    yield rate(
        "Fisher, all completions pooled", "6 runs an arm", [fisher(int(a), int(b), total) for a, b in k], "misuse"
    )
    share = correct / GROUP
    found = [analysis.clustered_difference(x[:, 0], x[:, 1]) for x in share]
    t = np.array([f.mean / f.se_by_problem for f in found])
    p = 2 * stats.t.sf(np.abs(t), PROBLEMS - 1)
    yield rate("clustered by problem, said of other seeds", "6 runs an arm", p, "misuse")
    d = differences(runs_of(rng, n, 20))[:, :15]
    looks = np.min([analysis.sign_flip_p_values(d[:, :seeds]) for seeds in range(6, 16)], axis=0)
    yield rate("sign flips after every pair", "6 to 15 pairs, stopped at the first find", looks, "misuse")


# ---- coverage


def coverages(rng: np.random.Generator, n: int) -> dict[str, float]:
    """Share of 95% intervals that hold the true difference, which is 0."""
    found: dict[str, float] = {}
    for seeds in (6, 12):
        d = differences(runs_of(rng, n, seeds))
        found[f"sign flips, {seeds} pairs"] = held([analysis.sign_flip_interval(x) for x in d])
        found[f"BCa bootstrap, {seeds} pairs"] = held([analysis.bootstrap_mean(x, resamples=999) for x in d])
    return found


def held(intervals: list) -> float:
    return float(np.mean([i.low <= 0 <= i.high for i in intervals]))


# ---- power


def powers(rng: np.random.Generator, n: int) -> Iterator[Power]:
    for pairs, effect in ((6, 0.75), (8, 0.6), (10, 0.5), (15, 0.4)):
        d = differences(runs_of(rng, n, pairs, effect=effect))
        dz = true_dz(rng, effect)
        yield power(
            "sign flips", f"{pairs} pairs", dz, analysis.power_of_sign_flips(dz, pairs), analysis.sign_flip_p_values(d)
        )
        yield power(
            "paired t", f"{pairs} pairs", dz, analysis.power_of_pairs(dz, pairs), stats.ttest_1samp(d, 0, axis=1).pvalue
        )
    for runs, effect in ((5, 0.8), (8, 0.6)):
        a, b = unpaired(rng, n, runs, runs, effect)
        d = true_d(rng, effect)
        p = analysis.label_permutation_p_values(a, b)
        yield power("labels", f"{runs} and {runs} runs", d, analysis.power_of_labels(d, runs), p)
        p = stats.ttest_ind(b, a, axis=1).pvalue
        yield power("Student's t", f"{runs} and {runs} runs", d, analysis.power_of_runs(d, runs), p)
    for pairs, effect in ((12, 0.6), (24, 0.4)):
        d = differences(runs_of(rng, n, pairs, effect=effect))
        dz = true_dz(rng, effect)
        p = 1 / analysis.e_process(d).max(axis=1)
        yield power("e-process", f"by {pairs} pairs", dz, analysis.power_of_anytime(dz, pairs), p)


def power(test: str, data: str, effect: float, predicted: float, p: np.ndarray) -> Power:
    return Power(f"{test}, {data}", round(effect, 3), round(predicted, 4), round(float(np.mean(p <= ALPHA)), 4))


def true_dz(rng: np.random.Generator, effect: float) -> float:
    """The effect in SD of paired differences, from 20,000 pairs."""
    d = differences(runs_of(rng, 4000, 5, effect=effect))
    return float(d.mean() / np.sqrt(d.var(axis=1, ddof=1).mean()))  # within campaigns, which share their problems


def true_d(rng: np.random.Generator, effect: float) -> float:
    """The effect in SD of runs, from 20,000 runs an arm."""
    a, b = unpaired(rng, 4000, 5, 5, effect)
    spread = np.sqrt((a.var(axis=1, ddof=1) + b.var(axis=1, ddof=1)).mean() / 2)
    return float((b - a).mean() / spread)


# ---- parts


def differences(runs: np.ndarray) -> np.ndarray:
    """(campaigns, seeds): the last arm minus the first."""
    return runs[:, :, -1] - runs[:, :, 0]


def unpaired(
    rng: np.random.Generator, n: int, first: int, second: int, effect: float = 0.0
) -> tuple[np.ndarray, np.ndarray]:
    """Runs of as many seeds, each in one arm only."""
    runs = runs_of(rng, n, first + second, effect=effect)
    return runs[:, :first, 0], runs[:, first:, 1]


def rate(test: str, data: str, p: np.ndarray | list[float], bound: str) -> Row:
    return Row(test, data, len(p), round(float(np.mean(np.asarray(p) <= ALPHA)), 4), bound)


def agree(fast: Callable, public: Callable, rows: np.ndarray) -> None:
    """The vectorised form and the public function say the same of 20 campaigns."""
    np.testing.assert_allclose(fast(rows[:20]), [public(row) for row in rows[:20]])


def agree_two(fast: Callable, public: Callable, a: np.ndarray, b: np.ndarray) -> None:
    np.testing.assert_allclose(fast(a[:20], b[:20]), [public(x, y) for x, y in zip(a[:20], b[:20], strict=True)])


@cache
def fisher(a: int, b: int, total: int) -> float:
    return analysis.fisher_test([[b, total - b], [a, total - a]]).p


@cache
def barnard(a: int, b: int, total: int) -> float:
    return analysis.barnard_test([[b, total - b], [a, total - a]]).p


@cache
def pooled_z(a: int, b: int, total: int) -> float:
    return analysis.pooled_z_test(a, total, b, total).p


@cache
def newcombe_excludes_0(a: int, b: int, total: int) -> bool:
    found = analysis.rate_difference_interval(a, total, b, total)
    return not found.low <= 0 <= found.high


@cache
def mcnemar(only_a: int, only_b: int, method: str) -> float:
    return analysis.mcnemar_test(only_a, only_b, method).p  # type: ignore[arg-type]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--campaigns", type=int, default=4000)
    parser.add_argument("--dry", action="store_true", help="append no row")
    asked = parser.parse_args()
    started = time.perf_counter()
    rng = np.random.default_rng(0)
    rows = list(null_rows(rng, asked.campaigns))
    found = list(powers(rng, asked.campaigns))
    covered = coverages(rng, min(1000, asked.campaigns))
    print("\n".join(tables(rows, found, covered)))
    fine = all(r.holds for r in rows) and all(abs(p.predicted - p.simulated) <= 0.05 for p in found)
    print("every promise holds" if fine else "NOT every promise holds")
    if not asked.dry:
        tests = [{**asdict(r), "holds": bool(r.holds)} for r in rows]
        measured = {
            "tests": tests,
            "power": [asdict(p) for p in found],
            "coverage": covered,
            "every_promise_holds": fine,
        }
        seconds = round(time.perf_counter() - started, 1)
        record = {"benchmark": "stats_calibration", "alpha": ALPHA, **measured, "seconds": seconds, **describe()}
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(record) + "\n")


def tables(rows: list[Row], found: list[Power], covered: dict[str, float]) -> list[str]:
    """For a page."""
    promise = {"exact": "at most 5%", "band": "3.5% to 6.5%", "misuse": "none: misuse"}
    lines = ["| test | data | null campaigns | type-I error | promise |", "|---|---|---|---|---|"]
    lines += [
        f"| {r.test} | {r.data} | {r.campaigns} | {r.type_1:.1%}{'' if r.holds else ' (!)'} | {promise[r.bound]} |"
        for r in rows
    ]
    lines += ["", "| test | effect, SD | predicted power | simulated |", "|---|---|---|---|"]
    lines += [f"| {p.test} | {p.effect_in_sd:.2f} | {p.predicted:.1%} | {p.simulated:.1%} |" for p in found]
    lines += ["", "| 95% interval | holds the truth |", "|---|---|"]
    return [*lines, *(f"| {name} | {share:.1%} |" for name, share in covered.items()), ""]


if __name__ == "__main__":
    main()
