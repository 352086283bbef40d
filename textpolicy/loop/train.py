"""The training loop. One page, one engine at a time, local or remote.

Evaluation, logging and checkpoints are the caller's, in ``on_step``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..algorithms import Algorithm
from ..algorithms.pipeline import Controller
from ..engine import Engine, Sampling
from ..environment.base import DrivenEnv
from ..environment.single_turn import TextGenerationEnv
from ..types import Episode
from .collect import collect, with_reference
from .curriculum import Curriculum
from .dynamic import collect_informative
from .metrics import Row, summarize
from .on_policy import OnPolicyCheck


@dataclass(frozen=True)
class Schedule:
    """Learning rate by step: linear warm-up, then linear decay to ``final`` times the peak."""

    peak: float
    steps: int
    warmup: int = 0
    final: float = 1.0

    def __call__(self, step: int) -> float:
        """The rate of ``step``, counted from 0."""
        if step < self.warmup:
            return self.peak * (step + 1) / self.warmup
        progress = (step - self.warmup) / max(1, self.steps - self.warmup - 1)
        return self.peak * (1 - (1 - self.final) * min(1.0, progress))


def train(
    engine: Engine,
    env: TextGenerationEnv | DrivenEnv,
    algorithm: Algorithm,
    *,
    schedule: Schedule,
    prompts_per_step: int,
    group_size: int,
    sampling: Sampling,
    updates_per_step: int = 1,
    check: OnPolicyCheck | None = None,
    on_sampled: Callable[[int, Sequence[Episode]], Row] = lambda step, episodes: {},
    curriculum: Curriculum | None = None,
    controller: Controller | None = None,
    start: int = 0,
    stopped: Callable[[], bool] = lambda: False,
    on_step: Callable[[int, Row, Sequence[Episode]], None] = lambda step, row, episodes: None,
) -> None:
    """Sample, score, credit, update; ``schedule.steps`` times. ``sampling.seed`` fixes every draw.

    Without a ``curriculum`` every prompt is drawn once before any is drawn again. A run that goes on gives the
    step to ``start`` with, its curriculum and its ``controller``, SEPA's. When ``stopped`` says so the loop ends
    between two steps, or gives up the one whose rollouts it has just sampled, before anything has changed.
    ``on_sampled`` is told of rollouts before the update, and what it says joins the step's metrics.
    """
    controller = controller or algorithm.controller()
    for step in range(start, schedule.steps):
        if stopped():
            return
        started = time.perf_counter()
        asked: list[int] = []  # the prompt of each group of this step

        def draw(n: int, step: int = step, asked: list[int] = asked) -> list[Episode]:
            if curriculum is not None:
                prompts = curriculum.draw(step, prompts_per_step, n)
            else:
                prompts = draw_prompts(step, prompts_per_step, len(env), sampling.seed, n)
            asked.extend(prompts)
            drawn = replace(sampling, seed=_step_seed(sampling.seed, step, n))
            first, spelled = n * prompts_per_step, algorithm.grams is not None
            return collect(engine, env, prompts, group_size, drawn, first_group=first, pieces=spelled)

        rollouts = collect_informative(draw, algorithm.resample, algorithm.signal_of)
        if stopped():
            return
        sampled = time.perf_counter()
        told = on_sampled(step, rollouts.sampled)
        gap = check(engine, step, rollouts.sampled) if check else None
        episodes = with_reference(engine, rollouts.trained) if algorithm.reward_kl else rollouts.trained
        tokens = algorithm.tokens(episodes, controller)
        batches = algorithm.pack(episodes, tokens, updates_per_step)
        if algorithm.surrogate.correction and len(batches) > 1:
            batches = [replace(batch, old=engine.score(batch)) for batch in batches]
        updates = [engine.update(batch, algorithm.surrogate, schedule(step)) for batch in batches]
        updated = time.perf_counter()
        change = check.after(engine, step, rollouts.sampled) if check else {}
        row = summarize(rollouts, updates, sampled - started, updated - sampled)
        pooling = {"sepa_lambda": controller.strength} if controller else {}
        course = _followed(curriculum, asked, rollouts.sampled)
        measured = {**(gap.row if gap else {}), **change}
        facts = {"step": step, "learning_rate": schedule(step), **row, **told, **measured, **pooling, **course}
        on_step(step, facts, rollouts.handed_out(algorithm.credited(episodes, tokens), gap.learner if gap else {}))


def _followed(curriculum: Curriculum | None, asked: Sequence[int], episodes: Sequence[Episode]) -> Row:
    """Tell the curriculum what came of the prompts, if anything could be scored; its state as metrics."""
    if curriculum is None:
        return {}
    if not all(np.isnan(e.reward) for e in episodes):
        curriculum.observe([(asked[e.group], e.is_correct) for e in episodes if e.is_correct is not None])
    return curriculum.row


def draw_prompts(step: int, count: int, total: int, seed: int, draw: int = 0) -> list[int]:
    """The prompts of a step: every one is drawn once before any is drawn again, in a shuffled order.

    ``draw`` above 0 is a further one of the same step, from orders of its own.
    """
    places = range(step * count, (step + 1) * count)
    return [int(_epoch_order(place // total, total, seed, draw)[place % total]) for place in places]


def _epoch_order(epoch: int, total: int, seed: int, draw: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch, *_of(draw)]).permutation(total)


def _step_seed(seed: int, step: int, draw: int) -> int:
    return int(np.random.SeedSequence([seed, step, *_of(draw)]).generate_state(1)[0])


def _of(draw: int) -> list[int]:
    return [draw] if draw else []
