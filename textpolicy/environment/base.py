"""What every environment offers a rollout."""

from __future__ import annotations

import copy
from abc import ABC, abstractmethod
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any, Self

from ..engine import Engine, Sampling
from ..types import Episode


class Environment(ABC):
    """Something a policy acts in, one episode at a time."""

    observation_space: Any = None  # a description, for the reader; nothing in the package uses it
    action_space: Any = None

    @abstractmethod
    def reset(self) -> tuple[Any, dict[str, Any]]:
        """Begin an episode; returns its first observation and an info dict."""

    @abstractmethod
    def step(self, action: Any) -> dict[str, Any]:
        """Act once.

        Returns exactly ``observation``, ``reward`` (float), ``terminated`` and ``truncated``
        (bool: the episode came to its end, or was cut off) and ``info`` (dict).
        """

    def clone(self) -> Self:
        """An independent copy."""
        return copy.deepcopy(self)

    def render(self) -> None:  # noqa: B027 (optional)
        """Show the current state; nothing by default."""

    def close(self) -> None:  # noqa: B027 (optional)
        """Release what the environment holds; nothing by default."""


@dataclass(frozen=True, slots=True)
class Wanted:
    """The episodes that a rollout asks for."""

    prompts: Sequence[int]  # indices
    group_size: int  # episodes of each prompt
    sampling: Sampling
    first_group: int = 0  # of the first prompt; the others follow
    pieces: bool = True  # with the text of every sampled token


class DrivenEnv(ABC):
    """Prompts whose episodes are played by somebody else's program, which asks the engine for every turn."""

    @abstractmethod
    def __len__(self) -> int:
        """The number of prompts."""

    @abstractmethod
    def play(self, engine: Engine, wanted: Wanted) -> list[Episode]:
        """The episodes, scored, as ``rollout.collect.collect`` gives them."""
