"""The rollouts of the step-by-step API: a policy acts in an environment, and a buffer stores the episodes."""

from __future__ import annotations

from typing import TYPE_CHECKING

from .._system.lazy import lazy_names

if TYPE_CHECKING:
    from .base import BatchedPolicy as BatchedPolicy
    from .base import Policy as Policy
    from .base import RolloutStrategy as RolloutStrategy
    from .coordinator import RolloutCoordinator as RolloutCoordinator
    from .runner import RolloutRunner as RolloutRunner
    from .strategy import Strategy as Strategy
    from .strategy import create_strategy as create_strategy

_HOME = {  # public name -> the module it is in
    "BatchedPolicy": ".base",
    "Policy": ".base",
    "RolloutCoordinator": ".coordinator",
    "RolloutRunner": ".runner",
    "RolloutStrategy": ".base",
    "Strategy": ".strategy",
    "create_strategy": ".strategy",
}

__all__ = [*_HOME]
__getattr__ = lazy_names(__name__, _HOME)
