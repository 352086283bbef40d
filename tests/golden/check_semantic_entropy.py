"""The entropy of gram counts, and the dispersion of planning tokens step by step."""

from __future__ import annotations

from typing import Any

import numpy as np
from vectors import Answer, Case, UnknownCase, numbers, raised

from textpolicy.algorithms.semantic_entropy import (
    dispersion_trend,
    planning_dispersion,
    planning_token_bags,
    pool_planning_states,
    semantic_entropy,
)

SETTING = {"ema_decay": "decay", "stability_tol": "tolerance", "stability_patience": "patience"}
UPSTREAM = {"decay": 0.99, "tolerance": 1e-3, "patience": 20}
SUCCESS = 0.5  # the reward from which a completion counts


def check(case: Case) -> list[Answer]:
    if "raises" in case.expected:
        return [Answer("raises", raised(lambda: check_values(case)))]
    return check_values(case)


def check_values(case: Case) -> list[Answer]:
    if "counts" in case.inputs:
        entropy = semantic_entropy(case.inputs["counts"])
        return [Answer(unit, getattr(entropy, unit)) for unit in ("nats", "bits", "normalised")]
    if "hidden" in case.inputs:
        return [Answer("embeddings", pooled(case))]
    if "steps" not in case.inputs or not {*case.params} <= {*SETTING, "hash_bins"}:
        raise UnknownCase(case.id)
    return tracked(case)


def pooled(case: Case) -> list[list[float] | None]:
    """The unit vectors; where no token plans ours is zero, which the vectors write as null."""
    lengths = case.inputs["lengths"]
    row = np.repeat(np.arange(len(lengths)), lengths)
    states = pool_planning_states(case.array("hidden"), case.array("mask") != 0, row, len(lengths))
    return [state.tolist() if state.any() else None for state in states]


def tracked(case: Case) -> list[Answer]:
    bins = case.params.get("hash_bins", 256)
    settings = {**UPSTREAM, **{SETTING[name]: value for name, value in case.params.items() if name != "hash_bins"}}
    trace: list[dict[str, Any]] = []
    means: list[float] = []
    ema, calm, stable, fired = None, 0, False, 0
    for step in case.inputs["steps"]:
        embeddings, reward, group = arrays(step, bins)
        distances = planning_dispersion(embeddings[reward >= SUCCESS], group[reward >= SUCCESS])
        if not len(distances):  # no group has two successful completions, so nothing changes
            trace.append({"stats": None, "fired_total": fired})
            continue
        means.append(float(distances.mean()))
        ema, change, calm = dispersion_trend(means, settings["decay"], settings["tolerance"])[-1]
        fired += calm >= settings["patience"] and not stable
        stable = calm >= settings["patience"]
        stats = {
            "semantic_entropy_batch": means[-1],
            "semantic_entropy_ema": ema,
            "semantic_entropy_delta": change,
            "semantic_entropy_group_count": len(distances),
            "semantic_entropy_stable": float(stable),
            "semantic_entropy_stable_steps": calm,
        }
        trace.append({"stats": stats, "fired_total": fired})
    return [Answer("trace", trace), Answer("ema", ema), Answer("stable_steps", calm), Answer("stability_fired", stable)]


def arrays(step: dict[str, Any], bins: int) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    row = np.repeat(np.arange(len(step["lens"])), step["lens"])
    bags = planning_token_bags(np.array(step["actions"]), np.array(step["mask"]) != 0, row, len(step["lens"]), bins)
    return bags, numbers(step["rewards"]), np.array([step["keys"].index(key) for key in step["keys"]])
