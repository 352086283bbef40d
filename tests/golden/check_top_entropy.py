"""The tokens that keep their credit because their entropy is high."""

from __future__ import annotations

import numpy as np
from made_credit import make_credit
from vectors import Answer, Case

from textpolicy.algorithms.top_entropy import KeepTopEntropy

NOT_TARGETS = {"trl_row_by_row": "TRL's quantile is that of a micro-batch, ours that of the step however it is split"}


def check(case: Case) -> list[Answer]:
    mask = case.array("mask") != 0
    credit = make_credit(mask.sum(axis=1), entropy=case.array("entropies")[mask])
    kept = np.zeros(mask.shape)
    kept[mask] = KeepTopEntropy(case.params["share"])(credit).advantage
    return [Answer("kept", kept)]
