"""Choose the prompts that a step draws: by default every one in turn, or by how often each was solved."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError

Outcomes = Sequence[tuple[int, bool]]  # (prompt, solved), one for each completion that was judged


@dataclass(eq=False)
class EveryPrompt:
    """The default curriculum: every prompt is drawn once, in a shuffled order, before any is drawn again.

    The step and the seed determine every draw. A curriculum of another kind overrides these methods.
    """

    total: int  # prompts
    seed: int = 0

    def draw(self, step: int, count: int, draw: int = 0) -> list[int]:
        """Return ``count`` prompts (indices) for a step; a further ``draw`` of the same step has orders of its own."""
        places, further = range(step * count, (step + 1) * count), [draw] if draw else []
        epochs = {place // self.total for place in places}
        orders = {n: np.random.default_rng([self.seed, n, *further]).permutation(self.total) for n in epochs}
        return [int(orders[place // self.total][place % self.total]) for place in places]

    def observe(self, outcomes: Outcomes) -> None:
        """Learn from the outcomes of a step; here nothing."""

    @property
    def row(self) -> dict[str, float]:
        """The state as metrics of a step; here none."""
        return {}

    def state_dict(self) -> dict[str, Any] | None:
        """Return all that a resumed run needs, as plain JSON values; None where there is no state."""
        return None

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore what ``state_dict`` returned; here ignore that of another kind, with which the run began."""


class PassRateCurriculum(EveryPrompt):
    """The curriculum that draws prompts in proportion to p (1 - p) + floor, for an estimated pass rate p.

    p = (c + 1) / (n + 2) for c correct ones among n completions, older ones weighing less. p (1 - p) is the variance
    of a 0/1 reward, which is what a group can learn from; it is largest for prompts never seen. ``floor`` brings
    back prompts that are always or never solved (learnability: arXiv:2502.12272).
    """

    def __init__(self, total: int, *, seed: int = 0, floor: float = 0.02, memory: float = 0.7) -> None:
        """Begin with ``total`` unseen prompts. Counts decay by ``memory`` when a prompt recurs. Raises UserError."""
        if total < 1:
            raise UserError(f"a curriculum has {total} prompts; give it at least one")
        if not floor > 0 or not 0 <= memory <= 1:
            raise UserError(f"floor is {floor} and memory {memory}; set floor above 0, and memory between 0 and 1")
        super().__init__(total, seed)
        self.floor, self.memory = floor, memory
        self.right, self.seen = np.zeros(total), np.zeros(total)  # completions, discounted

    @property
    def pass_rates(self) -> np.ndarray:
        """The estimated pass rate of each prompt, (total,); 0.5 for prompts never seen."""
        return (self.right + 1) / (self.seen + 2)

    def draw(self, step: int, count: int, draw: int = 0) -> list[int]:
        """Return different prompts as long as there are enough, then all of them again."""
        p = self.pass_rates
        weights = p * (1 - p) + self.floor
        random = np.random.default_rng([self.seed, step, draw])
        drawn: list[int] = []
        while len(drawn) < count:
            some = min(count - len(drawn), self.total)
            drawn += random.choice(self.total, some, replace=False, p=weights / weights.sum()).tolist()
        return drawn

    def observe(self, outcomes: Outcomes) -> None:
        """Update the counts; a prompt drawn twice in a step is discounted once. Raises UserError without outcomes."""
        if not outcomes:
            raise UserError(
                "a curriculum needs to know what is solved, and the reward never says so; "
                'return {"reward": ..., "is_correct": ...} from it'
            )
        prompts = np.array([prompt for prompt, _ in outcomes])
        again = np.unique(prompts)
        self.right[again] *= self.memory
        self.seen[again] *= self.memory
        np.add.at(self.right, prompts, [float(solved) for _, solved in outcomes])
        np.add.at(self.seen, prompts, 1.0)

    @property
    def row(self) -> dict[str, float]:
        """The share of prompts seen so far, and their mean estimated pass rate."""
        known = self.seen > 0
        rate = {"curriculum_pass_rate": float(self.pass_rates[known].mean())} if known.any() else {}
        return {"curriculum_seen": float(known.mean()), **rate}

    def state_dict(self) -> dict[str, Any]:
        """Return the counts, as plain JSON values."""
        return {"right": self.right.tolist(), "seen": self.seen.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Restore the counts. Raises UserError for those of another number of prompts."""
        if len(state["right"]) != self.total:
            raise UserError(
                f"the state is of {len(state['right'])} prompts and there are {self.total}; take the run's own"
            )
        self.right, self.seen = np.array(state["right"], float), np.array(state["seen"], float)
