"""The embedded default task: add two numbers and answer with the number alone."""

from __future__ import annotations

import re
from functools import partial
from typing import Any

import numpy as np

from .base import Message, Problem, Task

LARGEST = 40
WORKED = ((4, 7), (12, 13))  # solved in every prompt, so neither trained on nor judged
TEST_PAIRS, VALIDATION_PAIRS = 200, 100
_SPLIT_SEED = 2026  # the split is part of the task: every run and seed is judged on the same problems


def addition_task(largest: int = LARGEST) -> Task:
    """Sums of two numbers from 1 to ``largest``, split by unordered pair: 3 + 5 and 5 + 3 stay together."""
    pairs = [(a, b) for a in range(1, largest + 1) for b in range(a, largest + 1) if (a, b) not in WORKED]
    random = np.random.default_rng(_SPLIT_SEED)
    pairs = [pairs[i] if random.random() < 0.5 else pairs[i][::-1] for i in random.permutation(len(pairs))]
    test, validation, train = np.split(np.array(pairs), [TEST_PAIRS, TEST_PAIRS + VALIDATION_PAIRS])
    both_ways = [*train, *(p[::-1] for p in train if p[0] != p[1])]
    return Task(
        name="addition",
        summary=f"add two numbers from 1 to {largest} and answer with the number alone",
        train=tuple(_problem(*p) for p in both_ways),
        validation=tuple(_problem(*p) for p in validation),
        test=tuple(_problem(*p) for p in test),
        prompt=partial(chat, worked=WORKED),
        reward=addition_reward,
    )


def addition_reward(prompt: str, completion: str, example: dict[str, Any], **kwargs: Any) -> dict[str, Any]:
    """0.1 for a bare whole number, 0.4 for a right last number, 0.5 more for both; correct means both."""
    bare = re.fullmatch(r"\d{1,6}", completion) is not None
    numbers = re.findall(r"\d+", completion)
    right = bool(numbers) and numbers[-1] == example["answer"]
    return {"reward": 0.1 * bare + 0.4 * right + 0.5 * (bare and right), "is_correct": bare and right}


def chat(question: str, worked: tuple[tuple[int, int], ...]) -> list[Message]:
    """A conversation in which the ``worked`` sums were asked and answered before ``question``."""
    turns: list[Message] = []
    for a, b in worked:
        solved = _problem(a, b)
        turns.append({"role": "user", "content": solved.question})
        turns.append({"role": "assistant", "content": solved.answer})
    return [*turns, {"role": "user", "content": question}]


def _problem(a: int, b: int) -> Problem:
    return Problem(f"What is {a} + {b}?", str(a + b))
