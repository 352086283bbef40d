"""KL estimators, values and derivatives."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from vectors import Answer, Case

from textpolicy.losses import kl_estimate

MASK = np.array([[1, 1, 1, 1, 1], [1, 1, 1, 0, 0], [1, 0, 0, 0, 0]])  # of the file's arrays; one case alone states it
NAMES = {"k1_plus": "k1+", "k3_plus": "k3+"}


def check(case: Case) -> list[Answer]:
    estimator = NAMES.get(case.params["estimator"], case.params["estimator"])
    if "mean_old_minus_new" in case.expected:
        return metric(case)
    logprobs, reference = case.array("logprobs"), case.array("ref_logprobs")
    if "unclamped" in case.expected:
        clamped = np.clip(kl_estimate(logprobs, reference, estimator, np, limit=20), -10, 10)
        return [Answer("unclamped", kl_estimate(logprobs, reference, estimator, np)), Answer("verl_clamped", clamped)]
    old = case.array("old_logprobs") if case.params.get("importance_weighted") else None

    def value(l, q, o, xp):
        estimate = kl_estimate(l, q, estimator, xp)
        return estimate if o is None else estimate * xp.exp(l - o)

    in_mlx = [None if a is None else mx.array(a, mx.float32) for a in (reference, old)]
    slope = mx.grad(lambda l: value(l, *in_mlx, mx).sum())(mx.array(logprobs, mx.float32))
    ours = value(logprobs, reference, old, np)
    out = [Answer("value", ours), Answer("dvalue_dlogprob", np.array(slope), "float32")]
    if "masked_mean" in case.expected:
        mask = case.array("mask") if "mask" in case.inputs else MASK
        out.append(Answer("masked_mean", ours[mask != 0].mean()))
    return out


def metric(case: Case) -> list[Answer]:
    """KL(old || new) from samples of old: k1 may be negative, k3 of the ratio is not."""
    mask = case.array("mask") != 0
    old, new = case.array("old_logprobs")[mask], case.array("logprobs")[mask]
    return [
        Answer("mean_old_minus_new", kl_estimate(old, new, "k1", np).mean()),
        Answer("mean_k3_ratio", kl_estimate(old, new, "k3", np).mean()),
    ]
