"""GSPO and GSPO-token: sequence ratios, values and gradients."""

from __future__ import annotations

import numpy as np
from objective import answers, rows, weights_of
from vectors import Answer, Case, UnknownCase

from textpolicy.losses import Clip, Surrogate, importance_ratio

LEVEL = {"sequence": "sequence", "token": "sequence-token"}


def check(case: Case) -> list[Answer]:
    p, logprobs, old, mask = case.params, *(case.array(k) for k in ("logprobs", "old_logprobs", "mask"))
    if p.get("variant") not in LEVEL:
        raise UnknownCase(case.id)
    batch = rows(old, case.array("advantages"), weights_of(mask, "seq-mean-token-mean", None, p.get("empty_rows")))
    live = mask != 0
    ratio = importance_ratio(np.where(live, logprobs - old, 0), live, "sequence", np)
    how = Surrogate(Clip(p["eps_low"], p["eps_high"]), LEVEL[p["variant"]])
    return [*answers(logprobs, batch, how), Answer("seq_ratio", ratio[:, 0])]
