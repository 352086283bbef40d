"""The records of a task: problems with answers, split for training and evaluation, a prompt and a reward."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from hashlib import sha256
from typing import Any

Message = Mapping[str, Any]  # {"role": "user", "content": "What is 2 + 2?"}
Question = str | Sequence[Message]


@dataclass(frozen=True)
class Problem:
    """The question and the answer it is graded against."""

    question: Question
    answer: Any  # a text, a number or whatever else the reward compares with; "" for none
    columns: Mapping[str, Any] = field(default_factory=dict)  # further entries of the example

    @property
    def example(self) -> dict[str, Any]:
        """The example that the reward gets with the prompt; no column takes the place of the question or the answer."""
        return {**self.columns, "question": self.question, "answer": self.answer}


@dataclass(frozen=True)
class Task:
    """The record of a skill to teach. No problem is in two of the three splits, or solved in the prompt."""

    name: str
    summary: str
    train: tuple[Problem, ...]
    validation: tuple[Problem, ...]  # chooses the checkpoint that is kept
    test: tuple[Problem, ...]  # evaluates the run; nothing is chosen by it
    prompt: Callable[[Any], list[Message]]  # question -> chat messages
    reward: Callable[..., Any]  # (prompt, completion, example, **kwargs) -> number, dict or pair
    tools: tuple[Callable[..., Any], ...] = ()  # that may be called before the answer
    max_tokens: int | None = None  # of a completion, unless the run sets it; None is the run's default

    @property
    def digest(self) -> str:
        """The beginning of the SHA-256 of all questions, by which a resumed run knows its problems."""
        asked = [[problem.question for problem in split] for split in (self.train, self.validation, self.test)]
        return sha256(repr(asked).encode()).hexdigest()[:16]
