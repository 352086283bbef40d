"""What a rollout asks of a policy and a strategy, and the check of what an environment answers."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..buffer import Buffer
from ..environment.base import Environment

STEP_KEYS = ("observation", "reward", "terminated", "truncated", "info")


class Policy(Protocol):
    """What chooses an action for an observation."""

    def __call__(self, obs: Any, deterministic: bool = False) -> tuple[Any, dict[str, Any]]:
        """An action, and extras: logprob, value, entropy, temperature, each as far as it is known."""


@runtime_checkable
class BatchedPolicy(Protocol):
    """A policy that also answers many prompts in one call."""

    def __call__(self, obs: Any, deterministic: bool = False) -> tuple[Any, dict[str, Any]]:
        """As a ``Policy``."""

    def sample_batch(
        self, prompts: Sequence[np.ndarray], deterministic: bool = False
    ) -> list[tuple[Any, dict[str, Any]]]:
        """A pair (token ids, extras) per prompt (P,) int32, in order.

        Extras: logprob (R,) float32, entropy (R,) float32 in nats, temperature.
        """


class RolloutStrategy(Protocol):
    """How an algorithm acts while it collects, and what it keeps of a step."""

    def select_action(self, policy: Policy, obs: Any) -> tuple[Any, dict[str, Any]]:
        """The policy's action, and its extras."""

    def store_transition(self, buffer: Buffer, **data: Any) -> None:
        """Add a step to the buffer."""


def checked_step(env: Environment, action: Any, **facts: Any) -> dict[str, Any]:
    """``env.step(action, **facts)``, held to its contract.

    Raises TypeError for anything but a dict, a flag that is no bool, an info that is no dict;
    KeyError, naming them, for missing keys.
    """
    result = env.step(action, **facts)
    if not isinstance(result, dict):
        raise TypeError(f"env.step returned a {type(result).__name__}; return a dict of {', '.join(STEP_KEYS)}")
    if missing := [key for key in STEP_KEYS if key not in result]:
        raise KeyError(f"env.step left out {', '.join(missing)}; return a dict of {', '.join(STEP_KEYS)}")
    for flag in ("terminated", "truncated"):
        if not isinstance(result[flag], bool | np.bool_):
            raise TypeError(f"env.step returned {flag}={result[flag]!r}; return True or False")
    if not isinstance(result["info"], dict):
        raise TypeError(f"env.step returned info={result['info']!r}; return a dict")
    return result
