"""The pass@k family of metrics, from n samples of a problem of which c are correct (arXiv:2107.03374)."""

from __future__ import annotations

from collections.abc import Sequence
from math import comb
from numbers import Integral
from statistics import fmean

from ..errors import UserError


def pass_at_k(n: int, c: int, k: int) -> float:
    """Return 1 - C(n-c, k) / C(n, k), the chance that k of n samples include a correct one (arXiv:2107.03374, Eq. 1).

    Unbiased for k <= n. The integers are exact and rounded once. Raises UserError.
    """
    _refuse_impossible(n, c, k)
    return (comb(n, k) - comb(n - c, k)) / comb(n, k)


def pass_hat_k(n: int, c: int, k: int) -> float:
    """Return pass^k = C(c, k) / C(n, k), the chance that k of n samples are all correct (arXiv:2406.12045).

    Raises UserError.
    """
    _refuse_impossible(n, c, k)
    return comb(c, k) / comb(n, k)


def plug_in_pass_at_k(n: int, c: int, k: int) -> float:
    """Return 1 - (1 - c/n)^k, which some reports use: biased, never above pass@k (arXiv:2107.03374, app. A).

    Raises UserError.
    """
    _refuse_impossible(n, c, k)
    return 1 - (1 - c / n) ** k


def mean_pass_at_k(n: Sequence[int], c: Sequence[int], k: int) -> float:
    """Return pass@k averaged over problems with n_i samples, c_i correct; every n_i >= k. Raises UserError."""
    _refuse_unlike(n, c)
    return fmean(pass_at_k(n_i, c_i, k) for n_i, c_i in zip(n, c, strict=True))


def mean_pass_hat_k(n: Sequence[int], c: Sequence[int], k: int) -> float:
    """Return pass^k averaged over problems with n_i samples, c_i correct; every n_i >= k. Raises UserError."""
    _refuse_unlike(n, c)
    return fmean(pass_hat_k(n_i, c_i, k) for n_i, c_i in zip(n, c, strict=True))


def _refuse_impossible(n: int, c: int, k: int) -> None:
    if not all(isinstance(x, Integral) for x in (n, c, k)):
        raise UserError(f"n, c and k are {n}, {c} and {k}; give whole numbers of samples")
    if not 0 <= c <= n:
        raise UserError(f"{c} of {n} samples correct is impossible; give 0 <= c <= n")
    if not 1 <= k <= n:
        raise UserError(f"k is {k} with {n} samples; choose k from 1 to n, or draw more samples")


def _refuse_unlike(n: Sequence[int], c: Sequence[int]) -> None:
    if len(n) != len(c) or not len(n):
        raise UserError(f"n has {len(n)} problems and c {len(c)}; give one of each per problem, at least one problem")
