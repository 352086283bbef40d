"""Check the arguments of every statistic, and import statsmodels."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from .._system.machine import installer
from ..errors import MissingDependencyError, UserError, unknown_name

Alternative = Literal["two-sided", "less", "greater"]  # of candidate - baseline
ALTERNATIVES = ("two-sided", "less", "greater")
Numbers = Sequence[float] | np.ndarray


def sample(what: str, values: Numbers, least: int = 2) -> np.ndarray:
    """Return the values as (n,) float64. Raises UserError unless they are finite and at least ``least``."""
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or len(x) < least:
        raise UserError(f"{what} has shape {x.shape}; give a list of numbers, at least {least}")
    if not np.isfinite(x).all():
        raise UserError(f"{what} contains {x[~np.isfinite(x)][0]}; leave out runs without a number")
    return x


def differences(baseline: Numbers, candidate: Numbers, least: int = 2) -> np.ndarray:
    """Return candidate_i - baseline_i for runs paired by seed, (n,) float64, equal ones alike. Raises UserError."""
    a, b = sample("baseline", baseline, least), sample("candidate", candidate, least)
    if len(a) != len(b):
        raise UserError(f"baseline has {len(a)} runs and candidate {len(b)}; give the same seeds to both, in one order")
    return settled(b - a, a, b)


def settled(x: np.ndarray | float, *summed: np.ndarray) -> np.ndarray:
    """Return sums or differences ``x`` of the numbers ``summed``, rounded to 12 digits of the largest."""
    scale = max(float(np.abs(s).max()) for s in summed)
    return np.round(np.divide(x, scale), 12) * scale if scale else np.asarray(x)


def varies(x: np.ndarray) -> bool:
    """Return whether values differ by more than the rounding of their own subtraction."""
    return bool(np.ptp(x) > 1e-12 * np.abs(x).max())


def are_counts(values: Any) -> bool:
    """Return whether ``values`` of any shape are whole numbers from 0 to 2^53, where floats stop counting."""
    x = np.asarray(values)
    return x.dtype.kind in "iuf" and bool(((x >= 0) & (x <= 2**53) & (x == np.floor(x))).all())


def refuse_counts(correct: int, total: int) -> None:
    """Raise UserError unless ``correct`` of ``total`` is a rate."""
    if not are_counts([correct, total]) or not 0 <= correct <= total or total < 1:
        raise UserError(f"{correct} of {total} is not a rate; give 0 <= correct <= total with total at least 1")


def refuse_unless_share(what: str, value: float) -> None:
    """Raise UserError unless ``value`` is above 0 and below 1."""
    if not 0 < value < 1:
        raise UserError(f"{what} is {value}; set it between 0 and 1, both excluded")


def refuse_unless_known(what: str, name: str, known: Iterable[str]) -> None:
    """Raise UserError, with the names there are, unless ``name`` is one of them."""
    if name not in set(known):
        raise unknown_name(what, name, known)


def statsmodels(part: str) -> Any:
    """Return the module ``statsmodels.stats.<part>``. Raises MissingDependencyError with the install line."""
    try:
        return importlib.import_module(f"statsmodels.stats.{part}")
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            f"statsmodels is not installed; install it with: {installer()} 'textpolicy[analysis]'"
        ) from error
