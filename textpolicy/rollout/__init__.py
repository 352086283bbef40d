"""Rollouts: a policy acts in an environment, and a buffer keeps what happened."""

from .base import BatchedPolicy, Policy, RolloutStrategy
from .coordinator import RolloutCoordinator
from .runner import RolloutRunner
from .strategy import Strategy, create_strategy

__all__ = [
    "BatchedPolicy",
    "Policy",
    "RolloutCoordinator",
    "RolloutRunner",
    "RolloutStrategy",
    "Strategy",
    "create_strategy",
]
