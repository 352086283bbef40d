r"""Give a mathematical answer one spelling: no wrappers, no Markdown, and one name for each sign of Unicode.

Nothing here decides what an answer means, and nothing of it is dropped that a reader would miss.
"""

from __future__ import annotations

import functools
import re
import unicodedata
from collections.abc import Callable, Sequence
from fractions import Fraction

from .answer import closing

Rule = tuple[re.Pattern[str], str | Callable[[re.Match[str]], str]]

# ---- signs of Unicode, and what LaTeX calls them

_SIGNS = {
    "−": "-", "‐": "-", "‑": "-", "×": r"\times ", "·": r"\cdot ", "⋅": r"\cdot ", "∙": r"\cdot ", "∗": "*",
    "÷": r"\div ", "≤": r"\le ", "⩽": r"\le ", "≥": r"\ge ", "⩾": r"\ge ", "≠": r"\ne ", "±": r"\pm ", "∓": r"\mp ",
    "π": r"\pi ", "∞": r"\infty ", "√": r"\sqrt ", "∛": r"\sqrt[3]", "∜": r"\sqrt[4]", "∅": r"\emptyset ",
    "∪": r"\cup ", "∩": r"\cap ", "∈": r"\in ", "∖": r"\setminus ", "ℝ": r"\mathbb{R}", "ℤ": r"\mathbb{Z}",
    "ℕ": r"\mathbb{N}", "ℚ": r"\mathbb{Q}", "ℂ": r"\mathbb{C}", "∠": r"\angle ", "△": r"\triangle ", "…": r"\ldots ",
    "⋯": r"\ldots ", "→": r"\to ", "≡": r"\equiv ", "≈": r"\approx ", "∨": r"\lor ", "∧": r"\land ", "⟨": r"\langle ",
    "⟩": r"\rangle ", "⌊": r"\lfloor ", "⌋": r"\rfloor ", "⌈": r"\lceil ", "⌉": r"\rceil ", "′": "'", "’": "'",
    "°": r"^\circ ", "º": r"^\circ ", "˚": r"^\circ ", "℃": r"^\circ C", "℉": r"^\circ F", "⁄": "/", "∶": ":",
    "。": ".", "，": ", ", "、": ", ", "“": '"', "”": '"', "\u200b": "", "\u200c": "", "\u2060": "", "\ufeff": "",
    "％": "%", "µ": r"\mu ",
}  # fmt: skip
_GREEK = (
    "alpha beta gamma delta epsilon zeta eta theta iota kappa lambda mu nu xi rho sigma tau upsilon phi chi psi omega"
)
for _name in _GREEK.split():
    _SIGNS[unicodedata.lookup(f"GREEK SMALL LETTER {_name.replace('lambda', 'lamda')}")] = f"\\{_name} "
for _name in ("Gamma", "Delta", "Theta", "Lambda", "Xi", "Sigma", "Phi", "Psi", "Omega"):
    _SIGNS[unicodedata.lookup(f"GREEK CAPITAL LETTER {_name.upper().replace('LAMBDA', 'LAMDA')}")] = f"\\{_name} "
_FULLWIDTH = {code: code - 0xFEE0 for code in range(0xFF01, 0xFF5F) if chr(code) not in _SIGNS}
_TABLE = str.maketrans(_SIGNS) | _FULLWIDTH | dict.fromkeys(map(ord, "\u00a0\u2002\u2003\u2009\u202f\u3000"), " ")
_HIGH = str.maketrans("⁰¹²³⁴⁵⁶⁷⁸⁹⁺⁻⁽⁾ⁿⁱ", "0123456789+-()ni")
_LOW = str.maketrans("₀₁₂₃₄₅₆₇₈₉₊₋₍₎", "0123456789+-()")
_VULGAR = re.compile("[¼½¾⅐-⅞]")

# ---- what stands around an answer

_STYLES = r"textbf|textit|emph|mathbf|mathit|mathnormal|boldsymbol|bm|underline|displaystyle"
_WRAPPED = [
    re.compile(pattern, re.DOTALL)
    for pattern in (
        r"\\\((.*)\\\)", r"\\\[(.*)\\\]", r'"([^"]*)"', r"\*\*((?:(?!\*\*).)+)\*\*", r"\*([^*]+)\*",
        r"_{1,2}([^_]+)_{1,2}",
        r"`+([^`]*)`+", r"#{1,6}\s+(.*)", r"<(b|i|em|strong|u|code|answer)>(.*)</\1>",
        r"(?:\\displaystyle|\\textstyle)(?![A-Za-z])(.*)", r"=\s*([^=]*)",
        r"(.*[^.\s])\s*\.", r"(.*[^\\])(?:\\|\\\\|\\newline)", r"(.*[^,;\s\\])\s*[,;]",
    )
]  # fmt: skip
_BRACED = re.compile(rf"\\(?:boxed|fbox|{_STYLES}|text|textrm|textnormal|mbox|mathrm|mathsf|texttt|rm)\s*\{{")

# ---- names for the same sign, in this order

_FUNCTIONS = "arcsin arccos arctan sinh cosh tanh sin cos tan cot sec csc ln log exp sqrt"


def _half_of_day(found: re.Match[str]) -> str:
    return f" {(found[1] or found[2]).lower()}m"


_TIDY: list[Rule] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"(?<=\d),\s*\\!\s*(?=\d{3}(?!\d))|(?<!\\)\\!", ""),
        (r"(?<=\d) [xX] (?=10\s*\^)", r"\\times "),
        (r"(?<=\d)(?:\\[, ]|~|(?<!\\)\\;)(?=\d{3}(?!\d))", ""),
        (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])|\\(?:thin|med|thick)?space(?![A-Za-z])|[\t\n\r\f\v]", " "),
        (r"\\(?:left|right|[bB]igg?[lrm]?)(?![A-Za-z])\.?|\\displaystyle(?![A-Za-z])", ""),
        (r"\\[dtc]frac(?![A-Za-z])", r"\\frac"),
        (r"\\[dt]binom(?![A-Za-z])", r"\\binom"),
        (r"\\[lr]?vert(?![A-Za-z])", "|"),
        (r"\\[lr]?Vert(?![A-Za-z])", r"\\|"),
        (r"\\lbrace(?![A-Za-z])", r"\\{"),
        (r"\\rbrace(?![A-Za-z])", r"\\}"),
        (r"\\(le|ge)(?:q|qslant)(?![A-Za-z])", r"\\\1 "),
        (r"<=", r"\\le "),
        (r">=", r"\\ge "),
        (r"\\neq(?![A-Za-z])|!=|\\not\s*=", r"\\ne "),
        (r"\\varnothing(?![A-Za-z])|\\\{\s*\\\}", r"\\emptyset "),
        (r"\\(?:l|c|d)?dots[cbmio]?(?![A-Za-z])", r"\\ldots "),
        (r"\.\.\.+", r"\\ldots "),
        (r"\\(?:long)?rightarrow(?![A-Za-z])", r"\\to "),
        (r"\\backslash(?![A-Za-z])", r"\\setminus "),
        (r"\\var(phi|theta|epsilon|rho)(?![A-Za-z])", r"\\\1"),
        (
            r"\\(?:mbox|textrm|textnormal|textup|textbf|textit|emph|textsf|texttt|mathrm|mathsf)(?![A-Za-z])\s*",
            r"\\text",
        ),
        (r"\\(?:mathbf|mathit|mathnormal|boldsymbol|bm|underline)(?![A-Za-z])(?:\s*\{\s*([A-Za-z])\s*\})?", r"\1"),
        (r"\\(?:text)?color(?:box)?\s*\{\w+\}|\\(?:large|Large|LARGE|huge|small|normalsize|bf|it|rm)(?![A-Za-z])", ""),
        (r"\\colon(?![A-Za-z])", ":"),
        (r":=", "="),
        (r"(\\mathbb\s*\{?R\}?)\s*-\s*(?=\\\{)", r"\1\\setminus "),
        (r"\\text\s*\{\s*\^\\circ\s*\}", r"^\\circ "),
        (r"\\operatorname\*?\s*\{", r"\\text{"),
        (rf"\\text\s*\{{\s*({_FUNCTIONS.replace(' ', '|')}|pi|infty)\s*\}}", r"\\\1 "),
        (r"\\text\s*\{\s*([eid])\s*\}", r" \1 "),
        (r"\\text\s*\{\s*([-+]?\d[\d.,]*)\s*\}", r"{\1}"),
        (r"\\text\s*\{\s*,?\s*(and|or)\s*,?\s*\}", r" \1 "),
        (r"\\text\s*\{([^{}]*?)\s+(and|or)\s*\}", r"\\text{\1} \2 "),
        (r"\\text\s*\{(\s*(?:[,;:]|\\?%)?\s*)\}", r"\1"),
        (r"_\s*\\text\s*\{(\w+)\}", r"_{\1}"),
        (r"_\s*\{\s*\\text\s*\{(\w+)\}\s*\}", r"_{\1}"),
        (
            r"\\frac\s*\{\s*\\text\s*\{([A-Za-z ]+)\}\s*\}\s*\{\s*\\text\s*\{([A-Za-z ]+)\}((?:\^\d)?)\s*\}",
            r"\\text{\1/\2}\3",
        ),
        (r"\\text\s*\{\s*", r"\\text{"),
        (r"\{([^{}]*)\\choose(?![A-Za-z])([^{}]*)\}", r"\\binom{\1}{\2}"),
        (
            r"\\pmod\s*(\w)(?!\w)|\\pmod\s*\{([^{}]*)\}|\(\s*(?:\\[bp]?mod|\\text\{mod\s*\}|mod)\b\s*([^()]+)\)",
            r"\\pmod{\1\2\3}",
        ),
        (r"\s*(?:\\bmod|\\mod|\\text\{\s*mod\s*\}|(?<![A-Za-z\\])mod(?![A-Za-z]))\s*(\w+)$", r"\\pmod{\1}"),
        (r"(?<=\d)\s*(?:\\text\{([aApP])\.?\s*[mM]\.?\s*\}|([aApP])\.?\s?[mM](?![A-Za-z])\.?)", _half_of_day),
        (r"(?<![\w)}])\+\s*(?=\\infty)", ""),
        (r"\\%", "%"),
        (r"\\pounds(?![A-Za-z])", "£"),
        (r"\\euro(?![A-Za-z])", "€"),
        (r"^(?:\\text\{)?all real numbers\}?$|^reals$", r"\\mathbb{R}"),
        (r"(?<=[\d}])\s*(?:\\text\{(?:percent|per cent|pct)\s*\}|(?:percent|per cent|pct)\b)", "%"),
        (r"(?<=[\d}])\s*(?:\\text\{deg(?:rees?)?\s*\}|deg(?:rees?)?\b)", r"^\\circ "),
        (
            r"(?:\{\})?\^\s*\{\s*\\circ\s*\}|\^\s*\\circ(?![A-Za-z])|(?<=\d)\^o(?![A-Za-z])|\\degree(?![A-Za-z])",
            r"^\\circ ",
        ),
        (r"\^\\circ\s*(?:\\text\{([CF])(?:elsius|ahrenheit)?\s*\}|([CF])(?:elsius|ahrenheit)?\b)", r" \\text{deg\1\2}"),
        (r"\*\*", "^"),
        (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi "),
        (r"(?<![A-Za-z\\])(?:infty|infinity|inf|oo)(?![A-Za-z])", r"\\infty "),
        (r"(?<![\w.])(\d+\.?\d*|\.\d+)[eE]\+?(-?\d+)(?![\w.])", r"(\1\\cdot10^{\2})"),
        (r"(?<![\d./^_{])(\d+)\s+(\d+)\s?/\s?(\d+)(?![\d./])", r"\1\\frac{\2}{\3}"),
        (r"^([-+]?\d+) and (?:(\d+)/(\d+)|\\frac\{(\d+)\}\{(\d+)\})$", r"\1\\frac{\2\4}{\3\5}"),
        (r"^([-+]?\d{1,3})((?: \d{3})+)(\.\d+)?$", lambda m: m[0].replace(" ", "")),
        (r"(?<![\d.])(\d+)((?:\{,\}\d+)+)(?!\d)", lambda m: _comma(m[1], m[2].split("{,}")[1:]) or m[0]),
        (r"\s+", " "),
    )
]
_DOTS = r"(?:\.\.\.+|\\[lcd]?dots(?![A-Za-z]))"
_REPEATING = re.compile(
    r"(?<![\d.,])(\d{0,50})\.(\d{0,50})(?:\\(?:overline|bar)\s*\{(\d{1,50})\}|\\(?:overline|bar)\s*(\d)|\((\d{1,50})\)"
    rf"|\\dot\s*(?:\{{(\d)\}}|(\d))(?:(\d{{0,50}})\\dot\s*(?:\{{(\d)\}}|(\d)))?){_DOTS}?(?!\d)"
)
_DOTTED = re.compile(rf"(?<![\d.,])(\d{{0,50}})\.(\d{{0,6}}?)(\d{{1,6}}?)(\3+)\s*{_DOTS}")
# Further rewrites, for comparing texts only
_PLAIN: list[Rule] = [
    (re.compile(pattern), replacement)
    for pattern, replacement in (
        (r"\\text\s*\{([^{}]*)\}", r"\1"),
        (r"\s+", " "),
        (r"^\s*[(\[]?\s*([A-Za-z])\s*[)\]:]\s*$", r"\1"),  # a choice
        (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
        (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
        (r"(\\frac\{[^{}]*\})\s*(\d)", r"\1{\2}"),
        (r"^([-+]?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),
        (r"(?<![A-Za-z\\])sqrt", r"\\sqrt"),
        (r"\\sqrt\s*(\d+)", r"\\sqrt{\1}"),
        (r"([_^])\{(\w)\}", r"\1\2"),
        (r"(?<=\d)\s+(?=[A-Za-z])|(?<![A-Za-z\d])\s+|\s+(?![A-Za-z\d])", ""),  # other spaces separate words, or digits
    )
]


# And for the number alone
_BARE: list[Rule] = [
    (re.compile(r"((?:^|[,;(\[])[-+]?[\d.]+)(?:\^\\circ|%)(?=$|[,;)\]])"), r"\1"),
    (re.compile(r"(?:^|(?<=[,;(\[]))\\?\$(?=[-+.\d])"), ""),
]


def normalize_math_answer(answer: str) -> str:
    r"""Return ``answer`` in one spelling: "\dfrac12", "1/2" and "$\frac{1}{2}$" become "\frac{1}{2}".

    Spaces, \text{}, \left, \right, $, %, degrees and thousands separators are removed; words become lower case.
    The result is for comparing, not for parsing.
    """
    return _rewrite(spell(answer), _BARE)


@functools.lru_cache(maxsize=256)
def spell(answer: str) -> str:
    """Return ``answer`` in one spelling, with its percent sign, degrees and currency: what is compared as text."""
    answer = _rewrite(join_thousands(tidy(answer)), _PLAIN)
    return answer.lower() if answer.replace(" ", "").isalpha() else answer


@functools.lru_cache(maxsize=256)
def tidy(answer: str) -> str:
    r"""Return ``answer`` without what stands around it, and with one name for each sign, in the LaTeX that is read."""
    answer = re.sub("[⁰¹²³⁴-⁾ⁿⁱ]+", lambda m: f"^{{{m[0].translate(_HIGH)}}}", answer)
    answer = re.sub("[₀-₎]+", lambda m: f"_{{{m[0].translate(_LOW)}}}", answer)
    answer = re.sub("((?:[0-9][\u0304\u0305])+)", lambda m: f"\\overline{{{re.sub('[^0-9]', '', m[0])}}}", answer)
    answer = _VULGAR.sub(lambda m: _fraction(Fraction(unicodedata.numeric(m[0])).limit_denominator(10)), answer)
    answer = unwrap(re.sub(r"(?<!\d)–|–(?!\d)", "-", answer).translate(_TABLE))  # 5–7 is no subtraction
    answer = _REPEATING.sub(_repeating, answer)
    answer = _DOTTED.sub(_dotted, answer)
    return unwrap(_rewrite(answer, _TIDY))


def unwrap(text: str) -> str:
    r"""Return ``text`` without marks that stand around all of it: $, \[ \], **, ticks, \boxed, \text, a full stop."""
    while True:
        before, text = text, text.strip()
        dollars = len(re.findall(r"(?<!\\)\$", text))
        if dollars and dollars % 2 == 0:
            text = re.sub(r"(?<!\\)\$", " ", text).strip()
        for pattern in _WRAPPED:
            if whole := pattern.fullmatch(text):
                text = whole[whole.re.groups].strip()
        if (start := _BRACED.match(text)) and closing(text, start.end()) == len(text) - 1:
            text = text[start.end() : -1]
        if text == before:
            return text


def join_thousands(text: str) -> str:
    """Return ``text`` with "1,234" written 1234 outside brackets; the comma of "1, 234" and of "12,34" separates."""
    parts, depth = re.split(r"(\\[{}]|[][()])", text), 0
    for i, part in enumerate(parts):
        if i % 2:
            depth += 1 if part[-1] in "([{" else -1
        elif depth == 0:
            parts[i] = re.sub(r"(?<![\d.,])\d{1,3}(?:,\d{3})+(?!,?\d)", lambda m: m[0].replace(",", ""), part)
    return "".join(parts)


def _rewrite(text: str, rules: Sequence[Rule]) -> str:
    for pattern, replacement in rules:
        text = pattern.sub(replacement, text)
    return text.strip()


def _comma(first: str, rest: list[str]) -> str | None:
    """Return the number that a comma in braces groups by three, or writes with a decimal comma."""
    if len(first) <= 3 and first[0] != "0" and all(len(digits) == 3 for digits in rest):
        return first + "".join(rest)
    return f"{first}.{rest[0]}" if len(rest) == 1 else None


def _repeating(found: re.Match[str]) -> str:
    """Return the fraction that a bar, brackets, or a dot over the first and the last digit repeat."""
    whole, fixed, *parts = found.groups()
    block = "".join(part or "" for part in parts)
    return _fraction(_repeated(whole, fixed, block))


def _dotted(found: re.Match[str]) -> str:
    """Return 1/3 for "0.333...", where the digits that repeat are shown at least twice, and three digits of them."""
    whole, fixed, block, again = found.groups()
    return _fraction(_repeated(whole, fixed, block)) if len(block + again) >= 3 else found[0]


def _repeated(whole: str, fixed: str, block: str) -> Fraction:
    """Return whole.fixed + block / (10^f (10^b - 1)), with f and b the numbers of fixed and repeated digits."""
    head = Fraction(int(whole + fixed or "0"), 10 ** len(fixed))
    return head + Fraction(int(block), 10 ** len(fixed) * (10 ** len(block) - 1))


def _fraction(value: Fraction) -> str:
    return f"\\frac{{{value.numerator}}}{{{value.denominator}}}"
