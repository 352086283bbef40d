"""The errors a user can mend. Each message is one sentence: what, the value, what to do."""

from __future__ import annotations

import difflib
from collections.abc import Iterable


class TextPolicyError(Exception):
    """Base of every error below; the command line prints its message and exits with code 2."""


class UserError(TextPolicyError, ValueError):
    """A setting, file or argument that cannot work."""


class NotFiniteError(UserError):
    """A loss or gradient is NaN or infinite; nothing was changed."""


class StoppedError(TextPolicyError):
    """A signal ended a run where it can be resumed; the message says how."""

    def __init__(self, message: str, signal: int) -> None:
        super().__init__(message)
        self.exit_code = 128 + signal


class MissingDependencyError(TextPolicyError, ImportError):
    """An optional package is absent; the message carries the install line."""


class RewardError(TextPolicyError, RuntimeError):
    """A reward function raised, or returned something that is not a number."""


class RewardResultError(RewardError, ValueError):
    """A reward function returned something that is no reward."""


class WorkerError(TextPolicyError, RuntimeError):
    """A worker process died, took too long, or could not do what it was asked."""


class ServiceError(TextPolicyError, RuntimeError):
    """A training service refused, failed, or no longer answers."""


def unknown_name(what: str, name: str, known: Iterable[str]) -> UserError:
    """The error for a ``name`` that is none of the ``known`` ones, with the nearest of them."""
    known = sorted(known)
    near = difflib.get_close_matches(name, known, n=1)
    hint = f"did you mean {near[0]!r}? " if near else ""
    return UserError(f"there is no {what} {name!r}; {hint}choose one of {', '.join(known)}")
