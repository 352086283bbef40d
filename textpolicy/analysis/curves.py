"""Reduce the learning curve of a run to one number, before any test."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from scipy.integrate import trapezoid

from ..errors import UserError
from ._inputs import Numbers, sample


@dataclass(frozen=True, slots=True)
class CurveSummary:
    """The four summaries, in the units of the curve. Choose one before the runs; ``best`` rewards noise."""

    auc: float  # area under the curve over its length: a mean height
    final: float
    best: float
    mean_last: float


def summarize_curve(curve: Numbers, *, last: int = 1, steps: Numbers | None = None) -> CurveSummary:
    """Summarize a (T,) curve; ``mean_last`` averages its ``last`` points, ``auc`` sums trapezoids over ``steps``.

    ``steps`` (T,) must increase; by default the points are evenly spaced. Raises UserError.
    """
    y = sample("curve", curve, 1)
    if not 1 <= last <= len(y):
        raise UserError(f"last is {last} on a curve of {len(y)} points; set it from 1 to their number")
    x = np.arange(len(y)) if steps is None else sample("steps", steps, 1)
    if len(x) != len(y) or (np.diff(x) <= 0).any():
        raise UserError(f"steps are {list(x)} on a curve of {len(y)} points; give as many, in rising order")
    auc = trapezoid(y, x) / (x[-1] - x[0]) if len(y) > 1 else y[0]
    return CurveSummary(float(auc), float(y[-1]), float(y.max()), float(y[-last:].mean()))
