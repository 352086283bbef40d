r"""The task "math": problems answered in \boxed{}, from a hub data set where it can be reached, else made up."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator, Mapping
from fractions import Fraction
from math import comb, gcd, lcm
from pathlib import Path
from typing import Any

from ..environment.rows import read_rows
from ..errors import MissingDependencyError, UserError
from ..rewards.correctness import math_accuracy_reward
from ..rewards.math import extract_boxed
from .base import Message, Problem, Task
from .hub import hub_rows
from .splits import Splits, distinct

logger = logging.getLogger(__name__)

HUB = "EleutherAI/hendrycks_math"  # MATH (Hendrycks et al., 2021, arXiv:2103.03874)
SUBJECTS = ("intermediate_algebra", "precalculus", "number_theory", "counting_and_probability", "geometry")
TEST, VALIDATION, TRAIN = 200, 100, 1000
_SPLIT_SEED = 2026


def math_task() -> Task:
    r"""Mathematical problems answered in \boxed{}: the MATH data set if it can be reached, else made-up ones."""
    try:
        return hub_math_task()
    except (UserError, MissingDependencyError) as reason:
        logger.warning("made-up problems stand in for %s: %s", HUB, reason)
        return generated_math_task()


def hub_math_task() -> Task:
    """The MATH data set, five subjects of it; needs the package datasets and, the first time, the network."""
    rows = hub_rows(HUB, SUBJECTS, ("train", "test"))
    problems = {name: [_from_row(row) for row in kept if extract_boxed(row["solution"])] for name, kept in rows.items()}
    random.Random(_SPLIT_SEED).shuffle(problems["test"])
    random.Random(_SPLIT_SEED).shuffle(problems["train"])
    train = problems["train"]
    splits = Splits(tuple(train[VALIDATION:]), tuple(train[:VALIDATION]), tuple(problems["test"][:TEST]))
    return _task("math_hub", f"problems of {HUB}", splits)


def generated_math_task() -> Task:
    """Made-up problems: equations, fractions, percentages, divisors, series, combinations."""
    problems = distinct(_made(), lambda p: p.question, TEST + VALIDATION + TRAIN)
    return _task("math_generated", "made-up problems of seven kinds", Splits.cut(problems, TEST, VALIDATION))


def math_task_of(path: Path) -> Task:
    r"""The problems of a .jsonl, .csv or .parquet file: columns problem or question, and answer or solution.

    A solution's answer is its last \boxed{}. A fifth of the problems, at most 200, is the test split and a tenth, at
    most 100, the validation split, whatever the seed of a run. Raises UserError.
    """
    splits = Splits.drawn((_of_file(row, n, path) for n, row in enumerate(read_rows(path), 1)), str(path))
    return _task("math_file", f"the problems of {path.name}", splits)


def _of_file(row: Mapping[str, Any], number: int, path: Path) -> Problem:
    question, answer = row.get("problem", row.get("question")), row.get("answer")
    if answer is None:
        answer = extract_boxed(str(row.get("solution", "")))
    if question is None or answer is None:
        raise UserError(
            f"row {number} of {path} lacks a problem or its answer; give columns problem and answer, or problem and "
            "solution with the answer in \\boxed{}"
        )
    return Problem(str(question), str(answer))


def _task(name: str, summary: str, splits: Splits) -> Task:
    return Task(
        name=name,
        summary=f"{summary}, answered in \\boxed{{}}",
        train=splits.train,
        validation=splits.validation,
        test=splits.test,
        prompt=_ask,
        reward=math_accuracy_reward,
        max_tokens=256,
    )


def _from_row(row: dict[str, str]) -> Problem:
    return Problem(row["problem"], extract_boxed(row["solution"]) or "")


def _ask(question: str) -> list[Message]:
    return [{"role": "user", "content": f"{question}\nPut the final answer in \\boxed{{}}."}]


# ---- made-up problems


def _made() -> Iterator[Problem]:
    draw = random.Random(_SPLIT_SEED)
    while True:
        yield draw.choice(KINDS)(draw)


def _equation(draw: random.Random) -> Problem:
    a, x, b = draw.randint(2, 12), draw.randint(-12, 12), draw.randint(1, 30)
    return Problem(f"Solve {a}x + {b} = {a * x + b} for x.", str(x))


def _fractions(draw: random.Random) -> Problem:
    a, b = (Fraction(draw.randint(1, 9), draw.randint(2, 9)) for _ in range(2))
    total = a + b
    answer = str(total.numerator) if total.denominator == 1 else rf"\frac{{{total.numerator}}}{{{total.denominator}}}"
    return Problem(f"What is {a} + {b}, in lowest terms?", answer)


def _percentage(draw: random.Random) -> Problem:
    percent, whole = 5 * draw.randint(1, 19), 20 * draw.randint(2, 40)
    return Problem(f"What is {percent}% of {whole}?", str(percent * whole // 100))


def _divisor(draw: random.Random) -> Problem:
    a, b = draw.randint(12, 120), draw.randint(12, 120)
    return Problem(f"What is the greatest common divisor of {a} and {b}?", str(gcd(a, b)))


def _multiple(draw: random.Random) -> Problem:
    a, b = draw.randint(4, 40), draw.randint(4, 40)
    return Problem(f"What is the least common multiple of {a} and {b}?", str(lcm(a, b)))


def _series(draw: random.Random) -> Problem:
    first, step, n = draw.randint(1, 20), draw.randint(1, 9), draw.randint(5, 20)
    shown = ", ".join(str(first + i * step) for i in range(3))
    return Problem(
        f"What is the sum of the first {n} terms of {shown}, ...?", str(n * (2 * first + (n - 1) * step) // 2)
    )


def _choice(draw: random.Random) -> Problem:
    n, k = draw.randint(4, 12), draw.randint(2, 3)
    return Problem(f"In how many ways can {k} of {n} people be chosen?", str(comb(n, k)))


KINDS: tuple[Callable[[random.Random], Problem], ...] = (
    _equation,
    _fractions,
    _percentage,
    _divisor,
    _multiple,
    _series,
    _choice,
)
