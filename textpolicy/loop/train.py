"""The training loop, for any engine; evaluation, logging and checkpoints belong to the caller, in ``on_step``."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence
from contextlib import AbstractContextManager, nullcontext
from dataclasses import dataclass, replace

from ..algorithms import Algorithm
from ..algorithms.entropy_bonus import EntropyControl
from ..algorithms.sepa import SEPAController
from ..engine import Engine, Sampling
from ..environment.base import DrivenEnv
from ..environment.single_turn import TextGenerationEnv
from ..types import Episode
from .collect import collect, collect_informative, with_reference
from .curriculum import EveryPrompt
from .metrics import Row, summarize
from .on_policy import OnPolicyCheck
from .teacher import Teacher, teacher_kl


@dataclass(frozen=True)
class Schedule:
    """The number of steps, the updates in each, and the learning rate: linear warm-up, then linear decay."""

    peak: float
    steps: int
    warmup: int = 0  # steps
    final: float = 1.0  # rate of the last step, as a share of the peak
    updates: int = 1  # optimiser steps on the rollouts of one step
    first: int = 0  # steps of the stages before

    @property
    def end(self) -> int:
        """The number of steps done after the last one."""
        return self.first + self.steps

    def steps_from(self, done: int) -> range:
        """Return the numbers of the steps that are left after so many were done."""
        return range(max(done, self.first), self.end)

    def __call__(self, step: int) -> float:
        """Return the learning rate of ``step``, a number in ``range(first, end)``."""
        step -= self.first
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup - 1)
        return self.peak * (1 - (1 - self.final) * min(1.0, progress))


def annealed(sigma: float, progress: float) -> float:
    """Return the noise after a share ``progress`` of the steps: ``sigma`` at first, a twentieth at the end.

    It falls exponentially, from 0.01 to 0.0005 in QeRL (arXiv:2510.11696).
    """
    return float(sigma * 0.05**progress)


@dataclass(frozen=True)
class Session:
    """The state from which a run starts or resumes, and its hooks inside a step."""

    start: int = 0  # steps done before
    curriculum: EveryPrompt | None = None  # None: every prompt once before any is drawn again
    controller: SEPAController | None = None  # of SEPA; None: a fresh one, where the algorithm pools
    entropy: EntropyControl | None = None  # of the entropy bonus; None: a fresh one, where the algorithm has one
    perturbed: Callable[[int], AbstractContextManager[None]] = lambda step: nullcontext()  # around a step's work
    stopped: Callable[[], bool] = lambda: False  # ends the run between steps, or discards a step before its update
    on_sampled: Callable[[int, Sequence[Episode]], Row] = lambda step, episodes: {}  # before the update; adds metrics


def train(
    engine: Engine,
    env: TextGenerationEnv | DrivenEnv,
    algorithm: Algorithm,
    *,
    schedule: Schedule,
    prompts_per_step: int,
    group_size: int,
    sampling: Sampling,
    check: OnPolicyCheck | None = None,
    teacher: Teacher | None = None,
    session: Session = Session(),
    on_step: Callable[[int, Row, Sequence[Episode]], None] = lambda step, row, episodes: None,
) -> None:
    """Sample, score, credit and update, ``schedule.steps`` times. ``sampling.seed`` fixes every draw.

    A recipe that distils needs a ``teacher``.

    ``on_step`` gets each step's number, from 0, its metrics and all its episodes, with credit where trained on.
    """
    curriculum = session.curriculum or EveryPrompt(len(env), sampling.seed)
    controller = session.controller or algorithm.controller()
    entropy = session.entropy or algorithm.entropy_control()
    for step in schedule.steps_from(session.start):
        if session.stopped():
            return
        started = time.perf_counter()

        def draw(n: int, step: int = step) -> list[Episode]:
            prompts = curriculum.draw(step, prompts_per_step, n)
            drawn = sampling.reseeded(step, *([n] if n else []))
            return collect(engine, env, prompts, group_size, drawn, n * prompts_per_step, algorithm.grams is not None)

        with session.perturbed(step):  # sampler and learner alike
            rollouts = collect_informative(draw, algorithm.resample, algorithm.signal_of)
            if session.stopped():
                return
            sampled = time.perf_counter()
            extra = session.on_sampled(step, rollouts.sampled)
            gap = check(engine, step - schedule.first, rollouts.sampled) if check else None
            episodes = with_reference(engine, rollouts.trained) if algorithm.reward_kl else rollouts.trained
            if teacher is not None and teacher.beta is not None:  # whole distributions, and no rewards
                updates = [teacher.update(engine, env, episodes, algorithm, schedule(step))]
                shown = episodes
            else:
                if teacher is not None:
                    episodes = teacher.teach(engine, env, episodes)
                    extra = {**extra, "teacher_kl": teacher_kl(episodes)}
                tokens = algorithm.tokens(episodes, controller)
                if entropy is not None:
                    extra = {**extra, "entropy_bonus": entropy.advance(episodes)}
                batches = algorithm.pack(episodes, tokens, schedule.updates, extra.get("entropy_bonus", 0.0))
                if algorithm.surrogate.correction and len(batches) > 1:
                    batches = [replace(batch, old=engine.score(batch)) for batch in batches]
                updates = [engine.update(batch, algorithm.surrogate, schedule(step)) for batch in batches]
                shown = algorithm.credited(episodes, tokens)
            updated = time.perf_counter()
            change = check.after(engine, step - schedule.first, rollouts.sampled) if check else {}
        measured = {**(gap.row if gap else {}), **change}
        row = summarize(rollouts, updates, sampled - started, updated - sampled)
        pooling = {"sepa_lambda": controller.strength} if controller else {}
        if not all(math.isnan(e.reward) for e in rollouts.sampled):
            curriculum.observe(rollouts.outcomes)
        row = {"step": step, "learning_rate": schedule(step), **row, **extra, **measured, **pooling, **curriculum.row}
        on_step(step, row, rollouts.handed_out(shown, gap.learner if gap else {}))
