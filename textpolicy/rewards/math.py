r"""Grading of mathematical answers: the last \boxed{...} of a completion, and whether it equals a reference.

Two answers are equal when they are written the same up to spelling, or when math-verify finds them
equal. It runs in a process of its own, so that a time limit holds whatever the answer is and from any thread.
"""

from __future__ import annotations

import atexit
import functools
import importlib.util
import json
import os
import re
import signal
import subprocess
import sys
import threading
from fractions import Fraction
from typing import IO

from ..errors import MissingDependencyError, RewardError, UserError

MAX_EXCESS = 1000  # characters by which an answer may be longer than its reference
MAX_MEMORY = 4 << 30  # bytes of address space that the grading process may take, where the system can hold it to that


# ---- the answer of a completion

_BOX = r"\boxed{"


def extract_boxed(text: str) -> str | None:
    r"""The content of the last ``\boxed{...}``, or None when there is none or it does not close.

    ``\{`` and ``\}`` do not count as braces. Without any ``\boxed{``, the word after ``\boxed`` as in "\boxed 7".
    """
    start = text.rfind(_BOX)
    if start < 0:
        words = re.findall(r"\\boxed\s+([A-Za-z0-9]+)", text)
        return words[-1] if words else None
    start += len(_BOX)
    end = _closing(text, start)
    return None if end is None else text[start:end]


def _closing(text: str, start: int) -> int | None:
    """Where the brace closes that opened just before ``start``."""
    depth = 1
    for mark in re.finditer(r"\\.|[{}]", text[start:], re.DOTALL):
        depth += {"{": 1, "}": -1}.get(mark[0], 0)
        if depth == 0:
            return start + mark.start()
    return None


# ---- one spelling

# What a reader takes for the same but math-verify does not; in this order, to both sides.
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
# What a comparison of strings may forget besides.
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
    (r"(?<![A-Za-z\d])\s+|\s+(?![A-Za-z\d])", ""),  # others part words, or digits: 2 3 is not 23
)
_THOUSANDS = re.compile(r"[-+]?(?:\\?\$\s*)?\d{1,3}(?:[, ]\d{3})+(?:\.\d*)?")
_NUMERAL = re.compile(r"(?:\\?\$\s*)?([-+]?(?:\d{1,500}(?:\.\d{0,500})?|\.\d{1,500}))")
# 11_2, 3:00 and ABC are not 11, 3/0 and a product
_LITERAL = re.compile(r"\d_|:0\d|^[A-Za-z]{3,}$|^[A-Za-z]{2,}( [A-Za-z]{2,})+$")


def normalize_math_answer(answer: str) -> str:
    r"""``answer`` in one spelling: "\dfrac12", "1/2" and "$\frac{1}{2}$" become "\frac{1}{2}".

    Spaces, \text{}, \left, \right, $, %, degrees and thousands separators go; words lose their case.
    The result is for comparing, not for parsing.
    """
    answer = _rewrite(_tidy(answer), _SPELLING)
    return answer.lower() if answer.replace(" ", "").isalpha() else answer


def _tidy(answer: str) -> str:
    """``answer`` in a LaTeX that math-verify reads as a person would."""
    answer = _rewrite(answer, _TIDY)
    return re.sub("[, ]", "", answer) if _THOUSANDS.fullmatch(answer) else answer


def _rewrite(text: str, rules: tuple[tuple[str, str], ...]) -> str:
    for pattern, replacement in rules:
        text = re.sub(pattern, replacement, text.strip())
    return text.strip()


def _numeral(tidy: str) -> Fraction | None:
    """The exact value of a plain decimal number, else None."""
    numeral = _NUMERAL.fullmatch(tidy)
    return Fraction(numeral[1]) if numeral else None


# ---- grading


def grade_math_answer(given: str | None, reference: str, timeout: float = 3.0) -> bool:
    r"""Whether the answer ``given`` equals the ``reference``, both without ``\boxed``; None never does.

    Equal are the same text after ``normalize_math_answer``, and what math-verify finds equal: fractions,
    roots, sets in any order, intervals, matrices, equations. Units are not compared. Numbers with a base
    (11_2), times (3:00) and words are compared as text only. What takes math-verify more than ``timeout``
    seconds, or makes it fail, is not equal.

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
    return normalize_math_answer(given) == gold or _equal_in_value(_tidy(given), _tidy(reference), timeout)


def _equal_in_value(given: str, reference: str, timeout: float) -> bool:
    values = _numeral(given), _numeral(reference)
    if None not in values:
        return values[0] == values[1]
    readable = given and all(map(_is_algebra, (given, reference)))
    return bool(readable) and _grader().equal(given, reference, timeout)


def _is_algebra(tidy: str) -> bool:
    """Whether the braces of ``tidy`` balance, and it is not a form that only looks like algebra."""
    literal = _LITERAL.search(normalize_math_answer(tidy))
    return literal is None and _closing(tidy + "}", 0) == len(tidy)


@functools.cache
def _require_math_verify() -> None:
    if importlib.util.find_spec("math_verify") is None:
        raise MissingDependencyError("math-verify is not installed; install it with: pip install 'textpolicy[math]'")


class _Grader:
    """math-verify in a process of its own, started when first asked and again after one that ended.

    A request is a line of JSON, an answer a line with 1 or 0. The process arms an alarm for each
    request and dies of it, which nothing that it computes can put off.
    """

    def __init__(self) -> None:
        self.lock = threading.Lock()
        self.process: subprocess.Popen[str] | None = None

    def equal(self, given: str, reference: str, timeout: float) -> bool:
        with self.lock:
            process = self.started()
            requests, answers = _pipes(process)
            try:
                requests.write(json.dumps([given, reference, timeout]) + "\n")
                requests.flush()
                answer = answers.readline()
            except BaseException:  # an interrupt must not leave its answer to the next request
                self.stop()
                raise
            if not answer:  # it is dying of the request; poll() may not know yet
                self.stop()
            return answer == "1\n"

    def started(self) -> subprocess.Popen[str]:
        if self.process is not None and self.process.poll() is None:
            return self.process
        self.stop()
        self.process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {__name__} import _serve; _serve()"],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), "OPENBLAS_NUM_THREADS": "1"},
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        if _pipes(self.process)[1].readline() != READY:
            raise RewardError("the grading process ended at its start; see why with: python -c 'import math_verify'")
        return self.process

    def stop(self) -> None:
        if self.process is not None:
            with self.process:  # closes its pipes and waits for it
                self.process.kill()
            self.process = None


READY = "ready\n"
_GRADERS: dict[int, _Grader] = {}  # one for each process id: a fork must not share its parent's pipes


def _grader() -> _Grader:
    return _GRADERS.setdefault(os.getpid(), _Grader())


@atexit.register
def _stop_grader() -> None:
    _grader().stop()


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


def _serve() -> None:
    """What the grading process runs: answer requests from standard input until it closes."""
    from math_verify import parse, verify

    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a parser may print stays out of the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the parent's
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the alarm ends this process
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    print(READY, end="", file=answers, flush=True)
    for line in sys.stdin:
        given, reference, timeout = json.loads(line)
        signal.setitimer(signal.ITIMER_REAL, timeout)
        gold, answer = (parse(_BOX + a + "}", parsing_timeout=None) for a in (reference, given))
        equal = verify(gold, answer, timeout_seconds=None)
        signal.setitimer(signal.ITIMER_REAL, 0)
        print(int(equal), file=answers, flush=True)
