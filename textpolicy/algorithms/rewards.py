"""``Rewards``: the scores of a step by prompt, and the group statistics that every baseline is made of."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Self

import numpy as np

from ..errors import UserError


@dataclass(frozen=True, slots=True, eq=False)
class Rewards:
    """The rewards of B completions. Statistics are per group, of the scored ones, spread back to (B,)."""

    value: np.ndarray  # (B,) float64, NaN where unscorable
    group: np.ndarray  # (B,) int, dense: 0..G-1

    @classmethod
    def of(cls, values: Sequence[float | None] | np.ndarray, groups: Sequence[int] | np.ndarray | None = None) -> Self:
        """``groups`` are any ids; without them all are one group. None and NaN are unscorable. Raises UserError."""
        value = np.array([np.nan if v is None else v for v in values], np.float64)
        ids = np.zeros(len(value), int) if groups is None else np.asarray(groups)
        if value.ndim != 1 or ids.shape != value.shape:
            raise UserError(
                f"rewards have shape {value.shape} and group ids {ids.shape}; give one of each per completion"
            )
        if np.isinf(value).any():
            raise UserError("a reward is infinite; return a finite number, or None for what cannot be scored")
        return cls(value, np.unique(ids, return_inverse=True)[1].reshape(-1))

    @property
    def scored(self) -> np.ndarray:
        """(B,) bool."""
        return ~np.isnan(self.value)

    @property
    def count(self) -> np.ndarray:
        """(B,) scored completions in the group."""
        return self._sum(np.ones_like(self.value))

    @property
    def mean(self) -> np.ndarray:
        """(B,) mean reward of the group; 0 for a group without a scored completion."""
        return self._sum(self.value) / np.maximum(self.count, 1)

    def std(self, ddof: int = 1) -> np.ndarray:
        """(B,) standard deviation in the group; 0 for a group of ``ddof`` or fewer."""
        squares = self._sum((self.value - self.mean) ** 2)
        return np.sqrt(squares / np.maximum(self.count - ddof, 1))

    @property
    def uniform(self) -> np.ndarray:
        """(B,) bool: the group's scored rewards are all equal, so they say nothing of who did better."""
        low, high = np.full(self._groups, np.inf), np.full(self._groups, -np.inf)
        np.minimum.at(low, self.group[self.scored], self.value[self.scored])
        np.maximum.at(high, self.group[self.scored], self.value[self.scored])
        return (low >= high)[self.group]

    @property
    def centered(self) -> np.ndarray:
        """(B,) reward minus the group's mean; exactly 0 for an unscorable one and for a uniform group.

        There the rounding of the mean could leave a residue that Adam would blow up to a full step.
        """
        return np.where(self.uniform | ~self.scored, 0.0, self.value - self.mean)

    @property
    def _groups(self) -> int:
        return int(self.group.max(initial=-1)) + 1

    def _sum(self, values: np.ndarray) -> np.ndarray:
        return np.bincount(self.group, np.where(self.scored, values, 0.0), self._groups)[self.group]
