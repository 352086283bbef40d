"""The tokens that keep their credit because their entropy is high."""

from __future__ import annotations

import numpy as np
from vectors import Answer, Case

from textpolicy.algorithms.credit import Credit
from textpolicy.algorithms.top_entropy import KeepTopEntropy

NOT_TARGETS = {"trl_row_by_row": "TRL's quantile is that of a micro-batch, ours that of the step however it is split"}


def check(case: Case) -> list[Answer]:
    mask = case.array("mask") != 0
    row, position = np.nonzero(mask)
    ones, rewards = np.ones(len(row)), np.arange(len(mask)) % 2.0
    entropy, group = case.array("entropies")[mask], np.zeros(len(mask), int)
    credit = Credit(ones, ones, entropy, ones < 0, 0 * ones, row, position, rewards, group)
    kept = np.zeros(mask.shape)
    kept[mask] = KeepTopEntropy(case.params["share"])(credit).advantage
    return [Answer("kept", kept)]
