"""The errors that a user can fix. Each message is one sentence: what, the value, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Callable, Iterable
from numbers import Integral, Real
from typing import Any, NoReturn


class TextPolicyError(Exception):
    """The base of every error below; the command line prints its message and exits with code 2."""


class UserError(TextPolicyError, ValueError):
    """The error for a setting, file or argument that cannot work."""


class NotFiniteError(UserError):
    """The error for a loss or gradient that is NaN or infinite; nothing has changed."""


class StoppedError(TextPolicyError):
    """The error that ends a run after a signal, where it can be resumed; the message says how."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal


class RankError(TextPolicyError):
    """The error that ends a rank because another one failed, died or is waited for in vain; "" where that says so."""


class MissingDependencyError(TextPolicyError, ImportError):
    """The error for an optional package that is not installed; the message carries the install line."""


class RewardError(TextPolicyError, RuntimeError):
    """The error for a reward function that raised, or returned something that is not a number."""


class RewardResultError(RewardError, ValueError):
    """The error for a reward function that returned something that is not a reward."""


class WorkerError(TextPolicyError, RuntimeError):
    """The error for a worker process that died, timed out or failed at its task."""


class ServiceError(TextPolicyError, RuntimeError):
    """The error for a training service that refused a request, failed, or stopped answering."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> UserError:
    """Return the error for a ``name`` that is not among the ``known`` ones; it suggests the nearest."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"there is no {what} {name!r}; {hint}choose one of {', '.join(known)}")


def gone(name: str, instead: str) -> Callable[..., NoReturn]:
    """Return the method that stands for one of version 0.1: it raises UserError and says what to use ``instead``."""

    def method(*_: Any, **__: Any) -> NoReturn:
        raise UserError(f"{name} of version 0.1 is gone; {instead}")

    method.__doc__ = f"Raise UserError: it is gone; {instead}."
    return method


def refuse_outside(name: str, value: Any, low: float = 0, high: float = float("inf"), *, whole: bool = False) -> None:
    """Raise UserError unless ``value`` is a finite number, ``whole`` if so asked, and low <= value <= high.

    NumPy's numbers are numbers; text and True are none. The message names the setting.
    """
    number = isinstance(value, Integral if whole else Real) and not isinstance(value, bool)
    if not (number and low <= value <= high and abs(value) < float("inf")):
        kind = "a whole number" if whole else "a number"
        bounds = f"{low} or more" if high == float("inf") else f"{kind} from {low} to {high}"
        shown = repr(value) if isinstance(value, str) else f"{value!s:.60}"
        raise UserError(f"{name} is {shown}; set it to {bounds}")


def refuse_not_positive(name: str, value: float) -> None:
    """Raise UserError unless ``value`` is finite and above 0; the message names the setting."""
    if not 0 < value < float("inf"):
        raise UserError(f"{name} is {value}; set it above 0")
