"""Group the runs that differ only in their seed into arms, whose curves are means with a band."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from typing import Any

import numpy as np
from scipy.special import stdtrit

from ..doctor.facts import evaluations
from ..record.reader import RecordedRun, flat
from .words import natural, setting

_NOT_COMPARED = ("seed", "output", "quiet", "machine")  # settings and sections that do not change what is compared


@dataclass(frozen=True, slots=True)
class Arm:
    """The runs with the same settings but for the seed."""

    name: str
    runs: Sequence[RecordedRun]


@dataclass(frozen=True, slots=True, eq=False)
class Series:
    """The curve of a metric: the mean of an arm's runs and, of several, its 95% interval over seeds (Student's t).

    NaN where all seeds agree, so that the interval is not known.
    """

    name: str
    steps: np.ndarray  # (S,) the steps that every run has
    mean: np.ndarray  # (S,)
    low: np.ndarray | None = None  # (S,)
    high: np.ndarray | None = None  # (S,)
    joined: bool = True  # drawn as a line; otherwise as points
    colour: int = 0


def arms_of(runs: Sequence[RecordedRun]) -> list[Arm]:
    """Return the arms, ordered and named by the settings that differ between them."""
    settings = [flat(run.config) for run in runs]
    differing = differences(settings)
    grouped: dict[tuple[str, ...], list[int]] = {}
    for i, of_run in enumerate(settings):
        grouped.setdefault(tuple(repr(of_run.get(key)) for key in differing), []).append(i)
    if not differing:
        return [Arm(str(settings[0].get("algorithm.name") or runs[0].folder.resolve().name), runs)]
    firsts = {of_arm[0]: of_arm for of_arm in grouped.values()}
    ordered = sorted(firsts, key=lambda i: [natural(settings[i].get(key)) for key in differing])
    names = [", ".join(setting(key, settings[i].get(key), differing) for key in differing) for i in ordered]
    if len(set(names)) < len(names):
        names = [", ".join(f"{key} {settings[i].get(key)!r}" for key in differing) for i in ordered]
    return [Arm(name, [runs[j] for j in firsts[i]]) for name, i in zip(names, ordered, strict=True)]


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
    half = stdtrit(n - 1, 0.975) * values.std(axis=0, ddof=1) / math.sqrt(n)
    half[np.ptp(values, axis=0) < 1e-12] = np.nan
    return Series(name, steps, mean, mean - half, mean + half)


def by_step(run: RecordedRun, metric: str) -> dict[float, float]:
    """Return {step: value} of a metric of the training rows, where it is known and finite."""
    found = {r["step"] + 1: r.get(metric) for r in run.rows if r["kind"] == "train"}
    return {step: float(v) for step, v in found.items() if v is not None and math.isfinite(v)}


def held_out(arm: Arm, split: str) -> Series | None:
    """Return the greedy evaluations of an arm on ``split``; of one run with 95% intervals over problems (Wilson)."""
    found = [{e.step: e for e in evaluations(run) if e.split == split} for run in arm.runs]
    curve = series(arm, [{step: e.rate.value for step, e in of_run.items()} for of_run in found])
    if curve is None or len(found) > 1:
        return curve
    low, high = np.array([found[0][step].rate.interval for step in curve.steps.tolist()]).T
    return replace(curve, low=low, high=high)
