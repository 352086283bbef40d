"""Weights that correct for the sampler's mismatch with the learner."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from vectors import Answer, Case, UnknownCase

from textpolicy.losses import Correction, correction_weights, importance_ratio, kl_estimate


def check(case: Case) -> list[Answer]:
    old, sampler, mask = (case.array(k) for k in ("trainer_logprobs", "sampler_logprobs", "mask"))
    p, live = case.params, mask != 0
    level, _, how = p["mode"].partition("_")
    if level in ("token", "sequence") and how in ("truncate", "mask"):
        correction = Correction(level, how, p["c_min"], p["c_max"])
        in_mlx = correction_weights(*(mx.array(a, mx.float32) for a in (old, sampler)), mx.array(live), correction, mx)
        in_numpy = correction_weights(old, sampler, live, correction, np)
        return [Answer("weights", in_numpy), Answer("weights", np.array(in_mlx), "float32")]
    if p["mode"] == "seq_mean_k1":
        return geometric(case, old, sampler, live)
    raise UnknownCase(case.id)


def geometric(case: Case, old: np.ndarray, sampler: np.ndarray, live: np.ndarray) -> list[Answer]:
    correction = Correction("geometric", "mask", case.params["c_min"], case.params["c_max"])
    d = np.where(live, old - sampler, 0)
    mean = {
        f"{k}_seq": (np.where(live, kl_estimate(sampler, old, k, np), 0).sum(1) / live.sum(1)) for k in ("k2", "k3")
    }
    return [
        Answer("rho_geo", importance_ratio(d, live, "sequence", np)[:, 0]),
        Answer("keep", (correction_weights(old, sampler, live, correction, np)[:, 0] != 0).tolist()),
        *(Answer(k, v) for k, v in mean.items()),
    ]
