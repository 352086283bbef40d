"""GDPO's advantages from several rewards, and OPO's from rewards and lengths, spread over tokens."""

from __future__ import annotations

import numpy as np
from vectors import Answer, Case, UnknownCase, numbers

from textpolicy.algorithms.credit import Rewards
from textpolicy.algorithms.gdpo import DecoupledRelative
from textpolicy.algorithms.opo import LengthWeighted
from textpolicy.algorithms.reinforce import whiten


def check(case: Case) -> list[Answer]:
    mask, groups, p = case.array("mask") != 0, np.asarray(case.inputs["group_ids"]), case.params
    row, _ = np.nonzero(mask)
    out = np.zeros(mask.shape)
    match p["method"]:
        case "gdpo":
            scores = numbers(case.inputs["scores"])
            parts = tuple(zip(p["weights"], scores.T, strict=True))
            rewards = Rewards(scores @ np.array(p["weights"]), groups, mask.sum(axis=1), parts)
            out[mask] = whiten(DecoupledRelative(p["eps"])(rewards)[row])
        case "opo":
            out[mask] = LengthWeighted()(Rewards(case.array("rewards"), groups, mask.sum(axis=1)))[row]
        case _:
            raise UnknownCase(case.id)
    return [Answer("token_advantages", out)]
