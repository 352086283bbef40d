"""What a run on a service costs: tokens counted as they are spent, prices, limits, and a quote before it begins."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path

import numpy as np

from ..engine import Engine, Sampling
from ..losses import Surrogate
from ..types import Batch, Completion

MILLION = 1_000_000
TEMPLATE_TOKENS = 30  # of a chat template, in a guess


@dataclass(frozen=True, slots=True)
class Tokens:
    """Tokens by what is done with them, which is how services bill."""

    prefill: int = 0  # of prompts, once for all completions of one, and of whole sequences that are only scored
    sampled: int = 0
    trained: int = 0  # prompt and completion of every sequence that is sent to be learned from

    @property
    def total(self) -> int:
        return self.prefill + self.sampled + self.trained

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.prefill + other.prefill, self.sampled + other.sampled, self.trained + other.trained)

    def times(self, n: int) -> Tokens:
        return Tokens(self.prefill * n, self.sampled * n, self.trained * n)

    def as_dict(self) -> dict[str, int]:
        return asdict(self)


@dataclass(frozen=True, slots=True)
class Prices:
    """In one currency, per million tokens."""

    prefill: float = 0.0
    sampled: float = 0.0
    trained: float = 0.0

    @property
    def known(self) -> bool:
        return (self.prefill, self.sampled, self.trained) != (0, 0, 0)

    def cost(self, tokens: Tokens) -> float:
        """prefill p_prefill + sampled p_sampled + trained p_trained, by the million."""
        spent = self.prefill * tokens.prefill + self.sampled * tokens.sampled + self.trained * tokens.trained
        return spent / MILLION


@dataclass(frozen=True, slots=True)
class Limits:
    """What a run may spend, all tokens together and in money; None is no limit."""

    tokens: int | None = None
    cost: float | None = None

    def reason_to_stop(self, spent: Tokens, next_at_most: Tokens, prices: Prices) -> str | None:
        """Why what comes next may not begin: with it the run could pass a limit. None where it may."""
        after = spent + next_at_most
        if self.tokens is not None and after.total > self.tokens:
            return (
                f"{spent.total:,} tokens are spent and what comes next may take {next_at_most.total:,}, "
                f"which could pass max_tokens_total ({self.tokens:,})"
            )
        if self.cost is not None and prices.cost(after) > self.cost:
            return (
                f"{prices.cost(spent):.2f} is spent and what comes next may cost {prices.cost(next_at_most):.2f}, "
                f"which could pass max_cost ({self.cost:g})"
            )
        return None


@dataclass(frozen=True, slots=True)
class Workload:
    """The size of a run, for bounds on what it spends."""

    steps: int
    prompts: int  # in a step
    group_size: int
    prompt_tokens: int  # of the longest prompt, or of a guess
    max_tokens: int  # of a completion
    problems: int = 0  # in a look at held-out problems
    looks: int = 0

    @property
    def step(self) -> Tokens:
        """The most that a step takes: every completion is as long as it may be, and all are learned from."""
        rows = self.prompts * self.group_size
        return Tokens(
            self.prompts * self.prompt_tokens, rows * self.max_tokens, rows * (self.prompt_tokens + self.max_tokens)
        )

    @property
    def look(self) -> Tokens:
        """The most that a look takes."""
        return Tokens(self.problems * self.prompt_tokens, self.problems * self.max_tokens)

    @property
    def run(self) -> Tokens:
        """The most that all of it takes."""
        return self.step.times(self.steps) + self.look.times(self.looks)


def quote(work: Workload, prices: Prices, length: int | None = None) -> list[str]:
    """Lines that price ``work``: at most, and with completions of ``length`` tokens if that is given."""
    lines = [
        f"{work.steps} steps of {work.prompts} prompts x {work.group_size} completions, "
        f"and {work.looks} looks at {work.problems} held-out problems",
        f"prompts of {work.prompt_tokens} tokens; a completion has at most {work.max_tokens}",
        priced("at most", work.run, prices),
    ]
    if length is not None:
        lines.append(priced(f"with {length} tokens each", replace(work, max_tokens=length).run, prices))
    if not prices.known:
        lines.append("no prices are given; say --price-prefill, --price-sample and --price-train, per million tokens")
    return lines


def priced(what: str, tokens: Tokens, prices: Prices) -> str:
    """``what`` takes so many ``tokens``, by kind, and their cost where prices are known."""
    parts = ", ".join(f"{n:,} {name}" for name, n in tokens.as_dict().items())
    cost = f": {prices.cost(tokens):,.2f}" if prices.known else ""
    return f"{what}: {tokens.total:,} tokens ({parts}){cost}"


def guessed_prompt_tokens(texts: Iterable[str]) -> int:
    """Of the longest prompt, by its characters: 3 for a token, and the chat template."""
    return max(map(len, texts)) // 3 + TEMPLATE_TOKENS


class Metered:
    """An engine that counts the tokens of every call, and leaves the rest to the engine it wraps."""

    def __init__(self, engine: Engine, spent: Tokens | None = None) -> None:
        """``spent`` is what the run has used before, when it goes on."""
        self.engine, self.spent, self.stop = engine, spent or Tokens(), engine.stop
        self.sequences = 0  # that were sent to be learned from

    def sample(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling) -> list[list[Completion]]:
        """Counts prompts as prefill and completions as sampled."""
        out = self.engine.sample(prompts, n, sampling)
        self.spent += Tokens(prefill=sum(map(len, prompts)), sampled=sum(len(c.tokens) for group in out for c in group))
        return out

    def score(self, batch: Batch, *, reference: bool = False) -> np.ndarray:
        """Counts the rows as prefill."""
        self.spent += Tokens(prefill=int(batch.lengths.sum()))
        return self.engine.score(batch, reference=reference)

    def update(self, batch: Batch, surrogate: Surrogate, learning_rate: float) -> Mapping[str, float]:
        """Counts as trained the rows that can change the loss, which are those that are sent."""
        rows = sent(batch, surrogate)
        self.sequences += int(rows.sum())
        self.spent += Tokens(trained=int(batch.lengths[rows].sum()))
        return self.engine.update(batch, surrogate, learning_rate)

    def save(self, path: Path) -> None:
        self.engine.save(path)


def sent(batch: Batch, surrogate: Surrogate) -> np.ndarray:
    """(B,) bool: the rows of ``batch`` with a token that can change the loss."""
    matters = (batch.weights != 0) & ((batch.advantages != 0) | (surrogate.kl is not None))
    return matters.any(axis=1)
