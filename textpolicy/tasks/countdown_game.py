"""The tasks "countdown" and "countdown_tool": reach a number with + - * /, alone or with a calculator."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace
from fractions import Fraction
from functools import cache
from itertools import combinations

from ..environment.text.conversation import as_messages
from .base import Problem, Task
from .countdown import (
    countdown_reward_with_info,
    evaluate_expression,
    format_countdown_prompt,
    generate_countdown_problems,
)
from .splits import Splits, distinct

NUMBERS, LARGEST, TARGETS = 3, 25, (10, 100)
TEST, VALIDATION, TRAIN = 200, 100, 1000
_SPLIT_SEED = 2026  # the split is part of the task: every run and seed is evaluated on the same problems

Term = tuple[Fraction, str]  # a value, and the expression that has it


@cache
def countdown_task() -> Task:
    """Reach a target from three numbers with + - * / and parentheses, scored in exact fractions."""
    count = TEST + VALIDATION + TRAIN
    made = generate_countdown_problems(2 * count, NUMBERS, (1, LARGEST), TARGETS, seed=_SPLIT_SEED)
    problems = []
    for draw in distinct(made, lambda p: (p["target"], *sorted(p["numbers"])), count, tries=2):
        target, numbers = draw["target"], draw["numbers"]
        answer = solve_countdown(numbers, target) or ""
        problems.append(Problem(format_countdown_prompt(target, numbers), answer, draw))
    cut = Splits.cut(problems, TEST, VALIDATION)
    return Task(
        name="countdown",
        summary=f"reach a target from {NUMBERS} numbers with + - * /",
        train=cut.train,
        validation=cut.validation,
        test=cut.test,
        prompt=as_messages,
        reward=countdown_reward_with_info,
        max_tokens=64,
    )


def countdown_tool_task() -> Task:
    """Reach a target as in "countdown", with a calculator that the model may call before it answers."""
    summary = f"reach a target from {NUMBERS} numbers with + - * /, with a calculator to call"
    return replace(countdown_task(), name="countdown_tool", summary=summary, tools=(calculate,), max_tokens=128)


def calculate(expression: str) -> str:
    """Work out an expression of whole numbers, + - * / and parentheses, exactly."""
    return str(evaluate_expression(expression).value)


def solve_countdown(numbers: Sequence[int], target: int, use_all: bool = False) -> str | None:
    """Return an expression that reaches ``target`` with each of the ``numbers`` at most once (exactly: ``use_all``).

    None if there is none; ``is_solvable`` of textpolicy.tasks.countdown decides that faster. The search joins every
    pair of the remaining terms by every sign, which takes a moment for five numbers and minutes for seven.
    """
    return _search([(Fraction(n), str(n)) for n in numbers], target, use_all)


def _search(terms: list[Term], target: int, use_all: bool) -> str | None:
    """Return the expression of a term with the value ``target``, joining pairs of terms until there is one."""
    for value, expression in terms:
        if value == target and (len(terms) == 1 or not use_all):
            return expression[1:-1] if expression.startswith("(") else expression
    for i, j in combinations(range(len(terms)), 2):
        rest = [term for n, term in enumerate(terms) if n not in (i, j)]
        (a, x), (b, y) = terms[i], terms[j]
        joined = [(a + b, f"({x} + {y})"), (a - b, f"({x} - {y})"), (b - a, f"({y} - {x})"), (a * b, f"({x} * {y})")]
        joined += [(a / b, f"({x} / {y})")] if b else []
        joined += [(b / a, f"({y} / {x})")] if a else []
        for term in joined:
            if found := _search([term, *rest], target, use_all):
                return found
    return None
