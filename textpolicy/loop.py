"""The training loop. One page, one engine at a time, local or remote.

Evaluation, logging and checkpoints are the caller's, in ``on_step``.
"""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace

import numpy as np

from .algorithms import Algorithm
from .engine import Engine, Sampling
from .environment.text_generation import TextGenerationEnv
from .metrics import Row, summarize
from .rollout.collect import collect
from .types import Episode


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
    env: TextGenerationEnv,
    algorithm: Algorithm,
    *,
    schedule: Schedule,
    prompts_per_step: int,
    group_size: int,
    sampling: Sampling,
    on_step: Callable[[int, Row, Sequence[Episode]], None] = lambda step, row, episodes: None,
) -> None:
    """Sample, score, credit, update; ``schedule.steps`` times. ``sampling.seed`` fixes every draw."""
    for step in range(schedule.steps):
        started = time.perf_counter()
        prompts = draw_prompts(step, prompts_per_step, len(env), sampling.seed)
        episodes = collect(engine, env, prompts, group_size, replace(sampling, seed=_step_seed(sampling.seed, step)))
        sampled = time.perf_counter()
        update = engine.update(algorithm.credit(episodes), algorithm.surrogate, schedule(step))
        updated = time.perf_counter()
        row = summarize(episodes, update, sampled - started, updated - sampled)
        on_step(step, {"step": step, "learning_rate": schedule(step), **row}, episodes)


def draw_prompts(step: int, count: int, total: int, seed: int) -> list[int]:
    """The prompts of a step: every one is drawn once before any is drawn again, in a shuffled order."""
    places = range(step * count, (step + 1) * count)
    return [int(_epoch_order(place // total, total, seed)[place % total]) for place in places]


def _epoch_order(epoch: int, total: int, seed: int) -> np.ndarray:
    return np.random.default_rng([seed, epoch]).permutation(total)


def _step_seed(seed: int, step: int) -> int:
    return int(np.random.SeedSequence([seed, step]).generate_state(1)[0])
