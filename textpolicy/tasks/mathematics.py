r"""The task "math": problems answered in \boxed{}, from a hub data set if the hub can be reached, else made up."""

from __future__ import annotations

import logging
import numbers
import random
from collections.abc import Iterator
from fractions import Fraction
from math import comb, gcd, lcm
from pathlib import Path

from ..environment.rows import prompt_of, read_rows
from ..environment.text.conversation import as_messages
from ..errors import MissingDependencyError, UserError
from ..rewards.correctness import math_accuracy_reward
from ..rewards.example import missing
from ..rewards.math import extract_boxed
from .base import Message, Problem, Question, Task
from .hub import hub_rows
from .splits import Splits, distinct, question_key

logger = logging.getLogger(__name__)

HUB = "EleutherAI/hendrycks_math"  # MATH (Hendrycks et al., 2021, arXiv:2103.03874)
SUBJECTS = ("intermediate_algebra", "precalculus", "number_theory", "counting_and_probability", "geometry")
TEST, VALIDATION, TRAIN = 200, 100, 1000
_SPLIT_SEED = 2026
KINDS = ("equation", "fractions", "percentage", "divisor", "multiple", "series", "choice")  # of made-up problems


def math_task() -> Task:
    r"""The MATH data set, answered in \boxed{}, or made-up problems if it cannot be reached."""
    try:
        return hub_math_task()
    except (UserError, MissingDependencyError) as reason:
        logger.warning("made-up problems replace %s: %s", HUB, reason)
        return generated_math_task()


def hub_math_task() -> Task:
    """The MATH data set, five subjects of it; needs the package datasets and, for the first time, the network."""
    rows = hub_rows(HUB, SUBJECTS, ("train", "test"))
    problems: dict[str, list[Problem]] = {"train": [], "test": []}
    for name, kept in problems.items():
        answers = [(row["problem"], extract_boxed(row["solution"])) for row in rows[name]]
        kept += [Problem(question, answer) for question, answer in answers if answer]
    random.Random(_SPLIT_SEED).shuffle(problems["test"])
    random.Random(_SPLIT_SEED).shuffle(problems["train"])
    tested = {question_key(problem.question) for problem in problems["test"]}
    train = list({key: p for p in problems["train"] if (key := question_key(p.question)) not in tested}.values())
    splits = Splits(tuple(train[VALIDATION:]), tuple(train[:VALIDATION]), tuple(problems["test"][:TEST]))
    return _task("math_hub", f"problems of {HUB}", splits)


def generated_math_task() -> Task:
    """The task of made-up problems: equations, fractions, percentages, divisors, series, combinations."""
    problems = distinct(_made_up(), lambda p: p.question, TEST + VALIDATION + TRAIN)
    return _task("math_generated", "made-up problems of seven kinds", Splits.cut(problems, TEST, VALIDATION))


def math_task_of(path: Path) -> Task:
    r"""Return the task of a .jsonl, .csv or .parquet file: columns problem or question, and answer or solution.

    A solution's answer is its last \boxed{}. A fifth of the problems, at most 200, is the test split and a tenth, at
    most 100, the validation split, whatever the seed of a run. Raises UserError.
    """
    problems = []
    for number, row in enumerate(read_rows(path), 1):
        named = "question" if missing(row.get("problem")) else "problem"
        question = prompt_of(row, named, number, str(path))
        answer = row.get("answer")
        if missing(answer) or answer == "":
            answer = extract_boxed(str(row.get("solution", "")))
        if answer is None:
            raise UserError(
                f"row {number} of {path} lacks an answer; give columns problem and answer, or problem and solution "
                "with the answer in \\boxed{}"
            )
        problems.append(Problem(question, str(answer) if isinstance(answer, numbers.Number) else answer))
    return _task("math_file", f"the problems of {path.name}", Splits.drawn(problems, str(path)))


def _task(name: str, summary: str, splits: Splits) -> Task:
    """Return a task of problems that are answered in a box."""
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


def _ask(question: Question) -> list[Message]:
    """Return the prompt of a question."""
    *before, last = as_messages(question)
    content, how = last["content"], "Put the final answer in \\boxed{}."
    asked = f"{content}\n{how}" if isinstance(content, str) else [*content, {"type": "text", "text": f"\n{how}"}]
    return [*before, {**last, "content": asked}]


def _made_up() -> Iterator[Problem]:
    """Yield made-up problems of seven kinds without end, always the same ones."""
    draw = random.Random(_SPLIT_SEED)
    while True:
        match draw.choice(KINDS):
            case "equation":
                a, x, b = draw.randint(2, 12), draw.randint(-12, 12), draw.randint(1, 30)
                yield Problem(f"Solve {a}x + {b} = {a * x + b} for x.", str(x))
            case "fractions":
                first, second = (Fraction(draw.randint(1, 9), draw.randint(2, 9)) for _ in range(2))
                top, bottom = (first + second).as_integer_ratio()
                answer = str(top) if bottom == 1 else rf"\frac{{{top}}}{{{bottom}}}"
                yield Problem(f"What is {first} + {second}, in lowest terms?", answer)
            case "percentage":
                percent, whole = 5 * draw.randint(1, 19), 20 * draw.randint(2, 40)
                yield Problem(f"What is {percent}% of {whole}?", str(percent * whole // 100))
            case "divisor":
                a, b = draw.randint(12, 120), draw.randint(12, 120)
                yield Problem(f"What is the greatest common divisor of {a} and {b}?", str(gcd(a, b)))
            case "multiple":
                a, b = draw.randint(4, 40), draw.randint(4, 40)
                yield Problem(f"What is the least common multiple of {a} and {b}?", str(lcm(a, b)))
            case "series":
                start, step, n = draw.randint(1, 20), draw.randint(1, 9), draw.randint(5, 20)
                shown = ", ".join(str(start + i * step) for i in range(3))
                total = n * (2 * start + (n - 1) * step) // 2
                yield Problem(f"What is the sum of the first {n} terms of {shown}, ...?", str(total))
            case "choice":
                n, k = draw.randint(4, 12), draw.randint(2, 3)
                yield Problem(f"In how many ways can {k} of {n} people be chosen?", str(comb(n, k)))
