r"""The command ``python -m textpolicy.tinker.train_math``: train on mathematics, on a Tinker server.

Problems are answered in \boxed{} and graded by value. The command is a preset of the run driver: its flags become a
``Config``, a recipe and a task for ``run``, and ``MathFiles`` adds the files and keys that this command documents.
"""

from __future__ import annotations

import os
import sys
import time
from collections.abc import Mapping, Sequence
from dataclasses import asdict, replace
from pathlib import Path
from typing import Annotated, Any, Literal, Self

import numpy as np
from pydantic import AfterValidator, Field, model_validator

from .._system.extras import extra
from .._system.faults import TRAIN_MATH
from .._system.files import parse_json, read_object, write_whole
from .._system.terminal import counted, one_line, until_unread
from ..algorithms import Algorithm
from ..algorithms.planning import planning_masks
from ..algorithms.sepa import Pooling
from ..analysis.sepa.emergence import EmergenceLogger
from ..config.flags import parse
from ..config.settings import (
    MONEY,
    Address,
    Config,
    LocalPath,
    NonNegative,
    Positive,
    PositiveInt,
    Section,
    check_config,
)
from ..errors import StoppedError, TextPolicyError, UserError
from ..loop.evaluation import Evaluation
from ..loop.metrics import Row
from ..losses import ImportanceSampling, Surrogate
from ..record import layout
from ..tasks import Task, load_task
from ..tasks.mathematics import math_task_of
from ..tinker.advantages import recipe, surprisal_statistics
from ..tinker.engine import Adam
from ..tinker.spending import Budget, append_line, cut, quote_run, read_lines
from ..types import Episode
from .assembly import Parts
from .training_run import Extension, run

ALGORITHMS = {"grpo": ("grpo", "none"), "full": ("maxrl", "gtpo_sepa_hicra")}  # advantage mode, transform mode
RECIPES = {"gtpo": "gtpo", "gtpo_hicra": "hicra", "gtpo_sepa": "sepa", "gtpo_sepa_hicra": "full"}  # by transform mode
_FREE = {"log_dir", "max_steps", "save_every", "eval_every", "resume", "dry_run", "expected_tokens", "base_url", *MONEY}
_ALLOWED = ("steps", "evaluation", "checkpoint", "tinker")  # settings that may differ from those a run began with


class MathSettings(Section):
    """The settings of a math run that a campaign's runs share."""

    model: str = "Qwen/Qwen3-4B-Instruct-2507"
    """A model that the server offers."""
    base_url: Address = None
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
    data: Annotated[LocalPath, AfterValidator(Path.absolute)] | None = None
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
    log_dir: LocalPath = Path("logs/tinker_math")
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
        if self.max_cost is not None and not (self.price_prefill or self.price_sample or self.price_train):
            raise ValueError(f"max_cost is {self.max_cost:g} and no price is given; say what a million tokens cost")
        if self.data is not None and self.task != "math":
            raise ValueError(f"data is {self.data} and task is {self.task}; leave one of them out")
        return self

    @property
    def modes(self) -> tuple[str, str]:
        """The advantage mode and the transform mode; if one is given the other is that of version 0.1.11."""
        if self.advantage_mode or self.transform_mode:
            return self.advantage_mode or "maxrl", self.transform_mode or "gtpo_sepa"
        return ALGORITHMS[self.algorithm or "full"]

    @property
    def condition(self) -> str:
        """The modes as one word, by which campaigns tell their arms apart."""
        return "+".join(self.modes)


def recipe_of(args: TrainMathArguments) -> Algorithm:
    """Return the recipe, with importance sampling as the loss: one update on fresh samples needs no clipping."""
    advantage, transform = args.modes
    algorithm = recipe(
        advantage,
        transform,
        gtpo_beta=args.gtpo_beta,
        hicra_alpha=args.hicra_alpha,
        pooling=Pooling(args.sepa_steps, args.sepa_schedule, args.sepa_delay_steps, args.sepa_correct_rate_gate),
        grams=None if args.strategic_grams is None else grams_of(args.strategic_grams),
    )
    return replace(algorithm, surrogate=Surrogate(ImportanceSampling()), length=float(args.max_tokens))


def grams_of(text: str) -> list[str]:
    """Return the phrases of a JSON list, or of a file with one. Raises UserError."""
    from ..algorithms.grams import load_strategic_grams

    if not text.lstrip().startswith("["):
        return load_strategic_grams(text)
    try:
        grams = parse_json(text)
    except ValueError as error:
        raise UserError(f"strategic_grams is not a JSON list ({error}); correct it, or give a file") from error
    if not all(isinstance(gram, str) for gram in grams):
        raise UserError(f"strategic_grams is {text}; give a list of strings")
    return grams


def task_of(args: TrainMathArguments) -> Task:
    """Return the problems; the first ``max_examples`` are trained on. Raises UserError."""
    task = load_task(args.task) if args.data is None else math_task_of(args.data)
    if task.tools:
        raise UserError(f"the task {task.name} has tools, which this command does not support; use 'textpolicy train'")
    return replace(task, train=task.train[: args.max_examples])


def run_of(args: TrainMathArguments) -> tuple[Config, Algorithm, Task]:
    """Return the run's settings, recipe and task. Raises UserError.

    The held-out problems are the task's test problems; the run driver evaluates them as its validation problems.
    """
    values = {
        **args.model_dump(include={"model", "task", "seed"}),
        "steps": args.max_steps,
        "output": args.log_dir,
        "engine": "tinker",
        "algorithm": {"name": RECIPES.get(args.modes[1], args.modes[0])},
        "adapter": {"rank": args.lora_rank},
        "rollout": {
            "prompts_per_step": args.batch_size,
            **args.model_dump(include={"group_size", "max_tokens", "temperature"}),
        },
        "optimizer": {
            "learning_rate": args.lr,
            "weight_decay": args.weight_decay,
            "warmup_steps": 0,
            "final_fraction": 1.0,
        },
        "evaluation": {"every": args.eval_every or args.max_steps},
        "on_policy": {"every": 0},
        "checkpoint": {"every": args.save_every or args.max_steps},
        "tinker": {"untempered": True, **args.model_dump(include={"base_url", "reduction", *MONEY})},
    }
    task = task_of(args)
    held_out = task.test[: args.eval_problems or None] if args.eval_every else ()
    return check_config(values, "train_math"), recipe_of(args), replace(task, validation=held_out, test=())


class MathFiles:
    """The sink that writes the files and keys of train_math beside those of every run."""

    def __init__(self, args: TrainMathArguments) -> None:
        self.args, self.folder = args, args.log_dir
        self.metrics = read_lines(self.folder / layout.METRICS)  # as they were before a resume cuts them back
        self.correct = self.judged = 0  # completions over all steps

    def replace_parts(self, parts: Parts) -> Parts:
        """Set this command's Adam, and limits that do not reserve tokens for the evaluations after a step."""
        spending = parts.spending
        assert isinstance(spending, Budget)
        self.engine, self.tokenizer, self.controller = spending.engine, parts.tokenizer, parts.controller
        engine: Any = self.engine.engine
        engine.adam = Adam(weight_decay=self.args.weight_decay)
        self.grams = parts.recipe.grams
        phrases = None if self.grams is None else self.grams.phrases
        self.logger = EmergenceLogger(
            self.folder / "emergence", strategic_grams=phrases, max_completion_tokens=self.args.max_tokens
        )
        title = f"{self.args.condition} on {self.args.model}, {counted(self.args.max_steps, 'step')}"
        return replace(parts, title=title, spending=Budget(self.engine, spending.work, reserve=False))

    def begin(self, parts: Parts, folder: Path, done: int) -> None:
        """Write the settings, and cut the files back to ``done`` steps: later lines move to ``.cut.jsonl`` files."""
        write_whole(folder / TRAIN_MATH, self.args.model_dump_json(indent=2) + "\n")
        for name in ("steps", "generations"):
            cut(folder / "emergence" / f"{name}.jsonl", done)
        for name in ("evals", "checkpoints"):  # which count the steps done before
            cut(folder / f"{name}.jsonl", done + 1)
        for line in self.metrics:
            if line.get("kind") == "train" and line["step"] >= done:
                append_line(folder / "metrics.cut.jsonl", line)
        for line in read_lines(folder / "emergence" / "generations.jsonl"):
            if (correct := line["metadata"].get("correctness")) is not None:
                self.correct, self.judged = self.correct + correct, self.judged + 1
        if self.args.temperature != 1:
            print(
                f"samples at temperature {self.args.temperature:g} are scored at 1, which is what the service returns: "
                "the update treats them as samples at 1, and --temperature 1 makes that true",
                flush=True,
            )

    def on_sampled(self, step: int, episodes: Sequence[Episode]) -> Row:
        """Log every completion before it is learned from; return its surprisals under their documented names."""
        self.engine.sequences = 0
        self.logger.log_step(step, episodes, self.tokenizer, extra_step_metrics={"condition": self.args.condition})
        if self.grams is None:
            return {}
        planning = planning_masks([e.pieces for e in episodes], self.grams)
        return surprisal_statistics(np.concatenate([e.logprobs[e.mask] for e in episodes]), planning)

    def on_row(self, step: int, row: Row, episodes: Sequence[Episode]) -> dict[str, Any]:
        """Return the documented keys of metrics.jsonl."""
        self.correct += sum(bool(e.is_correct) for e in episodes)
        self.judged += sum(e.is_correct is not None for e in episodes)
        args, (advantage, transform) = self.args, self.args.modes
        return {
            "algorithm": args.algorithm or ("full" if args.modes == ALGORITHMS["full"] else None),
            "advantage_mode": advantage,
            "transform_mode": transform,
            "condition": args.condition,
            "mean_reward": row.get("reward_mean"),
            "correct_rate": row.get("accuracy"),
            "running_correct_rate": self.correct / self.judged if self.judged else None,
            "sepa_lambda": 0.0 if self.controller is None else self.controller.strength,
            "sepa_gate_open": self.controller is not None and self.controller.gate_open,
            "num_datums": self.engine.sequences,
            "max_token_hit_rate": row["truncated"],
            "step_time_s": row["sample_seconds"] + row["update_seconds"],
            "tokens_spent": self.engine.spent.total,
        }

    def step(self, step: int, row: Row, episodes: Sequence[Episode]) -> None:
        done, every = step + 1, self.args.save_every
        if every and done % every == 0 and done < self.args.max_steps:
            self.save(f"checkpoint_step_{done}", done)

    def on_end(self, done: int) -> None:
        """Save the weights of the last step."""
        self.save("final", done)

    def save(self, name: str, done: int) -> None:
        """Save weights and optimiser on the server under a documented name, and list them in checkpoints.jsonl."""
        path = self.folder / "checkpoints.jsonl"
        if (name, done) in ((line["name"], line["step"]) for line in read_lines(path)):
            return  # a run that was killed after this save has resumed
        line = {"name": name, "step": done, "correct": self.correct, "judged": self.judged}
        line |= {"spent": asdict(self.engine.spent), "state_path": self.engine.save_state(name)}
        line["sepa"] = None if self.controller is None else self.controller.state_dict()
        append_line(path, line)

    def evaluated(self, step: int, split: str, row: Mapping[str, Any], episodes: Sequence[Episode]) -> None:
        rate = Evaluation(episodes).accuracy
        low, high = rate.interval
        figures = {"accuracy": rate.value, "low": low, "high": high, "problems": rate.total, "time": time.time()}
        cut(self.folder / "evals.jsonl", step)  # of a run that begins again
        append_line(self.folder / "evals.jsonl", {"kind": "eval", "step": step, "split": "test", **figures})

    def close(self) -> None:
        """Do nothing: no file is held open."""


def load_key(path: Path = Path(".env")) -> None:
    """Set the environment variables of Tinker's SDK that ``path`` defines and the environment does not."""
    for name, value in extra("dotenv", "textpolicy[tinker]").dotenv_values(path).items():
        if name.startswith("TINKER_") and value:
            os.environ.setdefault(name, value)


def dry_run(args: TrainMathArguments) -> list[str]:
    """Return what the run may cost, line by line, without a server: prompts are counted by their characters."""
    config, algorithm, task = run_of(args)
    lines = quote_run(config, algorithm, task, args.expected_tokens, flags="--")
    return [f"{task.name}: {len(task.train)} training problems", *lines]


def train(args: TrainMathArguments) -> Path:
    """Train, or resume the run in ``args.log_dir``; return its folder.

    Raises UserError, also for a folder with a run that is not to be resumed or began with other settings,
    ServiceError and MissingDependencyError.
    """
    config, algorithm, task = run_of(args)
    folder, saved, summary = (args.log_dir / name for name in ("", TRAIN_MATH, layout.SUMMARY))
    if args.resume and not saved.exists():
        raise UserError(f"there is no run in {folder} to resume; leave --resume out, or correct --log-dir")
    if saved.exists():
        if summary.exists() and not args.resume:
            raise UserError(f"{folder} holds a run; add --resume to resume it, or choose another --log-dir")
        before, now = own_settings(args.log_dir), args.model_dump(mode="json")
        fixed = [name for name in now if name not in _FREE]
        changed = [f"{n} was {before.get(n)!r} and is {now[n]!r}" for n in fixed if before.get(n) != now[n]]
        if changed:
            raise UserError(
                f"the run began with other settings: {'; '.join(changed)}; resume it with its own, or start another"
            )
        steps = (read_object(summary, "restore it, or remove it to make the last evaluation again") or {}).get("steps")
        if type(steps) is int and steps >= args.max_steps:
            raise UserError(
                f"the run in {folder} is finished, with {counted(steps, 'step')}; raise --max-steps to train it further"
            )
    load_key()
    files = MathFiles(args)
    extension = Extension(
        task=task,
        recipe=algorithm,
        replace_parts=files.replace_parts,
        begin=files.begin,
        on_sampled=files.on_sampled,
        on_row=files.on_row,
        on_end=files.on_end,
        eval_rows=False,
    )
    return run(config, _ALLOWED if saved.exists() else (), [files], extension)


def own_settings(folder: Path) -> dict[str, Any]:
    """Return the settings that the run in ``folder`` wrote down. Raises UserError."""
    return read_object(folder / TRAIN_MATH, "restore it, or choose another --log-dir") or {}


def main(argv: Sequence[str] | None = None) -> int:
    """Run the command; a UserError is one sentence on stderr and exit code 2."""
    return until_unread(lambda: _run(list(sys.argv[1:] if argv is None else argv)))


def _run(arguments: list[str]) -> int:
    command = "textpolicy.tinker.train_math"
    try:
        args = parse(TrainMathArguments, arguments, command, program="python -m")
        saved = args.log_dir / TRAIN_MATH
        if args.resume and saved.exists():  # the run's own settings are the defaults
            own = {name: value for name, value in own_settings(args.log_dir).items() if value is not None}
            args = parse(TrainMathArguments, arguments, command, program="python -m", **own)
        if args.dry_run:
            print("\n".join(dry_run(args)))
        else:
            train(args)
    except TextPolicyError as error:
        print(f"train_math: {one_line(str(error))}", file=sys.stderr)
        return error.exit_code if isinstance(error, StoppedError) else 2
    except KeyboardInterrupt:
        print("train_math: stopped by Ctrl-C; --resume continues from the last checkpoint", file=sys.stderr)
        return 130
    return 0


if __name__ == "__main__":
    sys.exit(main())
