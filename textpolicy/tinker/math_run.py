"""One run of ``train_math``: what it logs, when it looks at held-out problems, keeps a checkpoint, and ends."""

from __future__ import annotations

import time
from collections.abc import Sequence
from typing import TYPE_CHECKING, Any, Protocol

import numpy as np

from ..algorithms.pipeline import Algorithm
from ..algorithms.planning import planning_masks
from ..algorithms.sepa import SEPAController
from ..analysis.sepa.emergence import EmergenceLogger
from ..engine import Engine, Sampling
from ..environment.single_turn import TextGenerationEnv
from ..loop.evaluation import Rate, evaluate
from ..loop.metrics import Row
from ..loop.train import Schedule, Session, train
from ..tasks import Problem, Task
from ..types import Episode
from .advantages import surprisal_statistics
from .money import Metered, Tokens, Workload
from .preflight import preflight
from .progress import Progress, RunFolder

if TYPE_CHECKING:
    from .train_math import TrainMathArguments


class Remote(Engine, Protocol):
    """An engine whose model, tokenizer and checkpoints are on a server."""

    tokenizer: Any

    def save_state(self, name: str) -> str:
        """Keep weights and optimiser under ``name``; the path there."""

    def close(self, status: str = "success") -> None:
        """End the session: success, errored or interrupted."""


class MathRun:
    """A run in progress, from ``progress`` on."""

    def __init__(
        self,
        asked: TrainMathArguments,
        remote: Remote,
        how: Algorithm,
        task: Task,
        folder: RunFolder,
        progress: Progress,
    ) -> None:
        """Tokenise the problems. Raises UserError."""
        self.asked, self.remote, self.how, self.folder = asked, remote, how, folder
        self.engine = Metered(remote, progress.spent)
        self.env = _environment(task, task.train, remote.tokenizer, asked.max_tokens)
        self.held_out = _environment(task, task.test[: asked.eval_problems or None], remote.tokenizer, asked.max_tokens)
        self.begun, self.correct, self.judged = progress, progress.correct, progress.judged
        self.sepa = _controller(how, progress)
        self.logger = EmergenceLogger(
            folder.path / "emergence",
            strategic_grams=None if how.grams is None else how.grams.phrases,
            max_completion_tokens=asked.max_tokens,
        )
        self.work = workload(asked, _longest(self.env, self.held_out), len(self.held_out))
        self.end: str | None = None  # why the run ends early

    def train(self) -> None:
        """All steps that are left, within the limits. Raises UserError and ServiceError."""
        preflight(self.engine, self.env, self.asked.temperature)
        with self.folder.claim():
            self.folder.begin(self.asked.model_dump(mode="json"), self.begun)
            self._introduce()
            self._look_if_missed()
            self._stop_before(self.work.step)
            self._steps()
            if self.end is not None:
                self._say(f"ended early: {self.end}; --resume goes on with higher limits")

    def _steps(self) -> None:
        asked = self.asked
        train(
            self.engine,
            self.env,
            self.how,
            schedule=Schedule(asked.lr, asked.max_steps),
            prompts_per_step=asked.batch_size,
            group_size=asked.group_size,
            sampling=Sampling(asked.max_tokens, asked.temperature, seed=asked.seed),
            session=Session(
                start=self.begun.step,
                controller=self.sepa,
                stopped=lambda: self.end is not None,
                on_sampled=self.before_update,
            ),
            on_step=self.on_step,
        )

    def before_update(self, step: int, episodes: Sequence[Episode]) -> Row:
        """Everything sampled is on the disk, and its price in the ledger, before it is learned from."""
        self.engine.sequences = 0
        self.logger.log_step(step, episodes, self.remote.tokenizer, extra_step_metrics={"condition": self.condition})
        self._write_down(step)
        return {} if self.how.grams is None else _surprisals(self.how, episodes)

    def on_step(self, step: int, row: Row, episodes: Sequence[Episode]) -> None:
        """Log the step, keep a checkpoint and look at held-out problems where due, and see whether to go on."""
        self.correct += sum(bool(e.is_correct) for e in episodes)
        self.judged += sum(e.is_correct is not None for e in episodes)
        line = {**row, **self._documented(row)}
        self.folder.append("metrics.jsonl", line)
        self._say(_step_line(line, self.engine.spent))
        done = step + 1
        last = done == self.asked.max_steps
        if last or _due(self.asked.save_every, done):
            self.checkpoint("final" if last else f"checkpoint_step_{done}", done)
        looks = last or _due(self.asked.eval_every, done)
        if looks:
            self.look(done)
        if not last:
            self._stop_before(self.work.step)
        if self.end is not None:
            self.checkpoint("final", done)
            if not looks:
                self.look(done)

    def look(self, done: int) -> None:
        """Answer the held-out problems greedily, if the limits leave room for it."""
        if not self.asked.eval_every:
            return
        reason = self.asked.limits.reason_to_stop(self.engine.spent, self.work.look, self.asked.prices)
        if reason is not None:
            self._say(f"no look at held-out problems after {done} steps: {reason}")
            return
        rate = evaluate(self.engine, self.held_out, Sampling(self.asked.max_tokens, 0.0, seed=self.asked.seed)).accuracy
        self.folder.append("evals.jsonl", _eval_line(done, rate))
        self._write_down(done)
        self._say(f"after {done} steps: {rate} of {rate.total} held-out problems right, greedy (95% interval)")

    def checkpoint(self, name: str, done: int) -> None:
        """Keep weights and optimiser on the server, and write down where."""
        path = self.remote.save_state(name)
        sepa = None if self.sepa is None else self.sepa.state_dict()
        progress = Progress(done, self.correct, self.judged, self.engine.spent, path, sepa)
        self.folder.append("checkpoints.jsonl", progress.line(name))

    @property
    def condition(self) -> str:
        """The modes as one word, by which campaigns tell their arms apart."""
        return "+".join(self.asked.modes)

    # ---- private

    def _look_if_missed(self) -> None:
        """The look before the first step, or the one that a run cut short after its checkpoint did not come to."""
        done = self.begun.step
        wanted = done in (0, self.asked.max_steps) or _due(self.asked.eval_every, done)
        if wanted and done not in {line["step"] for line in self.folder.lines("evals.jsonl")}:
            self.look(done)

    def _documented(self, row: Row) -> dict[str, Any]:
        """The keys of metrics.jsonl that the documentation names."""
        advantage, transform = self.asked.modes
        return {
            "algorithm": self.asked.algorithm or ("full" if self.asked.modes == ("maxrl", "gtpo_sepa_hicra") else None),
            "advantage_mode": advantage,
            "transform_mode": transform,
            "condition": self.condition,
            "mean_reward": row.get("reward_mean"),
            "correct_rate": row.get("accuracy"),
            "running_correct_rate": self.correct / self.judged if self.judged else None,
            "sepa_lambda": 0.0 if self.sepa is None else self.sepa.strength,
            "sepa_gate_open": self.sepa is not None and self.sepa.gate_open,
            "num_datums": self.engine.sequences,
            "max_token_hit_rate": row["truncated"],
            "step_time_s": row["sample_seconds"] + row["update_seconds"],
            "tokens_spent": self.engine.spent.total,
            **({"cost": self.asked.prices.cost(self.engine.spent)} if self.asked.prices.known else {}),
        }

    def _introduce(self) -> None:
        first, asked = self.begun.step, self.asked
        begins = f"resumed at step {first}" if first else "training"
        self._say(
            f"{begins}: {self.condition} on {asked.model}, {asked.max_steps} steps; the run is in {asked.log_dir}"
        )
        if asked.temperature != 1:
            self._say(
                f"samples at temperature {asked.temperature:g} are scored at 1, which is what the service gives: the "
                "update takes them for samples at 1, and --temperature 1 makes that true"
            )

    def _write_down(self, step: int) -> None:
        self.folder.enter(step, self.engine.spent)

    def _stop_before(self, coming: Tokens) -> None:
        self.end = self.asked.limits.reason_to_stop(self.engine.spent, coming, self.asked.prices)

    def _say(self, text: str) -> None:
        print(text, flush=True)


def workload(asked: TrainMathArguments, prompt_tokens: int, problems: int) -> Workload:
    """The size of the run; ``prompt_tokens`` are those of the longest prompt."""
    return Workload(
        asked.max_steps, asked.batch_size, asked.group_size, prompt_tokens, asked.max_tokens, problems, asked.looks
    )


def _environment(task: Task, problems: Sequence[Problem], tokenizer: Any, max_tokens: int) -> TextGenerationEnv:
    prompts, examples = [task.prompt(p.question) for p in problems], [p.example for p in problems]
    return TextGenerationEnv(prompts, task.reward, max_tokens, tokenizer=tokenizer, examples=examples)


def _due(every: int, done: int) -> bool:
    return every > 0 and done % every == 0


def _longest(*envs: TextGenerationEnv) -> int:
    """Tokens of the longest prompt."""
    return max(len(env.prompt_ids(i)) for env in envs for i in range(len(env)))


def _controller(how: Algorithm, progress: Progress) -> SEPAController | None:
    if how.pooling is None:
        return None
    controller = how.pooling.controller()
    if progress.sepa is not None:
        controller.load_state_dict(progress.sepa)
    return controller


def _surprisals(how: Algorithm, episodes: Sequence[Episode]) -> Row:
    """Mean and variance of the surprisals of execution and of planning tokens, under their documented names."""
    assert how.grams is not None
    planning = planning_masks([e.pieces for e in episodes], how.grams)
    return surprisal_statistics(np.concatenate([e.logprobs[e.mask] for e in episodes]), planning)


def _eval_line(done: int, rate: Rate) -> dict[str, Any]:
    low, high = rate.interval
    figures = {"accuracy": rate.value, "low": low, "high": high, "problems": rate.total}
    return {"kind": "eval", "step": done, "split": "test", **figures, "time": time.time()}


def _step_line(line: dict[str, Any], spent: Tokens) -> str:
    reward = "none scored" if line["mean_reward"] is None else f"{line['mean_reward']:.3f}"
    right = "" if line["correct_rate"] is None else f"  correct {line['correct_rate']:4.0%}"
    cost = f"  cost {line['cost']:.2f}" if "cost" in line else ""
    return (
        f"step {line['step'] + 1:4d}  reward {reward}{right}  sequences learned from {line['num_datums']}  "
        f"length {line['length_mean']:.0f}  SEPA {line['sepa_lambda']:.2f}  {line['step_time_s']:.1f} s  "
        f"{spent.total:,} tokens{cost}"
    )
