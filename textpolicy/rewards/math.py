r"""Compare mathematical answers with references; ``extract_boxed`` reads them from completions.

Two answers are equal when they are written the same up to spelling, or when math-verify finds them
equal. It runs in worker processes, so that a time limit holds whatever the answer is and from any thread.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import os
import re
import sys
from fractions import Fraction

from ..errors import MissingDependencyError, RewardError, UserError
from .answer import closing
from .answer import extract_boxed as extract_boxed
from .workers import ChildDiedError, TooSlowError, WorkerDiedError, WorkerRaisedError, Workers

MAX_EXCESS = 300  # characters by which an answer may be longer than its reference
MAX_DEPTH = 12  # nested brackets in an answer that is compared by value
MAX_MEMORY = 4 << 30  # bytes of address space of a grading process, where the system can enforce that
MAX_PROCESSES = 4  # that grade at once; one starts when all others are busy


# ---- one spelling

# Rewrites of both sides, in this order: a reader takes the two spellings for the same, math-verify does not.
_TIDY = (
    (r"(?<=\d),\\!(?=\d{3})|(?<!\\)\\!|\{,\}", ""),
    (r"(?<!\\)\\[,;: ]|~|\\q?quad(?![A-Za-z])", " "),
    (r"^\\[(\[]|\\[)\]]$|^\$+|(?<!\\)\$+$", ""),
    (r"\u2212", "-"),
    (r"°|\\degree(?![A-Za-z])", r"^\\circ"),
    (r"∞", r"\\infty"),
    (r"^([-+]?)(infty|infinity|inf|oo)$", r"\1\\infty"),
    (r"\\varnothing", r"\\emptyset"),
    (r"\*\*", "^"),
    (r"(?<![A-Za-z\\])pi(?![A-Za-z])", r"\\pi"),
    (r"(?<![A-Za-z\\])sqrt(?=[0-9])", r"\\sqrt"),
    (r"(?<![\d./])(\d+)\s+(\d+)/(\d+)(?![\d./])", r"\1\\frac{\2}{\3}"),  # 7 3/4 is a mixed number
    (r"(?<=\d)[eE]([-+]?\d+)", r"\\cdot10^{\1}"),
    (r"(?<=\d)\s*(dollars?|people|[ckm]m\^\{?[23]\}?)$", ""),
    (r"\.$", ""),
)
# Further rewrites, for comparing strings only.
_SPELLING = (
    (r"\\left(?![A-Za-z])|\\right(?![A-Za-z])|\\displaystyle", ""),
    (r"\\(?:text|textbf|textit|textrm|mathrm|mathbf|mbox)\{([^{}]*)\}", r"\1"),
    (r"\\[dt]frac", r"\\frac"),
    (r"\\frac\s*(\d)\s*(\d)", r"\\frac{\1}{\2}"),
    (r"\\frac\s*(\d)\s*\{", r"\\frac{\1}{"),
    (r"(\\frac\{[^{}]*\})\s*(\d)", r"\1{\2}"),
    (r"^([-+]?)(\d+)/(\d+)$", r"\1\\frac{\2}{\3}"),
    (r"\\sqrt\s*(\d)", r"\\sqrt{\1}"),
    (r"([_^])\{(\w)\}", r"\1\2"),
    (r"\^\\circ|\^\{\\circ\}|\\?%|\\?\$", ""),
    (r"(?<![A-Za-z\d])\s+|\s+(?![A-Za-z\d])", ""),  # other spaces separate words, or digits: 2 3 is not 23
)
_THOUSANDS = re.compile(r"[-+]?(?:\\?\$\s*)?\d{1,3}(?:[, ]\d{3})+(?:\.\d*)?")
_NUMERAL = re.compile(r"(?:\\?\$\s*)?([-+]?(?:\d{1,500}(?:\.\d{0,500})?|\.\d{1,500}))")
# 11_2, 3:00 and ABC are not 11, 3/0 and a product
_LITERAL = re.compile(r"\d_|:0\d|^[A-Za-z]{3,}$|^[A-Za-z]{2,}( [A-Za-z]{2,})+$")


# Forms that take math-verify for ever and that no person writes: signs again and again, numbers of 100 digits or more,
# exponents of 5 digits or more, towers such as 9^{9^9}, factorials of thousands, of powers and of factorials
_HUGE = re.compile(
    r"([^\s\d]{1,8}?)\1{19,}|\d{100,}|\^[{( ]*[-+]?\d{5,}|\d\^[{( ]*\d+\^[{( ]*(?:[7-9]|\d{2,})"
    r"|\^\{[^{}]*\^\{[^{}]*\^|\d{4,}\s*!|\^\{?\d{2,}[^A-Za-z!]*[)}]\s*!|!\s*[)}]+\s*!"
)


def normalize_math_answer(answer: str) -> str:
    r"""Return ``answer`` in one spelling: "\dfrac12", "1/2" and "$\frac{1}{2}$" become "\frac{1}{2}".

    Spaces, \text{}, \left, \right, $, %, degrees and thousands separators are removed; words become lower case.
    The result is for comparing, not for parsing.
    """
    answer = _rewrite(_tidy(answer), _SPELLING)
    return answer.lower() if answer.replace(" ", "").isalpha() else answer


def _tidy(answer: str) -> str:
    """Return ``answer`` in LaTeX that math-verify reads as a person would."""
    answer = _rewrite(answer, _TIDY)
    return re.sub("[, ]", "", answer) if _THOUSANDS.fullmatch(answer) else answer


def _rewrite(text: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text.strip())
    return text.strip()


# ---- grading


def grade_math_answer(given: str | None, reference: str, timeout: float = 3.0) -> bool:
    r"""Return whether the answer ``given`` equals the ``reference``, both without ``\boxed``; None never does.

    Equal are the same text after ``normalize_math_answer``, and what math-verify finds equal: fractions,
    roots, sets in any order, intervals, matrices, equations. Units are not compared. Numbers with a base
    (11_2), times (3:00) and words are compared as text only. An answer that takes math-verify more than
    ``timeout`` seconds, or makes it fail, is not equal.

    Raises UserError for an empty reference or a timeout that is not positive, MissingDependencyError
    without math-verify.
    """
    _require_math_verify()
    if timeout <= 0:
        raise UserError(f"a grading timeout of {timeout} s leaves no time; give a positive number of seconds")
    gold = normalize_math_answer(reference)
    if not gold:
        raise UserError(f"the reference answer {reference!r} is empty; give the right answer, or drop the problem")
    if given is None or len(given) > len(reference) + MAX_EXCESS:
        return False
    if normalize_math_answer(given) == gold:
        return True
    given, reference = _tidy(given), _tidy(reference)
    numerals = _NUMERAL.fullmatch(given), _NUMERAL.fullmatch(reference)
    if numerals[0] and numerals[1]:
        return Fraction(numerals[0][1]) == Fraction(numerals[1][1])
    if not given or not (_is_algebra(given) and _is_algebra(reference)):
        return False
    try:
        return bool(_graders(os.getpid()).call(0, {"given": given, "reference": reference}, timeout))
    except (TooSlowError, ChildDiedError, WorkerRaisedError):
        return False
    except WorkerDiedError as error:
        raise RewardError(
            f"the grading process was killed twice at the answer {given[:80]!r}; look for what kills it, "
            "such as a limit on memory"
        ) from error


def _is_algebra(tidy: str) -> bool:
    """Return whether math-verify may read ``tidy``: its braces balance and it will not take for ever."""
    if _LITERAL.search(normalize_math_answer(tidy)) or closing(tidy + "}", 0) != len(tidy):
        return False
    brackets = (1 if mark in "([{" else -1 for mark in re.findall(r"[][(){}]", tidy))
    depth = max(itertools.accumulate(brackets, initial=0))
    return depth <= MAX_DEPTH and _HUGE.search(tidy) is None


@functools.cache
def _require_math_verify() -> None:
    if importlib.util.find_spec("math_verify") is None:
        raise MissingDependencyError("math-verify is not installed; install it with: pip install 'textpolicy[math]'")


@functools.cache
def _graders(pid: int) -> Workers:
    """Return the grading processes of the process ``pid``: a fork must not share its parent's pipes."""
    return Workers([_equal], min(MAX_PROCESSES, os.cpu_count() or 1), _prepare)


# ---- what a grading process runs

USUAL = (
    r"\frac{x^2+1}{2\sqrt{3}}", r"(1,\infty)\cup[2,3]", r"\{1,2\}", r"\begin{pmatrix}1\\2\end{pmatrix}", "x=5",
    r"\sin(\pi x)+\log_2 e", r"12\text{ cm}", "0.5", r"\pm 2", "x<5", r"50\%", "a, b", "f(x)", "5!", "|x|",
    "[1]", "{{1}}", "2 mod 3", "x+=(/", "f('1')", r"3 \text{or} 4", "10^{-3}", "1,234.5", r"\frac{", r"\lim_{x\to0}",
)  # fmt: skip


def _prepare() -> None:
    """Limit the memory of this process, silence it, and load all that answers need, before it forks."""
    import math_verify  # noqa: F401 (what fails here is still written to the standard error)

    silence = os.open(os.devnull, os.O_WRONLY)
    os.dup2(silence, 1)  # a parser prints
    os.dup2(silence, 2)
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    for answer in USUAL:
        _equal(answer, answer + "+0")


def _equal(given: str, reference: str) -> bool:
    from math_verify import parse, verify

    answer = parse(r"\boxed{" + given + "}", parsing_timeout=None)
    return verify(_parsed(reference), answer, timeout_seconds=None)


@functools.lru_cache(maxsize=1024)
def _parsed(reference: str) -> list[object]:
    """Return the parsed ``reference``, which a group's completions share."""
    from math_verify import parse

    return parse(r"\boxed{" + reference + "}", parsing_timeout=None)
