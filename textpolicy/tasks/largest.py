"""The default task "largest": name the largest of five numbers, and nothing else."""

from __future__ import annotations

from functools import partial

import numpy as np

from .base import Problem, Task
from .number import number_reward, with_worked_examples

COUNT, LARGEST = 5, 99
WORKED = ((12, 5, 40, 33, 8), (71, 66, 9, 28, 15))  # solved in every prompt, so in no split
TEST, VALIDATION, TRAIN = 200, 100, 2000
_SPLIT_SEED = 2026  # the split is part of the task: every run and seed is evaluated on the same problems


def largest_task() -> Task:
    """Name the largest of five numbers from 1 to 99, and nothing else; the default.

    The five differ, and no set of five occurs twice, in any order. Naming one of them at random is
    right one time in five.
    """
    random = np.random.default_rng(_SPLIT_SEED)
    seen = {frozenset(w) for w in WORKED}
    lists: list[tuple[int, ...]] = []
    while len(lists) < TEST + VALIDATION + TRAIN:
        drawn = tuple(int(i) for i in random.choice(LARGEST, COUNT, replace=False) + 1)
        if frozenset(drawn) not in seen:
            seen.add(frozenset(drawn))
            lists.append(drawn)
    test, validation, train = lists[:TEST], lists[TEST : TEST + VALIDATION], lists[TEST + VALIDATION :]
    return Task(
        name="largest",
        summary=f"name the largest of {COUNT} numbers from 1 to {LARGEST}, and nothing else",
        train=tuple(map(_problem, train)),
        validation=tuple(map(_problem, validation)),
        test=tuple(map(_problem, test)),
        prompt=partial(with_worked_examples, worked=[_problem(w) for w in WORKED]),
        reward=number_reward,
    )


def _problem(numbers: tuple[int, ...]) -> Problem:
    return Problem(f"Largest of {', '.join(map(str, numbers))}?", str(max(numbers)))
