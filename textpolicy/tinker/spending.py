"""The cost of a run on a Tinker server: tokens counted as they are sent, limits, a ledger, and a quote beforehand."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Callable, Mapping, Sequence
from dataclasses import asdict, dataclass, replace
from pathlib import Path
from typing import Any

import numpy as np

from .._system.files import parse_json, to_disk
from .._system.terminal import counted
from ..algorithms import Algorithm
from ..config.settings import Config, TinkerSettings
from ..engine import ResumableEngine, Sampling
from ..environment.single_turn import TextGenerationEnv
from ..errors import ServiceError, UserError
from ..loop.collect import collect
from ..loop.metrics import Row
from ..loop.on_policy import measure
from ..losses import Surrogate
from ..tasks import Problem, Task
from ..types import Batch, Completion

LEDGER = "ledger.jsonl"  # tokens spent so far, as they are spent
TEMPLATE_TOKENS = 30  # of a chat template, in a guess
TRIAL_TOKENS = 16  # of the completion that a server is tried out with, at most
MAX_GAP = 1.0  # nats, mean, between sampler and learner: 0.1 is half precision, more a misalignment


@dataclass(frozen=True, slots=True)
class Tokens:
    """The numbers of tokens by what is done with them, which is how services bill."""

    prefill: int = 0  # of prompts, once for all completions of one, and of whole sequences that are only scored
    sampled: int = 0
    trained: int = 0  # prompt and completion of every sequence that is sent to be learned from

    @property
    def total(self) -> int:
        return self.prefill + self.sampled + self.trained

    def __add__(self, other: Tokens) -> Tokens:
        return Tokens(self.prefill + other.prefill, self.sampled + other.sampled, self.trained + other.trained)

    def __mul__(self, n: int) -> Tokens:
        return Tokens(self.prefill * n, self.sampled * n, self.trained * n)

    def cost(self, prices: TinkerSettings) -> float | None:
        """Return what they cost, in the currency of the ``prices`` per million tokens; None if no price is given."""
        p = prices.price_prefill, prices.price_sample, prices.price_train
        return (p[0] * self.prefill + p[1] * self.sampled + p[2] * self.trained) / 1e6 if any(p) else None


@dataclass(frozen=True, slots=True)
class RunWork:
    """The size of a run, which bounds what it spends."""

    config: Config
    recipe: Algorithm
    task: Task
    prompt_tokens: int  # of the longest prompt, or of a guess
    completion_tokens: int  # the most of an episode, after its prompt

    def sampled(self, prompts: int, n: int) -> Tokens:
        """Return the most that ``n`` completions of each prompt take: a prompt is read once, later turns by each."""
        later = prompts * n * (self.turns - 1) * (self.prompt_tokens + self.completion_tokens)
        return Tokens(prompts * self.prompt_tokens + later, prompts * n * self.completion_tokens)

    def step(self, number: int) -> Tokens:
        """Return the most that step ``number``, from 0, takes: every completion is of full length and learned from."""
        rollout, check, draws = self.config.rollout, self.config.on_policy, 1 + self.recipe.resample
        rows, whole = rollout.prompts_per_step * rollout.group_size, self.prompt_tokens + self.completion_tokens
        scored = rows * whole * (bool(self.recipe.reward_kl) + (self.recipe.distillation is not None))
        if check.every and number % check.every == 0:
            scored += 2 * min(check.completions, rows * draws) * whole
        drawn = self.sampled(rollout.prompts_per_step, rollout.group_size) * draws
        return drawn + Tokens(prefill=scored, trained=rows * whole)

    def evaluation(self, split: str) -> Tokens:
        """Return the most that an evaluation of "validation" or "test" takes."""
        problems = len(self.problems(split))
        if split == "test" or not self.config.evaluation.samples:
            return self.sampled(problems, 1)
        return self.sampled(problems, 1) + self.sampled(problems, self.config.evaluation.samples)

    def problems(self, split: str) -> Sequence[Problem]:
        """Return the problems of "validation" or "test" that are evaluated."""
        problems = self.task.test if split == "test" else self.task.validation
        return problems[: self.config.evaluation.problems or None]

    @property
    def turns(self) -> int:
        """The turns of an episode, each of which reads everything before it."""
        return self.config.rollout.max_turns if self.task.tools else 1

    @property
    def trial(self) -> Tokens:
        """The most that ``Budget.try_out`` takes."""
        few = min(TRIAL_TOKENS, self.completion_tokens)
        return Tokens(2 * self.prompt_tokens * self.turns + few, few)

    @property
    def opening(self) -> Tokens:
        """The most that is spent before the first step."""
        return self.trial + self.closing

    @property
    def closing(self) -> Tokens:
        """The most that is spent after the last step, which may be any."""
        return self.evaluation("validation") + self.evaluation("test")

    @property
    def run(self) -> Tokens:
        """The most that the whole run takes."""
        steps, every = self.config.steps, self.config.evaluation.every
        spent = self.opening + self.evaluation("validation") * ((steps - 1) // every) + self.closing
        for number in range(steps):
            spent += self.step(number)
        return spent


class MeteredRun:
    """Count the tokens of every call of an engine; what is kept on the server costs none."""

    def __init__(self, engine: ResumableEngine) -> None:
        self.engine, self.spent, self.stop = engine, Tokens(), engine.stop
        self.sequences = 0  # that were sent to be learned from

    def __getattr__(self, name: str) -> Any:
        """Return everything else from the engine itself."""
        return getattr(self.engine, name)

    def sample(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling) -> list[list[Completion]]:
        """Sample, and count prompts as prefill and completions as sampled."""
        out = self.engine.sample(prompts, n, sampling)
        self.spent += Tokens(prefill=sum(map(len, prompts)), sampled=sum(len(c.tokens) for group in out for c in group))
        return out

    def score(self, batch: Batch, *, reference: bool = False) -> np.ndarray:
        """Score, and count the rows as prefill."""
        self.spent += Tokens(prefill=int(batch.lengths.sum()))
        return self.engine.score(batch, reference=reference)

    def update(self, batch: Batch, surrogate: Surrogate, learning_rate: float) -> Mapping[str, float]:
        """Update, and count as trained the rows that can change the loss, which are those that are sent."""
        rows = ((batch.weights != 0) & ((batch.advantages != 0) | (surrogate.kl is not None))).any(axis=1)
        self.sequences += int(rows.sum())
        self.spent += Tokens(trained=int(batch.lengths[rows].sum()))
        return self.engine.update(batch, surrogate, learning_rate)


class Budget:
    """The tokens that a run has spent and may spend; every entry goes to ledger.jsonl at once, so a resume knows it."""

    def __init__(self, engine: MeteredRun, work: RunWork, *, reserve: bool = True) -> None:
        """Keep a budget; with ``reserve`` a step begins only if there is room for the evaluations after it, too."""
        self.engine, self.work, self.settings = engine, work, work.config.tinker
        self.closing = work.closing if reserve else Tokens()
        self.opening = work.opening if reserve else work.trial
        self.ledger: Path | None = None

    def open(self, folder: Path) -> None:
        """Record in ``folder`` from now on, and count what the run there has spent before."""
        self.ledger = folder / LEDGER
        cut(self.ledger)
        entries = [Tokens(**line["spent"]) for line in read_lines(self.ledger)]
        self.engine.spent += max(entries, key=lambda tokens: tokens.total, default=Tokens())

    def allow(self, done: int | None = None) -> None:
        """Raise UserError if the limits leave no room for step ``done`` and what follows; None: for the beginning."""
        if done is not None and done >= self.work.config.steps:
            return
        first = self.opening + self.work.step(0) if done is None else self.work.trial + self.work.step(done)
        if reason := self.reason_against(first + self.closing):
            raise UserError(f"{reason}; raise it, or make the run smaller")

    def try_out(self, env: TextGenerationEnv) -> None:
        """Sample a few tokens and score them: the server works, and its learner sees what was sampled.

        Raises UserError, ServiceError.
        """
        sampling = Sampling(min(TRIAL_TOKENS, env.max_tokens), self.work.config.rollout.temperature)
        gap = measure(self.engine, collect(self.engine, env, [0], 1, sampling, pieces=False))
        if not gap.mean <= MAX_GAP:
            raise ServiceError(
                f"the server's learner and sampler differ by {gap.mean:.3g} nats on average over {gap.tokens} tokens: "
                "no run on it would be on-policy; check that both serve the same weights"
            )

    def enter(self, step: int) -> None:
        """Record what is spent after so many steps."""
        assert self.ledger is not None
        append_line(self.ledger, {"step": step, "spent": asdict(self.engine.spent)})

    def sampled(self, step: int, record: Callable[[], None]) -> None:
        """Call ``record``, and record what is spent, before an update that may fail."""
        record()
        self.enter(step)

    def reason_to_end(self, done: int) -> str | None:
        """Return why step ``done`` must not begin: with it a limit could be passed. None if it may."""
        return self.reason_against(self.work.step(done) + self.closing)

    def reason_to_skip(self, split: str) -> str | None:
        """Return why the problems of ``split`` must not be evaluated now. None if they may."""
        return self.reason_against(self.work.evaluation(split))

    def reason_against(self, coming: Tokens) -> str | None:
        """Return why ``coming`` must not be spent: with it the run could pass a limit. None if it may."""
        spent, after, settings = self.engine.spent, self.engine.spent + coming, self.settings
        if settings.max_tokens_total is not None and after.total > settings.max_tokens_total:
            return (
                f"{spent.total:,} tokens are spent and the next part may take {coming.total:,}, "
                f"which could pass max_tokens_total ({settings.max_tokens_total:,})"
            )
        if settings.max_cost is not None and (after.cost(settings) or 0) > settings.max_cost:
            return (
                f"{spent.cost(settings):.2f} is spent and the next part may cost {coming.cost(settings):.2f}, "
                f"which could pass max_cost ({settings.max_cost:g})"
            )
        return None

    @property
    def lines(self) -> tuple[tuple[str, str], ...]:
        """The line of the closing table."""
        cost = self.engine.spent.cost(self.settings)
        end = "" if cost is None else f", cost {cost:,.2f}"
        return (("spent", f"{self.engine.spent.total:,} tokens on the server{end}"),)

    @property
    def row(self) -> Row:
        """The metrics of a step."""
        cost = self.engine.spent.cost(self.settings)
        return {"tokens_spent": float(self.engine.spent.total), **({} if cost is None else {"cost": cost})}


def budget(
    config: Config, recipe: Algorithm, task: Task, engine: MeteredRun, splits: Mapping[str, TextGenerationEnv]
) -> Budget:
    """Return the budget of a run whose prompts are tokenised."""
    longest = max(len(env.prompt_ids(i)) for env in splits.values() for i in range(len(env)))
    return Budget(engine, RunWork(config, recipe, task, longest, splits["train"].episode_tokens))


def quote_run(
    config: Config, recipe: Algorithm, task: Task, length: int | None = None, flags: str = "--tinker."
) -> Sequence[str]:
    """Return what the run may cost, line by line, without a server; ``length`` adds completions of that length.

    ``flags`` begins the names of the flags that set prices.
    """
    problems, rollout = [*task.train, *task.validation, *task.test], config.rollout
    texts = ["\n".join(str(m["content"]) for m in task.prompt(p.question)) for p in problems]
    longest, most = max(map(len, texts)) // 3 + TEMPLATE_TOKENS, rollout.max_tokens
    if task.tools:
        most = rollout.max_episode_tokens or rollout.max_turns * rollout.max_tokens
    work = RunWork(config, recipe, task, longest, most)
    lines = [
        f"{task.name}: {counted(config.steps, 'step')} of {rollout.prompts_per_step} prompts x "
        f"{rollout.group_size} completions, "
        f"{len(work.problems('validation'))} validation and {len(work.problems('test'))} test problems",
        f"prompts of {longest} tokens; an episode has at most {most} more",
    ]
    sizes = [("at most", work)]
    if length is not None:
        sizes.append((f"with {length} tokens each", replace(work, completion_tokens=length)))
    for what, size in sizes:
        tokens = size.run
        parts = ", ".join(f"{n:,} {name}" for name, n in asdict(tokens).items())
        cost = tokens.cost(config.tinker)
        lines.append(f"{what}: {tokens.total:,} tokens ({parts}){'' if cost is None else f': {cost:,.2f}'}")
    if cost is None:
        lines.append(
            f"no prices are given; pass {flags}price-prefill, {flags}price-sample and {flags}price-train, per "
            "million tokens"
        )
    return [*lines, "prompt tokens are a guess, 3 characters each and the chat template; no server was contacted"]


# ---- files of JSON lines, which a crash may cut off and a resume cuts back


def read_lines(path: Path) -> list[dict[str, Any]]:
    """Return the lines of a file, none if it is missing; an unfinished last line is left out.

    Raises UserError for a line that is not a JSON object.
    """
    found = []
    lines = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
    for number, line in enumerate(lines, 1):
        try:
            found.append(dict(parse_json(line)))
        except (ValueError, TypeError) as error:
            raise UserError(f"line {number} of {path} is not a JSON object; restore it, or remove the line") from error
    return found


def append_line(path: Path, line: Mapping[str, Any]) -> None:
    """Append a line, which is on the disk when this returns."""
    with path.open("a", encoding="utf-8") as file:
        file.write(json.dumps(line) + "\n")
        file.flush()
        to_disk(file.fileno())


def cut(path: Path, step: float = math.inf) -> None:
    """Move the lines of ``step`` and later to a ``.cut.jsonl`` file, and drop an unfinished last line."""
    if not path.exists():
        return
    lines = read_lines(path)
    late = [line for line in lines if line["step"] >= step]
    if late:
        with path.with_suffix(".cut.jsonl").open("a", encoding="utf-8") as file:
            file.writelines(json.dumps(line) + "\n" for line in late)
    new = path.with_suffix(".new")
    new.write_text("".join(json.dumps(line) + "\n" for line in lines if line["step"] < step), encoding="utf-8")
    os.replace(new, path)
