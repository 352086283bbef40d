"""Read from a finished run folder what a campaign needs: its held-out curve, its one number, and its cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.curves import summarize_curve
from ..errors import UserError
from ..record.layout import MATH_EVALS
from ..record.reader import load_run, marks
from .settings import Prices, Summary


@dataclass(frozen=True, slots=True)
class Point:
    """The accuracy on held-out problems after so many steps."""

    step: int
    accuracy: float
    problems: int


@dataclass(frozen=True, slots=True)
class Cost:
    """The tokens and the time of one run, or of several; None where a step did not record them."""

    sampled_tokens: int | None  # tokens of completions
    trained_tokens: int | None  # tokens of the sequences that updates read, prompts included
    seconds: float | None  # wall-clock: of the process if a campaign ran it, else of its steps

    @classmethod
    def total(cls, costs: Sequence[Cost]) -> Cost:
        """Return the sum of the ``costs``."""
        return cls(*(known_sum([getattr(cost, f.name) for cost in costs]) for f in fields(cls)))

    def money(self, prices: Prices) -> float | None:
        """Return the cost in the currency of the prices; None where what has a price is not known."""
        tokens = ((self.sampled_tokens, prices.sampled_per_million), (self.trained_tokens, prices.trained_per_million))
        parts = [(amount, price / 1e6) for amount, price in tokens] + [(self.seconds, prices.hour / 3600)]
        return known_sum([None if amount is None else amount * price for amount, price in parts if price])


@dataclass(frozen=True, slots=True)
class Outcome:
    """The result of a finished run."""

    arm: str
    seed: int
    value: float  # the campaign's summary, a share of 1
    problems: int  # that it was measured on
    curve: tuple[Point, ...]
    solved: str | None  # one 0 or 1 per problem of ``value``; None where the run recorded none, or for a curve's area
    cost: Cost


def read_outcome(folder: Path, arm: str, seed: int, summary: Summary, seconds: float | None = None) -> Outcome:
    """Read the run in ``folder``, of `textpolicy train` or of train_math, and reduce it to its ``summary``.

    ``seconds`` are those of its process, if known. Raises UserError for a run without a held-out evaluation.
    """
    rows = load_run(folder).rows
    steps, evaluations = ([row for row in rows if row["kind"] == kind] for kind in ("train", "eval"))
    during = [row for row in evaluations if row["split"] == "validation"]  # the last: after the last step
    kept = [row for row in evaluations if row["split"] == "test"][-1:]  # of the adapter that the run keeps
    if (folder / MATH_EVALS).exists():  # train_math chooses nothing by its evaluations, and keeps its last weights
        during, kept = evaluations, evaluations[-1:]
    if not during or not kept:
        raise UserError(f"{folder} has no evaluation on held-out problems; run it again, with some")
    curve = tuple(Point(row["step"], row["accuracy"], int(row["problems"])) for row in during)
    judged = kept[0] if summary == "kept" else during[-1]
    value, solved = judged["accuracy"], marks(judged)
    if summary == "auc":
        value, solved = summarize_curve([p.accuracy for p in curve], steps=[p.step for p in curve]).auc, None
    sampled, trained, *spent = (
        known_sum([row.get(name) for row in steps])
        for name in ("sampled_tokens", "trained_tokens", "sample_seconds", "update_seconds")
    )
    return Outcome(
        arm=arm,
        seed=seed,
        value=value,
        problems=int(judged["problems"]),
        curve=curve,
        solved=solved,
        cost=Cost(
            sampled_tokens=None if sampled is None else int(sampled),
            trained_tokens=None if trained is None else int(trained),
            seconds=known_sum(spent) if seconds is None else seconds,
        ),
    )


def known_sum(values: Sequence[Any]) -> Any:
    """Return the sum of the numbers; None if any is not known."""
    return None if None in values else sum(values)


def solved_by_run(outcomes: Sequence[Outcome]) -> np.ndarray | None:
    """Return (S, P) 0 or 1 for runs on the same problems; None where a run did not record them."""
    found = [o.solved for o in outcomes if o.solved is not None]
    if len(found) < len(outcomes) or len({len(solved) for solved in found}) != 1:
        return None
    return np.array([[int(mark) for mark in solved] for solved in found])
