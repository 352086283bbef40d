"""HICRA's amplification, the boost of planning tokens' entropy, and the selection reported of the authors' code."""

from __future__ import annotations

import numpy as np
from vectors import Answer, Case, UnknownCase, raised

from textpolicy.algorithms.credit import Rewards
from textpolicy.algorithms.grpo import GroupRelative
from textpolicy.algorithms.hicra import amplify, boost_entropy, reported_selection
from textpolicy.algorithms.top_entropy import entropy_threshold


def check(case: Case) -> list[Answer]:
    if "raises" in case.expected:
        return [Answer("raises", raised(lambda: check_values(case)))]
    return check_values(case)


def check_values(case: Case) -> list[Answer]:
    if "entropy_quantile" in case.params:
        return selection(case)
    if "rewards" in case.inputs:
        return from_rewards(case)
    planning = case.array("planning_mask") != 0
    if "gamma" in case.params:
        row = np.zeros(len(planning), int)
        return [Answer("entropies", boost_entropy(case.array("entropies"), planning, row, case.params["gamma"]))]
    if "alpha" not in case.params:
        raise UnknownCase(case.id)
    return [Answer("advantages", amplify(case.array("advantages"), planning, case.params["alpha"]))]


def from_rewards(case: Case) -> list[Answer]:
    advantages = GroupRelative("none")(Rewards.of(case.inputs["rewards"]))
    pairs = zip(advantages, case.inputs["masks"], strict=True)
    amplified = [amplify(np.full(len(m), a), np.array(m, bool), case.params["alpha"]).tolist() for a, m in pairs]
    return [Answer("token_advantages", amplified)]


def selection(case: Case) -> list[Answer]:
    mask = case.array("mask") != 0
    row = np.nonzero(mask)[0]
    entropy, planning = case.array("entropies")[mask], case.array("planning_mask")[mask] != 0
    advantage, share = case.array("advantages")[row], 1 - case.params["entropy_quantile"]
    selected = reported_selection(planning, entropy, advantage, row, share)
    grids = np.zeros((2, *mask.shape))
    grids[:, mask] = selected, amplify(advantage, selected, case.params["alpha"])
    return [
        Answer("threshold", entropy_threshold(entropy, share)),
        Answer("selected", grids[0]),
        Answer("advantages", grids[1]),
    ]
