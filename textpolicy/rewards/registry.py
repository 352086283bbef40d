"""Register reward and verifier functions by name, and build rewards from settings."""

from __future__ import annotations

import functools
import logging
import math
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, overload

from ..errors import UserError, unknown_name
from .contract import BoundReward, Function, RewardFunction, VerifierFunction, accepted_keywords, name_of

REWARD_REGISTRY: dict[str, RewardFunction] = {}
VERIFIER_REGISTRY: dict[str, VerifierFunction] = {}

logger = logging.getLogger(__name__)


# ---- the registries


@overload
def reward(_func: Function, *, name: str | None = None) -> Function: ...
@overload
def reward(_func: str | None = None, *, name: str | None = None) -> Callable[[Function], Function]: ...
def reward(_func: Any = None, *, name: str | None = None) -> Any:
    """Register a reward: ``@reward``, ``@reward()``, ``@reward("x")`` or ``@reward(name="x")``.

    The function itself is returned, undecorated. It is called as
    ``fn(prompt=..., completion=..., example=..., **kwargs)`` and returns a number,
    ``{"reward": x, "is_correct": b}`` or ``(reward, is_correct)``; None when the reward does not apply,
    NaN when the completion cannot be scored. A function whose parameters are called prompts, completions
    and examples receives lists and returns one result for each; either kind may be async.
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
    """Return the reward registered as ``name``; for an unknown one log the known names and return None."""
    if name not in REWARD_REGISTRY:
        logger.error("%s", unknown_name("reward", name, REWARD_REGISTRY))
    return REWARD_REGISTRY.get(name)


def get_verifier_function(name: str) -> VerifierFunction | None:
    """Return the verifier registered as ``name``; for an unknown one log the known names and return None."""
    if name not in VERIFIER_REGISTRY:
        logger.error("%s", unknown_name("verifier", name, VERIFIER_REGISTRY))
    return VERIFIER_REGISTRY.get(name)


def list_registered_functions() -> dict[str, list[str]]:
    """Return ``{"rewards": [...], "verifiers": [...]}``, in the order of registration."""
    return {"rewards": list(REWARD_REGISTRY), "verifiers": list(VERIFIER_REGISTRY)}


def clear_registries() -> None:
    """Remove every reward and verifier, the built-in ones too."""
    REWARD_REGISTRY.clear()
    VERIFIER_REGISTRY.clear()


def _registrar(registry: dict[str, Any], kind: str, target: Any, name: str | None) -> Any:
    if callable(target):
        return _register(registry, kind, name or name_of(target), target)
    if target is not None and not isinstance(target, str):
        raise UserError(f"@{kind} got {target!r}; give it a name, or nothing")
    return lambda fn: _register(registry, kind, name or target or name_of(fn), fn)


def _register(registry: dict[str, Any], kind: str, name: str, fn: Function) -> Function:
    try:
        BoundReward.of(fn)
    except UserError as error:  # it is registered anyway: a test may call it differently
        logger.warning("%s %r cannot score completions: %s", kind, name, error)
    if name in registry:
        logger.warning("%s %r was already registered; the new function replaces it", kind, name)
    registry[name] = fn
    return fn


def _require(registry: dict[str, Any], kind: str, name: str) -> Any:
    if name not in registry:
        raise unknown_name(kind, name, registry)
    return registry[name]


# ---- rewards put together from settings


@dataclass(frozen=True)
class RewardConfig:
    """The settings of a registered reward."""

    name: str
    weight: float = 1.0  # in a weighted sum; with 0 the reward is only reported
    params: Mapping[str, Any] = field(default_factory=dict)  # keyword arguments of the reward; None is none
    verifiers: Sequence[str] = field(default_factory=list)  # names, or None; the reward counts where all accept
    verifier_penalty: float = 0.0  # replaces the reward where a verifier refuses; weighted like it

    def __post_init__(self) -> None:
        object.__setattr__(self, "params", self.params or {})
        object.__setattr__(self, "verifiers", self.verifiers or [])
        for what, number in (("weight", self.weight), ("verifier_penalty", self.verifier_penalty)):
            if not math.isfinite(number):
                raise UserError(f"reward {self.name!r} has {what} {number}; give a finite number")
        if self.verifier_penalty and not self.weight:
            logger.warning("reward %r has weight 0, so its verifier_penalty never counts; give it a weight", self.name)


def configured(config: RewardConfig) -> BoundReward:
    """Return the reward ``config`` names, with its params as keyword defaults; the caller applies weight and verifiers.

    Raises UserError for an unknown name, or params the function does not take.
    """
    fn = _require(REWARD_REGISTRY, "reward", config.name)
    keywords = accepted_keywords(fn)
    for key in config.params:
        if keywords is not None and key not in keywords:
            raise unknown_name(f"parameter of reward {config.name!r} called", key, keywords)
    if not config.params:
        return BoundReward.of(fn)
    with_params: Any = functools.partial(fn, **config.params)
    with_params.__name__ = config.name
    return BoundReward.of(with_params)


def verifiers(names: Sequence[str]) -> tuple[BoundReward, ...]:
    """Return the verifiers of these names. Raises UserError for an unknown one, or one that is async or batched."""
    bound = tuple(BoundReward.of(_require(VERIFIER_REGISTRY, "verifier", name)) for name in names)
    for name, check in zip(names, bound, strict=True):
        if check.is_async or check.batched:  # it would return an object that is always true
            raise UserError(f"verifier {name!r} is async or batched; write it as fn(prompt, completion, example)")
    return bound


def create_configured_reward_function(config: RewardConfig) -> RewardFunction:
    """Return the reward ``config`` names, with its params as keyword defaults and its verifiers applied.

    Keywords given at call time override ``params``; ``weight`` has no effect here. Raises UserError for an
    unknown name, params the function does not take, or verifiers of a function that is batched or async,
    for which use ``Scorer``.
    """
    return apply_verifiers_to_reward(configured(config).fn, config.verifiers, config.verifier_penalty)


def apply_verifiers_to_reward(
    original_reward_func: RewardFunction, verifier_names: Sequence[str], penalty_on_failure: float = 0.0
) -> RewardFunction:
    """Return a function that gives ``penalty_on_failure`` where a verifier refuses, else calls the original.

    The verifiers run in order; after the first refusal neither the others nor the reward are
    called. Raises UserError for an unknown verifier name, or a function that is batched or async;
    exceptions of a verifier are passed on.
    """
    scoring, checks = BoundReward.of(original_reward_func), verifiers(verifier_names)
    if not checks:
        return original_reward_func
    if scoring.batched or scoring.is_async:
        raise UserError(f"{scoring.__name__!r} is batched or async; give it verifiers with a RewardConfig in a Scorer")

    def verified(prompt: str, completion: str, example: Mapping[str, Any], **kwargs: Any) -> Any:
        arguments = {"prompt": prompt, "completion": completion, "example": example, **kwargs}
        return scoring(**arguments) if all(check(**arguments) for check in checks) else penalty_on_failure

    verified.__name__ = f"{scoring.__name__}_verified_by_{'_and_'.join(verifier_names)}"
    return verified
