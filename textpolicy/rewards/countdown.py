"""Read Countdown answers: find the expression in a text, evaluate it in exact fractions, and score it."""

from __future__ import annotations

import re
import reprlib
from collections import Counter
from collections.abc import Iterable, Iterator, Mapping, Sequence
from dataclasses import dataclass
from fractions import Fraction
from operator import index
from typing import Any

from ..errors import UserError
from .answer import answered, extract_boxed
from .contract import Scored, judge
from .example import shown
from .registry import reward

MAX_LENGTH = 1000  # characters of an expression; a longer one is invalid
MAX_DEPTH = 50  # nested parentheses; more are invalid
MAX_LINE, MAX_LINES = 10_000, 200  # characters at the end of a line, lines at the end: what is searched for statements


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

    With ``available_numbers`` each of them may be used once, with either sign: signs are free. Raises
    ExpressionError for any other text: decimals, **, //, 2(3), a division by zero, more than MAX_LENGTH characters
    or MAX_DEPTH parentheses.
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
    if available_numbers is not None and (
        excess := Counter(result.numbers_used) - Counter(map(abs, available_numbers))
    ):
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
        self.parts: list[Fraction] = []  # the values of products and of what stands in parentheses

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
            self.parts.append(value)
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
            self.parts.append(value)
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

_FULL_WIDTH = {code: chr(code - 0xFEE0) for code in range(0xFF01, 0xFF5F)}
_SIGNS = _FULL_WIDTH | dict.fromkeys((0xD7, 0xB7, 0x2217, 0x2219, 0x22C5), "*")
_SIGNS |= dict.fromkeys((0xF7, 0x2044, 0x2215), "/") | dict.fromkeys((0x2013, 0x2212), "-")
_REWRITES = (  # of a line, in this order
    (r"^\s*(?:[-*+]\s+\[[ xX]\]\s+|(?:\d{1,2}|[A-Za-z])[.)]\s+|\((?:\d{1,2}|[A-Za-z])\)\s+(?=[\d(]))", ""),  # an item
    (r"\\(?:(?:times|cdot|ast)(?![A-Za-z])|\*)|(?<=[\d)\]}])\s*[xX\u2022]\s*(?=[\d(\[{])", "*"),
    (r"\\div(?![A-Za-z])", "/"),
    (r"\\(?:left|right)(?![A-Za-z])", ""),
    (r"\\[,;:! ()]|\\\[|\\\]|__", " "),
    (r"\\([{}])", r"\1"),
    (r"(?<![\d)\]}])(?<![\d)\]}] )\*{2,}|\*{2,}(?!\s*[-+\d(\[{])", " "),  # bold; between operands it is a power
)
_FRACTION = re.compile(r"\\[dt]?frac\s*\{([^{}]*)\}\s*\{([^{}]*)\}")
_CHAIN = re.compile(r"[-+*/()\[\]{}0-9 =]+")  # expressions with equals signs between them
_OPERATION = re.compile(r"[0-9)\]}] *[-+*/][-+*/(\[{ ]*[0-9]")
_BEFORE = re.compile(r"[\w.,][^ ]|\w *[+*/]|[\^\\\u221a\u221b].")  # what makes a chain part of something else
_AFTER = re.compile(r"[.,]?\w|\s*[\^\\%]|!\s*[-+*/=]")
_BULLET, _DASH = re.compile(r"\s*(?:[-+*]\s+)*"), re.compile(r"[\s)\]}]*(?:-\s+)*")  # in front of a chain
_WRAPPED = re.compile(r"(\$\$?|`{1,3})(.*)\1")  # a whole line in marks of Markdown or LaTeX


def extract_answer_tag(text: str, last_line_only: bool = False) -> str | None:
    """Return the content of the last <answer>...</answer> of the text, or of its last line; None without one."""
    text = text.split("\n")[-1] if last_line_only else text
    before, closed, _ = text.rpartition("</answer>")
    _, opened, content = before.rpartition("<answer>")
    return content.strip() if closed and opened else None


def extract_expression_from_completion(text: str) -> str:
    """Return the expression that ``text`` gives as its answer, in ASCII signs; "" when there is none.

    Reads what follows the thought: the last <answer> tag, else the last box, else all of it. The last statement with
    an operation is the answer, whatever stands around it ("the answer is 3*(4+5)."); of several expressions with
    equals signs between them the longest ("27 = 3*(4+5)", "3*(4+5) = 3*9"). What only works out a part of a statement
    before it is none ("3*(4+5), as 4+5 = 9 and 3*9 = 27"). Without one, a bare number in the last line. A tag or box
    without any of these is returned as it is.
    """
    return _expression(answered(text) or "")


def _marked(answer: str) -> str | None:
    """Return the content of the last <answer> tag, or else of the last box."""
    tagged = extract_answer_tag(answer)
    return extract_boxed(answer) if tagged is None else tagged


def _expression(answer: str) -> str:
    marked = _marked(answer)
    lines = [line[-MAX_LINE:] for line in (answer if marked is None else marked).splitlines() if line.strip()]
    found, whole = "", ""  # the last statement, as it is written and with spaces around its tokens
    worked: set[str] = set()  # the values of its parts that were worked out after it
    for expr, value in (statement for line in lines[-MAX_LINES:] for statement in _statements(_in_ascii(line))):
        tokens = re.findall(r"\d+|\S", expr)
        spaced = f" {' '.join(tokens)} "
        if value and (spaced in whole or not worked.isdisjoint(tokens) or _works_out(found, tokens, value)):
            worked.add(value)
        else:
            found, whole, worked = expr, spaced, set()
    if found:
        return _with_parentheses(found)
    last = _in_ascii(lines[-1]) if lines else ""
    return _with_parentheses(last) if re.fullmatch(r"[-+()\[\]{}0-9 ]+", last) else _in_ascii(marked or "")


def _works_out(expr: str, tokens: Sequence[str], value: str) -> bool:
    """Return whether ``tokens``, said to be ``value``, are ``expr`` with a part worked out: 3*9 = 27 of 3*(4+5)."""
    parser = _Parser(_with_parentheses(expr[:MAX_LENGTH]))
    try:
        total = parser.sum()
    except ExpressionError:
        return False
    parts = {str(part) for part in parser.parts} - {str(number) for number in parser.numbers}
    return str(total) == value and not parts.isdisjoint(tokens)


def _statements(line: str) -> Iterator[tuple[str, str]]:
    """Yield the expressions of ``line``, each with the number that it is said to be, or ""."""
    for chain in _CHAIN.finditer(line):
        if not _OPERATION.search(chain[0]):
            continue
        bare = chain[0].rstrip("-([{ ") if chain.end() < len(line) else chain[0]  # those are of the text after it
        shown = bare if chain[0][len(bare) : len(bare) + 1] == " " else chain[0]
        parts = (_DASH if chain.start() else _BULLET).sub("", shown, count=1).split("=")
        if chain.start() and _BEFORE.match(line, chain.start() - 1):
            del parts[0]
        if parts and _AFTER.match(line, chain.start() + len(shown)):
            del parts[-1]
        values = [part.strip() for part in parts if re.fullmatch(r" *\d+ *", part)]
        if parts := [part for part in parts if _OPERATION.search(part)]:
            yield max(parts, key=len).strip(), values[-1] if values else ""


def _in_ascii(line: str) -> str:
    """Return ``line`` in ASCII signs, without the marks around it."""
    line = line.translate(_SIGNS).strip()
    for pattern, sign in _REWRITES:
        line = re.sub(pattern, sign, line)
    for _ in range(10 if "frac" in line else 0):  # from the inside out
        line = _FRACTION.sub(r"((\1)/(\2))", line)
    wrapped = _WRAPPED.fullmatch(line.strip())
    return (wrapped[2] if wrapped else line).strip()


def _with_parentheses(expr: str) -> str:
    """Return ``expr`` with parentheses for its brackets and braces, if each of them closes what it should."""
    opened: list[str] = []
    for mark in re.findall(r"[][(){}]", expr):
        if mark in "([{":
            opened.append(mark)
        elif not opened or opened.pop() + mark not in ("()", "[]", "{}"):
            return expr
    return expr if opened else expr.translate(str.maketrans("[]{}", "()()"))


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
    completion: str,
    numbers: Sequence[int],
    target: int,
    rules: CountdownRules = CountdownRules(),
    truncated: bool = False,
    thinking: str = "",
) -> Scored:
    """Score ``completion`` by ``rules``; it is correct if it makes exactly ``target`` from the ``numbers`` given.

    The answer is what follows the thought (``answer.answered``). One that was ``truncated`` has an answer only in a
    tag or box that closes.
    """
    answer = answered(completion, thinking) or ""
    if rules.tag_only:
        expr = extract_answer_tag(answer, last_line_only=True)
    else:
        expr = None if truncated and _marked(answer) is None else _expression(answer) or None
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


@judge
def countdown_reward(
    prompt: str,
    completion: str,
    example: Mapping[str, Any],
    use_all: bool = False,
    invalid: float = -0.5,
    truncated: bool = False,
    thinking: str = "",
    **_: Any,
) -> float:
    """Return 1 for an expression that equals example["target"], 0 for another value, ``invalid`` for anything else.

    Every one of example["numbers"] may be used once; with ``use_all`` it must be. MaxRL needs rewards
    that are not negative: give it ``invalid=0``. Raises UserError when the example has no such entries.
    """
    return _score(completion, example, use_all, invalid, truncated, thinking).reward


@reward("countdown")
@judge
def countdown_reward_with_info(
    prompt: str,
    completion: str,
    example: Mapping[str, Any],
    use_all: bool = False,
    invalid: float = -0.5,
    truncated: bool = False,
    thinking: str = "",
    **_: Any,
) -> dict[str, Any]:
    """Return ``{"reward": countdown_reward, "is_correct": bool}``."""
    scored = _score(completion, example, use_all, invalid, truncated, thinking)
    return {"reward": scored.reward, "is_correct": scored.is_correct}


def _score(
    completion: str, example: Mapping[str, Any], use_all: bool, invalid: float, truncated: bool, thinking: str
) -> Scored:
    try:
        numbers, target = [index(n) for n in example["numbers"]], index(example["target"])
    except (KeyError, TypeError) as error:
        raise UserError(
            f"a countdown example has whole 'numbers' and a whole 'target', but this one is "
            f"{shown(dict(example))}; fix it"
        ) from error
    rules = CountdownRules(invalid=invalid, missing=invalid, use_all=use_all)
    return score_countdown(completion, numbers, target, rules, truncated, thinking)
