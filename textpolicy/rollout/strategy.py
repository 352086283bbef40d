"""The fields of a step that each algorithm stores while rollouts are collected."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from ..buffer import Buffer
from ..errors import unknown_name
from .base import Policy

REQUIRED = ("obs", "act", "rew", "next_obs", "done")
OF_A_GROUP = frozenset({"timeout", "logprob", "entropy", "is_correct", "group", "temperature"})


@dataclass(frozen=True)
class Strategy:
    """The strategy that samples from the policy and stores the required fields and those in ``keeps``."""

    keeps: frozenset[str] = OF_A_GROUP

    def select_action(self, policy: Policy, obs: Any) -> tuple[Any, dict[str, Any]]:
        """Return a sampled action and the policy's extras."""
        return policy(obs, deterministic=False)

    def store_transition(self, buffer: Buffer, **data: Any) -> None:
        """Add a step to ``buffer``, without the fields that the algorithm does not use.

        Raises ValueError if obs, act, rew, next_obs or done is missing.
        """
        if missing := [name for name in REQUIRED if name not in data]:
            raise ValueError(f"a transition lacks {', '.join(missing)}; give {', '.join(REQUIRED)}")
        buffer.add(**{k: v for k, v in data.items() if k in REQUIRED or k in self.keeps})


STRATEGIES = {
    "grpo": Strategy(),
    "gspo": Strategy(),
    "dr_grpo": Strategy(),
    "maxrl": Strategy(),
    "ppo": Strategy(OF_A_GROUP | {"value"}),
}


def create_strategy(algorithm: str) -> Strategy:
    """Return the strategy of ``algorithm``. Raises UserError for an unknown name."""
    if algorithm not in STRATEGIES:
        raise unknown_name("rollout strategy", algorithm, STRATEGIES)
    return STRATEGIES[algorithm]
