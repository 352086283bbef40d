"""The protocols of policies and strategies, and the check of what an environment returns."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any, Protocol, runtime_checkable

import numpy as np

from ..buffer import Buffer
from ..environment.base import Environment

STEP_KEYS = ("observation", "reward", "terminated", "truncated", "info")


class Policy(Protocol):
    """The policy's side of a rollout: it chooses an action for an observation."""

    def __call__(self, obs: Any, deterministic: bool = False) -> tuple[Any, dict[str, Any]]:
        """Return an action, and those of the extras logprob, value, entropy and temperature that are known."""


@runtime_checkable
class BatchedPolicy(Policy, Protocol):
    """The policy that also answers many prompts in one call."""

    def sample_batch(
        self, prompts: Sequence[np.ndarray], deterministic: bool = False
    ) -> list[tuple[Any, dict[str, Any]]]:
        """Return a pair (token ids, extras) for each prompt (P,) int32, in order.

        Extras: logprob (R,) float32, entropy (R,) float32 in nats, temperature.
        """


class RolloutStrategy(Protocol):
    """The way an algorithm acts while episodes are collected, and the fields of a step that it stores."""

    def select_action(self, policy: Policy, obs: Any) -> tuple[Any, dict[str, Any]]:
        """Return the policy's action and its extras."""

    def store_transition(self, buffer: Buffer, **data: Any) -> None:
        """Add a step to the buffer."""


def checked_step(env: Environment, action: Any, **keywords: Any) -> dict[str, Any]:
    """Return ``env.step(action, **keywords)`` after checking it against the contract.

    Raises KeyError if keys are missing, and TypeError if the result or its info is not a dict or a flag is not a bool.
    """
    result = env.step(action, **keywords)
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
