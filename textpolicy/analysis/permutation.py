"""The permutation tests over runs: signs of paired differences, labels of unpaired runs."""

from __future__ import annotations

import random
from dataclasses import dataclass
from math import comb, inf

import numpy as np
from scipy import stats

from ..errors import UserError
from ._inputs import Numbers, differences, sample

MOST_ARRANGEMENTS = 200_000  # that a test enumerates: 17 pairs, or 10 runs against 10


@dataclass(frozen=True, slots=True)
class Permutation:
    """The difference mean(candidate) - mean(baseline), compared with its values when the runs are rearranged."""

    difference: float  # in the units of the runs
    p_less: float
    p_greater: float
    p_two_sided: float  # |difference| at least as large as observed
    arrangements: int
    exact: bool  # all arrangements, not a sample of them

    @property
    def p_doubled(self) -> float:
        """The double of the smaller tail; equal to ``p_two_sided`` where the arms are of one size."""
        return min(1.0, 2 * min(self.p_less, self.p_greater))


def sign_flip_test(
    baseline: Numbers, candidate: Numbers, *, resamples: int | None = None, rng: int | np.random.Generator = 0
) -> Permutation:
    """Flip the signs of candidate_i - baseline_i over (n,) runs of the same seeds, in one order.

    Enumerates all 2^n signs (scipy.stats.permutation_test), or draws ``resamples`` of them with ``rng``;
    then p = (k+1)/(N+1). Needs two pairs; see ``smallest_sign_flip_p``. Raises UserError.
    """
    d = differences(baseline, candidate)
    _refuse_sizes(2 ** len(d), resamples)
    if resamples is None:
        null = stats.permutation_test((d,), np.mean, permutation_type="samples", n_resamples=inf).null_distribution
    else:
        signs = np.random.default_rng(rng).choice((-1.0, 1.0), size=(resamples, len(d)))
        null = (signs * d).mean(axis=1)
    return _permutation(float(d.mean()), null, resamples is None, 1e-9)


def label_permutation_test(
    baseline: Numbers,
    candidate: Numbers,
    *,
    resamples: int | None = None,
    rng: np.random.Generator | random.Random | None = None,
    ties: float = 1e-9,
) -> Permutation:
    """Reassign the runs to the arms, (n,) and (m,) runs of different seeds.

    Enumerates all C(n+m, n) assignments (scipy.stats.permutation_test), or shuffles ``resamples`` times with
    ``rng`` (default_rng(0)); then p = (k+1)/(N+1). Assignments within ``ties`` of the observed difference,
    relative to the largest one, count as equal to it. Raises UserError.
    """
    a, b = sample("baseline", baseline), sample("candidate", candidate)
    _refuse_sizes(comb(len(a) + len(b), len(a)), resamples)
    if resamples is None:
        null = stats.permutation_test(
            (a, b), mean_difference, permutation_type="independent", n_resamples=inf
        ).null_distribution
    else:
        pool, null, rng = [*a, *b], np.empty(resamples), rng or np.random.default_rng(0)
        for i in range(resamples):
            rng.shuffle(pool)
            null[i] = mean_difference(np.array(pool[: len(a)]), np.array(pool[len(a) :]))
    return _permutation(float(mean_difference(a, b)), null, resamples is None, ties)


def smallest_sign_flip_p(pairs: int) -> float:
    """Return 2 / 2^n, the smallest two-sided p that n pairs can reach; below 0.05 from 6 pairs on. Raises UserError."""
    if pairs < 1:
        raise UserError(f"pairs is {pairs}; give at least 1")
    return 2.0 ** (1 - pairs)


def mean_difference(a: np.ndarray, b: np.ndarray, axis: int = -1) -> np.ndarray:
    """Return mean(b) - mean(a) along ``axis``."""
    return np.mean(b, axis=axis) - np.mean(a, axis=axis)


def _permutation(observed: float, null: np.ndarray, exact: bool, ties: float) -> Permutation:
    """Return the shares of the ``null`` values that are as extreme as the ``observed`` one."""
    slack = ties * max(abs(observed), float(np.abs(null).max()))
    extreme = (null <= observed + slack, null >= observed - slack, np.abs(null) >= abs(observed) - slack)
    one = 0 if exact else 1  # a sample lacks the observed arrangement; an enumeration includes it
    p_less, p_greater, p_two_sided = ((int(found.sum()) + one) / (len(null) + one) for found in extreme)
    return Permutation(observed, p_less, p_greater, p_two_sided, len(null), exact)


def _refuse_sizes(arrangements: int, resamples: int | None) -> None:
    """Raise UserError for too many arrangements to enumerate, or too few resamples."""
    if resamples is None and arrangements > MOST_ARRANGEMENTS:
        raise UserError(
            f"there are {arrangements} arrangements, more than {MOST_ARRANGEMENTS}; set resamples to draw from them"
        )
    if resamples is not None and resamples < 1:
        raise UserError(f"resamples is {resamples}; set it to at least 1, 10000 for a p near 0.05")
