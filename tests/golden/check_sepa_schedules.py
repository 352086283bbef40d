"""SEPA's controller, event by event, and the whole pipeline from rewards to token advantages."""

from __future__ import annotations

from typing import Any

import numpy as np
from vectors import Answer, Case, UnknownCase, numbers, raised

from textpolicy.algorithms import Algorithm
from textpolicy.algorithms.grpo import GroupRelative
from textpolicy.algorithms.hicra import AmplifyPlanning
from textpolicy.algorithms.maxrl import MeanNormalized
from textpolicy.algorithms.planning import PlanningGrams
from textpolicy.algorithms.sepa import Pooling, SEPAController
from textpolicy.algorithms.weighting import WeightByUncertainty
from textpolicy.types import Episode

SETTING = {
    "steps": "sepa_steps",
    "delay": "sepa_delay_steps",
    "gate": "sepa_correct_rate_gate",
    "schedule": "sepa_schedule",
    "ema": "sepa_ema_decay",
    "thr": "sepa_var_threshold",
    "warmup": "sepa_warmup",
}
VISIBLE = ("var_ema", "var_0", "warmup_seen", "gate_open")
BASELINE = {"grpo": GroupRelative("none"), "maxrl": MeanNormalized()}


def check(case: Case) -> list[Answer]:
    if "events" in case.inputs:
        return [Answer("trace", trace(case))]
    if "rewards" in case.inputs:
        return [Answer("token_advantages", token_advantages(case))]
    if "raises" in case.expected:
        return [Answer("raises", raised(lambda: controller(case.params)))]
    if "enabled" in case.expected:
        ours = controller(case.params)
        return [Answer("schedule", ours.state_dict()["sepa_schedule"]), Answer("enabled", ours.enabled)]
    if any("," in key for key in case.expected):
        pairs = {key: key.split(",") for key in case.expected}
        return [Answer(k, controller({"schedule": s, "steps": int(n)}).enabled) for k, (s, n) in pairs.items()]
    raise UnknownCase(case.id)


def controller(params: dict[str, Any]) -> SEPAController:
    return SEPAController(**{SETTING.get(name, name): value for name, value in params.items()})


def trace(case: Case) -> list[Any]:
    ours, out = controller(case.params), []
    for event in case.inputs["events"]:
        match event["op"]:
            case "lambda":
                out.append(ours.resolve_lambda(event["step"]))
                continue
            case "rate":
                ours.observe_correct_rate(None if event["value"] is None else float(event["value"]))
            case "observe":
                ours.update_auto_state(numbers(event["exec"]))
            case "save_load":
                state, ours = ours.state_dict(), SEPAController()
                ours.load_state_dict(state)
            case _:
                raise UnknownCase(f"{case.id}: {event['op']}")
        out.append({name: ours.state_dict()[name] for name in VISIBLE})
    return out


class Constant:
    """A controller that pools with one strength."""

    def __init__(self, strength: float):
        self.strength = strength

    def advance(self, correct_rate, execution) -> float:
        return self.strength


def token_advantages(case: Case) -> list[list[float]]:
    """Through the pipeline that training runs; planning tokens are made the only ones that say "plan"."""
    p = case.params
    base, *parts = p["transform_mode"].split("_")
    if p["advantage_mode"] not in BASELINE or base not in ("none", "gtpo") or not set(parts) <= {"sepa", "hicra"}:
        raise UnknownCase(case.id)
    weighting = (WeightByUncertainty(p["beta"]),) if base == "gtpo" else ()
    amplifying = (AmplifyPlanning(p["alpha"]),) if "hicra" in parts else ()
    recipe = Algorithm(
        BASELINE[p["advantage_mode"]],
        (*weighting, *amplifying),
        pooling=Pooling() if "sepa" in parts else None,
        grams=PlanningGrams(("plan",)),
    )
    parts_of = (case.inputs[k] for k in ("rewards", "logprobs", "planning_masks"))
    episodes = [episode(*e) for e in zip(*parts_of, strict=True)]
    credit = recipe.tokens(episodes, Constant(p["lam"]))
    return [credit.advantage[credit.row == i].tolist() for i in range(len(episodes))]


def episode(reward: float, logprobs: list[float], planning: list[int]) -> Episode:
    length = len(logprobs) + 1
    return Episode(
        tokens=np.arange(length),
        mask=np.arange(length) > 0,
        logprobs=np.array([0.0, *logprobs]),
        entropy=None,
        reward=reward,
        group=0,
        pieces=tuple(" plan" if m else " x" for m in planning),
    )
