"""Learn from demonstrations: cross-entropy on what the assistant says, through the engine of every other update."""

from __future__ import annotations

import time
from collections.abc import Callable, Sequence

import numpy as np

from ..engine import Engine
from ..errors import UserError
from ..losses import CrossEntropy, Surrogate
from ..types import Batch, Episode
from .curriculum import EveryPrompt
from .metrics import Row, merge
from .train import Schedule

IMITATION = Surrogate(CrossEntropy())
_MEASURED = ("loss", "grad_norm", "updated", "skipped", "peak_memory_bytes")  # of an update; nothing was sampled


def imitated(episodes: Sequence[Episode]) -> Batch:
    """Return the batch whose loss under ``IMITATION`` is -sum_t l_t / N over the N tokens of the episodes' masks."""
    return Batch.pack(episodes, [e.mask.astype(np.float32) for e in episodes], "token-mean")


def held_out_loss(engine: Engine, episodes: Sequence[Episode]) -> float:
    """Return the mean of -l_t over the tokens of the episodes' masks, in nats."""
    batch = imitated(episodes)
    return float(-(engine.score(batch).astype(np.float64) * batch.weights).sum())


def teach(
    engine: Engine,
    demonstrations: Sequence[Episode],
    *,
    schedule: Schedule,
    rows_per_step: int,
    seed: int = 0,
    start: int = 0,
    stopped: Callable[[], bool] = lambda: False,
    on_step: Callable[[int, Row, Sequence[Episode]], None] = lambda step, row, episodes: None,
) -> None:
    """Update on ``rows_per_step`` of the ``demonstrations`` in each step of ``schedule``, every row before any again.

    It goes on after ``start`` steps, and ends between steps once it is ``stopped``. ``on_step`` gets each step's
    number, its metrics and no episodes, since none were sampled. Raises UserError where there are fewer
    demonstrations than updates in a step.
    """
    if len(demonstrations) < schedule.updates:
        raise UserError(
            f"optimizer.updates_per_step is {schedule.updates} and there are {len(demonstrations)} demonstrations; "
            "lower it"
        )
    curriculum = EveryPrompt(len(demonstrations), seed)
    for step in schedule.steps_from(start):
        if stopped():
            return
        started = time.perf_counter()
        drawn = np.array_split(curriculum.draw(step - schedule.first, rows_per_step), schedule.updates)
        batches = [imitated([demonstrations[i] for i in rows]) for rows in drawn]
        measured = merge([engine.update(batch, IMITATION, schedule(step)) for batch in batches])
        row = {
            "step": step,
            "learning_rate": schedule(step),
            **{name: measured[name] for name in _MEASURED if name in measured},
            "learned_tokens": float(sum(int((batch.weights != 0).sum()) for batch in batches)),
            "trained_tokens": float(sum(len(demonstrations[i].tokens) for rows in drawn for i in rows)),
            "sampled_tokens": 0.0,
            "sample_seconds": 0.0,
            "update_seconds": time.perf_counter() - started,
        }
        on_step(step, row, ())
