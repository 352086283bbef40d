r"""``python -m textpolicy.tinker.train_math``: learning to solve problems in mathematics on a Tinker server.

Problems are answered in \boxed{} and graded by value; rollouts, credit and updates are those of ``loop.train``.
"""

from __future__ import annotations

import json
import os
import sys
from collections.abc import Callable, Sequence
from dataclasses import replace
from pathlib import Path
from typing import Annotated, Literal, Self

from dotenv import dotenv_values
from pydantic import Field, model_validator

from ..algorithms.pipeline import Algorithm
from ..algorithms.sepa import Pooling
from ..config.flags import parse
from ..config.settings import NonNegative, Positive, PositiveInt, Section
from ..errors import TextPolicyError, UserError
from ..losses import ImportanceSampling, Surrogate
from ..tasks import Task, load_task
from ..tasks.mathematics import math_task_of
from .advantages import recipe
from .math_run import MathRun, Remote, workload
from .money import Limits, Prices, guessed_prompt_tokens, quote
from .progress import RunFolder

ALGORITHMS = {"grpo": ("grpo", "none"), "full": ("maxrl", "gtpo_sepa_hicra")}  # advantage mode, transform mode
_FREE = ("log_dir", "max_steps", "save_every", "eval_every", "resume", "dry_run", "expected_tokens", "base_url",
         "price_prefill", "price_sample", "price_train", "max_tokens_total", "max_cost")  # fmt: skip


class MathSettings(Section):
    """The settings of a math run that a campaign's runs share."""

    model: str = "Qwen/Qwen3-4B-Instruct-2507"
    """A model that the server offers."""
    base_url: str | None = None
    """The server's address; TINKER_BASE_URL if not given, or else the hosted service."""
    lora_rank: PositiveInt = 32
    """Width of the LoRA."""
    batch_size: PositiveInt = 8
    """Distinct problems in each step."""
    group_size: Annotated[int, Field(ge=2)] = 16
    """Completions of each problem."""
    max_tokens: PositiveInt = 2048
    """Longest completion, in tokens."""
    temperature: Positive = 0.7
    """Sampling temperature. The service scores at 1, so the ratio of the update is exact only at 1."""
    weight_decay: NonNegative = 0.0
    """Decoupled weight decay."""
    max_examples: PositiveInt | None = None
    """Train on the first so many problems; all if not given."""
    save_every: Annotated[int, Field(ge=0)] = 20
    """Steps between checkpoints on the server; 0 keeps the last one only."""
    gtpo_beta: NonNegative = 0.1
    """GTPO: strength of the weights by surprisal."""
    hicra_alpha: NonNegative = 0.2
    """HICRA: strength of the planning tokens."""
    sepa_steps: Annotated[int, Field(ge=0)] = 500
    """SEPA: steps of the ramp."""
    sepa_schedule: Literal["linear", "auto"] = "linear"
    """SEPA: linear, or as the variance of execution tokens falls."""
    sepa_delay_steps: Annotated[int, Field(ge=0)] = 50
    """SEPA: steps before the ramp."""
    sepa_correct_rate_gate: Annotated[float, Field(ge=0, le=1)] = 0.1
    """SEPA: nothing is pooled before a step has had this share of correct completions."""
    eval_every: Annotated[int, Field(ge=0)] = 20
    """Steps between evaluations on held-out problems, answered greedily; 0 is never."""
    eval_problems: Annotated[int, Field(ge=0)] = 100
    """Evaluate on the first so many held-out problems; 0 for all."""
    task: str = "math"
    """math is the MATH data set where it can be reached, else made-up problems; `textpolicy tasks` lists others."""
    data: Path | None = None
    """Problems of your own, .jsonl, .csv or .parquet: columns problem and answer, or problem and solution."""
    reduction: Literal["sum", "mean"] = "sum"
    """How the server's losses reduce: sum on hosted Tinker, mean on SkyRL's JAX engine."""


class TrainMathArguments(MathSettings):
    """Train a model on a Tinker server to solve problems in mathematics."""

    algorithm: Literal["grpo", "full"] | None = None
    """full, the default, is MaxRL, SEPA, GTPO and HICRA together; grpo is the group's mean as the baseline."""
    advantage_mode: Literal["grpo", "maxrl"] | None = None
    """Instead of algorithm: the baseline."""
    transform_mode: Literal["none", "gtpo", "gtpo_hicra", "gtpo_sepa", "gtpo_sepa_hicra"] | None = None
    """Instead of algorithm: how credit is spread over tokens."""
    max_steps: PositiveInt = 500
    """Training steps."""
    lr: Positive = 4e-5
    """Learning rate of Adam."""
    strategic_grams: str | None = None
    """JSON list of phrases that mark planning, or a file with one; the built-in list if not given."""
    log_dir: Path = Path("logs/tinker_math")
    """Folder of the run."""
    seed: Annotated[int, Field(ge=0)] = 0
    """Fixes the adapter's start, the order of problems and every draw, as far as the server allows."""
    resume: bool = False
    """Resume the run in log_dir from its last checkpoint."""
    dry_run: bool = False
    """Print what the run may cost, and exit."""
    expected_tokens: PositiveInt | None = None
    """In a dry run: also price completions of this length."""
    price_prefill: NonNegative = 0.0
    """Per million tokens of prompts."""
    price_sample: NonNegative = 0.0
    """Per million sampled tokens."""
    price_train: NonNegative = 0.0
    """Per million tokens that are learned from, prompts included."""
    max_tokens_total: PositiveInt | None = None
    """Stop before a step that could pass so many tokens of all kinds."""
    max_cost: Positive | None = None
    """Stop before a step that could pass this cost, at the prices given."""

    @model_validator(mode="after")
    def _fits(self) -> Self:
        if self.algorithm is not None and (self.advantage_mode or self.transform_mode):
            raise ValueError("algorithm is given together with advantage_mode or transform_mode; leave one of them out")
        if self.max_cost is not None and not self.prices.known:
            raise ValueError(f"max_cost is {self.max_cost:g} and no price is given; say what a million tokens cost")
        if self.data is not None and self.task != "math":
            raise ValueError(f"data is {self.data} and task is {self.task}; leave one of them out")
        return self

    @property
    def modes(self) -> tuple[str, str]:
        """Advantage mode and transform mode; with one of them given the other is that of version 0.1.11."""
        if self.advantage_mode or self.transform_mode:
            return self.advantage_mode or "maxrl", self.transform_mode or "gtpo_sepa"
        return ALGORITHMS[self.algorithm or "full"]

    @property
    def prices(self) -> Prices:
        return Prices(self.price_prefill, self.price_sample, self.price_train)

    @property
    def limits(self) -> Limits:
        return Limits(self.max_tokens_total, self.max_cost)

    @property
    def looks(self) -> int:
        """At held-out problems: before the first step, every so often, and after the last."""
        return 0 if not self.eval_every else 1 + -(-self.max_steps // self.eval_every)


Connect = Callable[[TrainMathArguments, str | None], Remote]  # the settings, and the path of a state to go on from


def recipe_of(asked: TrainMathArguments) -> Algorithm:
    """The recipe, with importance sampling as the loss: one update on what was just sampled needs no clipping."""
    advantage, transform = asked.modes
    pooling = Pooling(
        asked.sepa_steps, asked.sepa_schedule, asked.sepa_delay_steps, asked.sepa_correct_rate_gate
    )  # fmt: skip
    how = recipe(
        advantage,
        transform,
        gtpo_beta=asked.gtpo_beta,
        hicra_alpha=asked.hicra_alpha,
        pooling=pooling,
        grams=None if asked.strategic_grams is None else grams_of(asked.strategic_grams),
    )
    return replace(how, surrogate=Surrogate(ImportanceSampling()), length=float(asked.max_tokens))


def grams_of(text: str) -> list[str]:
    """The phrases of a JSON list, or of a file that holds one. Raises UserError."""
    from ..algorithms.grams import load_strategic_grams

    if not text.lstrip().startswith("["):
        return load_strategic_grams(text)
    try:
        grams = json.loads(text)
    except ValueError as error:
        raise UserError(f"strategic_grams is no JSON list ({error}); mend it, or give a file") from error
    if not all(isinstance(gram, str) for gram in grams):
        raise UserError(f"strategic_grams is {text}; give a list of strings")
    return grams


def task_of(asked: TrainMathArguments) -> Task:
    """The problems; training ones are the first ``max_examples``. Raises UserError."""
    task = load_task(asked.task) if asked.data is None else math_task_of(asked.data)
    if task.tools:
        raise UserError(f"the task {task.name} has tools, which this command does not; take 'textpolicy train'")
    return replace(task, train=task.train[: asked.max_examples])


def connect(asked: TrainMathArguments, resume: str | None) -> Remote:
    """The engine on the server. Raises UserError, ServiceError and MissingDependencyError."""
    from .engine import Adam, TinkerEngine

    return TinkerEngine.connect(
        asked.model,
        rank=asked.lora_rank,
        seed=asked.seed,
        base_url=asked.base_url,
        resume=resume,
        adam=Adam(weight_decay=asked.weight_decay),
        reduction=asked.reduction,
        untempered=True,
    )


def load_key(path: Path = Path(".env")) -> None:
    """Take what Tinker's SDK reads from the environment out of ``path``, where the environment has none of it."""
    for name, value in dotenv_values(path).items():
        if name.startswith("TINKER_") and value:
            os.environ.setdefault(name, value)


def dry_run(asked: TrainMathArguments) -> list[str]:
    """What the run may cost, line by line, without a server: prompts are counted by their characters."""
    task = task_of(asked)
    longest = guessed_prompt_tokens("\n".join(m["content"] for m in task.prompt(p.question)) for p in task.train)
    work = workload(asked, longest, len(task.test[: asked.eval_problems or None]))
    lines = [f"{task.name}: {len(task.train)} training problems", *quote(work, asked.prices, asked.expected_tokens)]
    return [*lines, "prompt tokens are a guess, 3 characters each and the chat template; no server was asked"]


def train(asked: TrainMathArguments, connect: Connect = connect) -> Path:
    """Train as ``asked``; returns the run's folder. Raises UserError, ServiceError and MissingDependencyError."""
    how, task, folder = recipe_of(asked), task_of(asked), RunFolder(asked.log_dir)
    progress = folder.look(asked.model_dump(mode="json"), asked.resume, _FREE)
    load_key()
    engine, status = connect(asked, progress.state_path), "errored"
    try:
        MathRun(asked, engine, how, task, folder, progress).train()
        status = "success"
    except KeyboardInterrupt:
        status = "interrupted"
        raise
    finally:
        engine.close(status)
    return asked.log_dir


def main(argv: Sequence[str] | None = None) -> int:
    """The command; a request that cannot work is one sentence on stderr and exit code 2."""
    arguments = list(sys.argv[1:] if argv is None else argv)
    try:
        asked = parse(TrainMathArguments, arguments, "textpolicy.tinker.train_math", program="python -m")
        if asked.dry_run:
            print("\n".join(dry_run(asked)))
        else:
            train(asked)
    except TextPolicyError as error:
        print(f"train_math: {error}", file=sys.stderr)
        return 2
    except OSError as error:
        what = f"{error.strerror or error}{'' if error.filename is None else f': {error.filename}'}"
        print(
            f"train_math: the run in {asked.log_dir} cannot write or read its files ({what}); mend that, and go on "
            "with --resume",
            file=sys.stderr,
        )
        return 2
    except KeyboardInterrupt:
        print("train_math: stopped by Ctrl-C; --resume goes on from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
