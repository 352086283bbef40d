"""What a run of ``textpolicy train`` on a Tinker server may spend: counted, written down, and priced beforehand."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Any, Literal, Self

from ..algorithms import Algorithm
from ..config.settings import Config, TinkerSettings
from ..engine import ResumableEngine
from ..environment.single_turn import TextGenerationEnv
from ..errors import UserError
from ..loop.metrics import Row
from ..tasks import Task
from .money import Limits, Metered, Prices, Tokens, guessed_prompt_tokens, priced
from .preflight import TOKENS, preflight
from .progress import LEDGER, RunFolder


class MeteredRun(Metered):
    """``Metered``, for a run with checkpoints; what is kept on the server costs no tokens."""

    def __init__(self, engine: ResumableEngine) -> None:
        super().__init__(engine)
        self.kept, self.packages = engine, engine.packages

    def weights(self) -> Any:
        return self.kept.weights()

    def restore(self, weights: Any) -> None:
        self.kept.restore(weights)

    def write_weights(self, weights: Any, folder: Path) -> None:
        self.kept.write_weights(weights, folder)

    def read_weights(self, folder: Path) -> Any:
        return self.kept.read_weights(folder)

    def write_state(self, folder: Path) -> None:
        self.kept.write_state(folder)

    def read_state(self, folder: Path) -> None:
        self.kept.read_state(folder)

    def close(self, status: Literal["success", "errored", "interrupted"] = "success") -> None:
        self.kept.close(status)

    @property
    def platform(self) -> Mapping[str, str]:
        return self.kept.platform


@dataclass(frozen=True, slots=True)
class RunWork:
    """The size of a run, for bounds on what it spends."""

    config: Config
    prompt_tokens: int  # of the longest prompt, or of a guess
    said: int  # the most tokens of an episode after its prompt
    turns: int = 1  # of an episode; each of them reads all before it
    draws: int = 1  # of prompts, in a step
    scored: bool = False  # every completion under the reference, for a KL in the reward
    validation: int = 0  # problems
    test: int = 0

    @classmethod
    def of(cls, config: Config, recipe: Algorithm, task: Task, prompt_tokens: int, said: int) -> Self:
        """``task`` says how many problems a look has, and whether there are tools."""
        limit = config.evaluation.problems or None
        return cls(
            config,
            prompt_tokens,
            said,
            turns=config.rollout.max_turns if task.tools else 1,
            draws=1 + recipe.resample,
            scored=bool(recipe.reward_kl),
            validation=len(task.validation[:limit]),
            test=len(task.test[:limit]),
        )

    def step(self, number: int) -> Tokens:
        """The most that step ``number``, from 0, takes: every completion is as long as it may be, and learned from."""
        rollout, check = self.config.rollout, self.config.on_policy
        rows, whole = rollout.prompts_per_step * rollout.group_size, self.prompt_tokens + self.said
        scored = rows * whole * self.scored
        if check.every and number % check.every == 0:
            scored += 2 * min(check.completions, rows * self.draws) * whole
        drawn = self._sampled(rollout.prompts_per_step, rollout.group_size).times(self.draws)
        return drawn + Tokens(prefill=scored, trained=rows * whole)

    @property
    def validation_look(self) -> Tokens:
        """The most that a look at the validation problems takes."""
        samples = self.config.evaluation.samples
        more = self._sampled(self.validation, samples) if samples else Tokens()
        return self._sampled(self.validation, 1) + more

    @property
    def test_look(self) -> Tokens:
        return self._sampled(self.test, 1)

    @property
    def preflight(self) -> Tokens:
        few = min(TOKENS, self.said)
        return Tokens(2 * self.prompt_tokens * self.turns + few, few)

    @property
    def opening(self) -> Tokens:
        """Before the first step."""
        return self.preflight + self.test_look + self.validation_look

    @property
    def closing(self) -> Tokens:
        """After the last step, which may be any."""
        return self.validation_look + self.test_look

    @property
    def run(self) -> Tokens:
        """The most that all of it takes."""
        steps, every = self.config.steps, self.config.evaluation.every
        spent = self.opening + self.validation_look.times((steps - 1) // every) + self.closing
        for number in range(steps):
            spent += self.step(number)
        return spent

    def _sampled(self, prompts: int, n: int) -> Tokens:
        """``n`` completions of each of so many prompts: a prompt is read once for all, later turns by each."""
        later = prompts * n * (self.turns - 1) * (self.prompt_tokens + self.said)
        return Tokens(prompts * self.prompt_tokens + later, prompts * n * self.said)


class Budget:
    """The tokens that a run has spent and may spend; every entry goes to ledger.jsonl at once, so a resume knows it."""

    def __init__(self, engine: MeteredRun, work: RunWork, settings: TinkerSettings) -> None:
        self.engine, self.work = engine, work
        self.prices, self.limits = prices_of(settings), Limits(settings.max_tokens_total, settings.max_cost)
        self._folder: RunFolder | None = None

    def open(self, folder: Path) -> None:
        """Record in ``folder`` from now on, and count what the run there has spent before."""
        self._folder = RunFolder(folder)
        self._folder.mend(LEDGER)
        self.engine.spent += self._folder.paid()

    def allow(self, done: int | None = None) -> None:
        """Raise UserError if the limits leave no room for step ``done`` and its evaluations; None: to begin."""
        work = self.work
        if done is not None and done >= work.config.steps:
            return
        first = work.opening + work.step(0) if done is None else work.preflight + work.step(done)
        reason = self.limits.reason_to_stop(self.engine.spent, first + work.closing, self.prices)
        if reason is not None:
            raise UserError(f"{reason}; raise it, or make the run smaller")

    def try_out(self, env: TextGenerationEnv) -> None:
        """Sample and score a few tokens of ``env``. Raises UserError, ServiceError."""
        preflight(self.engine, env, self.work.config.rollout.temperature)

    def enter(self, step: int) -> None:
        """Record what is spent after so many steps."""
        assert self._folder is not None
        self._folder.enter(step, self.engine.spent)

    def sampled(self, step: int, record: Callable[[], None]) -> None:
        """Call ``record``, and record what is spent, before an update that may fail."""
        record()
        self.enter(step)

    def reason_to_end(self, done: int) -> str | None:
        """Return why step ``done`` must not begin: with it and the last evaluations a limit could be passed."""
        return self.limits.reason_to_stop(self.engine.spent, self.work.step(done) + self.work.closing, self.prices)

    def reason_to_skip(self, split: str) -> str | None:
        """Return None: ``allow`` and ``reason_to_end`` always leave room for the evaluations."""
        return None

    @property
    def lines(self) -> tuple[tuple[str, str], ...]:
        """The line of the closing table."""
        spent = self.engine.spent
        cost = f", cost {self.prices.cost(spent):,.2f}" if self.prices.known else ""
        return (("spent", f"{spent.total:,} tokens on the server{cost}"),)

    @property
    def row(self) -> Row:
        """The metrics of a step."""
        cost = {"cost": self.prices.cost(self.engine.spent)} if self.prices.known else {}
        return {"tokens_spent": float(self.engine.spent.total), **cost}


def prices_of(settings: TinkerSettings) -> Prices:
    return Prices(settings.price_prefill, settings.price_sample, settings.price_train)


def budget(
    config: Config, recipe: Algorithm, task: Task, engine: MeteredRun, splits: Mapping[str, TextGenerationEnv]
) -> Budget:
    """The budget of a run whose prompts are tokenised."""
    longest = max(len(env.prompt_ids(i)) for env in splits.values() for i in range(len(env)))
    work = RunWork.of(config, recipe, task, longest, splits["train"].episode_tokens)
    return Budget(engine, work, config.tinker)


def quote_run(config: Config, recipe: Algorithm, task: Task, length: int | None = None) -> Sequence[str]:
    """What the run may cost, line by line, without a server; with completions of ``length`` tokens, if given, too."""
    problems = [*task.train, *task.validation, *task.test]
    longest = guessed_prompt_tokens("\n".join(m["content"] for m in task.prompt(p.question)) for p in problems)
    rollout, prices = config.rollout, prices_of(config.tinker)
    said = (
        rollout.max_tokens if not task.tools else rollout.max_episode_tokens or rollout.max_turns * rollout.max_tokens
    )
    work = RunWork.of(config, recipe, task, longest, said)
    lines = [
        f"{task.name}: {config.steps} steps of {rollout.prompts_per_step} prompts x {rollout.group_size} completions, "
        f"{work.validation} validation and {work.test} test problems",
        f"prompts of {longest} tokens; an episode has at most {said} more",
        priced("at most", work.run, prices),
    ]
    if length is not None:
        lines.append(priced(f"with {length} tokens each", replace(work, said=length).run, prices))
    if not prices.known:
        lines.append(
            "no prices are given; say --tinker.price-prefill, --tinker.price-sample and --tinker.price-train, per "
            "million tokens"
        )
    return [*lines, "prompt tokens are a guess, 3 characters each and the chat template; no server was asked"]
