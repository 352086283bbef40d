"""Read from a finished run folder what a campaign needs: its held-out curve, its one number, and its cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..analysis.curves import summarize_curve
from ..errors import UserError
from ..record.layout import MATH_EVALS
from ..record.reader import load_run
from .settings import Prices, Summary


@dataclass(frozen=True, slots=True)
class Point:
    """The accuracy on held-out problems after so many steps."""

    step: int
    accuracy: float
    problems: int


@dataclass(frozen=True, slots=True)
class Cost:
    """The tokens and the time of one run."""

    sampled_tokens: int  # tokens of completions
    trained_tokens: int  # tokens of the sequences that updates read, prompts included
    seconds: float  # wall-clock: of the process if a campaign ran it, else of its steps

    def money(self, prices: Prices) -> float:
        """Return the cost in the currency of the prices."""
        tokens = self.sampled_tokens * prices.sampled_per_million + self.trained_tokens * prices.trained_per_million
        return tokens / 1e6 + self.seconds / 3600 * prices.hour


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
    value, solved = judged["accuracy"], judged.get("solved")
    if summary == "auc":
        value, solved = summarize_curve([p.accuracy for p in curve], steps=[p.step for p in curve]).auc, None
    if seconds is None:
        seconds = sum(row.get("sample_seconds", 0) + row.get("update_seconds", 0) for row in steps)
    return Outcome(
        arm=arm,
        seed=seed,
        value=value,
        problems=int(judged["problems"]),
        curve=curve,
        solved=solved if isinstance(solved, str) and set(solved) <= {"0", "1"} else None,
        cost=Cost(
            sampled_tokens=int(sum(row.get("sampled_tokens", 0) for row in steps)),
            trained_tokens=int(sum(row.get("trained_tokens", 0) for row in steps)),
            seconds=seconds,
        ),
    )


def solved_by_run(outcomes: Sequence[Outcome]) -> np.ndarray | None:
    """Return (S, P) 0 or 1 for runs on the same problems; None where a run did not record them."""
    marks = [o.solved for o in outcomes]
    if any(m is None for m in marks) or len({len(m) for m in marks if m is not None}) != 1:
        return None
    return np.array([[int(c) for c in m] for m in marks if m is not None])
