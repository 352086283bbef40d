"""The test that may be evaluated after every pair of runs, an e-process on the signs of paired differences."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np

from ._inputs import Numbers, differences, refuse_unless_share, sample
from .intervals import Interval

BETS = (0.5, 1.0, 2.0, 4.0)  # strengths in the mixture: few pairs need a bold one, many a cautious one

_DRAWS, _MOST_SIMULATED = 2000, 400  # campaigns, and pairs in each


@dataclass(frozen=True, slots=True)
class Anytime:
    """The evidence after each pair against "the sign of a difference is a fair coin"."""

    difference: float  # mean(candidate - baseline), in the units of the runs
    e: tuple[float, ...]  # after each pair; 20 is the evidence of p = 0.05
    p: float  # 1 / the largest e so far, at most 1; valid whenever the runs stop
    stopped: int | None  # the first number of pairs with e >= 1 / alpha; later pairs cannot revoke it


def anytime_test(baseline: Numbers, candidate: Numbers, *, alpha: float = 0.05) -> Anytime:
    """Test (n,) runs of the same seeds, in the order in which they were made; two-sided, valid at every n.

    x_i = d_i / rms(d_1..d_i)
    e_n = mean over l in +-BETS of prod_i exp(l x_i) / cosh(l x_i)

    Given the sizes of the differences and the signs so far, a fair sign leaves each factor's mean at 1, so under
    the null e exceeds 1/alpha ever with a chance of at most alpha (Ville 1939; arXiv:2210.01948). Six pairs of one
    size and sign reach 20. Raises UserError.
    """
    refuse_unless_share("alpha", alpha)
    d = differences(baseline, candidate, 1)
    e = e_process(d)
    reached = np.flatnonzero(e >= 1 / alpha)
    return Anytime(
        difference=float(d.mean()),
        e=tuple(map(float, e)),
        p=float(min(1.0, 1 / e.max())),
        stopped=int(reached[0]) + 1 if len(reached) else None,
    )


def smallest_anytime_p(pairs: int) -> float:
    """Return a bound on p of ``anytime_test`` that n pairs can only come near to; 1 / e of pairs that grow without end.

    x_i = sqrt(i), its largest value, where each difference of one sign dwarfs those before.
    """
    return float(1 / _wealth(np.sqrt(np.arange(1, pairs + 1)))[-1])


def anytime_interval(paired: Numbers, *, level: float = 0.95) -> Interval:
    """Return the shifts of (n,) paired differences that ``anytime_test`` has not rejected at any n so far.

    Searched outward from the median on a grid of steps that grow by 3%. Unbounded below six pairs at 95%, and where
    no shift is left: pairs that all differ alike, or drift. Raises UserError.
    """
    refuse_unless_share("level", level)
    d = sample("differences", paired, 1)
    steps = max(float(np.ptp(d)), abs(float(d.mean())) * 1e-6, 1e-12) * np.geomspace(1e-3, 1e3, 467)
    center = float(np.median(d))
    ends: list[float] = []
    for sign in (-1, 1):
        shifts = center + sign * steps
        kept = np.flatnonzero(e_process(d - shifts[:, None]).max(axis=1) < 1 / (1 - level))  # not rejected
        if not len(kept):
            ends.append(center)
        else:
            ends.append(float(shifts[kept[-1]]) if kept[-1] < len(shifts) - 1 else sign * np.inf)
    return Interval(float(d.mean()), *(ends if ends[0] < ends[1] else (-np.inf, np.inf)))


def power_of_anytime(dz: float, pairs: int, *, alpha: float = 0.05) -> float:
    """Simulate the chance that ``anytime_test`` has stopped by ``pairs`` seeds of normal differences of ``dz`` SD.

    Raises UserError.
    """
    refuse_unless_share("alpha", alpha)
    return float((_largest_e(dz, pairs)[:, -1] >= 1 / alpha).mean())


def pairs_needed_by_anytime(dz: float, *, alpha: float = 0.05, power: float = 0.8) -> int | None:
    """Return the pairs by which ``anytime_test`` has stopped with ``power``; None for more than 400. Raises UserError.

    Simulated.
    """
    refuse_unless_share("alpha", alpha)
    stopped = (_largest_e(dz, _MOST_SIMULATED) >= 1 / alpha).mean(axis=0)
    return int(np.argmax(stopped >= power)) + 1 if stopped[-1] >= power else None


def _largest_e(dz: float, pairs: int) -> np.ndarray:
    """Simulate the largest e so far, (campaigns, pairs)."""
    d = np.random.default_rng(0).standard_normal((_DRAWS, pairs)) + dz
    return np.maximum.accumulate(e_process(d), axis=1)


def e_process(d: np.ndarray) -> np.ndarray:
    """Return e after each of the differences along the last axis, (..., n) float64."""
    d = np.asarray(d, np.float64)
    rms = np.sqrt(np.cumsum(d * d, axis=-1) / np.arange(1, d.shape[-1] + 1))
    x = np.divide(d, rms, out=np.zeros_like(d), where=rms > 0)
    return _wealth(x)


def _wealth(x: np.ndarray) -> np.ndarray:
    """Return the mean over bets l of the products of exp(l x_i) / cosh(l x_i) so far, (..., n)."""
    mixed = np.array([*BETS, *(-l for l in BETS)]).reshape(-1, *[1] * x.ndim) * x  # (2 len(BETS), ..., n)
    log_factors = mixed - (np.logaddexp(mixed, -mixed) - np.log(2))  # l x - log cosh(l x)
    return np.exp(np.cumsum(log_factors, axis=-1)).mean(axis=0)
