"""What every statistic asks of its arguments, and the way to statsmodels."""

from __future__ import annotations

import importlib
from collections.abc import Iterable, Sequence
from typing import Any, Literal

import numpy as np

from ..errors import MissingDependencyError, UserError, unknown_name

Alternative = Literal["two-sided", "less", "greater"]  # of candidate - baseline
Numbers = Sequence[float] | np.ndarray


def sample(what: str, values: Numbers, least: int = 2) -> np.ndarray:
    """Values as (n,) float64, finite, at least ``least`` of them."""
    x = np.asarray(values, np.float64)
    if x.ndim != 1 or len(x) < least:
        raise UserError(f"{what} has shape {x.shape}; give a list of numbers, at least {least}")
    if not np.isfinite(x).all():
        raise UserError(f"{what} holds {x[~np.isfinite(x)][0]}; leave out what has no number")
    return x


def differences(baseline: Numbers, candidate: Numbers, least: int = 2) -> np.ndarray:
    """candidate_i - baseline_i for runs paired by seed, (n,) float64."""
    a, b = sample("baseline", baseline, least), sample("candidate", candidate, least)
    if len(a) != len(b):
        raise UserError(f"baseline has {len(a)} runs and candidate {len(b)}; give the same seeds to both, in one order")
    return b - a


def varies(x: np.ndarray) -> bool:
    """Whether values differ by more than the rounding of their own subtraction."""
    return bool(np.ptp(x) > 1e-12 * np.abs(x).max())


def refuse_counts(correct: int, total: int) -> None:
    if not 0 <= correct <= total or total < 1:
        raise UserError(f"{correct} of {total} is not a rate; give 0 <= correct <= total with total at least 1")


def refuse_unless_share(what: str, value: float) -> None:
    if not 0 < value < 1:
        raise UserError(f"{what} is {value}; set it between 0 and 1, both excluded")


def refuse_unless_alternative(name: str) -> None:
    refuse_unless_known("alternative", name, ("two-sided", "less", "greater"))


def refuse_unless_known(what: str, name: str, known: Iterable[str]) -> None:
    if name not in set(known):
        raise unknown_name(what, name, known)


def statsmodels(part: str) -> Any:
    """The module ``statsmodels.stats.<part>``; raises MissingDependencyError with the install line."""
    try:
        return importlib.import_module(f"statsmodels.stats.{part}")
    except ModuleNotFoundError as error:
        raise MissingDependencyError(
            "statsmodels is not installed; install it with: pip install 'textpolicy[analysis]'"
        ) from error
