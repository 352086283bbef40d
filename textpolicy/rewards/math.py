r"""Compare mathematical answers with references; ``extract_boxed`` reads them from completions.

Two answers are equal when they are written the same up to spelling, or when all of both is read and has the
same value. Nothing is searched for in an answer, so that no part of it can be right for the whole.
"""

from __future__ import annotations

import functools
import importlib.util
import itertools
import re
import time

from .._system.machine import installer
from ..errors import MissingDependencyError, UserError
from .answer import extract_boxed
from .equality import read, same
from .expressions import MAX_DEPTH, LateError
from .spelling import normalize_math_answer, spell, tidy

__all__ = ["extract_boxed", "grade_math_answer", "normalize_math_answer"]

MAX_EXCESS = 300  # characters by which an answer may be longer than its reference


def grade_math_answer(given: str | None, reference: str, timeout: float = 3.0) -> bool:
    r"""Return whether the answer ``given`` equals the ``reference``, both without ``\boxed``; None never does.

    Equal are the same text after ``normalize_math_answer``, and what is the same by the table of rules in
    docs/02_rewards.md: numbers, expressions, lists, sets, tuples, intervals, matrices, equations. All of both
    must be read; what is not is compared as text. An answer that takes more than ``timeout`` seconds is not equal.

    Raises UserError for an empty reference or a timeout that is not positive, MissingDependencyError without mpmath.
    """
    _require_mpmath()
    if timeout <= 0:
        raise UserError(f"a grading timeout of {timeout} s leaves no time; give a positive number of seconds")
    deadline = time.monotonic() + timeout
    if "####" in reference:  # the solutions of GSM8K end with their answer
        reference = reference.rpartition("####")[2]
    if not normalize_math_answer(reference):
        raise UserError(f"the reference answer {reference!r} is empty; give the right answer, or drop the problem")
    if given is None or len(given) > len(reference) + MAX_EXCESS:
        return False
    if spell(given) == spell(reference):
        return True
    given, reference = tidy(given), tidy(reference)
    if not given or max(_depth(given), _depth(reference)) > MAX_DEPTH:
        return False
    try:
        return same(read(given), _read_reference(reference), deadline)
    except (LateError, RecursionError):
        return False


def _depth(text: str) -> int:
    """Return how many brackets of ``text`` are open at most."""
    brackets = (1 if mark in "([{" else -1 for mark in re.findall(r"[][(){}]", text))
    return max(itertools.accumulate(brackets, initial=0))


_read_reference = functools.lru_cache(maxsize=1024)(read)  # which a group's completions share


@functools.cache
def _require_mpmath() -> None:
    if importlib.util.find_spec("mpmath") is None:
        raise MissingDependencyError(f"mpmath is not installed; install it with: {installer()} 'textpolicy[math]'")
