"""Aggregation modes over a fixed matrix of token losses."""

from __future__ import annotations

import numpy as np
from objective import weights_of
from vectors import Answer, Case, UnknownCase

NAMES = ("token-mean", "seq-mean-token-mean", "seq-mean-token-sum", "seq-mean-token-sum-norm", "token-sum")


def check(case: Case) -> list[Answer]:
    losses, mask, mode = case.array("loss_mat"), case.array("mask"), case.params["mode"]
    if "micro_batches" in case.params:
        return micro_batches(losses, mask, mode, case.params["micro_batches"])
    length = case.params.get("max_len")
    if mode == "dr_grpo":
        mode, empty = "seq-mean-token-sum-norm", "in_denominator"
    elif mode in NAMES:
        empty = case.params.get("empty_rows")
        length = mask.shape[1] / mask.any(axis=1).sum()  # verl divides by the padded width and not by the rows
    else:
        raise UnknownCase(case.id)
    w = weights_of(mask, mode, length, empty)
    # verl adds 1e-8 to a row's count, which float64's tolerance would see and the batch's float32 does not
    return [Answer("loss", (w * losses).sum(), "float32"), Answer("weights", w, "float32")]


def micro_batches(losses: np.ndarray, mask: np.ndarray, mode: str, parts: list[list[int]]) -> list[Answer]:
    whole = weights_of(mask, mode) * losses
    local = [(weights_of(mask[rows], mode) * losses[rows]).sum() for rows in parts]
    return [
        Answer("full", whole.sum()),
        Answer("parts_with_global_denominator", [whole[rows].sum() for rows in parts]),
        Answer("parts_local_mean_averaged", np.mean(local)),
    ]
