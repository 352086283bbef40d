r"""Read answers as what they are: numbers, lists, sets, tuples, intervals, matrices, equations or texts; compare them.

An answer equals another only if all of both was read, part by part. What is not read is compared as text.
"""

from __future__ import annotations

import functools
import itertools
import re
from collections.abc import Sequence
from dataclasses import dataclass, field, replace
from fractions import Fraction
from typing import Any

from .expressions import FUNCTIONS, Expression, UnreadError, equal, number_of, proportional, read_expression, shortened
from .spelling import join_thousands, spell, unwrap

EMPTY = r"\emptyset"
MAX_SIDES = 4  # of a chain of equations, which is worked out when it is read
SHOWN = 15  # significant digits that a decimal must show to stand for a number that has no finite decimal


@dataclass(frozen=True)
class Text:
    """The text that is compared as such: words, times, dates, numbers with a base, and all that is not read."""

    spelled: str
    of: Number | None = field(default=None, compare=False)  # the product that a short word may be


@dataclass(frozen=True)
class Number:
    """The expression, its unit ("" for none), and how it was written."""

    of: Expression
    unit: str = ""
    percent: bool = False
    shown: int = 0  # significant digits of a decimal, 0 for anything else
    step: Fraction = Fraction(0)  # the value of its last digit


@dataclass(frozen=True)
class Several:
    """The parts of a list, a set, a tuple or an interval, the rows of a matrix, or the terms of a ratio."""

    kind: str  # "list", "set", "ratio", "rows", or the two brackets: "()", "[)", "(]", "[]", "<>"
    parts: tuple[Any, ...]


@dataclass(frozen=True)
class Named:
    """The name on the left of an equation, and what it is."""

    name: str
    value: Any


@dataclass(frozen=True)
class Relation:
    """The relation of an expression to 0: "=", "<" or "<="."""

    sign: str
    difference: Expression


@dataclass(frozen=True)
class Region:
    """The intervals of the real line, in order and apart: (low, closed, high, closed), with None for infinity."""

    pieces: tuple[tuple[Expression | None, bool, Expression | None, bool], ...]
    name: str = ""
    asked: bool = False  # written as an inequality


# ---- parts of a text

_OPEN, _CLOSE = ("(", "[", "{", r"\{", r"\langle"), (")", "]", "}", r"\}", r"\rangle")
_MARK = re.compile(r"\\begin\{[a-z]+\*?\}|\\end\{[a-z]+\*?\}|\\[A-Za-z]+|\\.|.", re.DOTALL)


def split(text: str, separator: re.Pattern[str]) -> list[str]:
    """Return the parts of ``text`` between separators that stand in no brackets, each separator after its part."""
    if separator.search(text) is None:
        return [text]
    parts, depth, start, at = [], 0, 0, 0
    while at < len(text):
        mark = _MARK.match(text, at)
        assert mark is not None
        if depth == 0 and (found := separator.match(text, at)) and found.end() > at:
            parts += [text[start:at], found[0]]
            at = start = found.end()
            continue
        depth += (mark[0] in _OPEN or mark[0].startswith(r"\begin")) - (
            mark[0] in _CLOSE or mark[0].startswith(r"\end")
        )
        at = mark.end()
    return [*parts, text[start:]]


_SEPARATOR = re.compile(
    r"\s*[,;]\s*(?:(?:and|or)(?![A-Za-z]))?|(?<![A-Za-z])(?:and|or)(?![A-Za-z])|\\text\{(?:and|or)\}"
)
_RELATION = re.compile(r"<(?!=)|>(?!=)|=|\\(?:le|ge|ne|lt|gt|in|equiv)(?![A-Za-z])")
_UNION = re.compile(r"\\cup(?![A-Za-z])|\\setminus(?![A-Za-z])")
_COLON = re.compile(":")
_PIPE = re.compile(r":|\\mid(?![A-Za-z])|\|")
_ROW, _CELL = re.compile(r"\\\\"), re.compile("&")
_ENVIRONMENT = re.compile(
    r"(.*?)\\begin\{(p|b|B|small|)(matrix|array|cases)\}(?:\{[lcr| ]*\})?(.*)\\end\{\2\3\}", re.DOTALL
)
_CLOCK = re.compile(  # or a date; no other number begins with a 0
    r"(?<![\d:])(?<!: )\d{1,2}\s?:\s?\d\d(?!\d)|\d{4}-\d\d?-\d\d?|\d\d?/\d\d?/\d{2,4}|\d\d?-\d\d?-\d{4}"
    r"|(?<!\d)\d\d-\d\d-\d\d(?!\d)|(?<![\d.])0\d[-/]\d|\d[-/]0\d(?![\d.])"
)

# ---- names

_LETTER = (
    r"(?:[A-Za-z]|\\(?:alpha|beta|gamma|delta|epsilon|zeta|eta|theta|kappa|lambda|mu|nu|xi|rho|sigma|tau|phi|chi|psi|omega"
    r"|Gamma|Delta|Theta|Lambda|Sigma|Phi|Psi|Omega|ell)|\\(?:vec|hat|bar|overline|overrightarrow)\{[A-Za-z]{1,3}\})"
)
_MARKS = r"(?:_(?:\w|\\[A-Za-z]+|\{[^{}]*\}))?'*"
_NAME = re.compile(
    rf"{_LETTER}{_MARKS}(?:\((?:[A-Za-z0-9., ]|\\[a-z]+)*\))?"
    rf"|(?:[fghFGHPE]|\\[pP](?:hi|si)){_MARKS}(?:\^\{{-1\}})?\([^()]*\)"
    rf"|m?\\angle\s*\{{?[A-Z]{{1,3}}\}}?|(?:\\triangle\s*)?[A-Z]{{2,4}}"
    rf"|\\text\{{[A-Za-z ]+\}}(?:_\w)?|(?:[Tt]he )?(?:[Aa]rea|[A-Za-z]{{5,}})(?: [A-Za-z]+)*"
    rf"|\(\s*{_LETTER}{_MARKS}(?:\s*,\s*{_LETTER}{_MARKS})+\s*\)|\|[A-Z]{{2}}\||\\\|\s*(?:[A-Za-z]|\\vec\{{[A-Za-z]\}})\s*\\\||\\frac\{{d\^?\d?[a-z]\}}\{{d[a-z]\^?\d?\}}"
)

# ---- units

# What follows a number and changes it, questions it, or names a time
_OTHER_WORDS = (
    "and or to not no nor maybe perhaps possibly either but is are was were more less fewer greater than least "
    "most about around approximately roughly nearly almost hundred thousand million millions billion billions "
    "trillion trillions dozen dozens k bn mn mil mln lakh crore mod modulo factorial squared cubed half halves "
    "third thirds quarter quarters fourth fourths fifth fifths sixth sixths seventh sevenths eighth eighths "
    "ninth ninths tenth tenths hundredths thousandths times plus minus over by negative false wrong incorrect "
    "true if when where for unless except without one two three four five six seven eight nine ten eleven twelve "
    "twenty thirty forty fifty infinity infinite th st rd am pm bc ad ce bce january february march april may "
    "june july august september october november december noon midnight choose through until till versus vs only "
    "repeating recurring inverse reciprocal mille ten of even odd prime too instead otherwise else then now initially"
)
_NO_UNITS = frozenset(_OTHER_WORDS.split())
_UNITS = {
    name: names.split()[0]
    for names in (
        "cm centimeter centimetre", "mm millimeter millimetre", "km kilometer kilometre", "m meter metre",
        "ft foot feet", "in inch inche", "mi mile", "yd yard", "g gram gramme", "kg kilogram", "mg milligram",
        "lb pound",
        "s sec second", "min minute", "h hr hour", "ms millisecond", "l liter litre", "ml milliliter millilitre",
        "hz hertz", "j joule", "w watt", "v volt", "n newton", "pa pascal", "mol mole", "$ dollar usd", "€ euro eur",
        "£ gbp", "¢ cent", "rad radian", "unit", "deg degree", "oz ounce", "mi/h mph", "k kelvin", "day", "year",
        "week", "acre", "gallon", "person people", "degc", "degf", "¥ yen", "₹ rupee",
        "km/h kph kmh", "block", "point", "%",
    )
    for name in names.split()
}  # fmt: skip
_POWERS = {"square": 2, "sq": 2, "cubic": 3, "cu": 3}
_BARE = frozenset("mshgLlNJWV")  # letters that are units after a number and a space
_WORD = r"(?:\\text\{[A-Za-z .,/()']*(?:[a-z]\^?[23])?\s*\}|(?<![A-Za-z\\])[A-Za-z]+\.?)(?:\s*\^\s*(?:-?\d|\{-?\d\}))?"
_TAIL = re.compile(rf"(.*?[\d.)}}%a-z])(\s*)\(?((?:{_WORD})(?:\s*(?:/|\\cdot|\s)\s*{_WORD})*)\)?", re.DOTALL)
_MONEY = re.compile(
    r"([-+]?)\s*(?:(\\?\$|£|€|¥|₹|¢)|\\text\{(\\?\$|€|£)\})\s*([-+]?.+)|(.+?)\s*(€|£|¥|₹|¢|\\?\$|\\text\{(?:€|£)\})"
)
_DECIMAL = re.compile(r"[-+]?(\d*)\.(\d+)")


def read(text: str, bracketed: bool = False) -> Any:
    """Return what ``text`` is: the record of its kind, and a Text for all that is not read."""
    text = unwrap(text)
    joined = join_thousands(text)
    if not bracketed or split(joined, _SEPARATOR)[1:]:
        text = joined
    parts = split(text, _SEPARATOR)
    if len(parts) > 1 and all(part.strip() for part in parts[::2]):
        return _listed(parts[::2], {p.strip(" ,;") for p in parts[1::2]})
    for reader in (_signs, _environment, _related, _modulo, _bracketed, _united, _ratio, _number):
        try:
            found = reader(text)
        except UnreadError:
            found = None
        if found is not None:
            return found
    return Text(spell(text))


def _listed(parts: list[str], words: set[str]) -> Any:
    """Return the list of ``parts``: a name holds for what follows it; inequalities joined by "or" are one region."""
    items: list[Any] = []
    for part in parts:
        item = read(part)
        for one in item.parts if isinstance(item, Several) and item.kind == "list" else (item,):
            is_value = isinstance(one, Number | Several)
            items.append(Named(items[0].name, one) if is_value and items and isinstance(items[0], Named) else one)
    if "or" in words and all(isinstance(item, Region) for item in items):
        joined = _union([piece for item in items for piece in item.pieces])
        if joined is not None and len({item.name for item in items}) == 1:
            return Region(joined, items[0].name, asked=True)
    return Several("list", tuple(items))


def _signs(text: str) -> Any:
    r"""Return the two values that \pm stands for."""
    text = text if r"\pm" in text else text.replace(r"\mp", r"\pm")
    if r"\{" in text or len(re.findall(r"\\pm(?![A-Za-z])", text)) != 1:
        return None
    both = (text.replace(r"\pm", "+").replace(r"\mp", "-"), text.replace(r"\pm", "-").replace(r"\mp", "+"))
    parts = tuple(read(part) for part in both)
    if any(isinstance(part, Text) for part in parts):
        return None
    return Several("list", tuple(p for part in parts for p in (part.parts if _is(part, "list") else (part,))))


def _environment(text: str) -> Any:
    """Return the rows of a matrix, times what stands before it; the lines of a system are a list."""
    found = _ENVIRONMENT.fullmatch(text)
    if found is None or r"\begin" in found[1] or text.count(r"\begin") > 1:
        return None
    factor = re.sub(r"^([-+])$", r"\g<1>1", found[1].strip())
    rows = [split(row, _CELL)[::2] for row in split(found[4], _ROW)[::2] if row.strip()]
    if found[3] == "cases":
        if factor:
            return None
        if all(len(row) == 1 for row in rows):
            return Several("list", tuple(read(row[0]) for row in rows))
    elif factor:
        read_expression(factor)
        rows = [[f"({factor})({cell})" for cell in row] for row in rows]
    return Several("rows", tuple(Several("row", tuple(read(cell, bracketed=True) for cell in row)) for row in rows))


def _related(text: str) -> Any:
    """Return an equation, an inequality, or what a name is or is an element of."""
    parts = split(text, _RELATION)
    if len(parts) == 1:
        return None
    sides = [part.strip() for part in parts[::2]]
    signs = [{"lt": "<", "gt": ">"}.get(sign.strip().lstrip("\\"), sign.strip().lstrip("\\")) for sign in parts[1::2]]
    if not all(sides) or ("equiv" in signs and r"\pmod" not in text):
        return None
    if set(signs) <= {"=", "in", "equiv"}:
        return _equation(sides, signs)
    if signs == ["ne"] and _is_variable(sides[0]) and _constant(sides[1]):
        bound = read_expression(sides[1])
        return Region(((None, False, bound, False), (bound, False, None, False)), _name(sides[0]), asked=True)
    if len(sides) > 3 or not (set(signs) <= {"<", "le"} or set(signs) <= {">", "ge"}):
        return None
    if signs[0] in (">", "ge"):
        sides, signs = sides[::-1], [{">": "<", "ge": "le"}[sign] for sign in signs[::-1]]
    return _inequality(sides, signs)


def _modulo(text: str) -> Any:
    """Return a number and its modulus."""
    found = re.fullmatch(r"(.+?)\s*\\pmod\{(.+)\}", text)
    return found and Several("mod", (Number(read_expression(found[1])), Number(read_expression(found[2]))))


def _equation(sides: list[str], signs: list[str]) -> Any:
    """Return what a name on the left is; an equation of two expressions; None for any other chain."""
    if len(sides) == 2 and not _NAME.fullmatch(sides[0]) and _NAME.fullmatch(sides[1]) and _constant(sides[0]):
        sides = sides[::-1]
    if _NAME.fullmatch(sides[0]) and not (_NO_UNITS | FUNCTIONS.keys()) & set(re.findall("[a-z]+", sides[0].lower())):
        name, values = _name(sides[0]), [read(side) for side in sides[1 : MAX_SIDES + 1]]
        if signs[0] == "in" and len(signs) == 1:
            return Named(name, values[0]) if isinstance(values[0], Several | Region) else None
        if "in" in signs or len(sides) > MAX_SIDES or (isinstance(values[0], Number) and name in values[0].of.names):
            return None
        if any(not same(value, values[-1], float("inf")) for value in values[:-1]):
            return None
        return Named(name, values[-1]) if not isinstance(values[-1], Named) else None
    if signs != ["="]:
        return None
    return Relation("=", _difference(*sides))


def _constant(text: str) -> bool:
    try:
        return not read_expression(text).names
    except UnreadError:
        return False


def _name(text: str) -> str:
    return re.sub(r"[\s{}]|\\text", "", text)


def _difference(left: str, right: str) -> Expression:
    return _less(read_expression(left), read_expression(right))


def _less(a: Expression, b: Expression) -> Expression:
    return Expression(("add", a.node, ("mul", ("number", Fraction(-1)), b.node)), a.names | b.names)


def _is_variable(text: str) -> bool:
    return re.fullmatch(rf"{_LETTER}{_MARKS}(?:\([a-z]\))?", text) is not None


def _inequality(sides: list[str], signs: list[str]) -> Any:
    """Return the region of a variable between numbers, or the relation of two expressions, of signs < and le."""
    at = 1 if len(sides) == 3 else next((i for i, side in enumerate(sides) if _is_variable(side)), None)
    others = [side for i, side in enumerate(sides) if i != at]
    if at is not None and _is_variable(sides[at]) and all(_constant(o) or _infinite(o) for o in others):
        low = sides[at - 1] if at else None
        high = sides[at + 1] if at + 1 < len(sides) else None
        piece = (_bound(low), bool(at) and signs[at - 1] == "le", _bound(high), at < len(signs) and signs[at] == "le")
        return Region((piece,), _name(sides[at]), asked=True)
    if len(sides) != 2:
        return None
    return Relation("<" if signs == ["<"] else "<=", _difference(*sides))


def _infinite(of: Any) -> int:
    r"""Return 1 for \infty, as text or as a Text, -1 for its negative, 0 for anything else."""
    found = re.fullmatch(r"\s*([-+]?)\s*\\infty\s*", of.spelled if isinstance(of, Text) else str(of))
    return 0 if found is None else -1 if found[1] == "-" else 1


def _bound(text: str | None) -> Expression | None:
    return None if text is None or _infinite(text) else read_expression(text)


def _bracketed(text: str) -> Any:
    """Return a set, a tuple or an interval; what one pair of brackets holds alone is the same without."""
    marks = [mark[0] for mark in _MARK.finditer(text)]
    depths = list(itertools.accumulate((mark in _OPEN) - (mark in _CLOSE) for mark in marks))
    if not depths or depths[0] != 1 or depths[-1] != 0 or 0 in depths[:-1]:
        return None
    kind, inner = marks[0] + marks[-1], text[len(marks[0]) : -len(marks[-1])]
    if kind == r"\{\}":
        return _set(inner)
    content = read(inner, bracketed=True)
    if not _is(content, "list"):
        return content if kind in ("()", "{}") and not isinstance(content, Text) else None
    kind = {r"\langle\rangle": "()", "{}": "set"}.get(kind, kind)
    return Several(kind, content.parts) if kind in ("()", "[)", "(]", "[]", "set") else None


def _set(inner: str) -> Any:
    r"""Return the set of elements, or what \{x : condition\} asks of x."""
    parts = split(inner, _PIPE)
    if len(parts) == 3 and re.fullmatch(rf"\s*{_LETTER}\s*(?:\\in\s*\\mathbb\{{R\}})?\s*", parts[0]):
        condition = read(parts[2])
        return condition if isinstance(condition, Region) else None
    content = read(inner, bracketed=True)
    return Several("set", content.parts if _is(content, "list") else (content,))


def _united(text: str) -> Any:
    r"""Return the region of intervals joined by \cup, the real numbers, or those without some."""
    parts = split(text, _UNION)
    if len(parts) == 1:
        return Region(((None, False, None, False),)) if re.fullmatch(r"\\mathbb\s*\{?R\}?", text) else None
    found = [_region(read(part)) for part in parts[::2]]
    regions = [region for region in found if region is not None]
    if len(regions) < len(found):
        return None
    if any(r"\setminus" in sign for sign in parts[1::2]):
        points = read(parts[2])
        if len(parts) != 3 or not re.fullmatch(r"\\mathbb\s*\{?R\}?", parts[0].strip()) or not _is(points, "set"):
            return None
        ordered = _union([piece for region in regions[1:] for piece in region.pieces])
        bounds = [None, *(piece[0] for piece in ordered or ()), None]
        return Region(tuple((a, False, b, False) for a, b in itertools.pairwise(bounds)))
    pieces = _union([piece for region in regions for piece in region.pieces])
    return None if pieces is None else Region(pieces)


def _region(of: Any) -> Region | None:
    """Return an interval, or a set of numbers, as a region, or None."""
    if isinstance(of, Region):
        return of
    if not isinstance(of, Several) or of.kind not in ("()", "[)", "(]", "[]", "set"):
        return None
    ends = [part.of if isinstance(part, Number) else None for part in of.parts]
    if of.kind == "set":
        pieces = [(end, True, end, True) for end in ends if end is not None]
        return Region(tuple(pieces)) if len(pieces) == len(ends) else None
    if len(ends) != 2 or any(end is None and _infinite(part) == 0 for end, part in zip(ends, of.parts, strict=True)):
        return None
    if _infinite(of.parts[0]) > 0 or _infinite(of.parts[1]) < 0:
        return None
    return Region(((ends[0], of.kind[0] == "[", ends[1], of.kind[1] == "]"),))


def _union(pieces: Sequence[Any]) -> tuple[Any, ...] | None:
    """Return the ``pieces`` in order, those joined that touch; None when an end has no value."""
    placed = []
    for piece in pieces:
        low, high = (None if end is None else number_of(end, float("inf")) for end in piece[::2])
        if any((end is None) != (value is None) for end, value in zip(piece[::2], (low, high), strict=True)):
            return None
        placed.append(
            (float("-inf") if low is None else float(low), float("inf") if high is None else float(high), *piece)
        )
    placed.sort(key=lambda p: (p[0], not p[3]))
    joined: list[Any] = []
    for piece in placed:
        last = joined[-1] if joined else None
        if last and (piece[0] < last[1] or (piece[0] == last[1] and (piece[3] or last[5]))):
            if piece[1] > last[1] or (piece[1] == last[1] and piece[5]):
                joined[-1] = (last[0], piece[1], last[2], last[3], piece[4], piece[5])
        else:
            joined.append(piece)
    return tuple(piece[2:] for piece in joined)


def _ratio(text: str) -> Any:
    """Return the terms of a ratio; a time of the day is none."""
    if _CLOCK.search(text):
        return Text(spell(text))
    parts = split(text, _COLON)
    if len(parts) == 1:
        return None
    return Several("ratio", tuple(Number(read_expression(part)) for part in parts[::2]))


def _number(text: str) -> Any:
    """Return an expression with its currency, unit and percent sign, or a word."""
    if re.fullmatch(r"(?![xyz]+$)[A-Za-z]{2,}(?: [A-Za-z]+)*", text):  # xy is a product
        try:
            return Text(spell(text), Number(read_expression(text)))
        except UnreadError:
            return None
    unit, percent = "", False
    if money := _MONEY.fullmatch(text):
        unit = re.sub(r"\\text|[\\{}]", "", money[2] or money[3] or money[6])
        text = (money[1] or "") + money[4] if money[4] else money[5]
    value, tail = _with_unit(text)
    if tail is not None:
        if unit and tail not in ("", unit):
            raise UnreadError(text)
        text, unit = value, tail or unit
    text = text.strip()
    if text.endswith("%"):
        text, percent = text[:-1].strip(), True
    of = read_expression(text)
    if (unit or percent) and (of.names - {"i"} or re.search(r"\d\s*-\s*\d", text)):
        raise UnreadError(text)
    decimal = _DECIMAL.fullmatch(text)
    shown = len((decimal[1] + decimal[2]).lstrip("0")) if decimal else 0
    return Number(of, unit, percent, shown, Fraction(1, 10 ** len(decimal[2])) if decimal else Fraction(0))


def _with_unit(text: str) -> tuple[str, str | None]:
    """Return the number and the unit that ``text`` ends with, or the text and None."""
    found = _TAIL.fullmatch(text) if len(text) < 200 else None
    if found is None:
        return text, None
    value, space, tail = found.groups()
    if text.count("(") != text.count(")"):
        return text, None
    words = re.findall(r"[A-Za-z$€£]+", tail.replace(r"\text", "").replace(r"\cdot", ""))
    bare = r"\text" not in tail
    if any(
        word.lower() in _NO_UNITS or word.lower().removesuffix("s") in _NO_UNITS or word in ("M", "B") for word in words
    ):
        return text, None
    if not words or len(words) > 5:
        return text, None
    if bare:
        known = all(word.lower().rstrip("s") in _UNITS or word.lower() in _UNITS or word in _POWERS for word in words)
        single = all(len(word) == 1 for word in words)
        if not value[-1].isdigit() and value[-1] not in ")}%" and not value.endswith(r"\pi"):
            return text, None
        if single and not (space and (len(words) > 1 or words[0] in _BARE) and known):
            return text, None
        if not known and (not space or len(words[0]) < 3):
            return text, None
    return value, _unit(tail)


def _unit(tail: str) -> str:
    """Return one spelling of a unit: "square meters", "m^2" and "sq m" are m2."""
    power, spelled = "", []
    tail = re.sub(r"\\text\s*\{([^{}]*)\}", r" \1 ", tail).replace(r"\cdot", " ").replace("per ", "/ ")
    for word in re.findall(r"[A-Za-z$€£]+|/|\^\s*\{?-?\d\}?|\d", tail):
        if word.lower() in _POWERS:
            power = str(_POWERS[word.lower()])
        elif word[0].isalpha():
            name = word if len(word) == 1 else word.lower()
            name = _UNITS.get(
                name.lower(), _UNITS.get(name.lower().rstrip("s"), name.rstrip("s") if len(name) > 3 else name)
            )
            spelled.append(name + power)
            power = ""
        else:
            spelled.append(re.sub(r"[\^\s{}]", "", word))
    return "".join(spelled)


# ---- equality


def _is(of: Any, kind: str) -> bool:
    return isinstance(of, Several) and of.kind == kind


def same(given: Any, reference: Any, deadline: float) -> bool:
    """Return whether the answer ``given`` is the ``reference``, both as ``read`` returns them.

    The set of one thing is that thing, unless it stands in a list.
    """
    for a, b in ((given, reference), (reference, given)):
        if _is(a, "set") and len(a.parts) == 1 and not (isinstance(b, Region) or _is(b, "set") or b == Text(EMPTY)):
            return same(a.parts[0], b, deadline)
    return _same(given, reference, deadline)


def _same(given: Any, reference: Any, deadline: float) -> bool:
    for a, b in ((given, reference), (reference, given)):
        if isinstance(a, Text) and a.of is not None and isinstance(b, Number):
            return _same(a.of, b, deadline)
        if isinstance(a, Named) and not isinstance(b, Named):
            return _named(a, b, deadline)
    if isinstance(given, Named):
        if given.name == reference.name and same(given.value, reference.value, deadline):
            return True
        return _relations(_as_relation(given), _as_relation(reference), deadline)
    if isinstance(given, Number) and isinstance(reference, Number):
        return _numbers(given, reference, deadline)
    if isinstance(given, Relation) or isinstance(reference, Relation):
        return _relations(_as_relation(given), _as_relation(reference), deadline)
    if isinstance(given, Region) or isinstance(reference, Region):
        return _regions(given, reference, deadline)
    if isinstance(given, Several) and isinstance(reference, Several):
        return _several(given, reference, deadline)
    return isinstance(given, Text) and given == reference


def _named(named: Named, other: Any, deadline: float) -> bool:
    """Return whether what ``named`` is, or the equation that it makes, is the ``other``."""
    if isinstance(other, Relation):
        return _relations(_as_relation(named), other, deadline)
    if named.name.startswith("(") and _is(named.value, "()") and _is(other, "list"):
        names = named.name[1:-1].split(",")
        if len(names) == len(named.value.parts):
            return _several(Several("list", tuple(map(Named, names, named.value.parts))), other, deadline)
    if _is(named.value, "set") and _is(other, "list"):
        return _several(named.value, other, deadline)
    return same(named.value, other, deadline)


def _as_relation(of: Any) -> Relation | None:
    """Return what a name is, or the inequality that bounds it on one side, as a relation to 0; None for others."""
    if isinstance(of, Relation):
        return of
    try:
        if isinstance(of, Named) and isinstance(of.value, Number) and not (of.value.unit or of.value.percent):
            return Relation("=", _less(read_expression(of.name), of.value.of))
        if isinstance(of, Region) and of.name and len(of.pieces) == 1:
            low, low_closed, high, high_closed = of.pieces[0]
            if low is None and high is not None:
                return Relation("<=" if high_closed else "<", _less(read_expression(of.name), high))
            if high is None and low is not None:
                return Relation("<=" if low_closed else "<", _less(low, read_expression(of.name)))
    except UnreadError:
        pass
    return None


def _relations(a: Relation | None, b: Relation | None, deadline: float) -> bool:
    """Return whether two relations to 0 are the same up to a factor, which is positive for an inequality."""
    if a is None or b is None or a.sign != b.sign or not a.difference.names or not b.difference.names:
        return False
    sign = proportional(a.difference, b.difference, deadline)
    return sign > 0 or (sign < 0 and a.sign == "=")


def _numbers(given: Number, reference: Number, deadline: float) -> bool:
    """Return whether two numbers have the same value, and the same unit if both name one.

    A percentage is also its hundredth, and degrees are also radians, where only one side says so.
    """
    a, b = given.of, reference.of
    units = {number.unit or "deg" * number.of.degrees or "%" * number.percent for number in (given, reference)} - {""}
    if len(units) > 1 and units != {"deg", "rad"}:
        return False
    choices = [(given, reference)] if len(units) < 2 else []
    if given.percent != reference.percent:
        choices.append(
            (_times(given, Fraction(1, 100)), reference)
            if given.percent
            else (given, _times(reference, Fraction(1, 100)))
        )
    if a.degrees != b.degrees and not (a.names | b.names):
        choices.append((_times(given, None), reference) if a.degrees else (given, _times(reference, None)))
    return any(_values(x, y, deadline) for x, y in choices)


def _times(number: Number, factor: Fraction | None) -> Number:
    """Return ``number`` times ``factor``, or times a degree in radians without one."""
    node = ("mul", number.of.node, ("degree",) if factor is None else ("number", factor))
    step = number.step * factor if factor else Fraction(0)
    return replace(number, of=replace(number.of, node=node), step=step, shown=number.shown if factor else 0)


def _values(a: Number, b: Number, deadline: float) -> bool:
    if equal(a.of, b.of, deadline):
        return True
    if max(a.shown, b.shown) < SHOWN or (a.shown and b.shown) or a.of.names or b.of.names:
        return False
    decimal, other = (a, b) if a.shown else (b, a)
    exact, shown = number_of(other.of, deadline), number_of(decimal.of, deadline)
    if exact is None or shown is None or (isinstance(exact, Fraction) and 10**4000 % exact.denominator == 0):
        return False  # a number that has a finite decimal must be written out
    return shortened(exact, shown, decimal.step)


def _regions(given: Any, reference: Any, deadline: float) -> bool:
    """Return whether two regions are the same; an inequality does not answer (a, b), which may be a point."""
    a, b = _region(given), _region(reference)
    if a is None or b is None or len(a.pieces) != len(b.pieces) or (a.name and b.name and a.name != b.name):
        return False
    if (
        a.asked
        and isinstance(reference, Several)
        and reference.kind == "()"
        and not any(map(_infinite, reference.parts))
    ):
        return False
    for x, y in zip(a.pieces, b.pieces, strict=True):
        for (end, closed), (other, also) in (((x[0], x[1]), (y[0], y[1])), ((x[2], x[3]), (y[2], y[3]))):
            if end is None or other is None:
                if end is not other:
                    return False
            elif closed != also or not equal(end, other, deadline):
                return False
    return True


def _several(given: Several, reference: Several, deadline: float) -> bool:
    """Return whether the parts are the same: in order, but for sets and for lists without names or dots."""
    a, b = given.parts, reference.parts
    kinds = {given.kind, reference.kind}
    compare = functools.partial(_same, deadline=deadline)
    if kinds == {"set"}:
        return all(any(compare(x, y) for y in b) for x in a) and all(any(compare(x, y) for x in a) for y in b)
    if len(a) != len(b):
        return False
    if kinds == {"ratio"}:
        return _proportions(a, b, deadline)
    named = all(isinstance(part, Named) for part in (*a, *b))
    if kinds <= {"list", "set"} and (named or not (_is_ordered(a) or _is_ordered(b))):
        left = list(b)
        for x in a:
            found = next((i for i, y in enumerate(left) if compare(x, y)), None)
            if found is None:
                return False
            del left[found]
        return True
    return (len(kinds) == 1 or kinds == {"list", "()"}) and all(map(compare, a, b))


def _is_ordered(parts: Sequence[Any]) -> bool:
    """Return whether a list has different names, or dots for what it leaves out."""
    names = {part.name for part in parts if isinstance(part, Named)}
    return len(names) > 1 or any(isinstance(part, Text) and r"\ldots" in part.spelled for part in parts)


def _proportions(a: Sequence[Number], b: Sequence[Number], deadline: float) -> bool:
    """Return whether a1 : a2 : ... is b1 : b2 : ..., by a1 bi = ai b1."""
    for x, y in zip(a, b, strict=True):
        left = Expression(("mul", a[0].of.node, y.of.node), a[0].of.names | y.of.names)
        right = Expression(("mul", x.of.node, b[0].of.node), x.of.names | b[0].of.names)
        if not equal(left, right, deadline):
            return False
    return all(not equal(n.of, Expression(("number", Fraction(0)), frozenset()), deadline) for n in (*a, *b))
