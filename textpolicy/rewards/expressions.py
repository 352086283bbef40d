r"""Read expressions in LaTeX, or as people type them, whole or not at all; work them out, and compare them exactly.

Rational numbers are Fractions. What is none is worked out to 300 digits, and what has variables at points.
"""

from __future__ import annotations

import functools
import itertools
import math
import random
import re
import threading
import time
import zlib
from collections.abc import Iterator, Sequence
from dataclasses import dataclass, field
from fractions import Fraction
from typing import Any

MAX_DEPTH = 12  # nested brackets of an expression that is read
MAX_BITS = 40_000  # of a fraction that is worked out exactly
MAX_LOG = 1e12  # binary logarithm of the largest number
DIGITS, FEWER = 300, 100  # decimal digits of numbers that are no fractions
POINTS = 6  # at which expressions with variables are compared


class UnreadError(ValueError):
    """The text is no expression that is read here."""


class UndefinedError(ArithmeticError):
    """The expression has no value at this point, or one too large to work out."""


class LateError(Exception):
    """The time limit has passed."""


Node = tuple[Any, ...]  # an operation and its arguments: numbers, names, and further nodes
Value = Any  # a Fraction, or a number of mpmath

# ---- reading

_TOKEN = re.compile(r"\\[A-Za-z]+|\\.|\d+(?:\.\d+)?|\.\d+|[A-Za-z]+|'+|\S")
_GREEK_NAMES = (
    r"\alpha \beta \gamma \delta \epsilon \zeta \eta \theta \iota \kappa \lambda \mu \nu \xi \rho \sigma \tau \upsilon"
    r" \phi \chi \psi \omega \Gamma \Delta \Theta \Lambda \Xi \Pi \Sigma \Upsilon \Phi \Psi \Omega \ell \hbar"
)
_GREEK = set(_GREEK_NAMES.split())
_INVERSES = {"sin": "asin", "cos": "acos", "tan": "atan", "sinh": "asinh", "cosh": "acosh", "tanh": "atanh"}
FUNCTIONS = {
    "sin": "sin", "cos": "cos", "tan": "tan", "cot": "cot", "sec": "sec", "csc": "csc", "sinh": "sinh", "cosh": "cosh",
    "tanh": "tanh", "exp": "exp", "ln": "ln", "log": "log", "lg": "log",
    "arcsin": "asin", "arccos": "acos", "arctan": "atan", "asin": "asin", "acos": "acos", "atan": "atan", "tg": "tan",
    "arsinh": "asinh", "arcosh": "acosh", "artanh": "atanh",
}  # fmt: skip
_CONSTANTS = {r"\pi": "pi", "e": "e", "i": "i"}
_OPAQUE = {"f", "g", "F", "G", r"\phi", r"\Phi", r"\psi", r"\Psi", r"\Gamma", r"\zeta"}  # f(3) is no product
_TYPED = re.compile(f"({'|'.join(sorted([*FUNCTIONS, 'sqrt'], key=len, reverse=True))})")
_FACES = {r"\vec", r"\hat", r"\overrightarrow", r"\tilde", r"\mathcal"}  # of a name
_CLOSING = {"(": ")", "[": "]", "{": "}", "|": "|", r"\{": r"\}", r"\lfloor": r"\rfloor", r"\lceil": r"\rceil"}
_IMPLICIT = {"(", "[", "|", r"\frac", r"\sqrt", r"\binom", r"\lfloor", r"\lceil", *_GREEK, *_CONSTANTS, *_FACES}


@dataclass
class Expression:
    """The tree of an expression, the names of its variables, and whether it says degrees outside a function."""

    node: Node
    names: frozenset[str]
    degrees: bool = False


@functools.lru_cache(maxsize=4096)
def read_expression(text: str) -> Expression:
    """Return the expression that the whole of ``text`` is. Raises UnreadError when it is none, or may be another."""
    reader = _Reader(_tokens(text))
    node = reader.sum()
    if reader.at < len(reader.tokens):
        raise UnreadError(text)
    return Expression(node, frozenset(reader.names), reader.degrees)


def _tokens(text: str) -> list[str]:
    """Return the tokens of ``text``; letters that stand together are names of functions, or products."""
    tokens: list[str] = []
    for found in _TOKEN.finditer(text):
        token = found[0]
        if not token.isascii() or not token.isalpha():
            tokens.append(token)
            continue
        for i, part in enumerate(_TYPED.split(token)):
            if i % 2 == 0 and len(part) > 3:
                raise UnreadError(text)  # a word
            tokens += ["\\" + part] if i % 2 else part
    return tokens


def _product(left: Node, right: Node) -> Node:
    return (*left, right) if left[0] == "mul" else ("mul", left, right)


@dataclass
class _Reader:
    """The tokens, and how far they are read."""

    tokens: list[str]
    at: int = 0
    depth: int = 0
    functions: int = 0  # in whose arguments the reader is
    bars: int = 0  # 1 where the next bar closes
    names: set[str] = field(default_factory=set)
    degrees: bool = False

    def peek(self) -> str:
        return self.tokens[self.at] if self.at < len(self.tokens) else ""

    def take(self, *expected: str) -> str:
        token = self.peek()
        if not token or (expected and token not in expected):
            raise UnreadError(token)
        self.at += 1
        return token

    def sum(self) -> Node:
        terms = [self.product()]
        while self.peek() in ("+", "-"):
            sign, term = self.take(), self.product()
            terms.append(term if sign == "+" else ("mul", ("number", Fraction(-1)), term))
        return ("add", *terms) if len(terms) > 1 else terms[0]

    def product(self) -> Node:
        node, divided = self.signed(), False
        while True:
            token = self.peek()
            if token in ("*", r"\cdot", r"\times"):
                self.take()
                node = _product(node, self.signed())
            elif token in ("/", r"\div"):
                if divided:
                    raise UnreadError("a/b/c")
                self.take()
                node, divided = ("div", node, self.signed()), True
                if self.starts_factor():
                    raise UnreadError("a/bc")
            elif self.starts_factor():
                node = self.beside(node)
            else:
                return node

    def starts_factor(self) -> bool:
        """Return whether the next token is a factor without a sign before it; numbers are none, but for 2!3!."""
        token = self.peek()
        if token[:1].isdigit():
            return self.tokens[self.at - 1] == "!"
        if token == "|":  # closes what was opened
            return self.bars == 0
        if token == "{":
            return self.at + 1 < len(self.tokens) and self.tokens[self.at + 1][0] not in "0123456789.+-"
        return token in _IMPLICIT or (token.isalpha() and token.isascii()) or token.lstrip("\\") in FUNCTIONS

    def beside(self, left: Node) -> Node:
        """Return the product of ``left`` and the factor beside it, or the mixed number that they are."""
        start = self.at
        right = self.power()
        beside = self.tokens[start - 1]
        if left[0] == "number" and beside[-1].isdigit() and self.tokens[start] == r"\frac" and right[0] == "div":
            whole, (over, under) = left[1], (part[1] if part[0] == "number" else None for part in right[1:])
            if over is not None and under is not None:
                if whole.denominator != 1 or not over < under or "." in beside:
                    raise UnreadError("neither a mixed number nor a product")
                return ("number", whole + over / under)
        return _product(left, right)

    def signed(self) -> Node:
        """Return a factor with one sign before it, or none: -2 1/3 is -(2 1/3)."""
        if self.peek() not in ("-", "+"):
            return self.power()
        sign, node = self.take(), self.power()
        if node[0] == "number" and self.peek() == r"\frac":
            node = self.beside(node)
        return node if sign == "+" else ("mul", ("number", Fraction(-1)), node)

    def power(self) -> Node:
        node = self.atom()
        while self.peek() == "!":
            self.take()
            if self.peek() == "!":
                raise UnreadError("!!")
            node = ("factorial", node)
        if self.peek() == "^":
            self.take()
            if self.peek() == r"\circ":
                self.take()
                self.degrees |= not self.functions
                node = ("mul", node, ("degree",)) if self.functions else node
            else:
                node = ("pow", node, self.exponent())
        if self.peek() in ("^", "_", "!") or self.peek().startswith("'"):
            raise UnreadError("a second exponent, or a mark")
        return node

    def exponent(self) -> Node:
        token = self.peek()
        if token in ("{", "("):
            return self.group()
        if token in ("-", "+"):
            sign, node = self.take(), self.exponent()
            return node if sign == "+" else ("mul", ("number", Fraction(-1)), node)
        if token == r"\frac" or token[:1].isdigit() or token.isalpha() or token in _GREEK or token in _CONSTANTS:
            return self.atom()
        raise UnreadError(token)

    def group(self) -> Node:
        """Return what stands between two brackets."""
        opened = self.take(*_CLOSING)
        self.depth += 1
        if self.depth > MAX_DEPTH:
            raise UnreadError("too deep")
        bars, self.bars = self.bars, int(opened == "|")
        node = self.sum()
        self.take(_CLOSING[opened])
        self.bars = bars
        self.depth -= 1
        kind = {"|": "abs", r"\lfloor": "floor", r"\lceil": "ceil"}.get(opened)
        return (kind, node) if kind else node

    def argument(self) -> Node:
        """Return what a command of LaTeX takes: a group, or one digit or letter."""
        if self.peek() == "{":
            return self.group()
        token = self.peek()
        if token.isdigit() and len(token) > 1:
            self.tokens[self.at : self.at + 1] = [token[0], token[1:]]
        if token.isdigit() or token.isalpha() or token in _GREEK or token in _CONSTANTS:
            return self.atom()
        raise UnreadError(token)

    def atom(self) -> Node:
        token = self.peek()
        if re.fullmatch(r"\d+(?:\.\d+)?|\.\d+", token) and token.isascii() and len(token) < 400:
            self.take()
            if self.peek() == "_":
                raise UnreadError("a base")
            return ("number", Fraction(token))
        if token in ("(", "[", "{", "|", r"\lfloor", r"\lceil"):
            return self.group()
        if token.lstrip("\\") in FUNCTIONS and len(token) > 1:
            return self.function()
        if token in (r"\frac", r"\binom"):
            self.take()
            over = self.argument()
            return ({r"\frac": "div", r"\binom": "binomial"}[token], over, self.argument())
        if token != r"\sqrt":
            return self.name()
        self.take()
        degree = self.group() if self.peek() == "[" else ("number", Fraction(2))
        inner = self.group() if self.peek() in ("{", "(") else self.atom()
        return ("pow", inner, ("div", ("number", Fraction(1)), degree))

    def function(self) -> Node:
        """Return a function of what follows: a group, or factors that stand beside each other."""
        name, base, power = FUNCTIONS[self.take().lstrip("\\")], None, None
        for _ in range(2):
            if self.peek() == "_" and name == "log" and base is None:
                self.take()
                base = self.argument() if self.peek() != "(" else self.group()
            elif self.peek() == "^" and power is None:
                self.take()
                power = self.exponent()
        if power == ("mul", ("number", Fraction(-1)), ("number", Fraction(1))):
            name, power = _INVERSES.get(name, ""), None
            if not name:
                raise UnreadError("an inverse")
        self.functions += 1
        if self.peek() in ("(", "[", "{", "|"):
            inner = self.group()
        else:
            inner = self.signed() if self.peek() in ("-", "+") else self.power()
            while (
                self.starts_factor()
                and self.peek() not in ("(", "[", "|")
                and self.peek().lstrip("\\") not in FUNCTIONS
            ):
                inner = self.beside(inner)
        self.functions -= 1
        node: Node = (name, inner)
        if name == "log" and base is not None:
            node = ("div", ("ln", inner), ("ln", base))
        return node if power is None else ("pow", node, power)

    def name(self) -> Node:
        """Return a constant, a variable with its index, or a function that is only a name."""
        token = self.take()
        if token in _FACES:
            inner = self.peek()
            if inner == "{":
                self.take()
                token += self.take()
                self.take("}")
            else:
                token += self.take()
            if not token.lstrip("\\").isalpha():
                raise UnreadError(token)
        elif not (token.isalpha() and token.isascii()) and token not in _GREEK and token not in _CONSTANTS:
            raise UnreadError(token)
        if self.peek() == "_":
            self.take()
            token += "_" + self.index()
        if self.peek().startswith("'"):
            token += self.take()
        if token in _OPAQUE and self.peek() == "(":
            return ("call", token, self.group())
        if token in _CONSTANTS:
            if token == "i":
                self.names.add("i")
            return ("constant", _CONSTANTS[token])
        self.names.add(token)
        return ("variable", token)

    def index(self) -> str:
        if self.peek() != "{":
            token = self.take()
            if token.isdigit() and len(token) > 1:
                raise UnreadError("x_12")
        else:
            self.take()
            token = "".join(iter(lambda: self.take() if self.peek() != "}" else "", ""))
            self.take("}")
        if not re.fullmatch(r"[A-Za-z0-9+,-]+|\\[A-Za-z]+", token):
            raise UnreadError(token)
        return token


# ---- values

_loading = threading.Lock()


@functools.cache
def _library() -> Any:
    """Return mpmath, with its constants worked out once: threads that work them out together may mix them up."""
    with _loading:
        import mpmath

        for constant in ("pi", "e", "ln2", "ln10"):
            mpmath.mp.workprec(4000)(lambda name=constant: +getattr(mpmath.mp, name))()
    return mpmath


_contexts = threading.local()


def _context(digits: int) -> Any:
    """Return this thread's arithmetic of so many decimal digits."""
    name = f"digits_{digits}"
    if not hasattr(_contexts, name):
        context = _library().MPContext()
        context.dps = digits
        setattr(_contexts, name, context)
    return getattr(_contexts, name)


@dataclass
class _Point:
    """The values of variables, and the arithmetic that works expressions out there."""

    at: dict[str, Fraction]
    is_complex: bool  # whether roots of negative numbers have a value
    digits: int
    deadline: float

    @property
    def mp(self) -> Any:
        return _context(self.digits)

    def value(self, node: Node) -> Value:
        """Return the value of ``node``. Raises UndefinedError, and LateError after the deadline."""
        if time.monotonic() > self.deadline:
            raise LateError
        kind, *parts = node
        if kind == "number":
            return parts[0]
        if kind == "variable":
            return self.at[parts[0]]
        if kind == "degree":
            return self.mp.pi / 180
        if kind == "constant":
            return {"pi": +self.mp.pi, "e": +self.mp.e, "i": self.mp.mpc(0, 1)}[parts[0]]
        if kind == "call":  # a number that is the same for the same function and argument
            if not isinstance(argument := self.value(parts[1]), Fraction):
                raise UndefinedError
            return Fraction(zlib.crc32(f"{parts[0]}({argument})".encode()), 2**31)
        values = [self.value(part) for part in parts]
        if kind in ("factorial", "binomial", "floor", "ceil", "abs"):
            return self.whole(kind, values)
        if kind in ("add", "mul", "div", "pow"):
            return functools.reduce(lambda a, b: self.bounded(self.combined(kind, a, b)), values)
        return self.bounded(self.function(kind, values[0]))

    def bounded(self, value: Value) -> Value:
        """Return ``value``: exact while it is a short fraction. Raises UndefinedError for none, or too large a one."""
        if isinstance(value, Fraction):
            if value.numerator.bit_length() + value.denominator.bit_length() <= MAX_BITS:
                return value
            value = self.real(value)
        if not self.mp.isfinite(value) or (value and abs(self.mp.mag(value)) > MAX_LOG):
            raise UndefinedError
        if isinstance(value, self.mp.mpc):
            if value.imag == 0:
                return value.real
            if not self.is_complex:
                raise UndefinedError
        return value

    def real(self, value: Value) -> Any:
        return self.mp.mpf(value.numerator) / value.denominator if isinstance(value, Fraction) else value

    def combined(self, kind: str, a: Value, b: Value) -> Value:
        if kind == "pow":
            return self.pow(a, b)
        if kind == "div" and (b == 0 or self.vanishes(b)):
            raise UndefinedError
        if not (isinstance(a, Fraction) and isinstance(b, Fraction)):
            a, b = self.real(a), self.real(b)
        return a + b if kind == "add" else a * b if kind == "mul" else a / b

    def vanishes(self, value: Value) -> bool:
        return not isinstance(value, Fraction) and abs(value) < self.mp.mpf(10) ** (-self.digits // 2)

    def pow(self, a: Value, b: Value) -> Value:
        """Return a^b; the odd root of a negative number is real."""
        if a == 0:
            if isinstance(b, Fraction) and b > 0:
                return Fraction(0)
            raise UndefinedError
        size = abs(self.mp.mag(self.real(a)) + 1) * abs(self.real(b))
        if size > MAX_LOG:
            raise UndefinedError
        if isinstance(b, Fraction):
            if b.denominator == 1 and isinstance(a, Fraction):
                if abs(b) * (a.numerator.bit_length() + a.denominator.bit_length()) <= MAX_BITS:
                    return a**b.numerator
            elif isinstance(a, Fraction) and (root := _exact_root(a, b.denominator)) is not None:
                return self.pow(root, Fraction(b.numerator))
            if b.denominator == 1:
                return self.real(a) ** b.numerator
            if b.denominator % 2 and not isinstance(a, self.mp.mpc) and a < 0:
                return (-1) ** b.numerator * self.mp.power(-self.real(a), self.real(b))
        return self.mp.power(self.real(a), self.real(b))

    def whole(self, kind: str, values: list[Value]) -> Value:
        """Return what is exact for whole numbers, or steps from one to the next."""
        first = values[0]
        if kind == "abs":
            return abs(first)
        if kind in ("floor", "ceil"):
            if not isinstance(first, Fraction) and (isinstance(first, self.mp.mpc) or abs(first) > 1e50):
                raise UndefinedError
            if not isinstance(first, Fraction):
                near = Fraction(int(self.mp.nint(first)))
                first = near if self.vanishes(first - self.real(near)) else first
            return Fraction(int(getattr(math if isinstance(first, Fraction) else self.mp, kind)(first)))
        if not all(isinstance(v, Fraction) and v.denominator == 1 and 0 <= v <= 3000 for v in values):
            raise UndefinedError
        return Fraction(math.factorial(int(first)) if kind == "factorial" else math.comb(int(first), int(values[1])))

    def function(self, name: str, value: Value) -> Value:
        x = self.real(value)
        if abs(x) > (1e11 if name in ("exp", "sinh", "cosh", "tanh") else self.mp.mpf(10) ** 50) and name not in (
            "ln",
            "log",
            "lg",
        ):
            raise UndefinedError
        if name in ("ln", "log"):
            if x == 0:
                raise UndefinedError
            return self.mp.ln(x) if name == "ln" else self.mp.ln(x) / self.mp.ln(10)
        if name in ("tan", "sec") and self.vanishes(self.mp.cos(x)):
            raise UndefinedError
        if name in ("cot", "csc") and self.vanishes(self.mp.sin(x)):
            raise UndefinedError
        try:
            return getattr(self.mp, name)(x)
        except (ValueError, ZeroDivisionError, OverflowError) as error:
            raise UndefinedError from error


def _exact_root(a: Fraction, q: int) -> Fraction | None:
    """Return the fraction whose ``q``-th power is ``a``, or None."""
    if q > 64 or (a < 0 and q % 2 == 0):
        return None
    roots: list[int] = []
    for number in (abs(a.numerator), a.denominator):
        root = math.isqrt(number) if q == 2 else round(math.exp(math.log(number) / q)) if number < 2**900 else 0
        if root**q != number:
            return None
        roots.append(root if a > 0 or len(roots) else -root)
    return Fraction(*roots)


# ---- comparing


def equal(a: Expression, b: Expression, deadline: float) -> bool:
    """Return whether ``a`` and ``b`` have the same value, at every point that gives them one."""
    if not (a.names | b.names) and a.node[0] == b.node[0] == "number":
        return bool(a.node[1] == b.node[1])
    for points, is_complex in _kinds_of_points(a, b):
        pairs = list(_values(points, (a, b), is_complex, DIGITS, deadline))
        if len(pairs) >= min(2, len(points)):
            return all(close(*both) or _vanish(points[i], (a, b), is_complex, both, deadline) for i, *both in pairs)
    return False


def _has_constant(of: Expression) -> bool:
    """Return whether one term is a constant of integration, C or c."""
    return of.node[0] == "add" and len({("variable", "C"), ("variable", "c")} & {*of.node[1:]}) == 1


def _kinds_of_points(a: Expression, b: Expression) -> Iterator[tuple[Sequence[dict[str, Fraction]], bool]]:
    """Yield points of real numbers, of whole ones, and again with roots of negative numbers."""
    names = tuple(sorted((a.names | b.names) - {"i"}))
    if {"C", "c"} <= {*names} and all(_has_constant(e) for e in (a, b)):
        names = tuple(name for name in names if name != "c")
    for is_complex in (True,) if "i" in a.names | b.names else (False, True):
        yield points_for(names), is_complex
        if names:
            yield points_for(names, whole=True), is_complex


@functools.lru_cache(maxsize=256)
def points_for(names: tuple[str, ...], whole: bool = False) -> list[dict[str, Fraction]]:
    """Return the points at which expressions of these variables are compared: positive, small, large, negative."""
    if not names:
        return [{}]
    points = []
    for i in range(POINTS):
        draw = random.Random(i)
        size = (0.9, 3, 40)[i % 3]
        signs = (1,) if i < POINTS // 2 else (-1, 1)
        point = {}
        for name in names:
            under = 2 * draw.randrange(50, 500)
            over = 2 * draw.randrange(int(0.1 * under * size / 2), int(under * size / 2)) + 1
            point[name] = (
                Fraction(over * draw.choice(signs), under) if not whole else Fraction(draw.randrange(2 + i, 9 + 2 * i))
            )
        points.append(point | {"c": point["C"]} if "C" in point and "c" not in point else point)
    return points


def _values(
    points: Sequence[dict[str, Fraction]], of: Sequence[Expression], is_complex: bool, digits: int, deadline: float
) -> Iterator[tuple[Any, ...]]:
    """Yield the number of each point at which all expressions have a value, and the values."""
    for i, point in enumerate(points):
        place = _Point(point, is_complex, digits, deadline)
        try:
            yield i, *(place.value(expression.node) for expression in of)
        except UndefinedError:
            continue


def close(a: Value, b: Value) -> bool:
    """Return whether two values are the same: fractions exactly, others to 250 of their 300 digits."""
    if isinstance(a, Fraction) and isinstance(b, Fraction):
        return a == b
    mp = _context(DIGITS)
    a, b = (mp.mpf(v.numerator) / v.denominator if isinstance(v, Fraction) else v for v in (a, b))
    return bool(abs(a - b) <= max(abs(a), abs(b)) * mp.mpf(10) ** -(DIGITS - 50))


def shortened(exact: Value, shown: Value, step: Fraction) -> bool:
    """Return whether the decimal ``shown``, of a last digit worth ``step``, is ``exact`` rounded or cut."""
    mp = _context(DIGITS)
    a, b, step = (mp.mpf(v.numerator) / v.denominator if isinstance(v, Fraction) else v for v in (exact, shown, step))
    return bool(abs(a - b) <= step / 2 or 0 <= abs(a) - abs(b) < step)


def _vanish(
    point: dict[str, Fraction], of: Sequence[Expression], is_complex: bool, values: Sequence[Value], deadline: float
) -> bool:
    """Return whether both sides are 0, which rounding hides: what is left then shrinks with the number of digits."""
    small = _context(DIGITS).mpf(10) ** -FEWER
    if any(v != 0 and (isinstance(v, Fraction) or abs(v) > small) for v in values):
        return False
    for _, *rough in _values([point], of, is_complex, FEWER, deadline):
        return all(v == 0 or abs(v) < abs(r) * small for v, r in zip(values, rough, strict=True))
    return False


def proportional(a: Expression, b: Expression, deadline: float) -> int:
    """Return the sign of the number c with a = c b at every point, or 0 when there is none."""
    for points, is_complex in _kinds_of_points(a, b):
        pairs = [(x, y) for _, x, y in _values(points, (a, b), is_complex, DIGITS, deadline)]
        if not pairs:
            continue
        place = _Point({}, True, DIGITS, deadline)
        x0, y0 = pairs[0]
        if any(v == 0 for v in itertools.chain(*pairs)) or not all(
            close(place.combined("mul", x, y0), place.combined("mul", x0, y)) for x, y in pairs
        ):
            return 0
        ratio = place.combined("div", x0, y0)
        return 1 if is_complex or ratio > 0 else -1
    return 0


def number_of(expression: Expression, deadline: float) -> Value | None:
    """Return the value of an expression without variables, or None."""
    if expression.names:
        return None
    return next((value for _, value in _values([{}], (expression,), False, DIGITS, deadline)), None)
