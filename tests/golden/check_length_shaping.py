"""Length penalties."""

from __future__ import annotations

from functools import partial

import numpy as np
from vectors import Answer, Case, UnknownCase

from textpolicy.algorithms.length import apply_length_shaping, overlong_penalty
from textpolicy.rewards import length_reward
from textpolicy.rewards.length import brevity, plateau


def check(case: Case) -> list[Answer]:
    p = case.params
    if "word_counts" in case.inputs:
        return words(case)
    if "max_len" not in p:
        raise UnknownCase(case.id)
    lengths = case.array("lengths")
    if "max_penalty" in p:
        return [Answer("penalty", apply_length_shaping(np.zeros(len(lengths)), lengths, *_settings(p)))]
    floor = "penalty_factor" not in p
    penalty = overlong_penalty(lengths, p["max_len"], p["cache_len"], p.get("penalty_factor", 1.0), floor)
    return [Answer("penalty", penalty)]


def _settings(p: dict) -> tuple:
    return p["max_len"], p["cache_len"], p["max_penalty"]


def words(case: Case) -> list[Answer]:
    """Rewards of a number of words: the two examples', or the built-in one around a target."""
    if "example09" in case.id:
        reward = brevity
    elif "example10" in case.id:
        reward = plateau
    elif "length_reward" in case.id or "target_length" in case.params:
        reward = partial(_built_in, case.params)
    else:
        raise UnknownCase(case.id)
    return [Answer("reward", [reward(n) for n in case.inputs["word_counts"]])]


def _built_in(settings: dict, n: int) -> float:
    known = {k: settings[k] for k in ("target_length", "tolerance") if k in settings}
    return length_reward(prompt="", completion="word " * n, example={}, **known)
