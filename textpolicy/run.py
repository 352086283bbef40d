"""``textpolicy train``: one run, from settings to a trained adapter in its own folder."""

from __future__ import annotations

import importlib.metadata
import json
import platform
import re
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal

from .algorithms import Algorithm
from .checkpoint import Checkpoint, Checkpoints, Pace, link_tree
from .config import Config
from .console import RunView
from .doctor.rules import examine
from .doctor.words import last_lines
from .durable import sync_tree, write_whole
from .engine import ResumableEngine, Sampling
from .environment.multi_turn import ToolEnv
from .environment.text_generation import TextGenerationEnv
from .errors import StoppedError, TextPolicyError, UserError
from .evaluation import Evaluation, Rate, evaluate
from .faults import how_to_resume, told
from .interrupt import StopSignal
from .lock import RunLock
from .loop import Schedule, train
from .metrics import Row
from .metrics_file import MetricsFile
from .on_policy import OnPolicyCheck
from .recipe import configure
from .record import layout
from .record.recorder import Recorder
from .report import History, closing_table, plot_learning, skipped_in_a_row
from .resume import CHECKPOINTS, changed_versions, reopen
from .rewards.scoring import Scorer
from .sinks import Sinks
from .streams import restore_streams, seed_streams, streams
from .tasks import Problem, Task, load_task
from .tasks.curriculum import Curriculum, PassRateCurriculum
from .trackers import open_trackers, require
from .types import Episode

if TYPE_CHECKING:
    from .mlx.engine import MLXEngine
    from .mlx.memory import Plan

_COMPILE: dict[str, bool | Literal["auto"]] = {"auto": "auto", "on": True, "off": False}


def run(config: Config, allow: Sequence[str] = ()) -> Path:
    """Train as ``config`` says and return the run's folder.

    The folder is made once the model has loaded and answered the test problems, so a run that cannot
    begin leaves nothing behind. Those problems choose nothing: the adapter that is kept is the one
    with the best validation accuracy. Where ``config.output`` is a run that was cut short it goes on, bit for
    bit, from its last checkpoint; ``allow`` names the settings that may then differ. Raises UserError, and
    StoppedError after a signal.
    """
    require(config.tracking)
    task = scored(load_task(config.task), config)
    config = sized(config, task)
    recipe = configure(config)
    with ExitStack() as held:
        resumed = reopen(config, allow, held)
        engine, tokenizer = build_engine(config, recipe)
        held.push(lambda kind, error, trace: engine.close("errored" if kind else "success"))
        limit = config.evaluation.problems or None
        splits = {
            "train": environment(task, task.train, tokenizer, config),
            "validation": environment(task, task.validation[:limit], tokenizer, config),
            "test": environment(task, task.test[:limit], tokenizer, config),
        }
        if resumed is not None and resumed.checkpoint is not None:
            refit_memory(engine, splits, config, resumed.checkpoint)
            with told(resumed.folder):
                return Run(config, resumed.folder, engine, splits, recipe, resumed.checkpoint).go_on(resumed.remarks)
        seed_streams(config.seed)
        plan = fit_memory(engine, splits, config) if config.engine == "mlx" else None
        started = time.perf_counter()
        before = evaluate(engine, splits["test"], greedy(config))
        folder = resumed.folder if resumed else claim_folder(config)
        if resumed is None:
            held.enter_context(RunLock(folder))
        with told(folder):
            write_setup(folder, config, engine)
            return Run(config, folder, engine, splits, recipe).begin(before, started, plan)


class Run:
    """One training run in progress, with the lock on its folder held by the caller."""

    def __init__(
        self,
        config: Config,
        folder: Path,
        engine: ResumableEngine,
        splits: dict[str, TextGenerationEnv],
        recipe: Algorithm,
        checkpoint: Checkpoint | None = None,
    ):
        """``checkpoint`` is what it goes on from, if it is not new. Raises OSError and UserError."""
        self.config, self.folder, self.engine, self.splits, self.recipe = config, folder, engine, splits, recipe
        self.resumed = checkpoint
        self.history, self.signal = History(), StopSignal()
        self.view = RunView(config.steps, quiet=config.quiet, log=folder / layout.LOG)
        self.controller, self.curriculum = recipe.controller(), course(config, splits["train"])
        self.checkpoints = Checkpoints(folder / CHECKPOINTS, config.checkpoint.keep)
        self.pace = Pace(config.checkpoint.every)
        self.done = 0  # training steps
        self.saved: int | None = None  # of them, in the last checkpoint
        self.best: Any = None  # what is trained, at its best on the validation problems
        self.best_files: Path | None = None  # the same in a checkpoint; None as long as none has it
        self.started = self.trained = time.perf_counter()  # when all of it, and training, would have begun in one go
        self.metrics = MetricsFile(folder / layout.METRICS, checkpoint.state["metrics_bytes"] if checkpoint else 0)
        layout.drop_from(folder, checkpoint.step if checkpoint else 0)
        self.recorder = Recorder(folder, splits["train"].pieces)
        self.sinks = Sinks([self.recorder, *open_trackers(config, folder), self.view])

    def begin(self, before: Evaluation, started: float, plan: Plan | None) -> Path:
        """``before`` is the look at the test problems, ``started`` when the clock began, ``plan`` what fits."""
        self.started, history = started, self.history
        config = self.config

        def look_around() -> None:
            self.view.say(f"{config.algorithm.name} on {config.task} with {config.model}; the run is in {self.folder}")
            if plan is not None and plan.shrunk:
                self.view.say(f"made smaller to fit into memory, without effect on results: {plan}")
            history.before = rate = self.record_look("test", 0, before)
            self.view.say(f"before training: {rate} of {rate.total} test problems right, greedy (95% interval)")
            self.validate(0)
            self.checkpoint()
            self.trained = time.perf_counter()

        return self._train(look_around)

    def go_on(self, remarks: Sequence[str]) -> Path:
        """Train on from the checkpoint, after saying the ``remarks`` on how it was found."""
        checkpoint = self.resumed
        assert checkpoint is not None

        def restore() -> None:
            for remark in remarks:
                self.view.say(remark)
            self._restore(checkpoint)
            self.view.say(f"going on with {self.folder} after {self.done} of {self.config.steps} steps")
            (self.folder / layout.SUMMARY).unlink(missing_ok=True)
            write_config(self.folder, self.config)

        return self._train(restore)

    def _train(self, open: Callable[[], None]) -> Path:
        config = self.config
        with self._told(), self.view, closing(self.metrics), closing(self.sinks), self.signal:
            open()
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
                curriculum=self.curriculum,
                controller=self.controller,
                start=self.done,
                stopped=lambda: self.signal.heard,
                on_sampled=self.on_sampled,
                on_step=self.on_step,
            )
            if self.signal.number is not None:
                raise self._stopped(self.signal.number)
            seconds = time.perf_counter() - self.trained
            self.keep_best()
            self.history.after = self.judge("test", self.history.kept_step)
            self.finish(seconds, time.perf_counter() - self.started)
        return self.folder

    def on_sampled(self, step: int, episodes: Sequence[Episode]) -> Row:
        """What a server was paid for is on the disk before the update, which may fail; credit follows after it."""
        if self.config.engine == "tinker":
            self.recorder.step(step, {}, episodes)
        return {}

    def on_step(self, step: int, row: Row, episodes: Sequence[Episode]) -> None:
        self.done = done = step + 1
        self.history.rows.append(row)
        self.sinks.step(step, row, episodes)
        self.record({"kind": "train", **row})
        last, better = done == self.config.steps, False
        if done % self.config.evaluation.every == 0 or last:
            self.view.examples(episodes[:: self.config.rollout.group_size])
            better = self.validate(done)
        if last or better or self.pace.due(done):
            self.checkpoint()
        refuse_skipping(self.history.rows, self.config.optimizer.max_skipped)

    def validate(self, steps: int) -> bool:
        """Look at the validation problems, and remember the adapter if it has never done better, which is returned."""
        rate = self.judge("validation", steps)
        self.history.validation.append((steps, rate))
        self.view.say(f"   validation after {steps} steps: {rate}")
        self.sample_validation(steps)
        better = self.history.best is None or rate.value >= self.history.best[1].value
        if better:
            self.history.best, self.best, self.best_files = (steps, rate), self.engine.weights(), None
        return better

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
        assert self.history.best is not None
        self.history.kept_step, _ = self.history.best
        self.engine.restore(self.best)
        self.engine.save(self.folder / "adapter")
        sync_tree(self.folder / "adapter")

    def finish(self, train_seconds: float, seconds: float) -> None:
        """Write what a run ends with; the summary last, because it says that all is there."""
        from .html_report.page import write_report

        plot_learning(self.history, self.folder / "learning_curve.png", self.config)
        rows = closing_table(self.history, self.folder, self.config, train_seconds, seconds)
        self.metrics.sync()
        write_report([self.folder], self.folder / layout.REPORT)
        write_whole(self.folder / layout.SUMMARY, json.dumps(summary(self.history, train_seconds), indent=2) + "\n")
        self.view.table("done", rows)
        for sentence in last_lines(examine(self.folder)):
            self.view.say(sentence)

    def record_look(self, split: str, steps: int, look: Evaluation) -> Rate:
        rate = look.accuracy
        row = {"kind": "eval", "step": steps, "split": split, "accuracy": rate.value, "problems": rate.total}
        row["solved"] = look.solved
        self.sinks.evaluated(steps, split, row, look.episodes)
        self.record(row)
        return rate

    def record(self, row: dict[str, Any]) -> None:
        self.metrics.write(row)

    # ---- being cut short, and going on

    def checkpoint(self) -> None:
        """Write one of the steps done so far, and what follows from them."""
        assert self.history.best is not None
        self.pace.begin()
        written = self.checkpoints.write(self.done, self._state(), self._fill, best=self.history.best[0])
        self.best_files, self.saved = written.path / "best", self.done
        self.pace.end()

    def _fill(self, folder: Path) -> None:
        self.engine.write_state(folder)
        if self.best_files is None:
            self.engine.write_weights(self.best, folder / "best")
        else:
            link_tree(self.best_files, folder / "best")

    def _state(self) -> dict[str, Any]:
        now = time.perf_counter()
        return {
            "history": self.history.state_dict(),
            "curriculum": None if self.curriculum is None else self.curriculum.state_dict(),
            "sepa": None if self.controller is None else self.controller.state_dict(),
            "streams": streams(),
            "seconds": {"all": now - self.started, "training": now - self.trained},
            "config": json.loads(self.config.model_dump_json()),
            "versions": versions(self.engine),
            "metrics_bytes": self.metrics.sync(),
        }

    def _restore(self, checkpoint: Checkpoint) -> None:
        state = checkpoint.state
        self.engine.read_state(checkpoint.path)
        self.best_files = checkpoint.path / "best"
        self.best = self.engine.read_weights(self.best_files)
        self.history.load_state_dict(state["history"])
        self.history.rows = self.metrics.rows("train")
        self.view.rows = list(self.history.rows)
        if self.curriculum is not None and state["curriculum"] is not None:
            self.curriculum.load_state_dict(state["curriculum"])
        if self.controller is not None and state["sepa"] is not None:
            self.controller.load_state_dict(state["sepa"])
        restore_streams(state["streams"])
        now, seconds = time.perf_counter(), state["seconds"]
        self.started, self.trained = now - seconds["all"], now - seconds["training"]
        self.done = self.saved = checkpoint.step
        if remark := changed_versions(state["versions"], versions(self.engine)):
            self.view.say(remark)

    def _stopped(self, number: int) -> StoppedError:
        if self.saved != self.done:
            self.checkpoint()
        return StoppedError(
            f"stopped by {signal.Signals(number).name} after {self.done} of {self.config.steps} steps; "
            f"go on with: {how_to_resume(self.folder)}",
            number,
        )

    @contextmanager
    def _told(self) -> Iterator[None]:
        """Say how to go on after an error that does not say it itself."""
        try:
            with told(self.folder):
                yield
        except TextPolicyError as error:
            if self.saved is not None and how_to_resume(self.folder) not in str(error):
                self.view.say(f"checkpoint of step {self.saved} kept; go on with: {how_to_resume(self.folder)}")
            raise


def refuse_skipping(rows: Sequence[Row], limit: int) -> None:
    """Raise UserError once ``limit`` steps in a row were skipped because something in them was not finite."""
    if skipped_in_a_row(rows) >= limit:
        raise UserError(
            f"the loss or gradient of the last {skipped_in_a_row(rows)} steps was not finite; lower "
            "optimizer.learning_rate, load the model in float32, or look for huge rewards (optimizer.max_skipped)"
        )


def build_engine(config: Config, recipe: Algorithm | None = None) -> tuple[Any, Any]:
    """The engine with a fresh adapter, and the tokenizer. ``recipe`` is what it must be able to learn from."""
    if config.engine == "tinker":
        from .tinker.from_config import build

        return build(config, recipe or configure(config))
    from .mlx.blas import set_blas_threads  # the first import of mlx, and what it costs, is here
    from .mlx.engine import MLXEngine
    from .mlx.lora import attach
    from .mlx.models import load_model

    if config.machine.threads:
        set_blas_threads(config.machine.threads)
    refuse_beyond_context(config, config.rollout.max_tokens, "a completion")
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
    rollout = config.rollout
    said = splits["train"].episode_tokens
    refuse_beyond_context(config, max(longest.values()) + said, "the longest prompt with what may follow it")
    training = Workload(rollout.prompts_per_step, rollout.group_size, longest["train"], said)
    judged = [Workload(len(splits[name]), 1, longest[name], said) for name in ("validation", "test")]
    return preflight(engine, training, judged, _memory_limit(config), copies=1)  # the best so far


def refit_memory(engine: Any, splits: dict[str, TextGenerationEnv], config: Config, checkpoint: Checkpoint) -> None:
    """For a run that goes on: the sizes it had, or, where the settings of the machine changed, those that fit now."""
    if config.engine != "mlx":
        return
    if checkpoint.state["config"]["machine"] == config.machine.model_dump():
        bound_memory(config)
    else:
        fit_memory(engine, splits, config)


def refuse_beyond_context(config: Config, tokens: int, what: str) -> None:
    """Raise UserError for ``tokens`` that the model was not made for, as far as its config says."""
    from .mlx.models import context_length

    context = context_length(config.model)
    if context is not None and tokens > context:
        raise UserError(
            f"{what} has {tokens} tokens and the context of {config.model} {context}; lower rollout.max_tokens "
            "(and rollout.max_turns or rollout.max_episode_tokens in a task with tools), or shorten the prompts"
        )


def bound_memory(config: Config) -> None:
    """Set MLX's limits; a run that goes on has its sizes."""
    from .mlx.memory import limit_memory

    limit_memory(_memory_limit(config))


def _memory_limit(config: Config) -> float | None:
    """In bytes, if the settings say one."""
    limit = config.machine.memory_limit_gb
    return None if limit is None else limit * 1e9


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


def scored(task: Task, config: Config) -> Task:
    """``task`` with its reward called as the run says, by one Scorer for all splits."""
    return replace(task, reward=Scorer(task.reward, **config.rewards.model_dump()))


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
    name, n = re.sub(r"[^\w+.-]", "-", f"{config.task}-{config.algorithm.name}-seed{config.seed}").lstrip("."), 1
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


def write_setup(folder: Path, config: Config, engine: ResumableEngine) -> None:
    """The resolved settings, and the versions that ran them. Raises OSError."""
    write_whole(folder / layout.VERSIONS, json.dumps(versions(engine), indent=2) + "\n")
    write_config(folder, config)


def write_config(folder: Path, config: Config) -> None:
    """The resolved settings. Raises OSError."""
    write_whole(folder / layout.CONFIG, config.model_dump_json(indent=2) + "\n")


def versions(engine: ResumableEngine) -> dict[str, str]:
    """All that the last bits of a run depend on, its settings aside."""
    packages = ("textpolicy", *engine.packages, "numpy", "transformers")
    found = {name: importlib.metadata.version(name) for name in packages}
    return {**found, "python": platform.python_version(), "platform": platform.platform(), **engine.platform}


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
        "peak_memory_bytes": max((row.get("peak_memory_bytes", 0.0) for row in history.rows), default=0.0),
    }
