"""The problems of countdown: reach a target from a few whole numbers with + - * / and parentheses."""

from __future__ import annotations

import random
from collections.abc import Mapping, Sequence
from fractions import Fraction
from typing import Any

from ..errors import UserError
from ..rewards.countdown import (
    MAX_DEPTH,
    MAX_LENGTH,
    TINYZERO_RULES,
    CountdownRules,
    EvalResult,
    ExpressionError,
    countdown_reward,
    countdown_reward_with_info,
    evaluate_expression,
    extract_answer_tag,
    extract_expression_from_completion,
    score_countdown,
)

__all__ = [
    "MAX_DEPTH",
    "MAX_LENGTH",
    "MAX_NUMBERS",
    "TINYZERO_RULES",
    "CountdownRules",
    "EvalResult",
    "ExpressionError",
    "countdown_reward",
    "countdown_reward_with_info",
    "evaluate_expression",
    "extract_answer_tag",
    "extract_expression_from_completion",
    "format_countdown_prompt",
    "generate_countdown_problems",
    "is_solvable",
    "score_countdown",
]

MAX_NUMBERS = 6  # that is_solvable accepts; the search grows faster than exponentially


def is_solvable(numbers: Sequence[int], target: int, use_all: bool = False) -> bool:
    """Return whether some of the ``numbers``, or all of them with ``use_all``, reach ``target``, each used once.

    values(S) = union over A + B = S of {a + b, |a - b|, a b, a / b, b / a : a in values(A), b in values(B)};
    signs are free in the grammar, so magnitudes suffice. S is a bit mask. Raises UserError for more
    than MAX_NUMBERS numbers.
    """
    if len(numbers) > MAX_NUMBERS:
        raise UserError(
            f"deciding whether {len(numbers)} numbers reach a target takes too long; give at most {MAX_NUMBERS}"
        )
    everything = (1 << len(numbers)) - 1
    values: dict[int, set[Fraction]] = {1 << i: {Fraction(abs(n))} for i, n in enumerate(numbers)}
    for chosen in range(1, everything + 1):
        if chosen not in values:
            values[chosen] = _values(chosen, values)
        if abs(target) in values[chosen] and (chosen == everything or not use_all):
            return True
    return False


def _values(chosen: int, values: Mapping[int, set[Fraction]]) -> set[Fraction]:
    """Return values(S) for the bit mask ``chosen``, given those of every smaller set."""
    found: set[Fraction] = set()
    part = (chosen - 1) & chosen
    while part > chosen ^ part:  # each split of the chosen in two, once
        for a in values[part]:
            for b in values[chosen ^ part]:
                found.update((a + b, abs(a - b), a * b))
                found.update([a / b] if b else [])
                found.update([b / a] if a else [])
        part = (part - 1) & chosen
    return found


def generate_countdown_problems(
    num_problems: int,
    num_numbers: int = 4,
    number_range: tuple[int, int] = (1, 25),
    target_range: tuple[int, int] = (10, 100),
    ensure_solvable: bool = True,
    seed: int | None = None,
    max_attempts: int | None = None,
    use_all: bool = False,
) -> list[dict[str, Any]]:
    """Return ``num_problems`` of ``{"target": int, "numbers": [int, ...]}``, uniform in ranges that include both ends.

    Numbers are drawn before their target, from a separate generator with ``seed``. With ``ensure_solvable``
    a draw without a solution (one using all numbers, with ``use_all``) is discarded. Raises UserError when
    ``max_attempts`` draws (100 per problem by default) are not enough, or a range is empty.
    """
    for name, (low, high) in (("number_range", number_range), ("target_range", target_range)):
        if low > high:
            raise UserError(f"{name} {(low, high)} is empty; put the smaller end first")
    draw = random.Random(seed).randint
    problems: list[dict[str, Any]] = []
    for _ in range(100 * num_problems if max_attempts is None else max_attempts):
        if len(problems) >= num_problems:
            break
        numbers = [draw(*number_range) for _ in range(num_numbers)]
        target = draw(*target_range)
        if not ensure_solvable or is_solvable(numbers, target, use_all):
            problems.append({"target": target, "numbers": numbers})
    if len(problems) < num_problems:
        raise UserError(
            f"only {len(problems)} of {num_problems} countdown problems were solvable; "
            "raise max_attempts, give more numbers, or bring target_range nearer to number_range"
        )
    return problems


def format_countdown_prompt(target: int, numbers: Sequence[int], use_all: bool = False) -> str:
    """Return the question for one problem; ``use_all`` requires every number, as the reward's setting does."""
    given = ", ".join(map(str, numbers))
    how_often = "exactly once" if use_all else "at most once"
    return (
        f"Make {target} from the numbers {given}.\n"
        f"You may use + - * / and parentheses, and must use each number {how_often}.\n"
        "Answer in one line, or in two if you need to think first. "
        "The last line must be the expression and nothing else, without an equals sign."
    )
