"""Token losses: objective, ratio, clipping, KL and aggregation, values and gradients."""

from __future__ import annotations

import numpy as np
from objective import answers, rows, weights_of
from vectors import Answer, Case, UnknownCase

from textpolicy.losses import (
    KL,
    Clip,
    ClippedWeight,
    ImportanceSampling,
    SoftGate,
    Surrogate,
    kl_estimate,
    tokens_of,
)

AGGREGATION = {  # loss type -> (aggregation, what becomes of empty rows), in TRL's terms
    "grpo": ("seq-mean-token-mean", "in_denominator"),
    "sapo": ("seq-mean-token-mean", "in_denominator"),
    "bnpo": ("token-mean", None),
    "dapo": ("token-mean", None),
    "dr_grpo": ("seq-mean-token-sum-norm", "in_denominator"),
    "luspo": ("seq-mean-token-sum", "in_denominator"),
}


def check(case: Case) -> list[Answer]:
    logprobs, mask = case.array("logprobs"), case.array("mask")
    reference = case.array("ref_logprobs") if "ref_logprobs" in case.inputs else None
    batch = rows(case.array("old_logprobs"), case.array("advantages"), weights(case, mask), reference)
    how = surrogate(case)
    return [*answers(logprobs, batch, how), *clip_fractions(case, logprobs, batch, how), *mean_kl(case, logprobs, mask)]


def weights(case: Case, mask: np.ndarray) -> np.ndarray:
    p = case.params
    if "agg" not in p:
        if p["loss_type"] not in AGGREGATION:
            raise UnknownCase(case.id)
        return weights_of(mask, *_with_length(*AGGREGATION[p["loss_type"]], p.get("max_completion_length")))
    length = mask.shape[1] / mask.any(axis=1).sum()  # verl divides by the padded width and not by the rows
    return weights_of(mask, p["agg"], length, p.get("empty_rows"))


def _with_length(aggregation: str, empty_rows: str | None, length: float | None) -> tuple:
    return aggregation, length, empty_rows


def surrogate(case: Case) -> Surrogate:
    p = case.params
    kl = KL(p["beta"], p.get("kl", "k3"), p.get("kl_importance_weighted", False)) if p.get("beta") else None
    ratio = "sequence" if p["loss_type"] == "luspo" else "token"
    return Surrogate(objective(case), ratio, kl)


def objective(case: Case):
    p = case.params
    match p["loss_type"]:
        case "cispo":
            return ClippedWeight(p["ratio_min"], p["ratio_max"])
        case "sapo":
            return SoftGate(p["tau_pos"], p["tau_neg"])
        case "importance_sampling":
            return ImportanceSampling()
        case "ppo" | "grpo" | "bnpo" | "dapo" | "dr_grpo" | "luspo":
            return Clip(p["eps_low"], p["eps_high"], p.get("delta"), p.get("dual_clip_c"))
    raise UnknownCase(case.id)


def clip_fractions(case: Case, logprobs: np.ndarray, batch, how: Surrogate) -> list[Answer]:
    if "clip_frac" not in case.expected:
        return []
    live = batch.weights != 0
    low, high = how.objective.clipped(tokens_of(logprobs, batch, np, how), np)
    fraction = {"clip_frac_low": low[live].mean(), "clip_frac_high": high[live].mean()}
    return [Answer(k, v) for k, v in {**fraction, "clip_frac": sum(fraction.values())}.items()]


def mean_kl(case: Case, logprobs: np.ndarray, mask: np.ndarray) -> list[Answer]:
    if "mean_kl" not in case.expected:
        return []
    value = kl_estimate(logprobs, case.array("ref_logprobs"), case.params["kl"], np)
    if case.params["kl_importance_weighted"]:
        value = value * np.exp(logprobs - case.array("old_logprobs"))
    return [Answer("mean_kl", value[mask != 0].mean())]
