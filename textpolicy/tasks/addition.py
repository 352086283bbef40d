"""The task "addition": add two numbers and answer with the number alone."""

from __future__ import annotations

from functools import partial

import numpy as np

from .base import Problem, Task
from .number import number_reward, with_worked_examples

LARGEST = 40
WORKED = ((4, 7), (12, 13))  # solved in every prompt, so in no split
TEST, VALIDATION = 200, 100
_SPLIT_SEED = 2026  # the split is part of the task: every run and seed is evaluated on the same problems


def addition_task(largest: int = LARGEST) -> Task:
    """Add two numbers from 1 to ``largest``, and answer with the number alone.

    The split is by unordered pair: 3 + 5 and 5 + 3 stay together.
    """
    pairs = [(a, b) for a in range(1, largest + 1) for b in range(a, largest + 1) if (a, b) not in WORKED]
    random = np.random.default_rng(_SPLIT_SEED)
    pairs = [pairs[i] if random.random() < 0.5 else pairs[i][::-1] for i in random.permutation(len(pairs))]
    test, validation, train = pairs[:TEST], pairs[TEST : TEST + VALIDATION], pairs[TEST + VALIDATION :]
    both_ways = [*train, *(pair[::-1] for pair in train if pair[0] != pair[1])]
    return Task(
        name="addition",
        summary=f"add two numbers from 1 to {largest} and answer with the number alone",
        train=tuple(_problem(*p) for p in both_ways),
        validation=tuple(_problem(*p) for p in validation),
        test=tuple(_problem(*p) for p in test),
        prompt=partial(with_worked_examples, worked=[_problem(*p) for p in WORKED]),
        reward=number_reward,
    )


def _problem(a: int, b: int) -> Problem:
    return Problem(f"What is {a} + {b}?", str(a + b))
