"""Weights by surprisal: of one completion, of several, and how far from uniform they are."""

from __future__ import annotations

import numpy as np
from vectors import Answer, Case, UnknownCase

from textpolicy.algorithms.weighting import uncertainty_weights


def check(case: Case) -> list[Answer]:
    if "lengths" in case.inputs:
        return several_completions(case)
    if "cosine_to_uniform" in case.expected:
        return effect_size(case)
    if "weights" not in case.expected:
        raise UnknownCase(case.id)
    w = weights(case, case.params["beta"])
    advantages = case.inputs["advantage"] * w
    return [Answer("weights", w), Answer("advantages", advantages), Answer("sum_weights", w.sum())]


def weights(case: Case, beta: float) -> np.ndarray:
    surprisal = case.array("surprisal")
    return uncertainty_weights(surprisal, np.zeros(len(surprisal), int), beta)


def several_completions(case: Case) -> list[Answer]:
    row = np.repeat(np.arange(len(case.inputs["lengths"])), case.inputs["lengths"])
    advantage, surprisal, beta = case.array("advantages")[row], case.array("surprisal"), case.params["beta"]
    return [
        Answer("per_completion", advantage * uncertainty_weights(surprisal, row, beta)),
        Answer("batch_mean", advantage * uncertainty_weights(surprisal, np.zeros_like(row), beta)),
    ]


def effect_size(case: Case) -> list[Answer]:
    """Measured on our weights; the closed forms leave out the 1e-8 in the denominator, hence their bound."""
    w = weights(case, case.params["beta"])
    cosine = w.sum() / np.sqrt(len(w) * (w @ w))
    return [
        Answer("std_weights", w.std()),
        Answer("cosine_to_uniform", cosine),
        Answer("closed_form", cosine, atol=1e-7),
        Answer("relative_l2_change", np.sqrt(np.mean((w - 1) ** 2)), atol=1e-7),
        Answer("cv", weights(case, 1.0).std(), atol=1e-7),
    ]
