"""What the baselines estimate: exact expectations over all outcomes of N Bernoulli completions."""

from __future__ import annotations

from math import comb

import numpy as np
from vectors import Answer, Case

from textpolicy.algorithms.credit import Rewards
from textpolicy.algorithms.grpo import GroupRelative
from textpolicy.algorithms.maxrl import MeanNormalized
from textpolicy.algorithms.rloo import LeaveOneOut

NOT_TARGETS = {
    "E_success_average": "an estimator of the paper's theorem that is no recipe here",
    "E_with_control_variate_on_allfail": "a variant that credits all-fail groups, which no recipe does",
    "dJ_RL": "the target of E_rloo, compared through it",
    "dJ_ML": "a limit",
    "dJ_T_N": "the target of E_success_average",
    "dJ_T_Nminus1": "the target of E_mean_normalised_allfail_zero, compared through it",
}


def check(case: Case) -> list[Answer]:
    n, p = case.inputs["N"], case.inputs["p"]
    ours = {
        "E_grpo_nostd": expectation(GroupRelative("none"), n, p),
        "E_grpo_std": expectation(GroupRelative("group", 1e-6), n, p),
        "E_rloo": expectation(LeaveOneOut(), n, p),
        "E_mean_normalised_allfail_zero": expectation(MeanNormalized(0.0), n, p),
    }
    identities = [Answer("dJ_RL", ours["E_rloo"]), Answer("dJ_T_Nminus1", ours["E_mean_normalised_allfail_zero"])]
    return [Answer(k, v, *_tolerance(k)) for k, v in ours.items()] + identities


def _tolerance(key: str) -> tuple:
    return ("float32",) if key == "E_grpo_std" else ("float64",)  # its eps is not in the vector


def expectation(baseline, n: int, p: float) -> float:
    """E[(1/N) sum_i A_i S_i], S = 1/p in success and -1/(1-p) in failure, by the number of successes K."""
    total = 0.0
    for k in range(n + 1):
        outcome = np.array([1.0] * k + [0.0] * (n - k))
        score = np.where(outcome == 1, 1 / p, -1 / (1 - p))
        probability = comb(n, k) * p**k * (1 - p) ** (n - k)
        total += probability * (baseline(Rewards.of(outcome)) * score).mean()
    return total
