"""One call of a reward function: its arguments, what it answered, and errors that show prompt and completion."""

from __future__ import annotations

import reprlib
from collections.abc import Awaitable, Callable, Iterator, Mapping, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

from ..errors import RewardError, RewardResultError
from .contract import Fitted, Request, Scored, read_result
from .workers import TooSlowError, WorkerDiedError, WorkerRaisedError

Outcome = Scored | None  # None: the reward does not apply
_excerpt = reprlib.Repr()
_excerpt.maxstring = 80
_excerpt.maxother = 80


@dataclass(frozen=True, slots=True)
class Part:
    """One of the rewards that are summed."""

    name: str
    fn: Fitted
    weight: float = 1.0
    checks: tuple[Fitted, ...] = ()  # verifiers, all of which must agree
    penalty: float = 0.0  # what stands in for the reward where one does not


@dataclass(frozen=True, slots=True)
class Call:
    """A reward function and the completions that one call of it scores: one, or many for a batched function."""

    part: Part
    requests: tuple[Request, ...]
    shared: Mapping[str, Any]  # keywords that are the same for every completion

    def here(self) -> list[Outcome]:
        """Call the function in this thread. Raises RewardError."""
        accepted = self.accepted()
        with self.told():
            result = self.part.fn.fn(**self.arguments(accepted)) if any(accepted) else []
        return self.outcomes(result, accepted)

    async def there(self, invoke: Callable[[Call, Mapping[str, Any]], Awaitable[Any]]) -> list[Outcome]:
        """Let ``invoke`` call the function with the arguments it is given. Raises RewardError."""
        accepted = self.accepted()
        with self.told():
            result = await invoke(self, self.arguments(accepted)) if any(accepted) else []
        return self.outcomes(result, accepted)

    # ---- what goes in

    def accepted(self) -> list[bool]:
        """Which completions pass the verifiers, asked in order until one refuses."""
        return [all(self._passes(check, request) for check in self.part.checks) for request in self.requests]

    def _passes(self, check: Fitted, request: Request) -> bool:
        with self.told(f"verifier {check.__name__!r} of reward {self.part.name!r}"):
            return bool(check(**_of_one(request), **self.shared))

    def arguments(self, accepted: Sequence[bool]) -> dict[str, Any]:
        """The keywords of the call, as far as the function takes them."""
        asked = [r for r, ok in zip(self.requests, accepted, strict=True) if ok]
        own = _of_many(asked) if self.part.fn.batched else _of_one(asked[0])
        return self.part.fn.taken({**own, **self.shared})

    # ---- what comes out

    def outcomes(self, result: Any, accepted: Sequence[bool]) -> list[Outcome]:
        """The result of the call, read for each completion; the penalty for those not accepted. Raises RewardError."""
        results = iter(self._listed(result, sum(accepted)))
        return [self._read(next(results)) if ok else Scored(self.part.penalty) for ok in accepted]

    def _listed(self, result: Any, expected: int) -> Sequence[Any]:
        if not self.part.fn.batched:
            return [result]
        try:
            listed = list(result)
        except TypeError:
            listed = []
        if len(listed) != expected:
            returned = f"returned {_excerpt.repr(result)}, which is not {expected} results"
            raise RewardResultError(
                f"reward {self.part.name!r} {returned} {self.where}; mend it to return one for each"
            )
        return listed

    def _read(self, result: Any) -> Outcome:
        try:
            return read_result(result)
        except (TypeError, ValueError, OverflowError) as error:
            returned = f"returned {_excerpt.repr(result)}, which is not a finite number,"
            advice = "mend it to return a number"
            raise RewardResultError(f"reward {self.part.name!r} {returned} {self.where}; {advice}") from error

    # ---- what goes wrong

    @contextmanager
    def told(self, who: str = "") -> Iterator[None]:
        """Turn whatever is raised inside into a RewardError that names ``who`` raised it, and for what."""
        who = who or f"reward {self.part.name!r}"
        try:
            yield
        except RewardError:
            raise
        except TooSlowError as error:
            raise RewardError(f"{who} was too slow {self.where}; raise time_limit, or make it faster") from error
        except WorkerDiedError as error:
            raise RewardError(f"{who} ended its worker process, twice, {self.where}; see what kills it") from error
        except WorkerRaisedError as error:
            raise self._raised(who, error.raised.kind, error.raised.text) from error
        except Exception as error:  # a user's function may raise anything; none of it is swallowed
            raise self._raised(who, type(error).__name__, str(error)) from error

    def _raised(self, who: str, kind: str, text: str) -> RewardError:
        return RewardError(f"{who} raised {kind} ({_excerpt.repr(text)}) {self.where}; mend it to return a number")

    @property
    def where(self) -> str:
        """The prompt and completion at hand, shortened; of many the first."""
        first, many = self.requests[0], len(self.requests) > 1
        which = f"for {len(self.requests)} completions, the first" if many else "for"
        prompt, completion = map(_excerpt.repr, (first.prompt, first.completion))
        return f"{which} prompt {prompt} and completion {completion}"


def calls_of(part: Part, requests: Sequence[Request], shared: Mapping[str, Any]) -> list[Call]:
    """The calls that score ``requests``: one for each, or one for all of them."""
    if part.fn.batched:
        return [Call(part, tuple(requests), shared)] if requests else []
    return [Call(part, (request,), shared) for request in requests]


def _of_one(request: Request) -> dict[str, Any]:
    return {
        "prompt": request.prompt,
        "completion": request.completion,
        "example": request.example,
        "truncated": request.truncated,
        **request.extra,
    }


def _of_many(requests: Sequence[Request]) -> dict[str, Any]:
    return {
        "prompts": [r.prompt for r in requests],
        "completions": [r.completion for r in requests],
        "examples": [r.example for r in requests],
        "truncated": [r.truncated for r in requests],
        **{key: [r.extra.get(key) for r in requests] for key in {k: None for r in requests for k in r.extra}},
    }
