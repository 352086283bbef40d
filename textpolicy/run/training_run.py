"""Train: ``textpolicy train``, one run from settings to a trained adapter in its own folder."""

from __future__ import annotations

import itertools
import json
import signal
import time
from collections.abc import Callable, Iterator, Mapping, Sequence
from contextlib import AbstractContextManager, ExitStack, closing, contextmanager, nullcontext
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._system.faults import how_to_resume, resumable_errors
from .._system.files import sync_tree, write_whole
from .._system.lock import RunLock
from .._system.machine import cores_of_each
from .._system.random_state import restore_streams, seed_streams, streams
from .._system.signals import StopSignal
from .._system.terminal import counted, latest
from ..algorithms import Algorithm
from ..config.recipe import configure
from ..config.settings import Config
from ..doctor.rules import examine
from ..doctor.words import last_lines
from ..errors import StoppedError, TextPolicyError, UserError
from ..loop.evaluation import Evaluation, Rate, evaluate
from ..loop.metrics import Row
from ..loop.start_gate import StartGate
from ..loop.teach import held_out_loss, teach
from ..loop.train import Session, annealed, train
from ..record import layout
from ..record.metrics_file import MetricsFile
from ..record.reader import load_run
from ..record.recorder import Recorder
from ..record.sinks import Sink, Sinks
from ..record.trackers import open_trackers, require
from ..tasks import Task, load_task
from ..types import Episode
from .assembly import (
    Parts,
    assemble,
    base_of,
    claim_folder,
    fit_memory,
    refuse_long_warmup,
    try_folder,
    with_full_paths,
    with_max_tokens,
    write_setup,
)
from .checkpoint import Checkpoint, Checkpoints, Pace, link_tree
from .console import RunView
from .ranks import follow, joined, lead, together
from .resume import CHECKPOINTS, changed_versions, reopen
from .summary import History, closing_table, next_commands, summary

if TYPE_CHECKING:
    from ..mlx.memory import Plan


_NOISE = 2**31 - 1  # a draw of prompts that no step makes


@dataclass(frozen=True)
class Extension:
    """The additions of a program built on ``run``; its sinks get steps and evaluations."""

    task: Task | None = None  # in place of the one that config.task names
    recipe: Algorithm | None = None  # in place of the one that config.algorithm describes
    replace_parts: Callable[[Parts], Parts] = lambda parts: parts  # before they are used: another spending, say
    begin: Callable[[Parts, Path, int], None] = lambda parts, folder, done: None  # with the steps done by then
    on_sampled: Callable[[int, Sequence[Episode]], Row] = lambda step, episodes: {}  # before the update; adds metrics
    on_row: Callable[[int, Row, Sequence[Episode]], Mapping[str, Any]] = lambda step, row, episodes: {}  # adds to it
    on_end: Callable[[int], None] = lambda done: None  # after the last step, be it early
    eval_rows: bool = True  # in metrics.jsonl; else the program writes evals.jsonl


def run(
    config: Config, allow: Sequence[str] = (), sinks: Sequence[Sink] = (), extension: Extension = Extension()
) -> Path:
    """Train as ``config`` says and return the run's folder.

    The folder is made once the model has loaded and answered the test problems, so a run that cannot
    begin leaves nothing behind. Those problems choose nothing: the adapter that is kept is the one
    with the best validation accuracy. If ``config.output`` is a run that was cut short, it resumes bit for
    bit from its last checkpoint; ``allow`` names the settings that may then differ. ``sinks`` get every step
    and evaluation, after the recorder and trackers. Raises UserError, and StoppedError after a signal.
    """
    with ExitStack() as held:
        team = held.enter_context(joined(config))
        given, again = config, False
        if team.rank:
            config, again = follow(team, config, held)
        require(config.tracking)
        config = with_full_paths(config)
        task = extension.task or load_task(config.task)
        config = with_max_tokens(config, task)
        for stage in () if extension.recipe else config.stages:
            configure(stage)  # raises before there is any work to lose
        resumed = None
        if team.rank == 0 or again:
            resumed = reopen(config, task.digest, partial(base_of, config), allow, held)
        if team.rank == 0:
            lead(team, given, resumed)
        if resumed is None:
            refuse_long_warmup(config)
            try_folder(config)
        before = {} if resumed is None or resumed.checkpoint is None else resumed.checkpoint.state["versions"]
        threads = int(before.get("blas_threads", 0)) if team.sharing == 1 else cores_of_each(team.sharing)
        with team.doing("loading the model"):
            parts = extension.replace_parts(assemble(config, task, extension.recipe, threads))
        parts = together(parts, team)
        held.enter_context(team.doing("taking a step"))
        ends: dict[Any, Any] = {None: "success", KeyboardInterrupt: "interrupted", StoppedError: "interrupted"}
        held.push(lambda kind, error, trace: parts.engine.close(ends.get(kind, "errored")))
        if resumed is not None:
            parts.spending.open(resumed.folder)
            if resumed.checkpoint is not None:
                team.remedy = f"resume with: {team.first(how_to_resume(resumed.folder))}"
                fit_memory(parts, resumed.checkpoint)
                with resumable_errors(resumed.folder):
                    progress = Run(parts, resumed.folder, sinks, extension, resumed.checkpoint)
                    return progress.resume(resumed.checkpoint, resumed.remarks)
        seed_streams(config.seed + team.rank)
        plan = fit_memory(parts)
        parts.spending.allow()
        parts.spending.try_out(parts.splits["train"])
        started, before = time.perf_counter(), None
        if "test" in parts.splits and parts.spending.reason_to_skip("test") is None:
            before = evaluate(parts.engine, parts.splits["test"], parts.greedy)
            before.judged()  # or there is nothing to measure by, which is reported while nothing has been made
        folder = resumed.folder if resumed else claim_folder(config)
        if resumed is None:
            held.enter_context(RunLock(folder))
            parts.spending.open(folder)
        with resumable_errors(folder):
            write_setup(folder, parts)
            team.remedy = f"resume with: {team.first(how_to_resume(folder))}"
            return Run(parts, folder, sinks, extension).begin(before, started, plan)


class Run:
    """The training run in progress; the caller holds the lock on its folder."""

    def __init__(
        self,
        parts: Parts,
        folder: Path,
        sinks: Sequence[Sink] = (),
        extension: Extension = Extension(),
        checkpoint: Checkpoint | None = None,
    ) -> None:
        """Open the run's files, cut back to ``checkpoint``, from which it resumes. Raises OSError and UserError."""
        self.folder, self.extension, self.team = folder, extension, parts.team
        self.done = 0 if checkpoint is None else checkpoint.step  # training steps
        self.stages = (parts, *parts.following)
        self.steps = self.stages[-1].schedule.end  # of all of them
        # those of the stage in progress
        self.parts = parts = next((stage for stage in self.stages if self.done < stage.schedule.end), self.stages[-1])
        self.saved: int | None = None  # steps done by the last checkpoint
        self.end: str | None = None  # why the run ends before its last step
        self.history = History()
        self.checkpoints = Checkpoints(folder / CHECKPOINTS, parts.checkpoint.keep)
        self.pace = Pace(parts.checkpoint.every)
        self.best: Any = None  # the engine's weights, at their best on the validation problems
        self.best_files: Path | None = None  # the same in a checkpoint; None as long as none has them
        self.cpu: float | None = time.process_time()  # at the end of the last step; None once it was found wanting
        self.started = self.trained = time.perf_counter()  # of the run and of training, as if never interrupted
        path, kept = folder / layout.METRICS, checkpoint.state["metrics_bytes"] if checkpoint else 0
        before = path.read_bytes() if parts.config.tracking.to and path.is_file() else b""  # what trackers were sent
        self.metrics = MetricsFile(path, kept)
        layout.drop_from(folder, self.done)
        config = parts.config
        self.view = RunView(self.steps, quiet=config.quiet, log=folder / layout.LOG)
        self.signal = StopSignal(self.view.stop if self.view.live else None)
        self.recorder = Recorder(folder, parts.splits["train"].pieces)
        self.trackers = open_trackers(config, folder, before, kept)
        self.sinks = Sinks([] if self.team.rank else [self.recorder, *self.trackers, *sinks, self.view])
        self.stopping = 0  # the number of the signal that a rank got

    def begin(self, before: Evaluation | None, started: float, plan: Plan | None) -> Path:
        """Train from the start: ``before`` is the test evaluation, ``started`` its time, ``plan`` what fits."""
        with self._open():
            self.started = started
            self.view.print(f"{self.parts.title}; the run is in {self.folder}")
            self.parts.spending.enter(0)
            if plan is not None and plan.shrunk:
                self.view.print(f"made smaller to fit into memory, without effect on results: {plan}")
            self.extension.begin(self.parts, self.folder, 0)
            self.history.before = rate = self.evaluate("test", 0, before)
            if rate is not None:
                self.view.print(f"before training: {rate} of {rate.total} test problems right, greedy (95% interval)")
            self.validate(0)
            self.checkpoint()
            self.trained = time.perf_counter()
            self._train()
        return self.folder

    def resume(self, checkpoint: Checkpoint, remarks: Sequence[str]) -> Path:
        """Train on from ``checkpoint``, after printing the ``remarks`` on how it was found."""
        state, parts = checkpoint.state, self.parts
        same_stage = state.get("stage", 0) == parts.schedule.first
        with self._open():
            parts.spending.allow(checkpoint.step)
            for line in remarks:
                self.view.print(line)
            parts.engine.read_state(checkpoint.path)
            self.best_files = checkpoint.path / "best"
            self.best = parts.engine.read_weights(self.best_files)
            self.history.load_state_dict(state["history"])
            self.history.rows = self.metrics.rows("train")
            self.view.rows = list(self.history.rows)
            if state["curriculum"] is not None and same_stage:
                parts.curriculum.load_state_dict(state["curriculum"])
            if parts.controller is not None and state["sepa"] is not None and same_stage:
                parts.controller.load_state_dict(state["sepa"])
            if parts.entropy is not None and same_stage:
                parts.entropy.coefficient = state["entropy_bonus"]
            of_ranks = state.get("streams_of_ranks", ())
            restore_streams(of_ranks[self.team.rank] if len(of_ranks) == self.team.size else state["streams"])
            now, seconds = time.perf_counter(), state["seconds"]
            self.started, self.trained = now - seconds["all"], now - seconds["training"]
            self.saved = checkpoint.step
            if remark := changed_versions(state["versions"], parts.versions):
                self.view.print(remark)
            parts.spending.try_out(parts.splits["train"])
            self.view.print(f"resuming {self.folder} after {self.done} of {self.steps} steps")
            self.extension.begin(parts, self.folder, self.done)
            (self.folder / layout.SUMMARY).unlink(missing_ok=True)
            write_whole(self.folder / layout.CONFIG, parts.config.model_dump_json(indent=2) + "\n")
            self._train()
        return self.folder

    @contextmanager
    def _open(self) -> Iterator[None]:
        """Hold the run's files, view and signals; after an error that does not say so itself, print how to resume."""
        try:
            with resumable_errors(self.folder), self.view, closing(self.metrics), closing(self.sinks), self.signal:
                try:
                    yield
                except BaseException as error:
                    for tracker in self.trackers:
                        tracker.exit_code = error.exit_code if isinstance(error, StoppedError) else 1
                    raise
        except TextPolicyError as error:
            if self.saved is not None and how_to_resume(self.folder) not in str(error):
                self.view.print(f"checkpoint of step {self.saved} kept; resume with: {how_to_resume(self.folder)}")
            raise

    def _train(self) -> None:
        """Take the steps that are left, and write what a run ends with."""
        for parts in self.stages:
            if self.done < parts.schedule.end and not self._stopped():
                self.parts = parts
                self._take_steps()
        parts = self.parts
        if self._stopped() and self.stopping:
            if self.saved != self.done:
                self.checkpoint()
            raise StoppedError(
                f"stopped by {signal.Signals(self.stopping).name} after {self.done} of "
                f"{self.steps} steps; resume with: {how_to_resume(self.folder)}",
                self.stopping,
            )
        seconds = time.perf_counter() - self.trained
        self.extension.on_end(self.done)
        assert self.history.best is not None
        self.history.kept_step, _ = self.history.best
        parts.engine.restore(self.best)
        parts.engine.save(self.folder / "adapter")
        sync_tree(self.folder / "adapter")
        self.history.after = self.evaluate("test", self.history.kept_step)
        self.team.part()
        self.finish(seconds, time.perf_counter() - self.started)

    def _stopped(self) -> bool:
        """Return whether the run ends before its last step, on all ranks alike."""
        self.stopping = max(self.team.exchange(self.signal.number or 0))
        return self.stopping > 0 or self.end is not None

    def _take_steps(self) -> None:
        """Take the steps of the stage in progress that are left."""
        parts, first = self.parts, self.done
        if parts.stage is not None:
            self.view.print(f"stage {parts.stage}: steps {first + 1} to {parts.schedule.end}")
        if parts.demonstrations:
            teach(
                parts.engine,
                parts.demonstrations,
                schedule=parts.schedule,
                rows_per_step=parts.rollout.prompts_per_step,
                seed=parts.config.seed,
                start=first,
                stopped=self._stopped,
                on_step=self.on_step,
            )
            return
        train(
            parts.engine,
            parts.splits["train"],
            parts.recipe,
            schedule=parts.schedule,
            prompts_per_step=parts.rollout.prompts_per_step,
            group_size=parts.rollout.group_size,
            sampling=parts.sampling,
            check=parts.check,
            teacher=parts.teacher,
            session=Session(
                start=first,
                curriculum=parts.curriculum,
                controller=parts.controller,
                entropy=parts.entropy,
                perturbed=self._perturbed,
                stopped=self._stopped,
                on_sampled=self.on_sampled,
            ),
            on_step=self.on_step,
        )

    def _perturbed(self, step: int) -> AbstractContextManager[None]:
        """Return the context of a step's work, in which the engine has the noise that the settings ask for."""
        parts, sigma = self.parts, self.parts.rollout.norm_noise
        if not sigma:
            return nullcontext()
        done, steps = step - parts.schedule.first, parts.schedule.steps
        engine: Any = parts.engine  # a local one
        noisy: AbstractContextManager[None] = engine.noisy(
            annealed(sigma, done / max(1, steps - 1)), parts.sampling.reseeded(step, _NOISE).seed
        )
        return noisy

    def on_sampled(self, step: int, episodes: Sequence[Episode]) -> Row:
        """Record what a server was paid for before the update, which may fail; credit follows after it."""
        self.parts.spending.sampled(step, lambda: self.recorder.step(step, {}, episodes))
        return self.extension.on_sampled(step, episodes)

    def on_step(self, step: int, row: Row, episodes: Sequence[Episode]) -> None:
        """Record a step, evaluate and write a checkpoint where due, and find out whether a limit ends the run."""
        self.done = done = step + 1
        self.say_if_slowed(row)
        row = {**row, **self.parts.spending.row}
        if self.team.size > 1:
            local: Any = self.parts.engine
            row = {**row, **self.team.figures(local.digest())}
        row = {**row, **self.extension.on_row(step, row, episodes)}
        self.history.rows.append(row)
        self.sinks.step(step, row, episodes)
        self.metrics.write(
            {"kind": "train", **({} if self.parts.stage is None else {"stage": self.parts.stage}), **row}
        )
        last, due = done == self.parts.schedule.end, done % self.parts.evaluation.every == 0  # last of its stage
        examples = episodes[:: self.parts.rollout.group_size]
        better = self.validate(done, examples) if due or last else False
        if not last:
            self.end = self.parts.spending.reason_to_end(done)
            last = self.end is not None
            if last and not due:
                better = self.validate(done, examples)
        if last or better or self.team.first(self.pace.due(done)):
            self.checkpoint()
        # steps in a row that moved nothing because an update was not finite, where the engine counts those
        skips = (row["updated"] == 0 and row.get("skipped", 0) > 0 for row in reversed(self.history.rows))
        skipped = sum(1 for _ in itertools.takewhile(bool, skips))
        if skipped >= self.parts.max_skipped:
            raise UserError(
                f"the loss or gradient of {latest(skipped, 'step')} was not finite; lower "
                "optimizer.learning_rate, load the model in float32, or look for huge rewards (optimizer.max_skipped)"
            )

    def say_if_slowed(self, row: Row) -> None:
        """Say once that other programs slow the steps down, where BLAS threads are left at their default."""
        if self.cpu is None or self.parts.config.engine != "mlx" or self.parts.config.machine.threads:
            return
        from ..mlx.blas import starved

        before, self.cpu = self.cpu, time.process_time()  # seconds of all threads
        if note := starved(row["sample_seconds"] + row["update_seconds"], self.cpu - before):
            self.view.print(note)
            self.cpu = None

    def evaluate(self, split: str, steps: int, found: Evaluation | None = None) -> Rate | None:
        """Evaluate greedily, or take what was ``found``, and record it; None where that is skipped."""
        parts = self.parts
        if found is None:
            if split not in parts.splits:
                return None
            if reason := parts.spending.reason_to_skip(split):
                self.view.print(f"the {split} problems are not evaluated after {counted(steps, 'step')}: {reason}")
                return None
            found = evaluate(parts.engine, parts.splits[split], parts.greedy)
        rate = found.accuracy
        row = {"kind": "eval", "step": steps, "split": split, "accuracy": rate.value, "problems": rate.total}
        row["solved"] = "".join(str(int(answers[0])) for answers in found.judged())  # 1 or 0 per judged problem
        self.sinks.evaluated(steps, split, row, found.episodes)
        if self.extension.eval_rows:
            self.metrics.write(row)
        parts.spending.enter(steps)
        return rate

    def validate(self, steps: int, examples: Sequence[Episode] = ()) -> bool:
        """Show some ``examples``, evaluate the validation problems, and keep the weights if they were never better.

        Without such an evaluation the latest weights are kept. Returns whether these were.
        """
        for e in examples[:3]:
            self.view.example(e)
        if shown := self.parts.held_out:
            loss = held_out_loss(self.parts.engine, shown)
            self.view.print(f"   loss on {counted(len(shown), 'held-out demonstration')}: {loss:.4f} nats per token")
            self.metrics.write({"kind": "eval_loss", "step": steps, "loss": loss, "demonstrations": len(shown)})
        rate = self.evaluate("validation", steps)
        if rate is not None:
            self.history.validation.append((steps, rate))
            self.view.print(f"   validation after {counted(steps, 'step')}: {rate}")
            if n := self.parts.evaluation.samples:  # measure avg@n and pass@n too, which choose nothing
                result = evaluate(self.parts.engine, self.parts.splits["validation"], self.parts.sampling, n)
                average, passed = result.average, result.pass_at(n)
                self.view.print(f"   sampled: avg@{n} {average}, pass@{n} {passed}")
                figures = {f"avg@{n}": average.value, f"pass@{n}": passed.value, "problems": average.problems}
                row = {"kind": "eval_sampled", "step": steps, "split": "validation", "samples": n, **figures}
                self.sinks.evaluated(steps, "validation", row, result.episodes)
                self.metrics.write(row)
                group = self.parts.rollout.group_size
                if not steps and all(len(answers) >= group for answers in result.judged()):
                    self.view.print(f"   {StartGate.of(result, group).advice}")
        best = self.history.best[1] if self.history.best else None
        better = rate is None or best is None or rate.value >= best.value
        if better:
            self.history.best, self.best, self.best_files = (steps, rate), self.parts.engine.weights(), None
        return better

    def finish(self, train_seconds: float, seconds: float) -> None:
        """Write the report and the summary, which is last because it says that the run is complete."""
        if self.team.rank:
            return
        from ..report.page import write_report
        from ..report.words import stage_line

        train, spending = self.parts.splits["train"], self.parts.spending
        env = self.parts.splits.get("test", train)
        question = env.examples[0].get("question", env.prompt_text(0))
        self.metrics.sync()
        stages = load_run(self.folder).stages
        rows = [*closing_table(self.history, self.folder, train_seconds, seconds), *spending.lines]
        rows[2:2] = [("stage", stage_line(stage)) for stage in stages]
        write_report([self.folder], self.folder / layout.REPORT)
        figures = {**summary(self.history, train_seconds), **spending.row, **({"stages": stages} if stages else {})}
        write_whole(self.folder / layout.SUMMARY, json.dumps(figures, indent=2) + "\n")
        self.view.table("done", rows, next_commands(self.folder, question))
        if self.end is not None:
            self.view.print(f"ended early: {self.end}; with a higher limit it resumes: {how_to_resume(self.folder)}")
        for line in last_lines(examine(self.folder)):
            self.view.print(line)

    # ---- checkpoints

    def checkpoint(self) -> None:
        """Write a checkpoint of the steps done so far."""
        assert self.history.best is not None
        parts, of_ranks = self.parts, self.team.exchange(streams())
        if self.team.rank:
            self.saved = self.done
            return

        def fill(folder: Path) -> None:
            parts.engine.write_state(folder)
            if self.best_files is None:
                parts.engine.write_weights(self.best, folder / "best")
            else:
                link_tree(self.best_files, folder / "best")

        with self.pace.timed():
            now = time.perf_counter()
            state = {
                "history": self.history.state_dict(),
                "stage": parts.schedule.first,
                "curriculum": parts.curriculum.state_dict(),
                "sepa": None if parts.controller is None else parts.controller.state_dict(),
                "entropy_bonus": None if parts.entropy is None else parts.entropy.coefficient,
                "streams": of_ranks[0],
                **({"streams_of_ranks": of_ranks} if self.team.size > 1 else {}),
                "seconds": {"all": now - self.started, "training": now - self.trained},
                "config": json.loads(parts.config.model_dump_json()),
                "versions": parts.versions,
                "metrics_bytes": self.metrics.sync(),
            }
            written = self.checkpoints.write(self.done, state, fill, best=self.history.best[0])
            self.best_files, self.saved = written.path / "best", self.done
