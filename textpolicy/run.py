"""``textpolicy train``: one run, from settings to a trained adapter in its own folder."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import time
from collections.abc import Sequence
from contextlib import closing
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .algorithms import Algorithm
from .config import Config
from .console import RunView
from .doctor.rules import examine
from .doctor.words import last_lines
from .engine import Sampling
from .environment.multi_turn import ToolEnv
from .environment.text_generation import TextGenerationEnv
from .errors import UserError
from .evaluation import Evaluation, Rate, evaluate
from .loop import Schedule, train
from .metrics import Row
from .on_policy import OnPolicyCheck
from .recipe import configure
from .record import layout
from .record.recorder import Recorder
from .report import History, closing_table, plot_learning
from .sinks import Sinks
from .tasks import Problem, Task, load_task
from .tasks.curriculum import Curriculum, PassRateCurriculum
from .trackers import open_trackers, require
from .types import Episode

if TYPE_CHECKING:
    from .mlx.engine import MLXEngine
    from .mlx.memory import Plan

_COMPILE: dict[str, bool | Literal["auto"]] = {"auto": "auto", "on": True, "off": False}


def run(config: Config) -> Path:
    """Train as ``config`` says and return the run's folder.

    The folder is made once the model has loaded and answered the test problems, so a run that cannot
    begin leaves nothing behind. Those problems choose nothing: the adapter that is kept is the one
    with the best validation accuracy.
    """
    if config.output is not None and config.output.exists():
        raise UserError(f"the output folder {config.output} exists; choose another or remove it")
    require(config.tracking)
    task = load_task(config.task)
    config = sized(config, task)
    recipe = configure(config)
    engine, tokenizer = build_engine(config)
    limit = config.evaluation.problems or None
    splits = {
        "train": environment(task, task.train, tokenizer, config),
        "validation": environment(task, task.validation[:limit], tokenizer, config),
        "test": environment(task, task.test[:limit], tokenizer, config),
    }
    plan = fit_memory(engine, splits, config)
    started = time.perf_counter()
    before = evaluate(engine, splits["test"], greedy(config))
    folder = claim_folder(config)
    write_setup(folder, config)
    return Run(config, folder, engine, splits, recipe).train(before, started, plan)


class Run:
    """One training run in progress."""

    def __init__(
        self, config: Config, folder: Path, engine: Any, splits: dict[str, TextGenerationEnv], recipe: Algorithm
    ):
        self.config, self.folder, self.engine, self.splits, self.recipe = config, folder, engine, splits, recipe
        self.history = History()
        self.view = RunView(config.steps, quiet=config.quiet, log=folder / layout.LOG)
        self.best: tuple[Rate, int, Any] | None = None
        self.metrics = (folder / "metrics.jsonl").open("w", encoding="utf-8")
        self.sinks = Sinks([Recorder(folder, splits["train"].pieces), *open_trackers(config, folder), self.view])

    def train(self, before: Evaluation, started: float, plan: Plan) -> Path:
        """``before`` is the look at the test problems, ``started`` when the clock began, ``plan`` what fits."""
        config, history = self.config, self.history
        with self.view, self.metrics, closing(self.sinks):
            self.view.say(f"{config.algorithm.name} on {config.task} with {config.model}; the run is in {self.folder}")
            if plan.shrunk:
                self.view.say(f"made smaller to fit into memory, without effect on results: {plan}")
            history.before = rate = self.record_look("test", 0, before)
            self.view.say(f"before training: {rate} of {rate.total} test problems right, greedy (95% interval)")
            self.validate(0)
            trained = time.perf_counter()
            train(
                self.engine,
                self.splits["train"],
                self.recipe,
                schedule=schedule(config),
                prompts_per_step=config.rollout.prompts_per_step,
                group_size=config.rollout.group_size,
                updates_per_step=config.optimizer.updates_per_step,
                check=OnPolicyCheck(
                    **config.on_policy.model_dump(), corrected=self.recipe.surrogate.correction is not None
                ),
                sampling=training_sampling(config),
                curriculum=course(config, self.splits["train"]),
                on_step=self.on_step,
            )
            seconds = time.perf_counter() - trained
            self.keep_best()
            history.after = self.judge("test", history.kept_step)
            self.finish(seconds, time.perf_counter() - started)
        return self.folder

    def on_step(self, step: int, row: Row, episodes: Sequence[Episode]) -> None:
        self.history.rows.append(row)
        self.sinks.step(step, row, episodes)
        self.record({"kind": "train", **row})
        done = step + 1
        if done % self.config.evaluation.every == 0 or done == self.config.steps:
            self.view.examples(episodes[:: self.config.rollout.group_size])
            self.validate(done)

    def validate(self, steps: int) -> None:
        """Look at the validation problems, and remember the adapter if it has never done better."""
        rate = self.judge("validation", steps)
        self.history.validation.append((steps, rate))
        self.view.say(f"   validation after {steps} steps: {rate}")
        self.sample_validation(steps)
        if self.best is None or rate.value >= self.best[0].value:
            self.best = (rate, steps, self.engine.weights())

    def sample_validation(self, steps: int) -> None:
        """avg@n and pass@n of the validation problems, if the run asks for them; they choose nothing."""
        if not (n := self.config.evaluation.samples):
            return
        result = evaluate(self.engine, self.splits["validation"], training_sampling(self.config), n)
        average, passed = result.average, result.pass_at(n)
        self.view.say(f"   sampled: avg@{n} {average}, pass@{n} {passed}")
        figures = {f"avg@{n}": average.value, f"pass@{n}": passed.value, "problems": average.problems}
        line = {"kind": "eval_sampled", "step": steps, "split": "validation", "samples": n, **figures}
        self.sinks.evaluated(steps, "validation", line, result.episodes)
        self.record(line)

    def judge(self, split: str, steps: int) -> Rate:
        return self.record_look(split, steps, evaluate(self.engine, self.splits[split], greedy(self.config)))

    def keep_best(self) -> None:
        assert self.best is not None
        _, self.history.kept_step, weights = self.best
        self.engine.restore(weights)
        self.engine.save(self.folder / "adapter")

    def finish(self, train_seconds: float, seconds: float) -> None:
        from .html_report.page import write_report

        plot_learning(self.history, self.folder / "learning_curve.png", self.config)
        rows = closing_table(self.history, self.folder, self.config, train_seconds, seconds)
        (self.folder / "summary.json").write_text(json.dumps(summary(self.history, train_seconds), indent=2) + "\n")
        write_report([self.folder], self.folder / layout.REPORT)
        self.view.table("done", rows)
        for sentence in last_lines(examine(self.folder)):
            self.view.say(sentence)

    def record_look(self, split: str, steps: int, look: Evaluation) -> Rate:
        rate = look.accuracy
        row = {"kind": "eval", "step": steps, "split": split, "accuracy": rate.value, "problems": rate.total}
        self.sinks.evaluated(steps, split, row, look.episodes)
        self.record(row)
        return rate

    def record(self, row: dict[str, Any]) -> None:
        self.metrics.write(json.dumps(row) + "\n")
        self.metrics.flush()


def build_engine(config: Config) -> tuple[Any, Any]:
    """The engine with a fresh adapter, and the tokenizer."""
    from .mlx.blas import set_blas_threads  # the first import of mlx, and what it costs, is here
    from .mlx.engine import MLXEngine
    from .mlx.lora import attach
    from .mlx.models import load_model

    if config.machine.threads:
        set_blas_threads(config.machine.threads)
    adapter = config.adapter.chosen()
    model, tokenizer = load_model(config.model, dequantize=adapter.dequantize)
    attach(model, adapter, config.seed)
    engine = MLXEngine(
        model,
        stop=tokenizer.eos_token_ids,
        weight_decay=config.optimizer.weight_decay,
        max_grad_norm=config.optimizer.max_grad_norm,
        micro_batch_tokens=config.machine.micro_batch_tokens,
        decode_rows=config.machine.decode_rows,
        checkpoint_every=config.machine.checkpoint_every,
        compile=_COMPILE[config.machine.compile],
    )
    return engine, tokenizer


def fit_memory(engine: MLXEngine, splits: dict[str, TextGenerationEnv], config: Config) -> Plan:
    """Give ``engine`` sizes whose predicted peak fits into memory; raises UserError where none does."""
    from .mlx.memory import Workload, preflight

    longest = {name: max(len(env.prompt_ids(i)) for i in range(len(env))) for name, env in splits.items()}
    rollout, limit = config.rollout, config.machine.memory_limit_gb
    said = splits["train"].episode_tokens
    training = Workload(rollout.prompts_per_step, rollout.group_size, longest["train"], said)
    judged = [Workload(len(splits[name]), 1, longest[name], said) for name in ("validation", "test")]
    return preflight(engine, training, judged, None if limit is None else limit * 1e9, copies=1)  # the best so far


def environment(task: Task, problems: Sequence[Problem], tokenizer: Any, config: Config) -> TextGenerationEnv:
    """The task's prompts, reward and tools over one split."""
    prompts, examples = [task.prompt(p.question) for p in problems], [p.example for p in problems]
    rollout = config.rollout
    if not task.tools:
        return TextGenerationEnv(prompts, task.reward, rollout.max_tokens, tokenizer=tokenizer, examples=examples)
    return ToolEnv(
        prompts,
        task.tools,
        task.reward,
        rollout.max_tokens,
        tokenizer=tokenizer,
        examples=examples,
        max_turns=rollout.max_turns,
        max_episode_tokens=rollout.max_episode_tokens or rollout.max_turns * rollout.max_tokens,
    )


def sized(config: Config, task: Task) -> Config:
    """``config`` with the completions as long as the task's, if nobody said how long."""
    if task.max_tokens is None or "max_tokens" in config.rollout.model_fields_set:
        return config
    rollout = config.rollout.model_copy(update={"max_tokens": task.max_tokens})
    return config.model_copy(update={"rollout": rollout})


def course(config: Config, env: TextGenerationEnv) -> Curriculum | None:
    """What draws the prompts, if not every one in its turn."""
    return PassRateCurriculum(len(env), seed=config.seed) if config.rollout.curriculum == "pass_rate" else None


def schedule(config: Config) -> Schedule:
    o = config.optimizer
    peak = o.learning_rate or config.adapter.chosen().learning_rate
    return Schedule(peak, config.steps, o.warmup_steps, o.final_fraction)


def training_sampling(config: Config) -> Sampling:
    return Sampling(config.rollout.max_tokens, config.rollout.temperature, seed=config.seed)


def greedy(config: Config) -> Sampling:
    return Sampling(config.rollout.max_tokens, temperature=0.0)


def claim_folder(config: Config) -> Path:
    """Make the run's folder: the one asked for, or the first free name under runs/."""
    if config.output is not None:
        return _make_folder(config.output)
    name, n = f"{config.task.replace(':', '-')}-{config.algorithm.name}-seed{config.seed}", 1
    while True:
        path = Path("runs") / (name if n == 1 else f"{name}-{n}")
        if not path.exists():
            return _make_folder(path)
        n += 1


def _make_folder(path: Path) -> Path:
    try:
        path.mkdir(parents=True)
    except OSError as error:
        raise UserError(f"cannot make the output folder {path} ({error.strerror}); choose another") from error
    return path


def write_setup(folder: Path, config: Config) -> None:
    """The resolved settings, and the versions that ran them."""
    (folder / "config.json").write_text(config.model_dump_json(indent=2) + "\n")
    packages = ("textpolicy", "mlx", "mlx-lm", "numpy", "transformers")
    versions = {name: importlib.metadata.version(name) for name in packages}
    versions |= {"python": platform.python_version(), "platform": platform.platform()}
    (folder / "versions.json").write_text(json.dumps(versions, indent=2) + "\n")


def summary(history: History, train_seconds: float) -> dict[str, Any]:
    """The run in one flat record, for tables over many runs."""
    assert history.before is not None
    assert history.after is not None
    return {
        "test_before": history.before.value,
        "test_after": history.after.value,
        "test_problems": history.after.total,
        "kept_step": history.kept_step,
        "validation": [{"step": step, "accuracy": rate.value} for step, rate in history.validation],
        "steps": len(history.rows),
        "train_seconds": train_seconds,
        "sampled_tokens": sum(row["sampled_tokens"] for row in history.rows),
        "peak_memory_bytes": max(row["peak_memory_bytes"] for row in history.rows),
    }
