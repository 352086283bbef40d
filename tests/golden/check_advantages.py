"""Group baselines, and the whitened token advantages of REINFORCE++."""

from __future__ import annotations

import numpy as np
from vectors import Answer, Case, UnknownCase, numbers

from textpolicy.algorithms.credit import Rewards
from textpolicy.algorithms.grpo import GroupRelative
from textpolicy.algorithms.maxrl import MeanNormalized
from textpolicy.algorithms.reinforce import NoBaseline, returns_to_go, whiten
from textpolicy.algorithms.rloo import LeaveOneOut

NOT_TARGETS = {
    "verl_grpo": "verl gives a group of one its reward",
    "verl_rloo": "verl gives a group of one its reward",
    "maxrl_author": "the authors' code divides a group of one by 1e-6",
    "verl_vectorized_variance_floor_*": "a floor under the variance in place of eps after the root",
}


def check(case: Case) -> list[Answer]:
    rewards = Rewards.of(case.inputs["rewards"] and numbers(case.inputs["rewards"]), case.inputs["group_ids"])
    if not case.params:
        return disagreements(case, rewards)
    p, method = case.params, case.params["method"]
    if method.startswith("reinforce++"):
        return whitened(case, rewards)
    return [Answer("", baseline(method, p, case)(rewards))]


def baseline(method: str, p: dict, case: Case):
    match method:
        case "grpo" | "dr_grpo":
            return GroupRelative(p.get("scale", "none"), p.get("eps", 1e-6), p.get("ddof", 1))
        case "rloo":
            return LeaveOneOut(p.get("normalize", False), p.get("eps", 1e-4))
        case "maxrl":
            return MeanNormalized(p["eps"])
    raise UnknownCase(case.id)


def disagreements(case: Case, rewards: Rewards) -> list[Answer]:
    """Where implementations differ: ours, and what its settings reproduce."""
    known = {"recommended": [GroupRelative(), GroupRelative("none"), LeaveOneOut(), MeanNormalized()]}
    known["verl_rloo_vectorized"] = [LeaveOneOut()]
    known |= {f"eps_added_1e{k}": [GroupRelative("group", 10.0**-k)] for k in range(1, 9)}
    return [Answer(k, b(rewards), *_loosely(k)) for k in case.expected if k in known for b in known[k]]


def _loosely(key: str) -> tuple:
    """The file says of eps_added: a tiny spread is blown up, so the last digits are rounding."""
    return ("float64",) if not key.startswith("eps") else ("float64", 1e-9)


def whitened(case: Case, rewards: Rewards) -> list[Answer]:
    mask = case.array("mask") != 0
    row, position = np.nonzero(mask)
    if case.params["method"] == "reinforce++-baseline":
        returns = GroupRelative("none")(rewards)[row]
    else:
        last = position == case.array("lengths")[row] - 1
        returns = returns_to_go(np.where(last, NoBaseline()(rewards)[row], 0), row, position, case.params["gamma"])
    out = np.zeros(mask.shape)
    out[mask] = whiten(returns)
    # verl adds 1e-8 to the token count under its means
    answers = [Answer("token_advantages", out, atol=1e-8)]
    if "returns" in case.expected:
        grid = np.zeros(mask.shape)
        grid[mask] = returns
        answers.append(Answer("returns", grid))
    return answers
