"""Make an environment and a policy, and collect episodes with them: ``RolloutCoordinator``."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from contextlib import AbstractContextManager
from types import TracebackType
from typing import Any

from ..buffer import Buffer
from ..environment.base import Environment
from ..errors import UserError
from ..rewards.contract import accepted_keywords
from .base import BatchedPolicy, Policy
from .runner import RolloutRunner
from .strategy import create_strategy

logger = logging.getLogger(__name__)


class RolloutCoordinator(AbstractContextManager["RolloutCoordinator"]):
    """The collector that makes its own environment and policy: at most ``max_episodes`` episodes per call."""

    def __init__(
        self,
        env_fn: Callable[..., Environment],
        policy_fn: Callable[..., Policy],
        algorithm: str,
        num_workers: int = 0,
        max_steps: int = 1000,
        max_episodes: int = 100,
        batch_size: int = 1,
        model: Any = None,
        tokenizer: Any = None,
        generation_params: Mapping[str, Any] | None = None,
        profile: bool = False,
        worker_seconds: float | None = None,
    ) -> None:
        """Make the environment with ``env_fn()`` and the policy with ``policy_fn()``; a ``worker`` argument gets 0.

        ``algorithm`` names the strategy. A call of ``collect`` takes at most ``max_steps`` steps. ``batch_size``
        above 1 samples that many completions in one call, with the policy of ``model``, ``tokenizer`` and
        ``generation_params`` if they are given. ``profile`` measures timings. ``num_workers`` and
        ``worker_seconds`` are accepted for compatibility: every episode is collected in this process, and
        ``num_workers`` above 0 logs a warning. Raises UserError.
        """
        for name, value, least in (
            ("num_workers", num_workers, 0),
            ("batch_size", batch_size, 1),
            ("max_episodes", max_episodes, 1),
        ):
            if value < least:
                raise UserError(f"{name} is {value}; set it to {least} or more")
        if batch_size > 1 and num_workers:
            raise UserError(f"batch_size is {batch_size} and num_workers {num_workers}; set one of them, not both")
        if num_workers:
            logger.warning(
                "num_workers is %d and starts no processes: this process collects all episodes; leave num_workers out",
                num_workers,
            )
        strategy = create_strategy(algorithm)
        self.max_episodes, self.batch_size, self.num_workers = max_episodes, batch_size, num_workers
        if batch_size > 1 and model is not None and tokenizer is not None:
            from ..generation.mlx_generation import create_policy

            policy: Any = create_policy(model, tokenizer, generation_params)
        else:
            policy = policy_fn(**({"worker": 0} if "worker" in (accepted_keywords(policy_fn) or ()) else {}))
        if batch_size > 1 and not isinstance(policy, BatchedPolicy):
            raise UserError(
                f"batch_size is {batch_size} and the policy answers one prompt at a time; "
                "pass model and tokenizer, or let policy_fn return what create_policy makes"
            )
        env = env_fn(**({"worker": 0} if "worker" in (accepted_keywords(env_fn) or ()) else {}))
        self.runner: RolloutRunner | None = RolloutRunner(env, policy, strategy, max_steps, profile=profile)

    def collect(self) -> Buffer:
        """Return a fresh buffer of new episodes. Raises UserError once the coordinator is closed."""
        if self.runner is None:
            raise UserError("this RolloutCoordinator is closed; make another one")
        if self.batch_size == 1:
            return self.runner.collect(self.max_episodes)
        assert isinstance(self.runner.policy, BatchedPolicy)
        total = min(self.runner.max_steps, self.max_episodes)
        buffer = Buffer(max(10, total))
        while len(buffer) < total:
            size = min(self.batch_size, total - len(buffer))
            for episode in self.runner.collect_batched(self.runner.policy.sample_batch, size).episodes:
                buffer.add_episode_from_dict(episode.to_dict())
        return buffer

    def close(self) -> None:
        """Close the environment."""
        if self.runner is not None:
            self.runner.env.close()
        self.runner = None

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def get_rollout_timing(self) -> dict[str, float]:
        """Return the seconds by phase, as ``RolloutRunner.get_timing``; {} without ``profile`` or once closed."""
        return {} if self.runner is None else self.runner.get_timing()

    def reset_rollout_timing(self) -> None:
        """Set the measured seconds back to 0."""
        if self.runner is not None:
            self.runner.reset_timing()

    def get_rollout_generation_profile(self) -> dict[str, float]:
        """Return the seconds of generation and their share of the total; {} without ``profile`` or once closed."""
        return {} if self.runner is None else self.runner.get_generation_profile()
