"""Which groups of a step teach something."""

from __future__ import annotations

import numpy as np
from vectors import Answer, Case

from textpolicy.algorithms.credit import Rewards

NOT_TARGETS = {"kept_by_upstream*": "a variance threshold, which drops one success in 128 and keeps groups of one"}


def check(case: Case) -> list[Answer]:
    groups = case.inputs["groups"]
    ids = np.repeat(np.arange(len(groups)), [len(g) for g in groups])
    rewards = np.array([r for g in groups for r in g])
    return [
        Answer("kept_by_nonconstant", kept(rewards, ids)),
        Answer("kept_by_dapo_binary", kept((rewards >= 1) * 1.0, ids)),
    ]


def kept(rewards: np.ndarray, ids: np.ndarray) -> list[int]:
    uniform = Rewards.of(rewards, ids).uniform
    return [i for i in np.unique(ids).tolist() if not uniform[ids == i].any()]
