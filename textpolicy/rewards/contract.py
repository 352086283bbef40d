"""The contract of a reward function: the arguments that it takes, and how its result is read."""

from __future__ import annotations

import inspect
import math
from collections.abc import Callable, Mapping
from contextlib import suppress
from dataclasses import dataclass, field
from functools import partial
from typing import Any, Literal, Self, SupportsFloat, TypeVar

import numpy as np

from ..errors import UserError

OnFailure = Literal["raise", "unscorable"]  # how a reward that raises is treated

Function = TypeVar("Function", bound=Callable[..., Any])

# (prompt, completion, example, **kwargs) -> number, dict or pair; or (prompts, completions, examples, **kwargs)
# -> one of these for each; either may be async.
RewardFunction = Callable[..., Any]
VerifierFunction = Callable[..., bool]  # (prompt, completion, example, **kwargs) -> bool

ONE = ("prompt", "completion", "example")
MANY = ("prompts", "completions", "examples")


_JUDGES: list[RewardFunction] = []


def judge(fn: Function) -> Function:
    """Mark a reward that raises UserError, whatever the completion, for an example by which it cannot judge."""
    _JUDGES.append(fn)
    return fn


# ---- arguments


@dataclass(frozen=True, slots=True)
class Request:
    """The completion to score, with its prompt and example."""

    prompt: str
    completion: str
    example: Mapping[str, Any] = field(default_factory=dict)
    truncated: bool = False  # its end was cut off, by a limit on tokens
    extra: Mapping[str, Any] = field(default_factory=dict)  # further keywords for this one


@dataclass(frozen=True, slots=True)
class BoundReward:
    """The reward or verifier together with the keywords that its signature takes, looked up once."""

    fn: Callable[..., Any]
    keywords: frozenset[str] | None  # None: it has **kwargs and takes all
    parameters: frozenset[str] = frozenset()  # all names in the signature; empty when it has none (a C function)
    batched: bool = False  # it takes lists: prompts, completions, examples
    is_async: bool = False
    judges: bool = False  # it is marked by ``judge``
    required: frozenset[str] = frozenset()  # names in the signature that have no default

    @classmethod
    def of(cls, fn: Callable[..., Any]) -> Self:
        """Read the signature of ``fn``.

        Raises UserError if ``fn`` can be called neither with prompt=, completion= and example= nor with
        prompts=, completions= and examples=.
        """
        if not callable(fn):
            raise UserError(f"{fn!r} is not a function; write one as fn(prompt, completion, example, **kwargs)")
        signature: Mapping[str, inspect.Parameter] = {}
        with suppress(ValueError, TypeError):  # a C function has none
            signature = inspect.signature(fn).parameters
        parameters, keywords = frozenset(signature), accepted_keywords(fn)
        batched = {*MANY} <= parameters
        missing = set() if batched or keywords is None else {*ONE} - keywords
        if not batched and parameters & {*MANY} and not {*ONE} <= parameters:  # as TRL's, which have **kwargs
            missing = {*MANY} - parameters
        if missing:
            raise UserError(
                f"{name_of(fn)!r} does not take {', '.join(sorted(missing))}; write it as fn(prompt, completion, "
                "example, **kwargs), or for lists as fn(prompts, completions, examples, **kwargs)"
            )
        is_async = any(map(inspect.iscoroutinefunction, (fn, type(fn).__call__)))  # or an object's __call__ is
        plain = fn.func if isinstance(fn, partial) else fn
        judges = any(plain is one for one in _JUDGES)
        named = [p for p in signature.values() if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY)]
        required = frozenset(p.name for p in named if p.default is p.empty)
        return cls(fn, keywords, parameters, batched, is_async, judges, required)

    @property
    def __name__(self) -> str:
        return name_of(self.fn)

    def __call__(self, **arguments: Any) -> Any:
        """Call the function with those ``arguments`` that it takes."""
        return self.fn(**self.select(arguments))

    def select(self, arguments: Mapping[str, Any]) -> dict[str, Any]:
        """Return those of the ``arguments`` that the function takes."""
        return {k: v for k, v in arguments.items() if self.keywords is None or k in self.keywords}


def accepted_keywords(fn: Callable[..., Any]) -> frozenset[str] | None:
    """Return the names ``fn`` takes as keywords; None when it takes any, or has no signature (a C function)."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (ValueError, TypeError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def name_of(fn: Callable[..., Any]) -> str:
    """Return the name of a function, or of the class of a callable object."""
    return getattr(fn, "__name__", type(fn).__name__)  # callable objects have no __name__ of their own


# ---- results


@dataclass(frozen=True, slots=True)
class Scored:
    """The score of one completion by a reward, or by several together."""

    reward: float  # NaN when it could not be scored
    is_correct: bool | None = None  # None when no reward returns it
    scores: Mapping[str, float] = field(default_factory=dict)  # of each of several rewards that applied, unweighted
    weights: Mapping[str, float] = field(default_factory=dict, compare=False)  # of those scores in ``reward``


def read_result(result: Any) -> Scored | None:
    """Read what a reward function returned; None means that the reward does not apply.

    Raises TypeError, ValueError or OverflowError for anything but a finite number, NaN, None, a ``Scored``,
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
    if is_correct is not None and (np.ndim(is_correct) or np.asarray(is_correct).item() not in (False, True)):
        raise TypeError(f"is_correct is {is_correct!r}, and neither True nor False")
    if is_correct is not None and not isinstance(result, Mapping) and np.asarray(is_correct).dtype != bool:
        raise TypeError("two numbers; the second of a pair is True or False")
    if value is None:
        return None
    return Scored(_number(value), None if is_correct is None else bool(is_correct))


def _number(value: Any) -> float:
    if np.ndim(value) or not isinstance(value, SupportsFloat) or math.isinf(float(value)):
        raise TypeError("not a finite number")
    return float(value)
