r"""Grading of mathematical answers: the last \boxed{...} of a completion, and whether it equals a reference.

Two answers are equal when they are written the same up to spelling, or when math-verify finds them
equal. It runs in processes of its own, so that a time limit holds whatever the answer is and from any thread.
"""

from __future__ import annotations

import atexit
import contextlib
import functools
import gc
import importlib.util
import itertools
import json
import os
import queue
import re
import signal
import subprocess
import sys
import time
from fractions import Fraction
from typing import IO, NoReturn

from .._system.processes import environment, interpreter
from ..errors import MissingDependencyError, RewardError, UserError

MAX_EXCESS = 300  # characters by which an answer may be longer than its reference
MAX_DEPTH = 12  # brackets inside each other in an answer that is compared by value
MAX_MEMORY = 4 << 30  # bytes of address space that a grading process may take, where the system can hold it to that
MAX_PROCESSES = 4  # that grade at once; one starts when all others are busy


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


# What takes math-verify for ever and no person writes: signs again and again, numbers of a hundred digits and more,
# exponents of five, towers such as 9^{9^9}, factorials of thousands, of powers and of factorials
_HUGE = re.compile(
    r"([^\s\d]{1,8}?)\1{19,}|\d{100,}|\^[{( ]*[-+]?\d{5,}|\d\^[{( ]*\d+\^[{( ]*(?:[7-9]|\d{2,})"
    r"|\^\{[^{}]*\^\{[^{}]*\^|\d{4,}\s*!|\^\{?\d{2,}[^A-Za-z!]*[)}]\s*!|!\s*[)}]+\s*!"
)


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
    return bool(readable) and _graders().equal(given, reference, timeout)


def _is_algebra(tidy: str) -> bool:
    """Whether the braces of ``tidy`` balance, it is not a form that only looks like algebra, and it is modest."""
    literal = _LITERAL.search(normalize_math_answer(tidy))
    return literal is None and _closing(tidy + "}", 0) == len(tidy) and _is_modest(tidy)


def _is_modest(tidy: str) -> bool:
    """Whether ``tidy`` has nothing that a person would not write and that takes math-verify for ever."""
    return _depth(tidy) <= MAX_DEPTH and _HUGE.search(tidy) is None


def _depth(text: str) -> int:
    """How many brackets stand open inside each other, at most."""
    steps = (1 if mark in "([{" else -1 for mark in re.findall(r"[][(){}]", text))
    return max(itertools.accumulate(steps, initial=0))


@functools.cache
def _require_math_verify() -> None:
    if importlib.util.find_spec("math_verify") is None:
        raise MissingDependencyError("math-verify is not installed; install it with: pip install 'textpolicy[math]'")


# ---- math-verify in processes of its own


class _Graders:
    """As many grading processes as calls run at once, up to a number; each starts when first needed."""

    def __init__(self, count: int) -> None:
        self.all = [_Grader() for _ in range(count)]
        self.idle: queue.LifoQueue[_Grader] = queue.LifoQueue()
        for grader in reversed(self.all):
            self.idle.put(grader)

    def equal(self, given: str, reference: str, timeout: float) -> bool:
        grader = self.idle.get()
        try:
            return grader.equal(given, reference, timeout)
        except BaseException:  # an interrupt must not leave its answer to the next request
            grader.stop()
            raise
        finally:
            self.idle.put(grader)

    def stop(self) -> None:
        for grader in self.all:
            grader.stop()


class _Grader:
    """A process that has math-verify ready, and forks a child that answers until a request kills it.

    A request is a line of JSON, an answer a line with the request's number and 1 or 0. The child arms an
    alarm for each request and dies of it, which nothing that it computes can put off; the process then
    tells the signal and forks another, at once because nothing is imported again.
    """

    def __init__(self) -> None:
        self.process: subprocess.Popen[str] | None = None
        self.number = 0

    def equal(self, given: str, reference: str, timeout: float) -> bool:
        for _ in range(2):  # a process that was killed from outside is replaced, once
            self.start()
            verdict = self.asked(given, reference, timeout)
            if verdict is not None:
                return verdict
            self.stop()
        raise RewardError(
            f"the grading process was killed twice at the answer {given[:80]!r}; look for what kills it, "
            "such as a limit on memory"
        )

    def asked(self, given: str, reference: str, timeout: float) -> bool | None:
        """The verdict, or None when the process ended. A killed child is replaced once; then nothing is equal."""
        deadline = time.monotonic() + timeout
        for _ in range(2):
            left = deadline - time.monotonic()
            if left <= 0:
                break
            answer = self.answered(given, reference, left)
            if answer == KILLED:
                continue
            return None if answer == "" else answer == "1"
        return False

    def answered(self, given: str, reference: str, timeout: float) -> str:
        """1, 0, KILLED by something but the alarm, or "" when the process ended."""
        assert self.process is not None
        requests, answers = _pipes(self.process)
        self.number += 1
        try:
            requests.write(json.dumps([self.number, given, reference, timeout]) + "\n")
            requests.flush()
        except BrokenPipeError:
            return ""
        for line in answers:
            number, _, answer = line.strip().partition(" ")
            if int(number) in (0, self.number):  # 0: a child died, of this request or before it
                return answer
        return ""

    def start(self) -> None:
        if self.process is not None and self.process.poll() is None:
            return
        self.stop()
        self.process = subprocess.Popen(
            [*interpreter(), f"from {__name__} import _serve; _serve()"],
            env=environment(OPENBLAS_NUM_THREADS="1"),
            stdin=subprocess.PIPE,
            stdout=subprocess.PIPE,
            stderr=subprocess.DEVNULL,
            encoding="utf-8",
        )
        if _pipes(self.process)[1].readline() != READY:
            raise RewardError("the grading process ended at its start; see why with: python -c 'import math_verify'")

    def stop(self) -> None:
        process, self.process = self.process, None
        if process is not None:
            process.kill()
            for pipe in _pipes(process):
                with contextlib.suppress(BrokenPipeError):  # what nobody reads any more
                    pipe.close()
            process.wait()


READY = "ready\n"
USUAL = (
    r"\frac{x^2+1}{2\sqrt{3}}", r"(1,\infty)\cup[2,3]", r"\{1,2\}", r"\begin{pmatrix}1\\2\end{pmatrix}", "x=5",
    r"\sin(\pi x)+\log_2 e", r"12\text{ cm}", "0.5", r"\pm 2", "x<5", r"50\%", "a, b", "f(x)", "5!", "|x|",
    "[1]", "{{1}}", "2 mod 3", "x+=(/", "f('1')", r"3 \text{or} 4", "10^{-3}", "1,234.5", r"\frac{", r"\lim_{x\to0}",
)  # fmt: skip
KILLED = "killed"
_GRADERS: dict[int, _Graders] = {}  # by process id: a fork must not share its parent's pipes


def _graders() -> _Graders:
    if os.getpid() not in _GRADERS:
        _GRADERS[os.getpid()] = _Graders(min(MAX_PROCESSES, os.cpu_count() or 1))
    return _GRADERS[os.getpid()]


@atexit.register
def _stop_graders() -> None:
    _graders().stop()


def _pipes(process: subprocess.Popen[str]) -> tuple[IO[str], IO[str]]:
    assert process.stdin is not None
    assert process.stdout is not None
    return process.stdin, process.stdout


# ---- what a grading process runs


def _serve() -> None:
    """Keep a child that answers requests from standard input, until that closes."""
    answers = os.fdopen(os.dup(1), "w", encoding="utf-8")
    os.dup2(2, 1)  # what a parser may print stays out of the answers
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the parent's
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the alarm ends the child
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    if sys.platform == "linux":
        import resource

        resource.setrlimit(resource.RLIMIT_AS, (MAX_MEMORY, MAX_MEMORY))
    for answer in USUAL:  # imports and tables that any answer needs, before the first fork
        _equal(answer, answer + "+0")
    gc.freeze()  # what is here is never garbage, and a child that looks for it among all this loses time
    print(READY, end="", file=answers, flush=True)
    while True:
        child = os.fork()
        if child == 0:
            _answer(answers)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            return
        # the alarm's signal, and whatever it raised, are verdicts; other signals may come from outside
        verdict = KILLED if status < 0 and status != -signal.SIGALRM else "0"
        print(f"0 {verdict}", file=answers, flush=True)


def _answer(answers: IO[str]) -> NoReturn:
    """What the child does. Its parent's copy of the input is unread: a request comes when the last is answered."""
    try:
        for line in sys.stdin:
            number, given, reference, timeout = json.loads(line)
            signal.setitimer(signal.ITIMER_REAL, timeout)
            equal = _equal(given, reference)
            signal.setitimer(signal.ITIMER_REAL, 0)
            print(f"{number} {int(equal)}", file=answers, flush=True)
        os._exit(0)
    finally:
        os._exit(1)


def _equal(given: str, reference: str) -> bool:
    from math_verify import parse, verify

    answer = parse(_BOX + given + "}", parsing_timeout=None)
    return verify(_parsed(reference), answer, timeout_seconds=None)


@functools.lru_cache(maxsize=1024)
def _parsed(reference: str) -> list[object]:
    """A group's completions share their reference."""
    from math_verify import parse

    return parse(_BOX + reference + "}", parsing_timeout=None)
