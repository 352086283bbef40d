r"""The task "math": problems answered in \boxed{}, from a hub data set where it can be reached, else made up."""

from __future__ import annotations

import logging
import random
from collections.abc import Callable, Iterator
from fractions import Fraction
from math import comb, gcd, lcm

from ..errors import MissingDependencyError, UserError
from ..rewards.correctness import math_accuracy_reward
from ..rewards.math import extract_boxed
from .base import Message, Problem, Task
from .hub import hub_rows
from .splits import distinct

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
    judged = tuple(problems["test"][:TEST])
    return _task("math_hub", f"problems of {HUB}", judged, problems["train"])


def generated_math_task() -> Task:
    """Made-up problems: equations, fractions, percentages, divisors, series, combinations."""
    problems = distinct(_made(), lambda p: p.question, TEST + VALIDATION + TRAIN)
    return _task("math_generated", "made-up problems of seven kinds", tuple(problems[:TEST]), problems[TEST:])


def _task(name: str, summary: str, test: tuple[Problem, ...], rest: list[Problem]) -> Task:
    return Task(
        name=name,
        summary=f"{summary}, answered in \\boxed{{}}",
        train=tuple(rest[VALIDATION:]),
        validation=tuple(rest[:VALIDATION]),
        test=test,
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
