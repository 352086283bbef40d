"""DPPO's masks by total variation and by KL, ipo's, and DRO: values, gradients, and the share of dropped tokens."""

from __future__ import annotations

import numpy as np
from objective import answers, rows, weights_of
from vectors import Answer, Case, UnknownCase

from textpolicy.losses import CrossEntropy, Surrogate, WithinDivergence, tokens_of

NOT_TARGETS = {"value": "prime-rl's -rho A, where ours is verl's -sg(rho) A l: the same gradient"}


def check(case: Case) -> list[Answer]:
    logprobs, how = case.array("logprobs"), surrogate(case)
    weights = weights_of(case.array("mask"), case.params["agg"])
    batch = rows(case.array("old_logprobs"), case.array("advantages"), weights)
    low, high = how.objective.clipped(tokens_of(logprobs, batch, np, how), np)
    found = [*answers(logprobs, batch, how), Answer("clip_frac", (low | high)[batch.weights != 0].mean())]
    # verl adds 1e-8 to the count of the mask and, in its means over rows, to a row's
    loose = ("clip_frac",) if case.params["agg"] == "token-mean" else ("clip_frac", "loss")
    found = [Answer(a.key, a.value, "float32") if a.key in loose else a for a in found]
    return [a for a in found if a.key in case.expected]


def surrogate(case: Case) -> Surrogate:
    p = case.params
    match p["objective"]:
        case "dppo_tv" | "dppo_kl":
            kind = p["objective"].removeprefix("dppo_")
            return Surrogate(WithinDivergence(kind, p["low"], p["high"], weight_high=p["weight_high"]))
        case "prime_default" | "prime_ipo":
            symmetric = p["objective"] == "prime_ipo"
            objective = WithinDivergence("tv", p["low"], p["high"], symmetric, weight_high=None)
            return Surrogate(objective, drift=p["drift"])
        case "dro":
            return Surrogate(CrossEntropy(), drift=p["beta"])
    raise UnknownCase(case.id)
