"""``Scorer``: several rewards, over many completions at a time, with a time limit and a policy for failure.

reward = sum of weight * score over the rewards that apply
"""

from __future__ import annotations

import asyncio
import logging
import math
from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import replace
from functools import partial
from typing import Any, Self, get_args

from .._system.processes import cloudpickle
from ..errors import RewardError, UserError, unknown_name
from .background import in_thread, in_time, wait_for
from .calls import Call, Outcome, Part, calls_of
from .contract import Fitted, OnFailure, Request, RewardFunction, Scored, parameter_names
from .registry import RewardConfig, configured, verifiers
from .workers import Workers

Reward = RewardFunction | RewardConfig | str  # a str is the name of a registered one

logger = logging.getLogger(__name__)


class Scorer:
    """A weighted sum of rewards; itself a reward function, so an environment takes one as its ``reward_fn``."""

    def __init__(
        self,
        rewards: Reward | Sequence[Reward],
        *,
        time_limit: float | None = None,
        concurrency: int = 1,
        on_failure: OnFailure = "raise",
        processes: bool = False,
        correct_from: float | None = None,
    ) -> None:
        """Functions and names have weight 1 and no verifiers; a ``RewardConfig`` says more of a registered reward.

        ``time_limit`` is in seconds for each call (of a batched function a call scores a whole batch), and
        ``concurrency`` calls run at once. With either, functions that are not async run in threads, which
        nothing can stop: a late one is no longer waited for, but goes on. With ``processes`` they run in
        ``concurrency`` worker processes, which are killed when late and replaced when they die; keywords
        such as tokenizer then reach only functions that name them.

        A call fails when it raises, is late, or returns no finite number. ``on_failure="raise"`` makes that
        a RewardError; with "unscorable" a warning is logged and the completion's reward is NaN, from which
        nothing is learnt. Where no reward says what is correct, a sum of ``correct_from`` or more is. Raises UserError
        for settings that cannot work, MissingDependencyError without cloudpickle.
        """
        listed = [rewards] if callable(rewards) or isinstance(rewards, RewardConfig | str) else list(rewards)
        _refuse_unusable(listed, time_limit, concurrency, on_failure)
        if processes:
            cloudpickle()  # now rather than at the first call
        self.parts = _named_apart([_part(r) for r in listed])
        self.time_limit, self.concurrency, self.on_failure = time_limit, concurrency, on_failure
        self.processes, self.correct_from = processes, correct_from
        self._workers: Workers | None = None

    @classmethod
    def of(cls, rewards: Any) -> Self:
        """``rewards`` itself when it is a Scorer, else a Scorer of it."""
        return rewards if isinstance(rewards, cls) else cls(rewards)

    def __call__(
        self, prompt: str, completion: str, example: Mapping[str, Any], truncated: bool = False, **shared: Any
    ) -> Scored:
        """Score one completion."""
        return self.score([Request(prompt, completion, example, truncated)], **shared)[0]

    def score(self, requests: Sequence[Request], **shared: Any) -> list[Scored]:
        """Score many completions, in order; ``shared`` are keywords the same for all, such as tokenizer.

        A reward that returns None does not apply to a completion: the others are summed. NaN from one that
        has a weight, or nothing that applies, makes the sum NaN. ``is_correct`` is True when no reward that
        says it says otherwise. ``scores`` holds each reward's own number when there are several.
        Raises RewardError.
        """
        calls = [call for part in self.parts for call in calls_of(part, requests, shared)]
        outcomes = iter([outcome for answered in self._run(calls) for outcome in answered])
        columns = [[next(outcomes) for _ in requests] for _ in self.parts]
        return [self._sum(row) for row in zip(*columns, strict=True)]

    def close(self) -> None:
        """End the worker processes, if any run; the next call starts others."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def worker_pids(self) -> list[int]:
        """The ids of the worker processes that run now."""
        return [] if self._workers is None else self._workers.pids()

    # ---- private

    def _sum(self, outcomes: Sequence[Outcome]) -> Scored:
        scored = [(part, o) for part, o in zip(self.parts, outcomes, strict=True) if o is not None]
        verdicts = [o.is_correct for _, o in scored if o.is_correct is not None]
        terms = [part.weight * o.reward for part, o in scored if part.weight]
        reward = math.fsum(terms) if terms else math.nan
        return Scored(
            reward,
            all(verdicts) if verdicts else self._verdict(reward),
            {part.name: o.reward for part, o in scored} if len(self.parts) > 1 else _own_scores(outcomes[0]),
        )

    def _verdict(self, reward: float) -> bool | None:
        return None if self.correct_from is None or math.isnan(reward) else reward >= self.correct_from

    def _run(self, calls: Sequence[Call]) -> list[list[Outcome]]:
        apart = self.time_limit is not None or self.concurrency > 1 or self.processes
        if not apart and not any(part.fn.is_async for part in self.parts):
            return [self._here(call) for call in calls]
        if self.processes and self._workers is None:
            self._workers = Workers([part.fn.fn for part in self.parts], self.concurrency)
        try:
            return wait_for(self._there(calls))
        except BaseException:
            self.close()  # what its processes still compute nobody waits for
            raise

    def _here(self, call: Call) -> list[Outcome]:
        try:
            return call.here()
        except RewardError as error:
            return self._failed(call, error)

    async def _there(self, calls: Sequence[Call]) -> list[list[Outcome]]:
        gate = asyncio.Semaphore(self.concurrency)

        async def one(call: Call) -> list[Outcome]:
            async with gate:
                try:
                    return await call.there(self._invoke)
                except RewardError as error:
                    return self._failed(call, error)

        tasks = [asyncio.create_task(one(call)) for call in calls]
        try:
            return [await task for task in tasks]
        finally:
            await _dropped(tasks)

    async def _invoke(self, call: Call, arguments: Mapping[str, Any]) -> Any:
        fn = call.part.fn
        if fn.is_async:
            return await in_time(fn.fn(**arguments), self.time_limit)
        if self._workers is None:
            return await in_time(in_thread(partial(fn.fn, **arguments)), self.time_limit)
        own = parameter_names(fn.fn)
        sent = {k: v for k, v in arguments.items() if k not in call.shared or k in own}
        return await in_thread(partial(self._workers.call, self.parts.index(call.part), sent, self.time_limit))

    def _failed(self, call: Call, error: RewardError) -> list[Outcome]:
        if self.on_failure == "raise":
            raise error
        logger.warning("counted as unscorable: %s", error)
        return [Scored(math.nan) for _ in call.requests]


def _own_scores(outcome: Outcome) -> Mapping[str, float]:
    """Those of a reward that is itself a sum."""
    return {} if outcome is None else outcome.scores


async def _dropped(tasks: Sequence[asyncio.Task[Any]]) -> None:
    """End the ``tasks`` that still run; what they raise is of no interest any more."""
    for task in tasks:
        task.cancel()
    await asyncio.gather(*tasks, return_exceptions=True)


# ---- what is scored by


def _part(reward: Reward) -> Part:
    match reward:
        case str(name):
            return Part(name, configured(RewardConfig(name)))
        case RewardConfig():
            checks = verifiers(reward.verifiers)
            return Part(reward.name, configured(reward), reward.weight, checks, reward.verifier_penalty)
        case _:
            fitted = reward if isinstance(reward, Fitted) else Fitted.of(reward)
            return Part(fitted.__name__, fitted)


def _named_apart(parts: Sequence[Part]) -> tuple[Part, ...]:
    """The parts with names that differ: the second of a name gets a 2."""
    seen: Counter[str] = Counter()
    apart = []
    for part in parts:
        seen[part.name] += 1
        again = seen[part.name] > 1
        apart.append(replace(part, name=f"{part.name}_{seen[part.name]}") if again else part)
    return tuple(apart)


def _refuse_unusable(rewards: Sequence[Any], time_limit: float | None, concurrency: int, on_failure: str) -> None:
    if not rewards:
        raise UserError("a Scorer has no rewards; give it at least one")
    if time_limit is not None and not time_limit > 0:
        raise UserError(f"time_limit is {time_limit} s; give a positive number of seconds, or None for no limit")
    if concurrency < 1:
        raise UserError(f"concurrency is {concurrency}; set it to 1 or more")
    if on_failure not in get_args(OnFailure):
        raise unknown_name("on_failure", on_failure, get_args(OnFailure))


# ---- the registries


# ---- one call


def call_reward(fn: RewardFunction, prompt: str, completion: str, example: Mapping[str, Any], **shared: Any) -> Scored:
    """Score one completion; ``shared`` keywords reach ``fn`` as far as its signature takes them.

    A reward of None or NaN says that the completion could not be scored. Raises RewardError when ``fn``
    raises or returns something that is not a finite number, None, ``{"reward": x[, "is_correct": b]}``
    or ``(reward, is_correct)``.
    """
    return Scorer.of(fn)(prompt, completion, example, **shared)
