"""The reward and the prompt, with worked examples, of tasks whose answer is one whole number."""

from __future__ import annotations

import re
from collections.abc import Sequence
from typing import Any

from ..rewards.answer import answered
from .base import Message, Problem


def number_reward(
    prompt: str, completion: str, example: dict[str, Any], thinking: str = "", **kwargs: Any
) -> dict[str, Any]:
    """Return 0.1 for a bare whole number, 0.4 for a right last number, 0.5 more for both; correct means both.

    A thought in front of the number is passed over.
    """
    answer = (answered(completion, thinking) or "").strip()
    bare = re.fullmatch(r"[0-9]{1,6}", answer) is not None
    numbers = re.findall(r"[0-9]+", answer)
    right = bool(numbers) and numbers[-1] == example["answer"]
    return {"reward": 0.1 * bare + 0.4 * right + 0.5 * (bare and right), "is_correct": bare and right}


def with_worked_examples(question: str, worked: Sequence[Problem]) -> list[Message]:
    """Return a conversation in which the ``worked`` problems are asked and answered before ``question``.

    Every prompt of a run begins with them, so their keys and values are computed once per step.
    """
    turns: list[Message] = []
    for problem in worked:
        turns.append({"role": "user", "content": problem.question})
        turns.append({"role": "assistant", "content": problem.answer})
    return [*turns, {"role": "user", "content": question}]
