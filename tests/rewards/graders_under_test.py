"""Every grader as a function of the completion alone, for tests and benchmarks with hostile texts."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

from textpolicy.rewards import REWARD_REGISTRY, VERIFIER_REGISTRY
from textpolicy.rewards.answer import answered
from textpolicy.rewards.math import extract_boxed, grade_math_answer
from textpolicy.rewards.sandbox import extract_program
from textpolicy.tasks.countdown import TINYZERO_RULES, score_countdown
from textpolicy.tasks.number import number_reward

LIMIT = 1.0  # seconds that the grading of a mathematical answer may take
REFERENCES = ("5", r"\frac{1}{2}", "x^2+1", r"\{1,2\}")
EXAMPLE = {
    "answer": r"\frac{1}{2}",
    "keywords": ["sun", "moon"],
    "numbers": [1, 2, 3, 4],
    "target": 24,
    "tests": [{"input": "", "output": ""}],
}
APART = {"math_accuracy", "code_output"}  # the first is below, the second runs what it is given: test_sandbox.py


def named(fn: Callable[..., Any]) -> Callable[[str], Any]:
    return lambda text: fn(prompt="p", completion=text, example=EXAMPLE)


GRADERS: dict[str, Callable[[str], Any]] = {
    **{name: named(fn) for name, fn in REWARD_REGISTRY.items() if name not in APART},
    **{name: named(fn) for name, fn in VERIFIER_REGISTRY.items()},
    "number_reward": named(number_reward),
    "countdown_tinyzero": lambda text: score_countdown(text, [1, 2, 3, 4], 24, TINYZERO_RULES),
    "answered": answered,
    "extract_boxed": extract_boxed,
    "extract_program": extract_program,
    "math_accuracy": lambda text: REWARD_REGISTRY["math_accuracy"]("p", text, EXAMPLE, timeout=LIMIT),
    "grade_math_answer": lambda text: grade_math_answer(text, REFERENCES[len(text) % 4], LIMIT),
}


def warm_up() -> None:
    """Load what grading loads once."""
    assert grade_math_answer("x+1", "1+x")
