"""Score many completions at a time with several rewards, a time limit and a policy for failures.

reward = sum of weight * score over the rewards that apply
"""

from __future__ import annotations

import asyncio
import logging
import math
import reprlib
from collections import Counter
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass, replace
from functools import partial
from typing import Any, Self, get_args

from .._system.extras import extra
from ..errors import RewardError, RewardResultError, UserError, unknown_name
from .background import in_thread, in_time, wait_for
from .contract import BoundReward, OnFailure, Request, RewardFunction, Scored, read_result
from .registry import RewardConfig, configured, verifiers
from .workers import CLOUDPICKLE, Raised, TooSlowError, WorkerDiedError, WorkerRaisedError, Workers

Reward = RewardFunction | RewardConfig | str  # a str is the name of a registered one
Outcome = Scored | None  # None: the reward does not apply

logger = logging.getLogger(__name__)
_excerpt = reprlib.Repr()
_excerpt.maxstring = 80
_excerpt.maxother = 80


# ---- one call of a reward function


@dataclass(frozen=True, slots=True)
class WeightedReward:
    """The reward as one term of the sum."""

    name: str
    fn: BoundReward
    weight: float = 1.0
    checks: tuple[BoundReward, ...] = ()  # verifiers, all of which must accept a completion
    penalty: float = 0.0  # the score where one does not

    @classmethod
    def of(cls, reward: Reward) -> Self:
        """Return ``reward`` bound to its signature. Raises UserError for an unknown name or an unusable function."""
        if isinstance(reward, str):
            return cls(reward, configured(RewardConfig(reward)))
        if isinstance(reward, RewardConfig):
            checks = verifiers(reward.verifiers)
            return cls(reward.name, configured(reward), reward.weight, checks, reward.verifier_penalty)
        bound = reward if isinstance(reward, BoundReward) else BoundReward.of(reward)
        return cls(bound.__name__, bound)


@dataclass(frozen=True, slots=True)
class Call:
    """The call of a reward function that scores one completion, or many for a batched function."""

    reward: WeightedReward
    requests: tuple[Request, ...]
    shared: Mapping[str, Any]  # keywords that are the same for every completion

    def call(self) -> list[Outcome]:
        """Call the function in this thread. Raises RewardError."""
        accepted, arguments = self._arguments()
        with self._reward_errors():
            result = self.reward.fn.fn(**arguments) if any(accepted) else []
        return self._outcomes(result, accepted)

    async def call_async(self, invoke: Callable[[Call, Mapping[str, Any]], Awaitable[Any]]) -> list[Outcome]:
        """Let ``invoke`` call the function with its arguments. Raises RewardError."""
        accepted, arguments = self._arguments()
        with self._reward_errors():
            result = await invoke(self, arguments) if any(accepted) else []
        return self._outcomes(result, accepted)

    def _arguments(self) -> tuple[list[bool], dict[str, Any]]:
        """Return which completions the verifiers accept, and the keywords of the call that scores those."""
        accepted = [True] * len(self.requests)
        for i, request in enumerate(self.requests):
            for check in self.reward.checks:
                with self._reward_errors(f"verifier {check.__name__!r} of reward {self.reward.name!r}"):
                    accepted[i] = bool(check(**_keywords(request), **self.shared))
                if not accepted[i]:
                    break
        scored = [r for r, ok in zip(self.requests, accepted, strict=True) if ok]
        if not scored:
            return accepted, {}
        given = _keywords(scored[0])
        if self.reward.fn.batched:
            extra = {key: [r.extra.get(key) for r in scored] for key in {k: None for r in scored for k in r.extra}}
            given = {
                "prompts": [r.prompt for r in scored],
                "completions": [r.completion for r in scored],
                "examples": [r.example for r in scored],
                "truncated": [r.truncated for r in scored],
                **extra,
            }
        chosen = self.reward.fn.select({**given, **self.shared})
        if lacking := self.reward.fn.required - chosen.keys():
            raise RewardError(
                f"reward {self.reward.name!r} takes {', '.join(sorted(lacking))}, which no completion comes with; read "
                "what it needs from the example, as fn(prompt, completion, example, **kwargs), or give it a default"
            )
        return accepted, chosen

    def _outcomes(self, result: Any, accepted: Sequence[bool]) -> list[Outcome]:
        """Read the ``result`` for each completion; those not accepted get the penalty. Raises RewardError."""
        try:
            results = list(result) if self.reward.fn.batched else [result]
        except TypeError:
            results = []
        if self.reward.fn.batched and len(results) != sum(accepted):
            returned = f"returned {_excerpt.repr(result)}, which is not {sum(accepted)} results"
            raise RewardResultError(
                f"reward {self.reward.name!r} {returned} {self._where()}; fix it to return one for each"
            )
        values, outcomes = iter(results), []
        for ok in accepted:
            value = next(values) if ok else Scored(self.reward.penalty)
            try:
                outcomes.append(read_result(value))
            except (TypeError, ValueError, OverflowError) as error:
                returned = f"returned {_excerpt.repr(value)}, which is no reward ({error}),"
                raise RewardResultError(
                    f"reward {self.reward.name!r} {returned} {self._where()}; fix it to return a number"
                ) from error
        return outcomes

    @contextmanager
    def _reward_errors(self, who: str = "") -> Iterator[None]:
        """Turn any exception into a RewardError that names ``who`` raised it, and shows the completion."""
        who = who or f"reward {self.reward.name!r}"
        try:
            yield
        except RewardError:
            raise
        except TooSlowError as error:
            raise RewardError(f"{who} was too slow {self._where()}; raise time_limit, or make it faster") from error
        except WorkerDiedError as error:
            raise RewardError(f"{who} ended its worker process, twice, {self._where()}; see what kills it") from error
        except Exception as error:  # a user's function may raise anything; none of it is swallowed
            local = Raised.of(error)
            raised = error.raised if isinstance(error, WorkerRaisedError) else local
            if raised.refused:
                raise RewardError(f"{raised.text} ({who} {self._where()})") from error
            raise RewardError(
                f"{who} raised {raised.kind} ({_excerpt.repr(raised.text)}) {self._where()}; fix it to return a number"
            ) from error

    def _where(self) -> str:
        """Return the prompt and completion of the call, shortened; of many the first."""
        first, many = self.requests[0], len(self.requests) > 1
        which = f"for {len(self.requests)} completions, the first" if many else "for"
        prompt, completion = map(_excerpt.repr, (first.prompt, first.completion))
        return f"{which} prompt {prompt} and completion {completion}"


def _keywords(request: Request) -> dict[str, Any]:
    return {
        "prompt": request.prompt,
        "completion": request.completion,
        "example": request.example,
        "truncated": request.truncated,
        **request.extra,
    }


# ---- all calls of several rewards


class Scorer:
    """The weighted sum of rewards; itself a reward function, so an environment takes one as its ``reward_fn``."""

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
        """Take functions and registered names, with weight 1 and no verifiers, or ``RewardConfig``s, which set both.

        ``time_limit`` is in seconds for each call (one call of a batched function scores a whole batch), and
        ``concurrency`` calls run at once. With either, functions that are not async run in threads, which
        cannot be stopped: a late one keeps running, and its result is dropped. With ``processes`` they run in
        ``concurrency`` worker processes, which are killed when late and replaced when they die; keywords
        such as tokenizer then reach only functions that name them.

        A call fails when it raises, is late, or returns no finite number. ``on_failure="raise"`` makes that
        a RewardError; with "unscorable" a warning is logged and the completion's reward is NaN, so it is not
        trained on. Where no reward returns ``is_correct``, a sum of ``correct_from`` or more counts as correct.
        Raises UserError for settings that cannot work, MissingDependencyError without cloudpickle.
        """
        listed = [rewards] if callable(rewards) or isinstance(rewards, RewardConfig | str) else list(rewards)
        if not listed:
            raise UserError("a Scorer has no rewards; give it at least one")
        if time_limit is not None and not time_limit > 0:
            raise UserError(f"time_limit is {time_limit} s; give a positive number of seconds, or None for no limit")
        if concurrency < 1:
            raise UserError(f"concurrency is {concurrency}; set it to 1 or more")
        if on_failure not in get_args(OnFailure):
            raise unknown_name("on_failure", on_failure, get_args(OnFailure))
        if processes:
            extra(*CLOUDPICKLE)  # fail now rather than at the first call
        seen: Counter[str] = Counter()
        self.rewards: list[WeightedReward] = []
        for reward in map(WeightedReward.of, listed):
            seen[reward.name] += 1  # the second of a name gets a 2
            again = seen[reward.name] > 1
            self.rewards.append(replace(reward, name=f"{reward.name}_{seen[reward.name]}") if again else reward)
        self.time_limit, self.concurrency, self.on_failure = time_limit, concurrency, on_failure
        self.processes, self.correct_from = processes, correct_from
        self._workers: Workers | None = None

    @classmethod
    def of(cls, rewards: Any) -> Self:
        """Return ``rewards`` itself when it is a Scorer, else a Scorer of it."""
        return rewards if isinstance(rewards, cls) else cls(rewards)

    def __call__(
        self, prompt: str, completion: str, example: Mapping[str, Any], truncated: bool = False, **shared: Any
    ) -> Scored:
        """Score one completion."""
        return self.score([Request(prompt, completion, example, truncated)], **shared)[0]

    def score(self, requests: Sequence[Request], **shared: Any) -> list[Scored]:
        """Score many completions, in order; ``shared`` are keywords the same for all, such as tokenizer.

        A reward that returns None does not apply to a completion: the others are summed. The sum is NaN when
        a reward with a weight returns NaN, or none applies. ``is_correct`` is True when every reward that
        returns it says so. ``scores`` holds each reward's own number when there are several.
        Raises RewardError.
        """
        calls = []
        for reward in self.rewards:
            batches = [tuple(requests)] if reward.fn.batched and requests else [(request,) for request in requests]
            calls += [Call(reward, batch, shared) for batch in batches]
        outcomes = iter([outcome for found in self._run(calls) for outcome in found])
        columns = [[next(outcomes) for _ in requests] for _ in self.rewards]
        found = []
        for row in zip(*columns, strict=True):
            applied = [(reward, o) for reward, o in zip(self.rewards, row, strict=True) if o is not None]
            terms = [reward.weight * o.reward for reward, o in applied if reward.weight]
            total = math.fsum(terms) if terms else math.nan
            verdicts = [o.is_correct for _, o in applied if o.is_correct is not None]
            is_correct = all(verdicts) if verdicts else None
            if not verdicts and self.correct_from is not None and not math.isnan(total):
                is_correct = total >= self.correct_from
            scores: Mapping[str, float] = {reward.name: o.reward for reward, o in applied}
            weights: Mapping[str, float] = {reward.name: reward.weight for reward, _ in applied}
            if len(self.rewards) == 1:  # which may be a sum itself
                scores, weights = (applied[0][1].scores, applied[0][1].weights) if applied else ({}, {})
            found.append(Scored(total, is_correct, scores, weights))
        return found

    def refuse(self, examples: Sequence[Mapping[str, Any]]) -> None:
        """Raise UserError if a built-in reward cannot judge by one of ``examples``, and failures are raised."""
        for reward in self.rewards if self.on_failure == "raise" else ():
            if isinstance(reward.fn.fn, Scorer):
                reward.fn.fn.refuse(examples)
            for i, example in enumerate(examples if reward.fn.judges else ()):
                try:
                    reward.fn(prompt="", completion="", example=example)
                except UserError as error:
                    raise UserError(
                        f"reward {reward.name!r} cannot judge by the example of prompt {i}: {error}"
                    ) from error

    def close(self) -> None:
        """End the worker processes, if any run; the next call starts others."""
        if self._workers is not None:
            self._workers.close()
            self._workers = None

    def worker_pids(self) -> list[int]:
        """Return the ids of the worker processes that run now."""
        return [] if self._workers is None else self._workers.pids()

    def _run(self, calls: Sequence[Call]) -> list[list[Outcome]]:
        """Return the outcomes of each call, made in this thread or, as the settings require, on the event loop."""
        apart = self.time_limit is not None or self.concurrency > 1 or self.processes
        if not apart and not any(reward.fn.is_async for reward in self.rewards):
            found = []
            for call in calls:
                try:
                    found.append(call.call())
                except RewardError as error:
                    found.append(self._failed(call, error))
            return found
        if self.processes and self._workers is None:
            self._workers = Workers([reward.fn.fn for reward in self.rewards], self.concurrency)
        try:
            return wait_for(self._run_async(calls))
        except BaseException:
            self.close()  # its processes may still compute what is no longer needed
            raise

    async def _run_async(self, calls: Sequence[Call]) -> list[list[Outcome]]:
        gate = asyncio.Semaphore(self.concurrency)

        async def gated(call: Call) -> list[Outcome]:
            async with gate:
                try:
                    return await call.call_async(self._invoke)
                except RewardError as error:
                    return self._failed(call, error)

        tasks = [asyncio.create_task(gated(call)) for call in calls]
        try:
            return [await task for task in tasks]
        finally:
            for task in tasks:
                task.cancel()
            await asyncio.gather(*tasks, return_exceptions=True)  # after a failure the others' errors are dropped

    async def _invoke(self, call: Call, arguments: Mapping[str, Any]) -> Any:
        """Return what the function of ``call`` returns: awaited, in a thread, or in a worker process."""
        fn = call.reward.fn
        if fn.is_async:
            return await in_time(fn.fn(**arguments), self.time_limit)
        if self._workers is None:
            return await in_time(in_thread(partial(fn.fn, **arguments)), self.time_limit)
        sent = {k: v for k, v in arguments.items() if k not in call.shared or k in fn.parameters}
        return await in_thread(partial(self._workers.call, self.rewards.index(call.reward), sent, self.time_limit))

    def _failed(self, call: Call, error: RewardError) -> list[Outcome]:
        """Raise ``error``, or log it and return NaN for each completion."""
        if self.on_failure == "raise":
            raise error
        logger.warning("counted as unscorable: %s", error)
        return [Scored(math.nan) for _ in call.requests]


def call_reward(fn: RewardFunction, prompt: str, completion: str, example: Mapping[str, Any], **shared: Any) -> Scored:
    """Score one completion; ``shared`` keywords are passed on as far as the signature of ``fn`` takes them.

    A reward of None or NaN marks a completion that could not be scored. Raises RewardError when ``fn``
    raises or returns something that is not a finite number, None, ``{"reward": x[, "is_correct": b]}``
    or ``(reward, is_correct)``.
    """
    return Scorer.of(fn)(prompt, completion, example, **shared)
