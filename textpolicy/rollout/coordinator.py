"""``RolloutCoordinator``: collects with one runner in this process, or with workers in processes of their own."""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping, Sequence
from types import TracebackType
from typing import Any, Self

from ..buffer import Buffer
from ..environment.base import Environment
from ..errors import UserError
from .base import BatchedPolicy, Policy
from .runner import RolloutRunner
from .strategy import create_strategy
from .workers import Fields, Work, Workers

logger = logging.getLogger(__name__)


class RolloutCoordinator:
    """Collects at most ``max_steps`` steps and ``max_episodes`` episodes per call, and per worker."""

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
        """``env_fn()`` and ``policy_fn()`` make what acts; ``algorithm`` names the strategy.

        With ``num_workers`` 0 they are called here. Otherwise each worker is a new process that calls them in
        itself, so a model loaded there does not follow training here; if they name a ``worker``
        argument they get its number, from which a policy takes a seed of its own. ``batch_size`` above 1 samples
        so many completions in one call, with the policy of ``model``, ``tokenizer`` and
        ``generation_params`` if they are given. ``worker_seconds`` bounds a call of ``collect`` with workers.
        ``profile`` keeps timings. Raises UserError.
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
        strategy = create_strategy(algorithm)
        self.max_episodes, self.batch_size, self.num_workers = max_episodes, batch_size, num_workers
        self.runner: RolloutRunner | None = None
        self.workers: Workers | None = None
        if num_workers:
            work = Work(env_fn, policy_fn, algorithm, max_steps, max_episodes)
            self.workers = Workers(work, num_workers, worker_seconds)
            return
        given = batch_size > 1 and model is not None and tokenizer is not None
        policy = _policy_of(model, tokenizer, generation_params) if given else policy_fn()
        if batch_size > 1 and not isinstance(policy, BatchedPolicy):
            raise UserError(
                f"batch_size is {batch_size} and the policy answers one prompt at a time; "
                "pass model and tokenizer, or let policy_fn return what create_policy makes"
            )
        self.runner = RolloutRunner(env_fn(), policy, strategy, max_steps, profile=profile)

    def collect(self) -> Buffer:
        """A fresh buffer of new episodes.

        Those of workers come worker by worker, complete ones only, with groups that no two workers share. Raises
        WorkerError, within a moment of it, when a worker dies or fails, and UserError once closed.
        """
        if self.workers is not None:
            return self._merged(self.workers.collect())
        if self.runner is None:
            raise UserError("this RolloutCoordinator is closed; make another one")
        return self._in_batches(self.runner) if self.batch_size > 1 else self.runner.collect(self.max_episodes)

    def close(self) -> None:
        """End the workers, and close the environment."""
        if self.workers is not None:
            self.workers.close()
        if self.runner is not None:
            self.runner.env.close()
        self.workers = self.runner = None

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def get_rollout_timing(self) -> dict[str, float]:
        """Seconds by phase so far, as ``RolloutRunner.get_timing``; {} without ``profile`` or with workers."""
        return {} if self.runner is None else self.runner.get_timing()

    def reset_rollout_timing(self) -> None:
        """Begin to count anew."""
        if self.runner is not None:
            self.runner.reset_timing()

    def get_rollout_generation_profile(self) -> dict[str, float]:
        """Seconds of generation and their share of the total; {} without ``profile`` or with workers."""
        return {} if self.runner is None else self.runner.get_generation_profile()

    def _in_batches(self, runner: RolloutRunner) -> Buffer:
        """As many episodes as one call of ``collect`` allows, ``batch_size`` at a time."""
        assert isinstance(runner.policy, BatchedPolicy)
        total = min(runner.max_steps, self.max_episodes)
        buffer = Buffer(max(10, total))
        while len(buffer) < total:
            part = runner.collect_batched(runner.policy.sample_batch, min(self.batch_size, total - len(buffer)))
            for episode in part.episodes:
                buffer.add_episode_from_dict(episode.to_dict())
        return buffer

    def _merged(self, collected: Sequence[Sequence[Fields]]) -> Buffer:
        _warn_of_twins(collected)
        buffer = Buffer(max(10, sum(map(len, collected))))
        for worker, episodes in enumerate(collected):
            for fields in episodes:
                group = fields["group"]
                unique = None if group is None else group * len(collected) + worker
                buffer.add_episode_from_dict({**fields, "group": unique})
        return buffer


def _policy_of(model: Any, tokenizer: Any, generation_params: Mapping[str, Any] | None) -> Any:
    from ..generation.mlx_generation import create_policy

    return create_policy(model, tokenizer, generation_params)


def _warn_of_twins(collected: Sequence[Sequence[Fields]]) -> None:
    """Policies made alike say the same things, which looks like more data and is not."""
    said = [str([(e["obs"], e["act"]) for e in episodes]) for episodes in collected if episodes]
    if len(set(said)) < len(said):
        logger.warning(
            "two rollout workers collected exactly the same; let policy_fn take worker, and use it in the policy's seed"
        )
