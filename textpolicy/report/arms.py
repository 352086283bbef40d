"""Runs that differ in their seed alone are one arm, and its curve is their mean with a band."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np
from scipy.stats import t as student

from ..record.reader import RecordedRun

_NO_DIFFERENCE = ("seed", "output", "quiet", "machine")  # settings that do not change what is compared


@dataclass(frozen=True, slots=True)
class Arm:
    """Runs of the same settings, but for the seed."""

    name: str
    runs: Sequence[RecordedRun]


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """A figure over steps: the mean of an arm's runs and, of several, its 95% interval over seeds (Student's t)."""

    name: str
    steps: np.ndarray  # (S,) those that every run has
    mean: np.ndarray  # (S,)
    low: np.ndarray | None = None  # (S,)
    high: np.ndarray | None = None  # (S,)
    joined: bool = True  # drawn as a line; otherwise as points


def arms_of(runs: Sequence[RecordedRun]) -> list[Arm]:
    """In the order of their first runs; each is named by the settings in which it differs from the others."""
    settings = [flat(run.config) for run in runs]
    differing = differences(settings)
    grouped: dict[str, list[RecordedRun]] = {}
    for run, setting in zip(runs, settings, strict=True):
        name = ", ".join(f"{key.removeprefix('algorithm.')} {setting.get(key)}" for key in differing)
        grouped.setdefault(name, []).append(run)
    return [Arm(name or _plain(members[0]), members) for name, members in grouped.items()]


def differences(settings: Sequence[Mapping[str, Any]]) -> list[str]:
    """The settings, seeds and the like left out, of which there are several values."""
    names = dict.fromkeys(name for setting in settings for name in setting)
    return [name for name in names if len({repr(setting.get(name)) for setting in settings}) > 1]


def flat(config: Mapping[str, Any], above: str = "") -> dict[str, Any]:
    """{"algorithm": {"name": "grpo"}} -> {"algorithm.name": "grpo"}, without what makes no difference."""
    out: dict[str, Any] = {}
    for name, value in config.items():
        if above + name in _NO_DIFFERENCE:
            continue
        out |= flat(value, f"{above}{name}.") if isinstance(value, Mapping) else {above + name: value}
    return out


def series(arm: Arm, points: Sequence[Mapping[float, float]], name: str | None = None) -> Series | None:
    """Of one {step: value} per run of the ``arm``; None without a step that all have."""
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


def by_step(run: RecordedRun, figure: str) -> dict[float, float]:
    """{step: value} of a figure of the training rows, where it is known."""
    found = {r["step"] + 1: r.get(figure) for r in run.rows if r["kind"] == "train"}
    return {step: float(v) for step, v in found.items() if v is not None and math.isfinite(v)}


def by_look(run: RecordedRun, split: str) -> dict[float, float]:
    """{steps done: accuracy} of the greedy looks at ``split``."""
    return {r["step"]: r["accuracy"] for r in run.rows if r["kind"] == "eval" and r["split"] == split}


def _plain(run: RecordedRun) -> str:
    config = run.config
    return f"{config['algorithm']['name']} on {config['task']}" if config else Path(run.folder).resolve().name
