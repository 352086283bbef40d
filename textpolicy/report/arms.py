"""Group the runs that differ only in their seed into arms, whose curves are means with a band."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np
from scipy.stats import t as student

from ..record.reader import RecordedRun, flat

_NOT_COMPARED = ("seed", "output", "quiet", "machine")  # settings and sections that do not change what is compared


@dataclass(frozen=True, slots=True)
class Arm:
    """The runs with the same settings but for the seed."""

    name: str
    runs: Sequence[RecordedRun]


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """The curve of a metric: the mean of an arm's runs and, of several, its 95% interval over seeds (Student's t)."""

    name: str
    steps: np.ndarray  # (S,) the steps that every run has
    mean: np.ndarray  # (S,)
    low: np.ndarray | None = None  # (S,)
    high: np.ndarray | None = None  # (S,)
    joined: bool = True  # drawn as a line; otherwise as points


def arms_of(runs: Sequence[RecordedRun]) -> list[Arm]:
    """Return the arms in the order of their first runs, each named by the settings that differ between arms."""
    settings = [flat(run.config) for run in runs]
    differing = differences(settings)
    grouped: dict[str, list[RecordedRun]] = {}
    for run, setting in zip(runs, settings, strict=True):
        name = ", ".join(f"{key.removeprefix('algorithm.')} {setting.get(key)}" for key in differing)
        grouped.setdefault(name, []).append(run)
    if list(grouped) == [""]:  # nothing differs
        config = runs[0].config
        name = f"{config['algorithm']['name']} on {config['task']}" if config else runs[0].folder.resolve().name
        return [Arm(name, runs)]
    return [Arm(name, members) for name, members in grouped.items()]


def differences(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """Return the names of the flat settings that have several values; seeds and the like are left out."""
    names = dict.fromkeys(name for setting in settings for name in setting)
    compared = [name for name in names if name.split(".")[0] not in _NOT_COMPARED]
    return [name for name in compared if len({repr(setting.get(name)) for setting in settings}) > 1]


def series(arm: Arm, points: Sequence[Mapping[float, float]], name: str | None = None) -> Series | None:
    """Average one {step: value} per run of the ``arm``; None if no step is in all of them."""
    common = sorted(set.intersection(*(set(p) for p in points))) if points else []
    if not common:
        return None
    values = np.array([[p[step] for step in common] for p in points], float)
    mean, n = values.mean(axis=0), len(points)
    steps, name = np.array(common, float), name or arm.name
    if n == 1:
        return Series(name, steps, mean)
    half = student.ppf(0.975, n - 1) * values.std(axis=0, ddof=1) / math.sqrt(n)
    return Series(name, steps, mean, mean - half, mean + half)


def by_step(run: RecordedRun, metric: str) -> dict[float, float]:
    """Return {step: value} of a metric of the training rows, where it is known and finite."""
    found = {r["step"] + 1: r.get(metric) for r in run.rows if r["kind"] == "train"}
    return {step: float(v) for step, v in found.items() if v is not None and math.isfinite(v)}


def by_evaluation(run: RecordedRun, split: str) -> dict[float, float]:
    """Return {steps done: accuracy} of the greedy evaluations on ``split``."""
    return {r["step"]: r["accuracy"] for r in run.rows if r["kind"] == "eval" and r["split"] == split}
