"""The tasks "countdown" and "countdown_tool": reach a number with + - * /, alone or with a calculator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import combinations

from .base import Message, Problem, Task
from .countdown import (
    countdown_reward_with_info,
    evaluate_expression,
    format_countdown_prompt,
    generate_countdown_problems,
)
from .splits import Splits, distinct

NUMBERS, LARGEST, TARGETS = 3, 25, (10, 100)
TEST, VALIDATION, TRAIN = 200, 100, 1000
_SPLIT_SEED = 2026  # the split is part of the task: every run and seed is judged on the same problems


def countdown_task() -> Task:
    """Reach a target from three numbers with + - * / and parentheses, scored in exact fractions."""
    cut = Splits.cut(_problems(), TEST, VALIDATION)
    return Task(
        name="countdown",
        summary=f"reach a target from {NUMBERS} numbers with + - * /",
        train=cut.train,
        validation=cut.validation,
        test=cut.test,
        prompt=_ask,
        reward=countdown_reward_with_info,
        max_tokens=64,
    )


def countdown_tool_task() -> Task:
    """Countdown with a calculator that the model may call before it answers."""
    summary = f"reach a target from {NUMBERS} numbers with + - * /, with a calculator to call"
    return replace(countdown_task(), name="countdown_tool", summary=summary, tools=(calculate,), max_tokens=128)


def calculate(expression: str) -> str:
    """Work out an expression of whole numbers, + - * / and parentheses, exactly."""
    return str(evaluate_expression(expression).value)


def solve_countdown(numbers: Sequence[int], target: int, use_all: bool = False) -> str | None:
    """An expression that reaches ``target`` with each of the ``numbers`` at most once (exactly, with ``use_all``).

    None if there is none; ``is_solvable`` of textpolicy.tasks.countdown says so faster. Every pair of what is
    left is joined by every sign, in turn, which takes a moment for five numbers and minutes for seven.
    """
    return _search([(Fraction(n), str(n)) for n in numbers], target, use_all)


Term = tuple[Fraction, str]  # a value, and the expression that has it


def _search(terms: list[Term], target: int, use_all: bool) -> str | None:
    for value, expression in terms:
        if value == target and (len(terms) == 1 or not use_all):
            return expression[1:-1] if expression.startswith("(") else expression
    for i, j in combinations(range(len(terms)), 2):
        rest = [term for n, term in enumerate(terms) if n not in (i, j)]
        for joined in _joined(terms[i], terms[j]):
            if found := _search([joined, *rest], target, use_all):
                return found
    return None


def _joined(left: Term, right: Term) -> list[Term]:
    (a, x), (b, y) = left, right
    out = [(a + b, f"({x} + {y})"), (a - b, f"({x} - {y})"), (b - a, f"({y} - {x})"), (a * b, f"({x} * {y})")]
    out += [(a / b, f"({x} / {y})")] if b else []
    return out + ([(b / a, f"({y} / {x})")] if a else [])


@cache
def _problems() -> list[Problem]:
    count = TEST + VALIDATION + TRAIN
    made = generate_countdown_problems(2 * count, NUMBERS, (1, LARGEST), TARGETS, seed=_SPLIT_SEED)
    chosen = distinct(made, lambda p: (p["target"], *sorted(p["numbers"])), count, tries=2)
    return [_problem(p["target"], p["numbers"]) for p in chosen]


def _problem(target: int, numbers: Sequence[int]) -> Problem:
    columns = {"target": target, "numbers": list(numbers)}
    return Problem(format_countdown_prompt(target, numbers), solve_countdown(numbers, target) or "", columns)


def _ask(question: str) -> list[Message]:
    return [{"role": "user", "content": question}]
