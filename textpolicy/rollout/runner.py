"""``RolloutRunner``: lets a policy act in an environment and collects what happened."""

from __future__ import annotations

from collections.abc import Callable, Iterator, Mapping, Sequence
from typing import Any

import numpy as np

from ..buffer import Buffer
from ..environment.base import Environment
from ..environment.single_turn import TextGenerationEnv
from ..errors import UserError
from .base import BatchedPolicy, Policy, RolloutStrategy, checked_step
from .clock import Clock

SampleBatch = Callable[..., Sequence[tuple[Any, dict[str, Any]]]]  # as BatchedPolicy.sample_batch


class RolloutRunner:
    """Collects ``max_steps`` steps at a time, in one policy call where policy and environment can.

    A policy is called as ``policy(obs, deterministic=False)`` and returns (action, extras).
    ``agent``, an object with ``policy`` and ``rollout_strategy``, may stand for the two. With ``profile``
    the seconds of each phase are kept, for ``get_timing``.
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
        self.clock = Clock(profile)

    def get_timing(self) -> dict[str, float]:
        """Seconds so far in total, env_reset, generation, env_step and buffer_store; {} without ``profile``."""
        return self.clock.seconds()

    def get_generation_profile(self) -> dict[str, float]:
        """Seconds of generation so far, and their share of the total; {} without ``profile``."""
        seconds = self.get_timing()
        if not seconds:
            return {}
        share = seconds["generation"] / seconds["total"] if seconds["total"] else 0.0
        return {"generation_seconds": seconds["generation"], "generation_share": share}

    def reset_timing(self) -> None:
        """Begin to count anew."""
        self.clock.reset()

    def collect(self, max_episodes: int | None = None) -> Buffer:
        """A fresh buffer with ``max_steps`` steps; an episode that they cut short stays open in it.

        It ends earlier once ``max_episodes`` are complete. Raises UserError.
        """
        most = self.max_steps if max_episodes is None else max_episodes
        if most < 1:
            raise UserError(f"max_episodes is {max_episodes}; set it to 1 or more")
        at_once = isinstance(self.env, TextGenerationEnv) and self.env.single_turn
        if at_once and isinstance(self.policy, BatchedPolicy):
            return self.collect_batched(self.policy.sample_batch, min(self.max_steps, most))
        with self.clock.of("total"):
            return self._collect_one_by_one(most)

    def _collect_one_by_one(self, max_episodes: int) -> Buffer:
        buffer = Buffer(max(10, self.max_steps))
        while len(buffer) < self.max_steps and buffer.episode_count < max_episodes:
            for transition in _consistent([*self._play(self.strategy.select_action, self.max_steps - len(buffer))]):
                self._store(buffer, transition)
        return buffer

    def collect_batched(self, batched_policy_fn: SampleBatch, batch_size: int) -> Buffer:
        """A fresh buffer with the next ``batch_size`` episodes, sampled in one call.

        ``batched_policy_fn`` follows ``BatchedPolicy.sample_batch``. Raises ValueError when
        batch_size is below 1, the outputs are not one per prompt, or the environment is not a
        TextGenerationEnv, whose episodes are one step each and known in advance.
        """
        if batch_size < 1:
            raise UserError(f"batch_size is {batch_size}; set it to 1 or more")
        if not isinstance(self.env, TextGenerationEnv) or not self.env.single_turn:
            raise UserError(f"a {type(self.env).__name__} cannot be batched; use collect(), or a TextGenerationEnv")
        with self.clock.of("total"):
            return self._collect_at_once(self.env, batched_policy_fn, batch_size)

    def _collect_at_once(self, env: TextGenerationEnv, sample: SampleBatch, batch_size: int) -> Buffer:
        with self.clock.of("generation"):
            outputs = sample(env.upcoming(batch_size), deterministic=False)
        if len(outputs) != batch_size:
            raise ValueError(f"the policy answered {len(outputs)} of {batch_size} prompts; return one output each")
        buffer = Buffer(max(10, batch_size))
        for output in outputs:
            self._store(buffer, self._step(self._reset(), output))
        return buffer

    def collect_episode(self, deterministic: bool = False) -> list[dict[str, Any]]:
        """The transitions of one episode, at most ``max_steps``.

        ``deterministic`` asks the policy for its best guess instead of a sample. A transition holds
        obs, act, rew, next_obs, done, timeout, the policy's extras and, where the environment says
        them, is_correct and group.
        """

        def best_guess(policy: Policy, obs: Any) -> tuple[Any, dict[str, Any]]:
            return policy(obs, deterministic=True)

        select = best_guess if deterministic else self.strategy.select_action
        return list(self._play(select, self.max_steps))

    def _play(self, select: Callable[..., tuple[Any, dict[str, Any]]], max_steps: int) -> Iterator[dict[str, Any]]:
        """One episode, or its first ``max_steps`` steps."""
        obs = self._reset()
        for _ in range(max_steps):
            with self.clock.of("generation"):
                output = select(self.policy, obs)
            transition = self._step(obs, output)
            yield transition
            if transition["done"] or transition["timeout"]:
                return
            obs = transition["next_obs"]

    def _reset(self) -> Any:
        with self.clock.of("env_reset"):
            return _observation(self.env.reset())

    def _store(self, buffer: Buffer, transition: dict[str, Any]) -> None:
        with self.clock.of("buffer_store"):
            self.strategy.store_transition(buffer, **transition)

    def _step(self, obs: Any, output: Any) -> dict[str, Any]:
        """The transition from ``obs`` by the policy's ``output``."""
        action, extras = _action_and_extras(output)
        act = action if isinstance(action, str) else np.asarray(action).tolist()
        cut_off = bool(extras.get("truncated", False))  # by the policy's own max_tokens
        with self.clock.of("env_step"):
            result = checked_step(self.env, act, **self._facts(cut_off))
        told = {key: result["info"][key] for key in ("is_correct", "group") if key in result["info"]}
        return {
            **told,
            **extras,
            "obs": obs,
            "act": act,
            "rew": float(result["reward"]),
            "next_obs": result["observation"],
            "done": bool(result["terminated"]),
            "timeout": bool(result["truncated"]) or cut_off,
        }

    def _facts(self, cut_off: bool) -> dict[str, bool]:
        """What an environment of several turns is told of an action: nobody answers a turn that was cut off."""
        several = isinstance(self.env, TextGenerationEnv) and not self.env.single_turn
        return {"truncated": True} if cut_off and several else {}


def _consistent(transitions: list[dict[str, Any]]) -> list[dict[str, Any]]:
    """An episode that says at its end whether it succeeded had not succeeded in the steps before."""
    known = "is_correct" in transitions[-1]
    return [{"is_correct": False, **t} for t in transitions] if known else transitions


def _action_and_extras(output: Any) -> tuple[Any, Mapping[str, Any]]:
    match output:
        case (action, Mapping() as extras):
            return action, extras
        case _:
            raise TypeError(f"a policy returned {output!r}; return a pair, the action and a dict of extras")


def _observation(start: Any) -> Any:
    """The observation that ``reset`` returned, alone or with an info dict."""
    match start:
        case (obs, dict()):
            return obs
        case _:
            return start
