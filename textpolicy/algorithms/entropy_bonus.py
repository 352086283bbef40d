"""Adjust the coefficient of an entropy bonus to a target: Skywork-OR1 (arXiv:2505.22312), with the bounds of TRL."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np

from ..errors import UserError
from ..types import Episode


class EntropyControl:
    """The coefficient of the bonus c H, H the mean entropy of a step's sampled tokens; constant without a ``target``.

    With one, c is given where H <= target, else 0, and then c <- clip(c + step, 0, 1) where H <= target, else
    clip(c - step, 0, 1).
    """

    def __init__(self, coefficient: float, target: float | None = None, step: float = 0.005) -> None:
        """Start with c = ``coefficient``; ``target`` is in nats per token."""
        self.coefficient = coefficient  # all that changes
        self._target, self._step = target, step

    def advance(self, episodes: Sequence[Episode]) -> float:
        """Observe what a step sampled and return its coefficient. Raises UserError without exact entropies."""
        given = self.coefficient
        if self._target is None:
            return given
        known = [e.entropy[e.mask] for e in episodes if e.entropy is not None]
        if len(known) < len(episodes):
            raise UserError(
                "entropy_target needs exact entropy and the engine reported none; use an engine that does, or leave it "
                "out"
            )
        low = bool(np.concatenate(known).mean(dtype=np.float64) <= self._target)
        self.coefficient = min(max(given + (self._step if low else -self._step), 0.0), 1.0)
        return given if low else 0.0
