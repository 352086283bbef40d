"""The permutation tests of many campaigns at once, the interval that belongs to them, and their power.

A t-test's power formula does not hold for a permutation test of a handful of runs, which can take few values of p.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import lru_cache
from itertools import combinations
from math import ceil, comb, floor, inf

import numpy as np

from ..errors import UserError
from ._inputs import Numbers, refuse_unless_share, sample, varies
from .intervals import Interval
from .permutation import MOST_ARRANGEMENTS, smallest_sign_flip_p
from .power import (
    detectable_with_pairs,
    detectable_with_runs,
    pairs_needed,
    power_of_pairs,
    power_of_runs,
    runs_needed_per_arm,
)
from .sequential import power_of_anytime

MOST_PAIRS = 17  # whose 2^17 subsets are enumerated
_FEW = 50  # arrangements that alpha allows: with fewer power is simulated; with more the t-test's is as good
_DRAWS = 4000  # campaigns: a power of 80% is then known to 0.6 points
_MOST_DRAWN = 2**25  # arrangements of all campaigns together
_SLACK = 1e-9  # arrangements within this of the observed one, relative to the largest, tie with it


# ---- many campaigns at once


def sign_flip_p_values(differences: np.ndarray) -> np.ndarray:
    """Return two-sided p (R,) of ``sign_flip_test`` for (R, n) paired differences, n at most 17. Raises UserError."""
    d = _rows("differences", differences)
    n = d.shape[1]
    if n > MOST_PAIRS:
        raise UserError(f"{n} pairs have 2^{n} arrangements; give at most {MOST_PAIRS} pairs")
    return _p_values(d, _signs(n))


def label_permutation_p_values(baseline: np.ndarray, candidate: np.ndarray) -> np.ndarray:
    """Return two-sided p (R,) of ``label_permutation_test`` for (R, n) and (R, m) runs. Raises UserError."""
    a, b = _rows("baseline", baseline), _rows("candidate", candidate)
    return _p_values(np.concatenate([b, a], axis=1), _label_weights(a.shape[1], b.shape[1]))


def _p_values(runs: np.ndarray, weights: np.ndarray) -> np.ndarray:
    """Return the share of arrangements whose difference is as far from 0 as the first, observed one; (R,).

    ``runs`` are (R, n) and ``weights`` (n, arrangements): a difference is their product.
    """
    shares = []
    for rows in np.array_split(runs, ceil(len(runs) * weights.shape[1] / 4_000_000)):  # at most 32 MB each
        with np.errstate(all="ignore"):  # Accelerate, on a Mac, raises flags over finite products (numpy 28687)
            size = np.abs(rows @ weights)
        shares.append((size >= size[:, :1] - _SLACK * size.max(axis=1, keepdims=True)).mean(axis=1))
    return np.concatenate(shares)


@lru_cache
def _signs(n: int) -> np.ndarray:
    """Return (n, 2^(n-1)) signs over n, the first column all plus; the other half is their mirror image."""
    rest = 1 - 2 * ((np.arange(2 ** (n - 1))[None] >> np.arange(n - 1)[:, None]) & 1)
    return np.concatenate([np.ones((1, 2 ** (n - 1))), rest]) / n


@lru_cache
def _label_weights(n: int, m: int) -> np.ndarray:
    """Return (m + n, C(m + n, m)) weights of a difference of means, the observed assignment first."""
    weights = np.full((m + n, comb(m + n, m)), -1 / n)
    for column, chosen in enumerate(combinations(range(m + n), m)):
        weights[list(chosen), column] = 1 / m
    return weights


# ---- the interval of the sign-flip test


def sign_flip_interval(differences: Numbers, *, level: float = 0.95) -> Interval:
    """Return the interval of shifts that ``sign_flip_test`` does not reject, for (n,) paired differences.

    Its ends are the k-th smallest and k-th largest mean over a subset of the differences, k = floor(2^n (1-level)/2):
    exact where they are symmetric about the true one (Hartigan 1969, doi:10.2307/2283057). Unbounded below six
    pairs at 95%, and where all pairs differ alike, whose spread is unknown. Above 17 pairs 2^17 random subsets stand
    for all. Raises UserError.
    """
    refuse_unless_share("level", level)
    d = sample("differences", differences, 1)
    if not varies(d):
        return Interval(float(d.mean()), -inf, inf)
    n = min(len(d), MOST_PAIRS)
    if len(d) > MOST_PAIRS:
        chosen = np.random.default_rng(0).integers(0, 2, (2**n - 1, len(d)))
        chosen = chosen[chosen.any(axis=1)]
    else:
        chosen = (np.arange(1, 2**n)[:, None] >> np.arange(n)) & 1  # every non-empty subset
    with np.errstate(all="ignore"):  # as above
        means = np.sort((chosen @ d) / chosen.sum(axis=1))
    k = floor((len(means) + 1) * (1 - level) / 2 + 1e-9)
    low, high = (float(means[k - 1]), float(means[-k])) if k else (-inf, inf)
    return Interval(float(d.mean()), low, high)


# ---- power


def power_of_sign_flips(dz: float, pairs: int, *, alpha: float = 0.05) -> float:
    """Return the chance that ``sign_flip_test`` on ``pairs`` seeds finds ``dz`` SD of normal differences.

    Simulated where p can take few values, up to 10 pairs at alpha 0.05; beyond, that of the paired t-test.
    Raises UserError.
    """
    refuse_unless_share("alpha", alpha)
    if pairs < 2 or smallest_sign_flip_p(pairs) > alpha:
        return 0.0
    if not _few_signs(pairs, alpha):
        return power_of_pairs(dz, pairs, alpha=alpha)
    draws = min(_DRAWS, _MOST_DRAWN >> pairs)
    d = np.random.default_rng(pairs).standard_normal((draws, pairs)) + dz
    return float((sign_flip_p_values(d) <= alpha).mean())


def power_of_labels(d: float, per_arm: int, *, alpha: float = 0.05) -> float:
    """Return the chance that ``label_permutation_test`` on ``per_arm`` normal runs in each arm finds ``d`` SD.

    Simulated where p can take few values, up to 6 runs per arm at alpha 0.05; beyond, that of Student's t-test.
    Raises UserError.
    """
    refuse_unless_share("alpha", alpha)
    if per_arm < 2 or 2 / _deals(per_arm) > alpha:
        return 0.0
    if not _few_labels(per_arm, alpha):
        return power_of_runs(d, per_arm, alpha=alpha)
    draws = int(min(_DRAWS, _MOST_DRAWN // _deals(per_arm)))
    both = np.random.default_rng(2 * per_arm).standard_normal((draws, 2 * per_arm))
    return float((label_permutation_p_values(both[:, :per_arm], both[:, per_arm:] + d) <= alpha).mean())


def detectable_by_sign_flips(pairs: int, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the effect that ``sign_flip_test`` finds with ``power``, in SD of the differences. Raises UserError.

    It is inf where no p is small enough, below six pairs at alpha 0.05.
    """
    if pairs > 1 and not _few_signs(pairs, alpha) and smallest_sign_flip_p(pairs) <= alpha:
        return detectable_with_pairs(pairs, alpha=alpha, power=power)
    return _least_effect(lambda dz: power_of_sign_flips(dz, pairs, alpha=alpha), power)


def detectable_by_labels(per_arm: int, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the effect that ``label_permutation_test`` finds with ``power``, in SD. Raises UserError.

    It is inf where no p is small enough.
    """
    if per_arm > 1 and not _few_labels(per_arm, alpha) and 2 / _deals(per_arm) <= alpha:
        return detectable_with_runs(per_arm, alpha=alpha, power=power)
    return _least_effect(lambda d: power_of_labels(d, per_arm, alpha=alpha), power)


def pairs_needed_by_sign_flips(dz: float, *, alpha: float = 0.05, power: float = 0.8) -> int:
    """Return the pairs for ``sign_flip_test`` to find ``dz`` SD of the differences with ``power``. Raises UserError."""
    pairs = 2
    while _few_signs(pairs, alpha) or smallest_sign_flip_p(pairs) > alpha:
        if power_of_sign_flips(abs(dz), pairs, alpha=alpha) >= power:
            return pairs
        pairs += 1
    return max(pairs, ceil(pairs_needed(dz, alpha=alpha, power=power)))


def runs_needed_by_labels(d: float, *, alpha: float = 0.05, power: float = 0.8) -> int:
    """Return the runs per arm for ``label_permutation_test`` to find ``d`` SD with ``power``. Raises UserError."""
    per_arm = 2
    while _few_labels(per_arm, alpha) or 2 / _deals(per_arm) > alpha:
        if power_of_labels(abs(d), per_arm, alpha=alpha) >= power:
            return per_arm
        per_arm += 1
    return max(per_arm, ceil(runs_needed_per_arm(d, alpha=alpha, power=power)))


def _few_signs(pairs: int, alpha: float) -> bool:
    """Return whether so few signs are as extreme as alpha allows that power is simulated, and can be."""
    return pairs <= MOST_PAIRS and alpha * 2 ** (pairs - 1) < _FEW


def _few_labels(per_arm: int, alpha: float) -> bool:
    """Return the same of the labels of two arms."""
    return _deals(per_arm) <= MOST_ARRANGEMENTS and alpha * _deals(per_arm) / 2 < _FEW


def _deals(per_arm: int) -> float:
    """Return C(2n, n), the deals of two arms' runs; inf where that is beyond a float."""
    return float(comb(2 * per_arm, per_arm)) if per_arm < 500 else inf


def detectable_by_anytime(pairs: int, *, alpha: float = 0.05, power: float = 0.8) -> float:
    """Return the effect at which ``anytime_test`` has stopped by ``pairs`` with ``power``, in SD. Raises UserError.

    It is inf below six pairs at alpha 0.05.
    """
    return _least_effect(lambda dz: power_of_anytime(dz, pairs, alpha=alpha), power)


def _least_effect(power_of: Callable[[float], float], wanted: float) -> float:
    """Return the smallest effect from 0 to 32 SD with the ``wanted`` power, to 0.01 SD; inf if there is none."""
    low, high = 0.0, 32.0
    if power_of(high) < wanted:
        return inf
    while high - low > 0.01:
        middle = (low + high) / 2
        low, high = (low, middle) if power_of(middle) >= wanted else (middle, high)
    return high


def _rows(what: str, values: np.ndarray) -> np.ndarray:
    """Return (campaigns, runs) float64. Raises UserError for another shape."""
    x = np.asarray(values, np.float64)
    if x.ndim != 2 or min(x.shape) < 1 or not np.isfinite(x).all():
        raise UserError(f"{what} has shape {x.shape}; give finite numbers as (campaigns, runs)")
    return x
