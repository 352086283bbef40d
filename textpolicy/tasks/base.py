"""What a task is: problems with answers, split for training and judging, a prompt and a reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, str]  # {"role": "user", "content": "What is 2 + 2?"}


@dataclass(frozen=True)
class Problem:
    """One question and the answer it is graded against."""

    question: str
    answer: str
    columns: Mapping[str, Any] = field(default_factory=dict)  # what else the reward reads

    @property
    def example(self) -> dict[str, Any]:
        """What the reward gets with the prompt."""
        return {"question": self.question, "answer": self.answer, **self.columns}


@dataclass(frozen=True)
class Task:
    """A skill to teach. No problem stands in two of the three splits, nor solved in the prompt."""

    name: str
    summary: str
    train: tuple[Problem, ...]
    validation: tuple[Problem, ...]  # chooses the checkpoint that is kept
    test: tuple[Problem, ...]  # judges the run; nothing is chosen by it
    prompt: Callable[[str], list[Message]]  # question -> chat messages
    reward: Callable[..., Any]  # (prompt, completion, example, **kwargs) -> number, dict or pair
    tools: tuple[Callable[..., Any], ...] = ()  # that may be called before the answer
    max_tokens: int | None = None  # of a completion, where a run does not say; None leaves it to the run's default
