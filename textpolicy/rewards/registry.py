"""Reward and verifier functions: their registries, and the one place that calls a reward."""

from __future__ import annotations

import functools
import inspect
import logging
import math
import reprlib
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self, SupportsFloat, TypeVar, overload

import numpy as np

from ..errors import RewardError, UserError, unknown_name

RewardFunction = Callable[..., Any]  # (prompt, completion, example, **kwargs) -> number, dict or pair
VerifierFunction = Callable[..., bool]  # (prompt, completion, example, **kwargs) -> bool
Function = TypeVar("Function", bound=Callable[..., Any])

REWARD_REGISTRY: dict[str, RewardFunction] = {}
VERIFIER_REGISTRY: dict[str, VerifierFunction] = {}

logger = logging.getLogger(__name__)
_excerpt = reprlib.Repr()
_excerpt.maxstring = 80
_excerpt.maxother = 80


# ---- the registries


@overload
def reward(_func: Function, *, name: str | None = None) -> Function: ...
@overload
def reward(_func: str | None = None, *, name: str | None = None) -> Callable[[Function], Function]: ...
def reward(_func: Any = None, *, name: str | None = None) -> Any:
    """Register a reward: ``@reward``, ``@reward()``, ``@reward("x")`` or ``@reward(name="x")``.

    The function itself is returned, undecorated. It is called as
    ``fn(prompt=..., completion=..., example=..., **kwargs)`` and returns a number,
    ``{"reward": x, "is_correct": b}`` or ``(reward, is_correct)``.
    """
    return _registrar(REWARD_REGISTRY, "reward", _func, name)


@overload
def verifier(_func: Function, *, name: str | None = None) -> Function: ...
@overload
def verifier(_func: str | None = None, *, name: str | None = None) -> Callable[[Function], Function]: ...
def verifier(_func: Any = None, *, name: str | None = None) -> Any:
    """Register a verifier, in the same forms as ``reward``; it returns True for an acceptable completion."""
    return _registrar(VERIFIER_REGISTRY, "verifier", _func, name)


def get_reward_function(name: str) -> RewardFunction | None:
    """The reward registered as ``name``, or None, and then the known names are logged."""
    return _look_up(REWARD_REGISTRY, "reward", name)


def get_verifier_function(name: str) -> VerifierFunction | None:
    """The verifier registered as ``name``, or None, and then the known names are logged."""
    return _look_up(VERIFIER_REGISTRY, "verifier", name)


def list_registered_functions() -> dict[str, list[str]]:
    """``{"rewards": [...], "verifiers": [...]}``, in the order of registration."""
    return {"rewards": list(REWARD_REGISTRY), "verifiers": list(VERIFIER_REGISTRY)}


def clear_registries() -> None:
    """Forget every reward and verifier, the built-in ones too."""
    REWARD_REGISTRY.clear()
    VERIFIER_REGISTRY.clear()


def _registrar(registry: dict[str, Any], kind: str, target: Any, name: str | None) -> Any:
    if callable(target):
        return _register(registry, kind, name or _name(target), target)
    if target is not None and not isinstance(target, str):
        raise UserError(f"@{kind} got {target!r}; give it a name, or nothing")
    return lambda fn: _register(registry, kind, name or target or _name(fn), fn)


def _register(registry: dict[str, Any], kind: str, name: str, fn: Function) -> Function:
    keywords = accepted_keywords(fn)
    if keywords is not None and len(keywords) < 3:
        logger.warning("%s %r takes fewer than the three parameters prompt, completion, example", kind, name)
    if name in registry:
        logger.warning("%s %r was already registered; the new function replaces it", kind, name)
    registry[name] = fn
    return fn


def _look_up(registry: dict[str, Any], kind: str, name: str) -> Any:
    if name not in registry:
        logger.error("%s", unknown_name(kind, name, registry))
    return registry.get(name)


def _require(registry: dict[str, Any], kind: str, name: str) -> Any:
    if name not in registry:
        raise unknown_name(kind, name, registry)
    return registry[name]


def _name(fn: Callable[..., Any]) -> str:
    return getattr(fn, "__name__", type(fn).__name__)  # callable objects have no __name__ of their own


# ---- calling a reward


@dataclass(frozen=True, slots=True)
class Scored:
    """What a reward said of one completion."""

    reward: float
    is_correct: bool | None = None  # None when the reward does not say


@dataclass(frozen=True, slots=True)
class Fitted:
    """A reward or verifier together with the keywords its signature takes, looked up once."""

    fn: Callable[..., Any]
    keywords: frozenset[str] | None  # None: it has **kwargs and takes all

    @classmethod
    def of(cls, fn: Callable[..., Any]) -> Self:
        """Read the signature of ``fn``.

        Raises UserError if ``fn`` cannot be called with prompt=, completion= and example=.
        """
        keywords = accepted_keywords(fn)
        missing = {"prompt", "completion", "example"} - (keywords or set())
        if not callable(fn) or (keywords is not None and missing):
            raise UserError(
                f"{_name(fn)!r} does not take {', '.join(sorted(missing))}; "
                "write it as fn(prompt, completion, example, **kwargs)"
            )
        return cls(fn, keywords)

    @property
    def __name__(self) -> str:
        return _name(self.fn)

    def __call__(self, **arguments: Any) -> Any:
        """Call the function with those ``arguments`` that it takes."""
        if self.keywords is None:
            return self.fn(**arguments)
        return self.fn(**{k: v for k, v in arguments.items() if k in self.keywords})


def accepted_keywords(fn: Callable[..., Any]) -> frozenset[str] | None:
    """The names ``fn`` takes as keywords; None when it takes any, or does not say (a C function)."""
    try:
        parameters = inspect.signature(fn).parameters.values()
    except (ValueError, TypeError):
        return None
    if any(p.kind is p.VAR_KEYWORD for p in parameters):
        return None
    return frozenset(p.name for p in parameters if p.kind in (p.POSITIONAL_OR_KEYWORD, p.KEYWORD_ONLY))


def call_reward(fn: RewardFunction, prompt: str, completion: str, example: Mapping[str, Any], **extra: Any) -> Scored:
    """Score one completion. Nothing else in the package calls a reward function.

    ``extra`` is passed on as it is; wrap ``fn`` in ``Fitted.of`` to drop what its signature does not
    take. A reward of None or NaN says that the completion could not be scored. Raises RewardError
    when ``fn`` raises or returns something that is not a finite number, None,
    ``{"reward": x[, "is_correct": b]}`` or ``(reward, is_correct)``.
    """
    where = f"for prompt {_excerpt.repr(prompt)} and completion {_excerpt.repr(completion)}"
    try:
        result = fn(prompt=prompt, completion=completion, example=example, **extra)
    except Exception as error:  # a user's function may raise anything; none of it is swallowed
        raised = f"raised {type(error).__name__} ({_excerpt.repr(str(error))})"
        raise RewardError(f"reward {_name(fn)!r} {raised} {where}; mend it to return a number") from error
    try:
        return _scored(result)
    except (TypeError, ValueError, OverflowError) as error:
        returned = f"returned {_excerpt.repr(result)}, which is not a finite number,"
        raise RewardError(f"reward {_name(fn)!r} {returned} {where}; mend it to return a number") from error


def _scored(result: Any) -> Scored:
    match result:
        case Mapping():
            if "reward" not in result:
                raise TypeError("the mapping has no key 'reward'")
            value, is_correct = result["reward"], result.get("is_correct")
        case (value, is_correct):
            pass
        case _:
            value, is_correct = result, None
    reward = math.nan if value is None else _number(value)
    return Scored(reward, None if is_correct is None else _number(is_correct) != 0)


def _number(value: Any) -> float:
    if np.ndim(value) or not isinstance(value, SupportsFloat) or math.isinf(float(value)):
        raise TypeError(f"{value!r} is not a finite number")
    return float(value)


# ---- rewards put together from settings


@dataclass(frozen=True)
class RewardConfig:
    """A registered reward with its settings."""

    name: str
    weight: float = 1.0  # of this reward in a weighted sum
    params: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments of the reward
    verifiers: Sequence[str] = field(default_factory=list)  # names; the reward counts where all agree
    verifier_penalty: float = 0.0  # the reward where one of them does not


def create_configured_reward_function(config: RewardConfig) -> RewardFunction:
    """The reward ``config`` names, with its params as keyword defaults, behind its verifiers.

    Keywords given at call time win over ``params``. ``weight`` is left to whoever sums rewards.
    Raises UserError for an unknown name, or params the function does not take.
    """
    fn = _require(REWARD_REGISTRY, "reward", config.name)
    keywords = accepted_keywords(fn)
    for key in config.params:
        if keywords is not None and key not in keywords:
            raise unknown_name(f"parameter of reward {config.name!r} called", key, keywords)
    configured = _called(config.name, functools.partial(fn, **config.params))
    return apply_verifiers_to_reward(configured, config.verifiers, config.verifier_penalty)


def apply_verifiers_to_reward(
    original_reward_func: RewardFunction, verifier_names: Sequence[str], penalty_on_failure: float = 0.0
) -> RewardFunction:
    """``original_reward_func`` where every verifier agrees, ``penalty_on_failure`` where one does not.

    The verifiers run in order; after the first refusal neither the others nor the reward are
    called. Raises UserError for an unknown verifier name; what a verifier raises is not hidden.
    """
    scoring = Fitted.of(original_reward_func)
    checks = [Fitted.of(_require(VERIFIER_REGISTRY, "verifier", name)) for name in verifier_names]
    if not checks:
        return original_reward_func

    def verified(prompt: str, completion: str, example: Mapping[str, Any], **kwargs: Any) -> Any:
        arguments = {"prompt": prompt, "completion": completion, "example": example, **kwargs}
        return scoring(**arguments) if all(check(**arguments) for check in checks) else penalty_on_failure

    return _called(f"{scoring.__name__}_verified_by_{'_and_'.join(verifier_names)}", verified)


def _called(name: str, fn: Callable[..., Any]) -> Callable[..., Any]:
    fn.__name__ = name
    return fn
