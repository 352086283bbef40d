"""What a reward function is: the arguments that it takes, and how its result is read."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Literal, Self, SupportsFloat

import numpy as np

from ..errors import UserError

OnFailure = Literal["raise", "unscorable"]  # what becomes of a completion whose reward raises

# (prompt, completion, example, **kwargs) -> number, dict or pair; or (prompts, completions, examples, **kwargs)
# -> one of these for each; either may be async.
RewardFunction = Callable[..., Any]
VerifierFunction = Callable[..., bool]  # (prompt, completion, example, **kwargs) -> bool

ONE = ("prompt", "completion", "example")
MANY = ("prompts", "completions", "examples")


# ---- what goes in


@dataclass(frozen=True, slots=True)
class Request:
    """One completion to score."""

    prompt: str
    completion: str
    example: Mapping[str, Any] = field(default_factory=dict)
    truncated: bool = False  # its end was cut off, by a limit on tokens
    extra: Mapping[str, Any] = field(default_factory=dict)  # further keywords of this one


@dataclass(frozen=True, slots=True)
class Fitted:
    """A reward or verifier together with what its signature takes, looked up once."""

    fn: Callable[..., Any]
    keywords: frozenset[str] | None  # None: it has **kwargs and takes all
    batched: bool = False  # it takes lists: prompts, completions, examples
    is_async: bool = False

    @classmethod
    def of(cls, fn: Callable[..., Any]) -> Self:
        """Read the signature of ``fn``.

        Raises UserError if ``fn`` can be called neither with prompt=, completion= and example= nor with
        prompts=, completions= and examples=.
        """
        if not callable(fn):
            raise UserError(f"{fn!r} is not a function; write one as fn(prompt, completion, example, **kwargs)")
        keywords, batched = accepted_keywords(fn), {*MANY} <= parameter_names(fn)
        missing = set() if batched or keywords is None else {*ONE} - keywords
        if missing:
            raise UserError(
                f"{name_of(fn)!r} does not take {', '.join(sorted(missing))}; "
                "write it as fn(prompt, completion, example, **kwargs)"
            )
        return cls(fn, keywords, batched, _is_async(fn))

    @property
    def __name__(self) -> str:
        return name_of(self.fn)

    def __call__(self, **arguments: Any) -> Any:
        """Call the function with those ``arguments`` that it takes."""
        return self.fn(**self.taken(arguments))

    def taken(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Those of the ``arguments`` that the function takes."""
        return {k: v for k, v in arguments.items() if self.keywords is None or k in self.keywords}


def accepted_keywords(fn: Callable[..., Any]) -> frozenset[str] | None:
    """The names ``fn`` takes as keywords; None when it takes any, or does not say (a C function)."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (ValueError, TypeError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def parameter_names(fn: Callable[..., Any]) -> frozenset[str]:
    """The names in the signature of ``fn``; none when it does not say (a C function)."""
    try:
        return frozenset(inspect.signature(fn).parameters)
    except (ValueError, TypeError):
        return frozenset()


def _is_async(fn: Callable[..., Any]) -> bool:
    """Whether a call returns something to await; ``fn`` may be an object with an async __call__."""
    return inspect.iscoroutinefunction(fn) or inspect.iscoroutinefunction(type(fn).__call__)


def name_of(fn: Callable[..., Any]) -> str:
    """The name of a function, or of the class of a callable object."""
    return getattr(fn, "__name__", type(fn).__name__)  # callable objects have no __name__ of their own


# ---- what comes out


@dataclass(frozen=True, slots=True)
class Scored:
    """What a reward, or several together, said of one completion."""

    reward: float  # NaN when it could not be scored
    is_correct: bool | None = None  # None when nothing says
    scores: Mapping[str, float] = field(default_factory=dict)  # of each of several rewards that applied, unweighted


def read_result(result: Any) -> Scored | None:
    """What a reward function returned; None when it says that it does not apply.

    Raises TypeError, ValueError or OverflowError for what is not a finite number, NaN, None, a ``Scored``,
    ``{"reward": x[, "is_correct": b]}`` or ``(reward, is_correct)``.
    """
    match result:
        case Scored():
            return result
        case Mapping():
            if "reward" not in result:
                raise TypeError("the mapping has no key 'reward'")
            value, is_correct = result["reward"], result.get("is_correct")
        case (value, is_correct):
            pass
        case _:
            value, is_correct = result, None
    if value is None:
        return None
    return Scored(_number(value), None if is_correct is None else _number(is_correct) != 0)


def _number(value: Any) -> float:
    if np.ndim(value) or not isinstance(value, SupportsFloat) or math.isinf(float(value)):
        raise TypeError(f"{value!r} is not a finite number")
    return float(value)
