"""Read Countdown answers: find the expression in a text, evaluate it in exact fractions, and score it."""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from operator import index
from typing import Any

from ..errors import UserError
from .contract import Scored
from .registry import reward

MAX_LENGTH = 1000  # characters of an expression; a longer one is invalid
MAX_DEPTH = 50  # nested parentheses; more are invalid


# ---- expressions


class ExpressionError(UserError):
    """The text is not an expression of the game, or uses numbers that were not given."""


@dataclass(frozen=True, slots=True)
class EvalResult:
    """The exact value of an expression, and the numbers in it, left to right."""

    value: Fraction
    numbers_used: tuple[int, ...]


def evaluate_expression(expr: str, available_numbers: Iterable[int] | None = None) -> EvalResult:
    """Evaluate ``expr``: whole numbers, + - * / ( ), signs and spaces.

    With ``available_numbers`` each of them may be used once. Raises ExpressionError for any other text:
    decimals, **, //, 2(3), a division by zero, more than MAX_LENGTH characters or MAX_DEPTH parentheses.
    """
    if len(expr) > MAX_LENGTH:
        raise ExpressionError(f"the expression has {len(expr)} characters; keep to {MAX_LENGTH}")
    if stray := re.search(r"[^0-9+\-*/() ]", expr):
        raise ExpressionError(
            f"{reprlib.repr(expr)} contains {stray[0]!r}; write whole numbers, + - * / and parentheses only"
        )
    parser = _Parser(expr)
    result = EvalResult(parser.sum(), tuple(parser.numbers))
    if parser.token:
        raise parser.error(f"{parser.token!r} where it should end")
    if available_numbers is not None and (excess := Counter(result.numbers_used) - Counter(available_numbers)):
        raise ExpressionError(
            f"{reprlib.repr(min(excess))} is used more often than it is given; use each number at most once"
        )
    return result


class _Parser:
    """The recursive-descent parser in exact fractions; each method is one rule of the grammar.

    sum = product {("+" | "-") product};  product = signed {("*" | "/") signed}
    signed = {"+" | "-"} atom;            atom = number | "(" sum ")"
    """

    def __init__(self, expr: str) -> None:
        self.expr = expr
        self.tokens = [*re.findall(r"[0-9]+|[-+*/()]", expr), ""]  # "" ends them
        self.at, self.token = 0, self.tokens[0]
        self.depth = 0
        self.numbers: list[int] = []

    def sum(self) -> Fraction:
        value = self.product()
        while self.token in ("+", "-"):
            value = value + self.product() if self.next() == "+" else value - self.product()
        return value

    def product(self) -> Fraction:
        value = self.signed()
        while self.token in ("*", "/"):
            operator, factor = self.next(), self.signed()
            if operator == "/" and factor == 0:
                raise self.error("a division by zero")
            value = value * factor if operator == "*" else value / factor
        return value

    def signed(self) -> Fraction:
        sign = 1
        while self.token in ("+", "-"):
            sign = sign if self.next() == "+" else -sign
        return sign * self.atom()

    def atom(self) -> Fraction:
        token = self.next()
        if token == "(":
            self.depth += 1
            if self.depth > MAX_DEPTH:
                raise self.error(f"more than {MAX_DEPTH} nested parentheses")
            value = self.sum()
            if self.next() != ")":
                raise self.error("a parenthesis that does not close")
            self.depth -= 1
            return value
        if not token.isdigit():
            raise self.error(f"{token!r} where a number should stand" if token else "a number missing at its end")
        self.numbers.append(int(token))
        return Fraction(self.numbers[-1])

    def next(self) -> str:
        token = self.token
        if token:
            self.at += 1
            self.token = self.tokens[self.at]
        return token

    def error(self, what: str) -> ExpressionError:
        return ExpressionError(f"the expression {reprlib.repr(self.expr)} has {what}; fix it")


# ---- the answer in a completion

_SIGNS = {0xD7: "*", 0x2217: "*", 0xB7: "*", 0x22C5: "*", 0xF7: "/", 0x2215: "/", 0x2044: "/", 0x2212: "-", 0x2013: "-"}
_LATEX_SIGNS = ((r"\\times|\\cdot", "*"), (r"\\div", "/"), (r"\\left\b|\\right\b", ""))
_ARITHMETIC = re.compile(r"[-+*/()0-9 ]+")
_OPERATION = re.compile(r"[0-9)] *[-+*/]")  # a sign alone is not an operation
_CONTINUES = re.compile(r"[.,]?\w|\^")
_WRAPPED = re.compile(r"(\*\*|\$\$?|`{1,3})(.*)\1")  # a whole line in marks of Markdown or LaTeX


def extract_answer_tag(text: str, last_line_only: bool = False) -> str | None:
    """Return the content of the last <answer>...</answer> of the text, or of its last line; None without one."""
    text = text.split("\n")[-1] if last_line_only else text
    before, closed, _ = text.rpartition("</answer>")
    _, opened, content = before.rpartition("<answer>")
    return content.strip() if closed and opened else None


def extract_expression_from_completion(text: str) -> str:
    """Return the expression that ``text`` gives as its answer, in ASCII signs; "" when there is none.

    Reads the last <answer> tag, or the whole text without one: the last line that is nothing but
    arithmetic; else, from the last line that has any, the longest stretch of arithmetic ("27 = 3*(4+5)",
    "3*(4+5) = 3*9", "the answer is 3*(4+5)."); else the last line if it is a bare number. A tag without
    any of these is returned as it is.
    """
    tagged = extract_answer_tag(text)
    lines = [_in_ascii(line) for line in (text if tagged is None else tagged).splitlines()]
    lines = [line for line in reversed(lines) if line]
    if whole := next((line for line in lines if _ARITHMETIC.fullmatch(line) and _OPERATION.search(line)), None):
        return whole
    for line in lines:
        stretches = []
        for run in _ARITHMETIC.finditer(line):  # that no letter, decimal point or power touches
            before, start = line[run.start() - 1 : run.start()], run[0][0]
            touched = start != " " and (before.isalnum() or before in ("_", ".", ",", "^"))
            touched |= run[0][-1] != " " and _CONTINUES.match(line, run.end()) is not None
            if _OPERATION.search(run[0]) and not touched:
                stretches.append(run[0].strip())
        if stretches:
            return max(stretches, key=len)
    if lines and _ARITHMETIC.fullmatch(lines[0]):
        return lines[0]
    return _in_ascii(tagged or "")


def _in_ascii(line: str) -> str:
    """Return ``line`` in ASCII signs, without the marks around it."""
    line = line.translate(_SIGNS).strip()
    for pattern, sign in _LATEX_SIGNS:
        line = re.sub(pattern, sign, line)
    wrapped = _WRAPPED.fullmatch(line)
    return wrapped[2].strip() if wrapped else line


# ---- scores


@dataclass(frozen=True, slots=True)
class CountdownRules:
    """The rewards of correct and other completions, and when a completion is correct."""

    correct: float = 1.0
    wrong: float = 0.0  # an expression with another value
    invalid: float = -0.5  # no expression, or one with numbers that were not given
    missing: float = -0.5  # no answer
    use_all: bool = False  # every number exactly once, instead of at most once
    tag_only: bool = False  # read nothing but an <answer> tag in the last line


# The rules of TinyZero (Pan et al., 2025), the source of many published curves. TinyZero evaluates in floats
# and accepts all Python expressions, such as 2**3; this module keeps its own grammar and exact arithmetic.
TINYZERO_RULES = CountdownRules(wrong=0.1, invalid=0.1, missing=0.0, use_all=True, tag_only=True)


def score_countdown(
    completion: str, numbers: Sequence[int], target: int, rules: CountdownRules = CountdownRules()
) -> Scored:
    """Score ``completion`` by ``rules``; it is correct if it makes exactly ``target`` from the ``numbers`` given."""
    if rules.tag_only:
        expr = extract_answer_tag(completion, last_line_only=True)
    else:
        expr = extract_expression_from_completion(completion) or None
    if expr is None:
        return Scored(rules.missing, False)
    try:
        result = evaluate_expression(expr, numbers)
    except ExpressionError:
        return Scored(rules.invalid, False)
    if rules.use_all and len(result.numbers_used) < len(numbers):
        return Scored(rules.invalid, False)
    is_correct = result.value == target
    return Scored(rules.correct if is_correct else rules.wrong, is_correct)


def countdown_reward(
    prompt: str,
    completion: str,
    example: Mapping[str, Any],
    use_all: bool = False,
    invalid: float = -0.5,
    **_: Any,
) -> float:
    """Return 1 for an expression that equals example["target"], 0 for another value, ``invalid`` for anything else.

    Every one of example["numbers"] may be used once; with ``use_all`` it must be. MaxRL needs rewards
    that are not negative: give it ``invalid=0``. Raises UserError when the example has no such entries.
    """
    return _score(completion, example, use_all, invalid).reward


@reward("countdown")
def countdown_reward_with_info(
    prompt: str,
    completion: str,
    example: Mapping[str, Any],
    use_all: bool = False,
    invalid: float = -0.5,
    **_: Any,
) -> dict[str, Any]:
    """Return ``{"reward": countdown_reward, "is_correct": bool}``."""
    scored = _score(completion, example, use_all, invalid)
    return {"reward": scored.reward, "is_correct": scored.is_correct}


def _score(completion: str, example: Mapping[str, Any], use_all: bool, invalid: float) -> Scored:
    try:
        numbers, target = [index(n) for n in example["numbers"]], index(example["target"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"a countdown example has whole 'numbers' and a whole 'target', but this one is {dict(example)!r}; fix it"
        ) from error
    rules = CountdownRules(invalid=invalid, missing=invalid, use_all=use_all)
    return score_countdown(completion, numbers, target, rules)
