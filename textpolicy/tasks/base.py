"""The records of a task: problems with answers, split for training and evaluation, a prompt and a reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any

Message = Mapping[str, str]  # {"role": "user", "content": "What is 2 + 2?"}


@dataclass(frozen=True)
class Problem:
    """The question and the answer it is graded against."""

    question: str
    answer: str
    columns: Mapping[str, Any] = field(default_factory=dict)  # further entries of the example

    @property
    def example(self) -> dict[str, Any]:
        """The example that the reward gets with the prompt."""
        return {"question": self.question, "answer": self.answer, **self.columns}


@dataclass(frozen=True)
class Task:
    """The record of a skill to teach. No problem is in two of the three splits, or solved in the prompt."""

    name: str
    summary: str
    train: tuple[Problem, ...]
    validation: tuple[Problem, ...]  # chooses the checkpoint that is kept
    test: tuple[Problem, ...]  # evaluates the run; nothing is chosen by it
    prompt: Callable[[str], list[Message]]  # question -> chat messages
    reward: Callable[..., Any]  # (prompt, completion, example, **kwargs) -> number, dict or pair
    tools: tuple[Callable[..., Any], ...] = ()  # that may be called before the answer
    max_tokens: int | None = None  # of a completion, unless the run sets it; None is the run's default
