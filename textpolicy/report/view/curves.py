"""A learning curve small enough for the top of a page, as points of an SVG line, without a plotting library."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

WIDTH, HEIGHT, MARGIN = 320, 72, 4


@dataclass(frozen=True, slots=True)
class Curve:
    """One metric over the steps of a run."""

    name: str
    points: str  # of an SVG polyline in a box of WIDTH x HEIGHT
    low: float
    high: float
    last: float


def curve(name: str, steps: Sequence[float], values: Sequence[float]) -> Curve | None:
    """Return the curve; None if there are fewer than two points."""
    if len(values) < 2:
        return None
    low, high = min(values), max(values)
    first, span, rise = steps[0], (steps[-1] - steps[0]) or 1, (high - low) or 1
    places = [
        (
            MARGIN + (WIDTH - 2 * MARGIN) * (step - first) / span,
            HEIGHT - MARGIN - (HEIGHT - 2 * MARGIN) * (value - low) / rise,
        )
        for step, value in zip(steps, values, strict=True)
    ]
    return Curve(name, " ".join(f"{x:.1f},{y:.1f}" for x, y in places), low, high, values[-1])
