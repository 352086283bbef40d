"""The two records of credit assignment: a step's rewards by prompt, and the sampled tokens that share them out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..types import Bools, Floats, Ints


@dataclass(frozen=True, slots=True, eq=False)
class Rewards:
    """The rewards of B completions. Statistics are per group, over its scored completions, repeated for each: (B,)."""

    value: Floats  # (B,) float64, NaN where scoring failed
    group: Ints  # (B,) int, dense: 0..G-1
    scored: Bools = field(init=False)  # (B,) bool
    count: Floats = field(init=False)  # (B,) scored completions in the group
    mean: Floats = field(init=False)  # (B,) mean reward of the group; 0 for a group without a scored completion
    uniform: Bools = field(init=False)  # (B,) bool: the group's scored rewards are all equal
    centered: Floats = field(init=False)  # (B,) reward minus mean; exactly 0 if unscored or in a uniform group
    length: Ints | None = None  # (B,) sampled tokens; None: all of one length
    parts: tuple[tuple[float, Floats], ...] = ()  # weight and (B,) scores, or NaN, of each of several rewards

    def __post_init__(self) -> None:
        put = object.__setattr__  # the record is frozen
        put(self, "scored", ~np.isnan(self.value))
        put(self, "count", self._sum(np.ones_like(self.value)))
        put(self, "mean", self._sum(self.value) / np.maximum(self.count, 1))
        groups = int(self.group.max(initial=-1)) + 1
        low, high = np.full(groups, np.inf), np.full(groups, -np.inf)
        np.minimum.at(low, self.group[self.scored], self.value[self.scored])
        np.maximum.at(high, self.group[self.scored], self.value[self.scored])
        put(self, "uniform", (low >= high)[self.group])
        # in a uniform group the rounding of the mean could leave a residue that Adam would amplify to a full step
        put(self, "centered", np.where(self.uniform | ~self.scored, 0.0, self.value - self.mean))

    @classmethod
    def of(
        cls, values: Sequence[float | None] | NDArray[Any], groups: Sequence[int] | NDArray[Any] | None = None
    ) -> Self:
        """Make the record from rewards, None or NaN where scoring failed, and any group ids. Raises UserError.

        Without ``groups`` all completions are one group.
        """
        value = np.array([np.nan if v is None else v for v in values], np.float64)
        ids = np.zeros(len(value), int) if groups is None else np.asarray(groups)
        if value.ndim != 1 or ids.shape != value.shape:
            raise UserError(
                f"rewards have shape {value.shape} and group ids {ids.shape}; give one of each per completion"
            )
        if np.isinf(value).any():
            raise UserError("a reward is infinite; return a finite number, or None for what cannot be scored")
        return cls(value, np.unique(ids, return_inverse=True)[1].reshape(-1))

    def std(self, ddof: int = 1) -> Floats:
        """Return the standard deviation in the group, (B,); 0 for a group of ``ddof`` or fewer."""
        squares = self._sum((self.value - self.mean) ** 2)
        return np.sqrt(squares / np.maximum(self.count - ddof, 1))

    def _sum(self, values: Floats) -> Floats:
        """Sum ``values`` over the scored completions of each group, (B,) -> (B,)."""
        total: NDArray[Any] = np.bincount(self.group, np.where(self.scored, values, 0.0))
        return total[self.group]


@dataclass(frozen=True, slots=True, eq=False)
class Credit:
    """The sampled tokens of a step, completion after completion: N tokens of B completions."""

    advantage: Floats  # (N,) float64
    uncertainty: Floats  # (N,) float64, nats: surprisal or exact entropy, as the recipe sets it; SEPA pools it
    entropy: Floats | None  # (N,) float64, nats, exact; None when the engine does not report it
    planning: Bools  # (N,) bool, True on strategic grams
    penalty: Floats  # (N,) float64, of a KL in the reward
    row: Ints  # (N,) int, non-decreasing: the completion of each token
    position: Ints  # (N,) int, 0 at a completion's first token
    reward: Floats  # (B,) float64, NaN where scoring failed
    group: Ints  # (B,) int, dense: 0..G-1
    baseline: Floats | None = None  # (B,) float64, advantages before any stage; None where they come per token
    alone: bool = False  # whether completions are learned from each by itself, not against the others of their group

    @property
    def silent(self) -> Bools:
        """The completions without a learning signal, (B,) bool: unscored, or in a uniform group."""
        uniform = np.zeros(len(self.reward), bool) if self.alone else Rewards(self.reward, self.group).uniform
        return uniform | np.isnan(self.reward)


def row_mean(values: Floats, row: Ints, rows: int) -> Floats:
    """Return the mean over each completion's tokens, (N,) -> (rows,); 0 for an empty completion."""
    return np.bincount(row, values, rows) / np.maximum(np.bincount(row, minlength=rows), 1)
