"""Runs the vectors of the statistics: the first part of an id names the kind."""

from __future__ import annotations

import math
import random
import re
from collections.abc import Callable
from typing import Any

import numpy as np
from vectors import Answer, Case, UnknownCase

from textpolicy import analysis
from textpolicy.analysis import Interval, Permutation

NOT_TARGETS = {"barnard_p": "null for large tables, where scipy's search takes seconds; compared wherever it is given"}


def check(case: Case) -> list[Answer]:
    kind, _, rest = case.id.partition("/")
    if kind not in KINDS:
        raise UnknownCase(case.id)
    answers = KINDS[kind](case, rest)
    return [answer for answer in answers if answer.key in case.expected]


def fisher(case: Case, rest: str) -> list[Answer]:
    table = case.inputs["table"]
    two_sided = analysis.fisher_test(table, case.params["alternative"])
    answers = [
        Answer("p_value", two_sided.p),
        Answer("odds_ratio", _absent(two_sided.statistic)),
        Answer("p_less", analysis.fisher_test(table, "less").p),
        Answer("p_greater", analysis.fisher_test(table, "greater").p),
    ]
    if case.expected.get("barnard_p") is not None:  # scipy takes columns for arms, and the file gave it rows
        answers.append(Answer("barnard_p", analysis.barnard_test(np.transpose(table), mirrored=False).p))
    return answers


def t_tests(case: Case, rest: str) -> list[Answer]:
    a, b = case.inputs["a"], case.inputs["b"]
    paired, student, welch = analysis.paired_test(a, b), analysis.student_test(a, b), analysis.welch_test(a, b)
    return [
        Answer("paired", {"t": paired.t, "p": paired.p, "ci95": [paired.low, paired.high]}),
        Answer("student", {"t": student.t, "p": student.p}),
        Answer("welch", {"t": welch.t, "p": welch.p, "df": welch.df}),
        Answer("wilcoxon_exact", analysis.wilcoxon_test(a, b, method="exact").p),
        Answer("mannwhitney_exact", analysis.mann_whitney_test(a, b, method="exact").p),
        Answer("cohens_d", analysis.cohens_d(a, b)),
        Answer("cohens_dz", analysis.cohens_dz(a, b)),
    ]


def permutation(case: Case, rest: str) -> list[Answer]:
    if rest == "min_p_by_pairs":
        return [Answer(pairs, analysis.smallest_sign_flip_p(int(pairs))) for pairs in case.expected]
    a, b = case.inputs["a"], case.inputs["b"]
    if "resamples" in case.params:
        rng = random.Random(case.params["seed"])  # the file counts ties as floating point has them
        drawn = analysis.label_permutation_test(a, b, resamples=case.params["resamples"], rng=rng, ties=0.0)
        return [
            Answer("p_value", drawn.p_two_sided),
            Answer("exact", analysis.label_permutation_test(a, b).p_two_sided),
        ]
    return _permutation(analysis.sign_flip_test(a, b) if _paired(rest) else analysis.label_permutation_test(a, b))


def _permutation(found: Permutation) -> list[Answer]:
    values = [
        (found.p_two_sided, ("p_value", "p", "p_two_sided", "exact", "two_sided")),
        (found.p_less, ("p_less", "less")),
        (found.p_greater, ("p_greater", "greater")),
        (found.p_doubled, ("p_doubled",)),
        (found.difference, ("diff", "difference", "mean_diff", "observed")),
        (found.arrangements, ("arrangements", "n_permutations", "n_resamples")),
    ]
    return [Answer(key, value) for value, keys in values for key in keys]


def bootstrap(case: Case, rest: str) -> list[Answer]:
    if rest.startswith("exhaustive"):
        x = case.inputs["x"]
        found = analysis.bootstrap_exhaustive(x, level=case.params["level"])
        return [
            Answer("n_resamples", found.resamples),
            Answer("mean", found.estimate),
            Answer("se", found.se),
            Answer("se_formula", analysis.bootstrap_standard_error(x)),
            Answer("ci", [found.low, found.high]),
        ]
    given = case.params
    method = next((m for m in ("BCa", "basic") if m.lower() in rest.lower()), "percentile")
    how = {
        "level": given.get("level", 0.95),
        "method": method,
        "resamples": given.get("n_resamples", given.get("resamples")),
        "rng": given.get("seed", 7),
    }
    if "x" in case.inputs:
        found = analysis.bootstrap_mean(case.inputs["x"], **how)
    else:
        found = analysis.bootstrap_difference(case.inputs["a"], case.inputs["b"], paired=_paired(rest), **how)
    tolerance = given["mc_tolerance"]
    return [Answer("ci", [found.low, found.high], atol=tolerance), Answer("se", found.se, atol=tolerance / 10)]


def clustered(case: Case, rest: str) -> list[Answer]:
    a, b = case.array("a"), case.array("b")
    found = analysis.clustered_difference(a, b)
    return [
        Answer("mean_diff", found.mean),
        Answer("se_clustered_by_problem", found.se_by_problem),
        Answer("se_iid", found.se_iid),
        Answer("per_seed_diff", found.per_run),
        Answer("se_by_seed", found.se_by_run),
        Answer("icc_like_design_effect", analysis.observed_design_effect(a)),
    ]


def mcnemar(case: Case, rest: str) -> list[Answer]:
    counts = case.inputs["only_a"], case.inputs["only_b"]
    return [
        Answer("p_exact", analysis.mcnemar_test(*counts).p),
        Answer("p_mid", analysis.mcnemar_test(*counts, "mid-p").p),
        Answer("chi2_cc", analysis.mcnemar_test(*counts, "chi2").statistic),
    ]


def rate_ci(case: Case, rest: str) -> list[Answer]:
    k, n, alpha = case.inputs["successes"], case.inputs["n"], case.params["alpha"]
    return [Answer(m, _bounds(analysis.rate_interval(k, n, alpha=alpha, method=m))) for m in case.expected]


def rate_diff(case: Case, rest: str) -> list[Answer]:
    i = case.inputs
    arms = i["a"], i["n_a"], i["b"], i["n_b"]
    z, newcombe, wald, agresti_caffo = (
        analysis.pooled_z_test(*arms),
        *(
            analysis.rate_difference_interval(*arms, alpha=case.params["alpha"], method=method)
            for method in ("newcombe", "wald", "agresti-caffo")
        ),
    )
    return [
        Answer("diff", newcombe.estimate),
        Answer("newcombe", _bounds(newcombe)),
        Answer("wald", _bounds(wald)),
        Answer("agresti_caffo", _bounds(agresti_caffo)),
        Answer("z_pooled", z.statistic),
        Answer("p_pooled", z.p),
    ]


def power(case: Case, rest: str) -> list[Answer]:
    p = case.params
    if "icc" in p:
        effect = Answer("deff", analysis.design_effect(p["cluster"], p["icc"]))
        sizes = [(key, re.fullmatch(r"effective_n_of_(\d+)", key)) for key in case.expected]
        return [
            effect,
            *(Answer(key, analysis.effective_answers(int(m[1]), p["cluster"], p["icc"])) for key, m in sizes if m),
        ]
    levels = {"alpha": p["alpha"], "power": p["power"]}
    if "d" in p:
        return _power_of_means(case, p["d"], levels)
    if "p1" in p:
        rates = p["p1"], p["p2"]
        return [
            Answer("n_per_arm_pooled_z", math.ceil(analysis.answers_needed_per_arm_pooled_z(*rates, **levels))),
            Answer("cohens_h", analysis.cohens_h(*rates)),
            Answer("n_per_arm_arcsine", analysis.answers_needed_per_arm(*rates, **levels)),
        ]
    raise UnknownCase(case.id)


def _power_of_means(case: Case, d: float, levels: dict[str, float]) -> list[Answer]:
    answers = [
        Answer("n_per_arm_ttest_ind", analysis.runs_needed_per_arm(d, **levels)),
        Answer("n_pairs_ttest_paired", analysis.pairs_needed(d, **levels)),
        Answer("n_per_arm_normal", analysis.runs_needed_per_arm_normal(d, **levels)),
    ]
    for key in case.expected:
        if found := re.fullmatch(r"power_with_(\d+)_(pairs|per_arm)", key):
            chance = analysis.power_of_pairs if found[2] == "pairs" else analysis.power_of_runs
            answers.append(Answer(key, chance(d, int(found[1]), alpha=levels["alpha"])))
    return answers


def multiplicity(case: Case, rest: str) -> list[Answer]:
    found = analysis.correct_p_values(case.inputs["p"], case.params["alpha"], rest)
    return [Answer("reject", found.reject), Answer("p_adjusted", found.p)]


def stopping(case: Case, rest: str) -> list[Answer]:
    return [Answer("rule", analysis.STOPPING_RULE)]


def summary(case: Case, rest: str) -> list[Answer]:
    found = analysis.summarize_curve(case.inputs["curve"], last=case.params["last"])
    return [
        Answer("auc_trapezoid", found.auc),
        Answer("final", found.final),
        Answer("mean_last_k", found.mean_last),
        Answer("best", found.best),
    ]


def _paired(rest: str) -> bool:
    """Whether the name of a case speaks of runs paired by seed."""
    return re.search("pair|sign|flip", rest.replace("unpaired", "")) is not None


def _bounds(interval: Interval) -> list[float]:
    return [interval.low, interval.high]


def _absent(value: float) -> float | None:
    """NaN as the null that the files have for it."""
    return None if math.isnan(value) else value


KINDS: dict[str, Callable[[Case, str], list[Any]]] = {
    "fisher": fisher,
    "t_tests": t_tests,
    "permutation": permutation,
    "bootstrap": bootstrap,
    "clustered": clustered,
    "mcnemar": mcnemar,
    "rate_ci": rate_ci,
    "rate_diff": rate_diff,
    "power": power,
    "multiplicity": multiplicity,
    "sprt_like_note": stopping,
    "summary": summary,
}
