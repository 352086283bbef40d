"""``textpolicy train``: one run, from settings to a trained adapter in its own folder."""

from __future__ import annotations

import json
import signal
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack, closing, contextmanager
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._system.faults import how_to_resume, told
from .._system.files import sync_tree, write_whole
from .._system.lock import RunLock
from .._system.random_state import restore_streams, seed_streams, streams
from .._system.signals import StopSignal
from ..algorithms import Algorithm
from ..config.recipe import configure
from ..config.settings import Config
from ..doctor.rules import examine
from ..doctor.words import last_lines
from ..engine import ResumableEngine
from ..environment.single_turn import TextGenerationEnv
from ..errors import StoppedError, TextPolicyError, UserError
from ..loop.evaluation import Evaluation, Rate, evaluate
from ..loop.metrics import Row
from ..loop.on_policy import OnPolicyCheck
from ..loop.train import train
from ..record import layout
from ..record.metrics_file import MetricsFile
from ..record.recorder import Recorder
from ..record.sinks import Sinks
from ..record.trackers import open_trackers, require
from ..tasks import load_task
from ..types import Episode
from .assembly import (
    build_engine,
    claim_folder,
    course,
    environment,
    fit_memory,
    greedy,
    refit_memory,
    schedule,
    scored,
    sized,
    spending,
    training_sampling,
    versions,
    write_config,
    write_setup,
)
from .checkpoint import Checkpoint, Checkpoints, Pace, link_tree
from .console import RunView
from .resume import CHECKPOINTS, changed_versions, reopen
from .summary import History, closing_table, plot_learning, skipped_in_a_row

if TYPE_CHECKING:
    from ..mlx.memory import Plan
    from ..tinker.spending import Budget


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
        paid = spending(config, recipe, task, engine, splits)
        if paid is not None and resumed is not None:
            paid.take_over(resumed.folder)
        if resumed is not None and resumed.checkpoint is not None:
            refit_memory(engine, splits, config, resumed.checkpoint)
            with told(resumed.folder):
                going_on = Run(config, resumed.folder, engine, splits, recipe, resumed.checkpoint, paid)
                return going_on.go_on(resumed.remarks)
        seed_streams(config.seed)
        plan = fit_memory(engine, splits, config) if config.engine == "mlx" else None
        if paid is not None:
            paid.allow_beginning()
            paid.try_out(splits["train"])
        started = time.perf_counter()
        before = evaluate(engine, splits["test"], greedy(config))
        before.judged()  # or there is nothing to measure by, which is said while nothing has been made
        folder = resumed.folder if resumed else claim_folder(config)
        if resumed is None:
            held.enter_context(RunLock(folder))
        with told(folder):
            write_setup(folder, config, engine)
            return Run(config, folder, engine, splits, recipe, paid=paid).begin(before, started, plan)


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
        paid: Budget | None = None,
    ):
        """``checkpoint`` is what it goes on from, if it is not new; ``paid`` counts what a server is paid for.

        Raises OSError and UserError.
        """
        self.config, self.folder, self.engine, self.splits, self.recipe = config, folder, engine, splits, recipe
        self.resumed, self.paid = checkpoint, paid
        self.end: str | None = None  # why it ends before its last step
        self.history, self.signal = History(), StopSignal()
        self.controller, self.curriculum = recipe.controller(), course(config, splits["train"])
        self.checkpoints = Checkpoints(folder / CHECKPOINTS, config.checkpoint.keep)
        self.pace = Pace(config.checkpoint.every)
        self.versions = versions(engine, config.task)  # now: the file of a task may be edited or moved later
        self.done = 0  # training steps
        self.saved: int | None = None  # of them, in the last checkpoint
        self.best: Any = None  # what is trained, at its best on the validation problems
        self.best_files: Path | None = None  # the same in a checkpoint; None as long as none has it
        self.started = self.trained = time.perf_counter()  # when all of it, and training, would have begun in one go
        self.metrics = MetricsFile(folder / layout.METRICS, checkpoint.state["metrics_bytes"] if checkpoint else 0)
        layout.drop_from(folder, checkpoint.step if checkpoint else 0)
        self.view = RunView(config.steps, quiet=config.quiet, log=folder / layout.LOG)
        self.recorder = Recorder(folder, splits["train"].pieces)
        self.sinks = Sinks([self.recorder, *open_trackers(config, folder), self.view])

    def begin(self, before: Evaluation, started: float, plan: Plan | None) -> Path:
        """``before`` is the look at the test problems, ``started`` when the clock began, ``plan`` what fits."""
        self.started, history = started, self.history
        config = self.config

        def look_around() -> None:
            self.view.say(f"{config.algorithm.name} on {config.task} with {config.model}; the run is in {self.folder}")
            if self.paid is not None:
                self.paid.begin(self.folder)
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
            if self.paid is not None:
                self.paid.allow_going_on(checkpoint.step)
            for remark in remarks:
                self.view.say(remark)
            self._restore(checkpoint)
            if self.paid is not None:
                self.paid.try_out(self.splits["train"])
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
                stopped=lambda: self.signal.heard or self.end is not None,
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
        if self.paid is not None:
            self.recorder.step(step, {}, episodes)
            self.paid.enter(step)
        return {}

    def on_step(self, step: int, row: Row, episodes: Sequence[Episode]) -> None:
        self.done = done = step + 1
        if self.paid is not None:
            row = {**row, **self.paid.row}
        self.history.rows.append(row)
        self.sinks.step(step, row, episodes)
        self.record({"kind": "train", **row})
        last, looks = done == self.config.steps, done % self.config.evaluation.every == 0
        better = self.look(done, episodes) if looks or last else False
        if not last and self.paid is not None:
            self.end = self.paid.reason_to_end(done)
            last = self.end is not None
            if last and not looks:
                better = self.look(done, episodes)
        if last or better or self.pace.due(done):
            self.checkpoint()
        refuse_skipping(self.history.rows, self.config.optimizer.max_skipped)

    def look(self, done: int, episodes: Sequence[Episode]) -> bool:
        """Show some of the step's ``episodes``, and ``validate``."""
        self.view.examples(episodes[:: self.config.rollout.group_size])
        return self.validate(done)

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
        from ..report.page import write_report

        plot_learning(self.history, self.folder / "learning_curve.png", self.config)
        test = self.splits["test"]
        question = test.examples[0].get("question", test.prompt_text(0))
        rows = closing_table(self.history, self.folder, question, train_seconds, seconds)
        self.metrics.sync()
        write_report([self.folder], self.folder / layout.REPORT)
        figures = summary(self.history, train_seconds)
        if self.paid is not None:
            rows, figures = [*rows, self.paid.line], {**figures, **self.paid.row}
        write_whole(self.folder / layout.SUMMARY, json.dumps(figures, indent=2) + "\n")
        self.view.table("done", rows)
        if self.end is not None:
            self.view.say(f"ended early: {self.end}; with a higher one it goes on: {how_to_resume(self.folder)}")
        for sentence in last_lines(examine(self.folder)):
            self.view.say(sentence)

    def record_look(self, split: str, steps: int, look: Evaluation) -> Rate:
        rate = look.accuracy
        row = {"kind": "eval", "step": steps, "split": split, "accuracy": rate.value, "problems": rate.total}
        row["solved"] = look.solved
        self.sinks.evaluated(steps, split, row, look.episodes)
        self.record(row)
        if self.paid is not None:
            self.paid.enter(steps)
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
            "versions": self.versions,
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
        if remark := changed_versions(state["versions"], self.versions):
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
