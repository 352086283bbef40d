"""Let a policy act in an environment and collect the episodes: ``RolloutRunner``."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from typing import Any

import numpy as np

from ..buffer import Buffer
from ..environment.base import Environment
from ..environment.single_turn import TextGenerationEnv
from ..errors import UserError, gone
from .base import BatchedPolicy, Policy, RolloutStrategy, checked_step
from .clock import Clock

SampleBatch = Callable[..., Sequence[tuple[Any, dict[str, Any]]]]  # as BatchedPolicy.sample_batch
PHASES = ("total", "env_reset", "generation", "env_step", "buffer_store")


class RolloutRunner:
    """The collector of episodes: ``max_steps`` steps per call, sampled together where policy and environment allow it.

    A policy is called as ``policy(obs, deterministic=False)`` and returns (action, extras).
    ``agent``, an object with ``policy`` and ``rollout_strategy``, may stand in for the two. With ``profile``
    the seconds of each phase are measured, for ``get_timing``.
    Raises UserError when a policy or strategy is missing, or max_steps is below 1.
    """

    def __init__(
        self,
        env: Environment,
        policy: Policy | None = None,
        strategy: RolloutStrategy | None = None,
        max_steps: int = 1000,
        agent: Any = None,
        profile: bool = False,
    ) -> None:
        if agent is not None:
            policy, strategy = policy or agent.policy, strategy or agent.rollout_strategy
        if policy is None or strategy is None:
            raise UserError("RolloutRunner has no policy or no strategy; pass both, or an agent that has them")
        if max_steps < 1:
            raise UserError(f"max_steps is {max_steps}; set it to 1 or more")
        self.env, self.policy, self.strategy, self.max_steps = env, policy, strategy, max_steps
        self.profile, self.clock = profile, Clock(*PHASES)

    def get_timing(self) -> dict[str, float]:
        """Return the seconds in total, env_reset, generation, env_step and buffer_store; {} without ``profile``."""
        return dict(self.clock.seconds) if self.profile else {}

    def get_generation_profile(self) -> dict[str, float]:
        """Return the seconds of generation and their share of the total; {} without ``profile``."""
        if not self.profile:
            return {}
        seconds = self.clock.seconds
        share = seconds["generation"] / seconds["total"] if seconds["total"] else 0.0
        return {"generation_seconds": seconds["generation"], "generation_share": share}

    def reset_timing(self) -> None:
        """Set the measured seconds back to 0."""
        self.clock = Clock(*PHASES)

    def collect(self, max_episodes: int | None = None) -> Buffer:
        """Return a fresh buffer with ``max_steps`` steps, or fewer once ``max_episodes`` episodes are complete.

        An episode that ``max_steps`` cuts short stays open in the buffer. Raises UserError.
        """
        most = self.max_steps if max_episodes is None else max_episodes
        if most < 1:
            raise UserError(f"max_episodes is {max_episodes}; set it to 1 or more")
        batched = isinstance(self.env, TextGenerationEnv) and self.env.single_turn
        if batched and isinstance(self.policy, BatchedPolicy):
            return self.collect_batched(self.policy.sample_batch, min(self.max_steps, most))
        buffer = Buffer(max(10, self.max_steps))
        with self.clock("total"):
            while len(buffer) < self.max_steps and buffer.episode_count < most:
                transitions = self.collect_episode(max_steps=self.max_steps - len(buffer))
                # An environment that reports success at the end of an episode had not succeeded in the steps before.
                unsolved = {"is_correct": False} if "is_correct" in transitions[-1] else {}
                for transition in transitions:
                    with self.clock("buffer_store"):
                        self.strategy.store_transition(buffer, **unsolved | transition)
        return buffer

    collect_rollout = gone(
        "RolloutRunner.collect_rollout", "call collect(), with max_episodes for a number of episodes"
    )
    get_statistics = gone("RolloutRunner.get_statistics", "collect() returns a Buffer, whose episodes have the rewards")

    def collect_batched(self, batched_policy_fn: SampleBatch, batch_size: int) -> Buffer:
        """Return a fresh buffer with the next ``batch_size`` episodes, sampled in one call.

        ``batched_policy_fn`` follows ``BatchedPolicy.sample_batch``. Raises ValueError when
        batch_size is below 1, the outputs are not one per prompt, or the environment is not a
        TextGenerationEnv, whose episodes are one step each and known in advance.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; set it to 1 or more")
        if not isinstance(self.env, TextGenerationEnv) or not self.env.single_turn:
            raise UserError(f"a {type(self.env).__name__} cannot be batched; use collect(), or a TextGenerationEnv")
        buffer = Buffer(max(10, batch_size))
        with self.clock("total"):
            with self.clock("generation"):
                outputs = batched_policy_fn(self.env.upcoming(batch_size), deterministic=False)
            if len(outputs) != batch_size:
                raise ValueError(f"the policy answered {len(outputs)} of {batch_size} prompts; return one output each")
            for output in outputs:
                transition = self._step(self._reset(), output)
                with self.clock("buffer_store"):
                    self.strategy.store_transition(buffer, **transition)
        return buffer

    def collect_episode(self, deterministic: bool = False, max_steps: int | None = None) -> list[dict[str, Any]]:
        """Return the transitions of one episode, at most ``max_steps`` (by default the runner's).

        ``deterministic`` takes the policy's most likely action instead of a sample. A transition holds
        obs, act, rew, next_obs, done, timeout, the policy's extras and, where the environment reports
        them, is_correct and group.
        """
        obs = self._reset()
        transitions: list[dict[str, Any]] = []
        for _ in range(self.max_steps if max_steps is None else max_steps):
            with self.clock("generation"):
                if deterministic:
                    output = self.policy(obs, deterministic=True)
                else:
                    output = self.strategy.select_action(self.policy, obs)
            transitions.append(self._step(obs, output))
            if transitions[-1]["done"] or transitions[-1]["timeout"]:
                break
            obs = transitions[-1]["next_obs"]
        return transitions

    def _reset(self) -> Any:
        """Return the first observation of an episode, which ``reset`` gives alone or with an info dict."""
        with self.clock("env_reset"):
            match self.env.reset():
                case (obs, dict()):
                    return obs
                case obs:
                    return obs

    def _step(self, obs: Any, output: Any) -> dict[str, Any]:
        """Take the action in the policy's ``output`` and return the transition from ``obs``."""
        match output:
            case (action, Mapping() as extras):
                act = action if isinstance(action, str) else np.asarray(action).tolist()
            case _:
                raise TypeError(f"a policy returned {output!r}; return a pair, the action and a dict of extras")
        cut_off = bool(extras.get("truncated", False))  # by the policy's own max_tokens
        # An environment of several turns has to know, because a turn that was cut off gets no reply.
        several_turns = isinstance(self.env, TextGenerationEnv) and not self.env.single_turn
        with self.clock("env_step"):
            result = checked_step(self.env, act, **({"truncated": True} if cut_off and several_turns else {}))
        return {
            **{key: result["info"][key] for key in ("is_correct", "group") if key in result["info"]},
            **extras,
            "obs": obs,
            "act": act,
            "rew": float(result["reward"]),
            "next_obs": result["observation"],
            "done": bool(result["terminated"]),
            "timeout": bool(result["truncated"]) or cut_off,
        }
