"""SEPA's pooling: the values, their mean, and the variance off the planning tokens; per completion and over a batch."""

from __future__ import annotations

import numpy as np
from vectors import Answer, Case, UnknownCase

from textpolicy.algorithms.sepa import pool_execution


def check(case: Case) -> list[Answer]:
    if "lengths" in case.inputs:
        row = np.repeat(np.arange(len(case.inputs["lengths"])), case.inputs["lengths"])
        return [Answer("per_completion", pool(case, row)), Answer("batch", pool(case, np.zeros_like(row)))]
    if "pooled" not in case.expected:
        raise UnknownCase(case.id)
    pooled = pool(case, np.zeros(len(case.inputs["surprisal"]), int))
    execution = pooled[~planning(case)]
    return [
        Answer("pooled", pooled),
        Answer("mean", pooled.mean() if len(pooled) else None),
        Answer("exec_var", execution.var() if len(execution) else None),
    ]


def pool(case: Case, row: np.ndarray) -> np.ndarray:
    return pool_execution(case.array("surprisal"), planning(case), row, case.params["lam"])


def planning(case: Case) -> np.ndarray:
    return case.array("planning_mask") != 0
