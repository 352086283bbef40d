"""What every algorithm shares: the per-token credit record and the pipeline over it."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..losses import Surrogate
from ..types import Batch, Episode, Normalize


@dataclass(frozen=True, slots=True, eq=False)
class Credit:
    """One episode's sampled tokens, as the credit stages see them."""

    advantage: np.ndarray  # (T,) float32


Baseline = Callable[[np.ndarray], np.ndarray]  # (G,) rewards of one group -> (G,) advantages
Stage = Callable[[Credit], Credit]


@dataclass(frozen=True)
class Algorithm:
    """A named recipe: a group baseline, token-level stages, and how the loss reads them."""

    baseline: Baseline
    stages: tuple[Stage, ...] = ()
    surrogate: Surrogate = field(default_factory=Surrogate)
    normalize: Normalize = "token"
    constant: float = 1.0  # the length that normalize="constant" divides by
    paper: str = ""

    def credit(self, episodes: Sequence[Episode]) -> Batch:
        """Turn scored episodes into a training batch, one baseline per group id."""
        scalars = self.advantages(
            np.array([e.reward for e in episodes], np.float64), np.array([e.group for e in episodes])
        )
        tokens = [self._token_advantages(e, a) for e, a in zip(episodes, scalars, strict=True)]
        return Batch.pack(episodes, tokens, self.normalize, self.constant)

    def advantages(self, rewards: np.ndarray, groups: np.ndarray) -> np.ndarray:
        """(N,) rewards and (N,) group ids -> (N,) advantages; no group sees another's rewards."""
        out = np.zeros_like(rewards)
        for group in np.unique(groups):
            members = groups == group
            out[members] = self.baseline(rewards[members])
        return out

    def _token_advantages(self, episode: Episode, scalar: float) -> np.ndarray:
        credit = Credit(advantage=np.full(int(episode.mask.sum()), scalar, np.float32))
        for stage in self.stages:
            credit = stage(credit)
        out = np.zeros(len(episode.tokens), np.float32)
        out[episode.mask] = credit.advantage
        return out
