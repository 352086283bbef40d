"""The interfaces of environments: ``Environment``, played by a policy, and ``DrivenEnv``, which plays itself."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from ..engine import Engine, Sampling
from ..types import Episode


class Environment(ABC):
    """The base class of environments in which a policy acts, one episode at a time."""

    observation_space: Any = None  # a description, for the reader; nothing in the package uses it
    action_space: Any = None

    @abstractmethod
    def reset(self) -> tuple[Any, dict[str, Any]]:
        """Begin an episode and return its first observation and an info dict."""

    @abstractmethod
    def step(self, action: Any) -> dict[str, Any]:
        """Take one action.

        Returns exactly ``observation``, ``reward`` (float), ``terminated`` and ``truncated``
        (bool: the episode ended, or was cut off) and ``info`` (dict).
        """

    def clone(self) -> Self:
        """Return an independent copy."""
        return copy.deepcopy(self)

    def render(self, mode: str = "human") -> None:  # noqa: B027 (optional)
        """Show the current state; by default do nothing."""

    def close(self) -> None:  # noqa: B027 (optional)
        """Release the environment's resources; by default do nothing."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The episodes that a rollout requests."""

    prompts: Sequence[int]  # indices
    group_size: int  # episodes of each prompt
    sampling: Sampling
    first_group: int = 0  # number of the first prompt's group; the others count up from it
    pieces: bool = True  # whether episodes get the text of every sampled token
    groups: Sequence[int] = ()  # the number of each prompt's group, where they do not count up

    @property
    def numbers(self) -> Sequence[int]:
        """The number of each prompt's group."""
        return self.groups or range(self.first_group, self.first_group + len(self.prompts))

    @property
    def streams(self) -> list[int]:
        """The number of each episode's random stream, which no other episode of the draw has."""
        size = self.group_size
        return [(group - self.first_group) * size + n for group in self.numbers for n in range(size)]


class DrivenEnv(ABC):
    """The base class of environments that another program plays, requesting every turn from the engine."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of prompts."""

    @abstractmethod
    def play(self, engine: Engine, wanted: Wanted) -> list[Episode]:
        """Play and score the episodes; returns them as ``loop.collect.collect`` does."""
