"""Draw learning curves for the top of a page as points of SVG lines, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from itertools import pairwise
from typing import Any

LEFT, RIGHT, TOP, BOTTOM = 40.0, 236.0, 14.0, 84.0  # of the axes, in a box of 240 x 98
_METRICS = {"reward_mean": "reward", "accuracy": "correct in training", "entropy": "entropy", "length_mean": "length"}
_COLUMNS = 140  # of a curve that answer the pointer


@dataclass(frozen=True, slots=True)
class Column:
    """The part of a curve that answers the pointer: the value of one step, and its place in the box."""

    step: int
    value: float
    x: float
    y: float
    left: float  # where the column begins
    width: float


@dataclass(frozen=True, slots=True)
class Curve:
    """The curve of one metric over the steps of a run."""

    name: str
    points: str  # of an SVG polyline
    low: float
    high: float
    first: int  # step
    last: int  # step
    value: float  # the last one
    columns: Sequence[Column]
    split: str | None = None  # that was evaluated; None: it is of training


def curves(rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Return the curves of a run from the rows of its metrics.jsonl; one needs at least two points."""
    evaluations = [r for r in rows if r["kind"] == "eval" and r["split"] == "validation"]
    drawn: list[tuple[str, list[tuple[int, float]], str | None]] = []
    drawn.append(("validation, greedy", [(r["step"], r["accuracy"]) for r in evaluations], "validation"))
    for name, shown in _METRICS.items():
        known = [r for r in rows if r["kind"] == "train" and math.isfinite(r.get(name, math.nan))]
        drawn.append((shown, [(r["step"], r[name]) for r in known], None))
    return [_curve(name, points, split) for name, points, split in drawn if len(points) > 1]


def _curve(name: str, points: Sequence[tuple[int, float]], split: str | None) -> Curve:
    """Scale the (step, value) ``points`` of one curve to the box."""
    values, steps = [value for _, value in points], [step for step, _ in points]
    low, high, first = min(values), max(values), steps[0]
    span, rise = (steps[-1] - first) or 1, (high - low) or 1
    places = [
        (LEFT + (RIGHT - LEFT) * (step - first) / span, BOTTOM - (BOTTOM - TOP) * (value - low) / rise)
        for step, value in points
    ]
    every = math.ceil(len(points) / _COLUMNS)
    chosen = range((len(points) - 1) % every, len(points), every)  # the last is among them
    middles = [places[i][0] for i in chosen]
    edges = [LEFT, *((a + b) / 2 for a, b in pairwise(middles)), RIGHT]
    columns = [
        Column(*points[i], *places[i], left, right - left)
        for i, (left, right) in zip(chosen, pairwise(edges), strict=True)
    ]
    line = " ".join(f"{x:.1f},{y:.1f}" for x, y in places)
    return Curve(name, line, low, high, first, steps[-1], values[-1], columns, split)
