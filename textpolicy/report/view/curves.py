"""Draw learning curves for the top of a page as points of SVG lines, without a plotting library."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

WIDTH, HEIGHT, MARGIN = 320, 72, 4
_METRICS = {"reward_mean": "reward", "accuracy": "correct in training", "entropy": "entropy", "length_mean": "length"}


@dataclass(frozen=True, slots=True)
class Curve:
    """The curve of one metric over the steps of a run."""

    name: str
    points: str  # of an SVG polyline in a box of WIDTH x HEIGHT
    low: float
    high: float
    last: float


def curves(rows: Sequence[Mapping[str, Any]]) -> list[Curve]:
    """Return the curves of a run from the rows of its metrics.jsonl; one needs at least two points."""
    evaluations = [r for r in rows if r["kind"] == "eval" and r["split"] == "validation"]
    drawn = [("validation, greedy", [(r["step"], r["accuracy"]) for r in evaluations])]
    for name, shown in _METRICS.items():
        known = [r for r in rows if r["kind"] == "train" and math.isfinite(r.get(name, math.nan))]
        drawn.append((shown, [(r["step"], r[name]) for r in known]))
    found: list[Curve] = []
    for name, points in drawn:
        if len(points) < 2:
            continue
        values = [value for _, value in points]
        low, high, first = min(values), max(values), points[0][0]
        span, rise = (points[-1][0] - first) or 1, (high - low) or 1
        places: list[str] = []
        for step, value in points:
            x = MARGIN + (WIDTH - 2 * MARGIN) * (step - first) / span
            y = HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (value - low) / rise
            places.append(f"{x:.1f},{y:.1f}")
        found.append(Curve(name, " ".join(places), low, high, values[-1]))
    return found
