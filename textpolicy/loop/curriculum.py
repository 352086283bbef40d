"""Which prompts a step draws, by how often they were solved so far."""

from __future__ import annotations

from collections import deque
from collections.abc import Sequence
from typing import Any, Protocol

import numpy as np

from ..errors import UserError

Outcomes = Sequence[tuple[int, bool]]  # (prompt, solved), one for each judged completion


class Curriculum(Protocol):
    """Draws prompts, and learns from what came of them."""

    def draw(self, step: int, count: int, draw: int = 0) -> list[int]:
        """``count`` prompts (indices) for a step; ``draw`` above 0 is a further draw of the same step."""

    def observe(self, outcomes: Outcomes) -> None:
        """What the completions of a step came to."""

    @property
    def row(self) -> dict[str, float]:
        """Its state as metrics of a step."""

    def state_dict(self) -> dict[str, Any]:
        """All that a run which goes on needs, as JSON can hold it."""

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""


class PassRateCurriculum:
    """Prompts in proportion to p (1 - p) + floor, p being the estimated chance that a completion is right.

    p = (c + 1) / (n + 2) of c right ones among n completions, older ones weighing less. p (1 - p) is the variance of
    a 0/1 reward, which is what a group can learn from; it is largest for prompts never seen. ``floor`` brings
    back what is always or never solved (learnability: arXiv:2502.12272).
    """

    def __init__(self, total: int, *, seed: int = 0, floor: float = 0.02, memory: float = 0.7) -> None:
        """``total`` prompts. Counts are multiplied by ``memory`` when a prompt is seen again. Raises UserError."""
        if total < 1:
            raise UserError(f"a curriculum has {total} prompts; give it at least one")
        if not floor > 0 or not 0 <= memory <= 1:
            raise UserError(f"floor is {floor} and memory {memory}; set floor above 0, and memory between 0 and 1")
        self.total, self.seed, self.floor, self.memory = total, seed, floor, memory
        self.right, self.seen = np.zeros(total), np.zeros(total)  # completions, discounted

    @property
    def pass_rates(self) -> np.ndarray:
        """(total,) estimated chance that a completion is right; 0.5 for prompts never seen."""
        return (self.right + 1) / (self.seen + 2)

    def draw(self, step: int, count: int, draw: int = 0) -> list[int]:
        """Different prompts as long as there are enough, then all once more."""
        p = self.pass_rates
        weights = p * (1 - p) + self.floor
        random = np.random.default_rng([self.seed, step, draw])
        drawn: list[int] = []
        while len(drawn) < count:
            some = min(count - len(drawn), self.total)
            drawn += random.choice(self.total, some, replace=False, p=weights / weights.sum()).tolist()
        return drawn

    def observe(self, outcomes: Outcomes) -> None:
        """Count; a prompt drawn twice in a step is discounted once."""
        _refuse_none(outcomes)
        prompts = np.array([prompt for prompt, _ in outcomes])
        again = np.unique(prompts)
        self.right[again] *= self.memory
        self.seen[again] *= self.memory
        np.add.at(self.right, prompts, [float(solved) for _, solved in outcomes])
        np.add.at(self.seen, prompts, 1.0)

    @property
    def row(self) -> dict[str, float]:
        """The share of prompts seen so far, and the mean estimate over them."""
        known = self.seen > 0
        rate = {"curriculum_pass_rate": float(self.pass_rates[known].mean())} if known.any() else {}
        return {"curriculum_seen": float(known.mean()), **rate}

    def state_dict(self) -> dict[str, Any]:
        return {"right": self.right.tolist(), "seen": self.seen.tolist()}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        """Raises UserError for the state of another number of prompts."""
        if len(state["right"]) != self.total:
            raise UserError(
                f"the state is of {len(state['right'])} prompts and there are {self.total}; take the run's own"
            )
        self.right, self.seen = np.array(state["right"], float), np.array(state["seen"], float)


class LevelCurriculum:
    """Prompts of one level of difficulty; a level up when most completions of it are right, down when few are."""

    def __init__(
        self, levels: Sequence[int], *, seed: int = 0, window: int = 64, up: float = 0.7, down: float = 0.2
    ) -> None:
        """``levels`` (total,) says the level of each prompt; the lowest comes first.

        The share of right ones is taken over the last ``window`` completions of the level; it moves up at
        ``up`` or more, down at ``down`` or less. Raises UserError.
        """
        if not len(levels) or window < 1 or not down < up:
            raise UserError(
                f"there are {len(levels)} levels, window is {window}, down {down} and up {up}; give levels, a "
                "positive window, and down below up"
            )
        self.prompts = {level: [i for i, of in enumerate(levels) if of == level] for level in sorted(set(levels))}
        self.of = list(levels)
        self.order = list(self.prompts)
        self.seed, self.window, self.up, self.down = seed, window, up, down
        self.place = 0  # in the order of levels
        self.recent: deque[bool] = deque(maxlen=window)

    @property
    def level(self) -> int:
        """The level that is drawn from now."""
        return self.order[self.place]

    def draw(self, step: int, count: int, draw: int = 0) -> list[int]:
        """Prompts of the level, different ones as long as there are enough."""
        here = self.prompts[self.level]
        random = np.random.default_rng([self.seed, step, draw])
        order = [i for _ in range(-(-count // len(here))) for i in random.permutation(len(here)).tolist()]
        return [here[i] for i in order[:count]]

    def observe(self, outcomes: Outcomes) -> None:
        _refuse_none(outcomes)
        self.recent.extend(solved for prompt, solved in outcomes if self.of[prompt] == self.level)
        if len(self.recent) < self.window:
            return
        share = sum(self.recent) / self.window
        move = (share >= self.up) - (share <= self.down)
        place = min(max(self.place + move, 0), len(self.order) - 1)
        if place != self.place:
            self.place = place
            self.recent.clear()

    @property
    def row(self) -> dict[str, float]:
        return {"curriculum_level": float(self.level)}

    def state_dict(self) -> dict[str, Any]:
        return {"place": self.place, "recent": list(self.recent)}

    def load_state_dict(self, state: dict[str, Any]) -> None:
        self.place = state["place"]
        self.recent = deque(state["recent"], maxlen=self.window)


def _refuse_none(outcomes: Outcomes) -> None:
    if not outcomes:
        raise UserError(
            "a curriculum goes by what is solved, and the reward never says so; "
            'return {"reward": ..., "is_correct": ...} from it'
        )
