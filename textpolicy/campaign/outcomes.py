"""What a finished run folder holds that a campaign reads: its held-out curve, its one number, and what it cost."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from ..analysis.curves import summarize_curve
from ..analysis.sepa.emergence_runs import read_rows
from ..errors import UserError
from .settings import Prices, Summary


@dataclass(frozen=True, slots=True)
class Point:
    """Accuracy on held-out problems after so many steps."""

    step: int
    accuracy: float
    problems: int


@dataclass(frozen=True, slots=True)
class Cost:
    """What one run took."""

    sampled_tokens: int  # tokens of completions
    trained_tokens: int  # tokens of the sequences that updates read, prompts included
    seconds: float  # wall-clock: of the process where a campaign ran it, else of its steps

    def money(self, prices: Prices) -> float:
        """In the currency of the prices."""
        tokens = self.sampled_tokens * prices.sampled_per_million + self.trained_tokens * prices.trained_per_million
        return tokens / 1e6 + self.seconds / 3600 * prices.hour


@dataclass(frozen=True, slots=True)
class Outcome:
    """A finished run."""

    arm: str
    seed: int
    value: float  # the summary that the campaign is about, a share of 1
    problems: int  # it was measured on
    curve: tuple[Point, ...]
    solved: str | None  # one 0 or 1 per problem of ``value``; None where the run did not say, or for a curve's area
    cost: Cost


def read_outcome(folder: Path, arm: str, seed: int, summary: Summary, seconds: float | None = None) -> Outcome:
    """The run in ``folder``, summed up as ``summary`` says: of `textpolicy train`, or of train_math.

    Raises UserError for a run that never looked at held-out problems.
    """
    looks = _looks(folder)
    steps = [row for row in read_rows(folder / "metrics.jsonl") if row.get("kind", "train") == "train"]
    curve = tuple(Point(row["step"], row["accuracy"], row["problems"]) for row in looks.during)
    judged = looks.kept if summary == "kept" else looks.during[-1]
    auc = summarize_curve([p.accuracy for p in curve], steps=[p.step for p in curve]).auc
    return Outcome(
        arm=arm,
        seed=seed,
        value=auc if summary == "auc" else judged["accuracy"],
        problems=judged["problems"],
        curve=curve,
        solved=None if summary == "auc" else judged.get("solved"),
        cost=Cost(
            sampled_tokens=_total(steps, "sampled_tokens"),
            trained_tokens=_total(steps, "trained_tokens"),
            seconds=sum(row["sample_seconds"] + row["update_seconds"] for row in steps) if seconds is None else seconds,
        ),
    )


@dataclass(frozen=True, slots=True)
class _Looks:
    """Rows about held-out problems."""

    during: list[dict[str, Any]]  # on one set, while it learned; the last is after the last step
    kept: dict[str, Any]  # on the test problems, with what the run keeps


def _looks(folder: Path) -> _Looks:
    """train_math looks at test problems, chooses nothing by them, and keeps its last weights."""
    of_math = read_rows(folder / "evals.jsonl")
    rows = of_math or [row for row in read_rows(folder / "metrics.jsonl") if row["kind"] == "eval"]
    during = of_math or [row for row in rows if row["split"] == "validation"]
    after = [row for row in rows if row["split"] == "test"]
    if not during or not after:
        raise UserError(f"{folder} has no look at held-out problems; run it again, with some")
    return _Looks(during, after[-1])


def solved_by_run(outcomes: Sequence[Outcome]) -> np.ndarray | None:
    """(S, P) 0 or 1 of runs on the same problems; None where a run did not say."""
    marks = [o.solved for o in outcomes]
    if any(m is None for m in marks) or len({len(m) for m in marks if m is not None}) != 1:
        return None
    return np.array([[int(c) for c in m] for m in marks if m is not None])


def _total(rows: Sequence[dict[str, Any]], name: str) -> int:
    return int(sum(row.get(name, 0) for row in rows))
