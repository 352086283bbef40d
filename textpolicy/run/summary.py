"""The outcome of a run: its history, the closing table and summary.json."""

from __future__ import annotations

import shlex
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from .._system.terminal import counted
from ..loop.evaluation import Rate
from ..loop.metrics import Row

_LONGEST = 300  # characters of a question in a command


@dataclass
class History:
    """The results of a run so far: a row per step, a rate per evaluation."""

    rows: list[Row] = field(default_factory=list)
    validation: list[tuple[int, Rate]] = field(default_factory=list)  # (steps done, rate)
    best: tuple[int, Rate | None] | None = None  # (steps done, rate), the last of the highest; None: not evaluated
    before: Rate | None = None  # on the test problems; None where they are not evaluated
    after: Rate | None = None
    kept_step: int = 0

    def state_dict(self) -> dict[str, Any]:
        """Return what is not in metrics.jsonl, as plain JSON values."""
        return {
            "before": _counts(self.before),
            "validation": [[step, *_counts(rate)] for step, rate in self.validation],
            "best": None if self.best is None else [self.best[0], *_counts(self.best[1])],
        }

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Restore what ``state_dict`` returned."""
        self.before = Rate(*state["before"]) if state["before"] else None
        self.validation = [(step, Rate(*counts)) for step, *counts in state["validation"]]
        step, *counts = state["best"]
        self.best = (step, Rate(*counts) if counts else None)


def _counts(rate: Rate | None) -> list[int]:
    return [] if rate is None else [rate.correct, rate.total]


def closing_table(history: History, folder: Path, train_seconds: float, seconds: float) -> list[tuple[str, str]]:
    """Return (name, value) lines."""
    rows, before, after = history.rows, history.before, history.after
    tokens = sum(row["sampled_tokens"] for row in rows)
    sampling = sum(row["sample_seconds"] for row in rows)
    updating = sum(row["update_seconds"] for row in rows)
    table = []
    if before is not None and after is not None:
        gain = 100 * (after.value - before.value)
        kept = f"{gain:+z.1f} points; adapter of step {history.kept_step}, by validation"
        table = [
            ("before training", f"{before} of {after.total} held-out problems right, greedy (95% interval)"),
            ("after training", f"{after}, {kept}"),
        ]
    table += [
        ("training", f"{counted(len(rows), 'step')} in {train_seconds:.0f} s ({seconds:.0f} s with all evaluation)"),
        ("time", f"rollouts {sampling:.0f} s, updates {updating:.0f} s"),
    ]
    if tokens:
        speed = f"{tokens / (sampling + updating):.0f} tokens/s, rollouts and updates"
        table.append(("speed", f"{tokens:.0f} tokens sampled, {speed}"))
    if peaks := [row["peak_memory_bytes"] for row in rows if "peak_memory_bytes" in row]:  # of an engine here
        table.append(("peak memory", f"{max(peaks) / 1e9:.2f} GB in MLX arrays"))
    return [
        *table,
        ("adapter", str(folder / "adapter")),
        ("report", str(folder / "report.html")),
    ]


def next_commands(folder: Path, question: Any) -> list[tuple[str, str]]:
    """Return (name, command) for what to do with a run, for a shell; ``question`` is what the model can be asked."""
    short = isinstance(question, str) and len(question) <= _LONGEST and question.replace("\n", " ").isprintable()
    asked = [] if not short else ["--", question] if question.startswith("-") else [question]
    return [
        ("browse it", shlex.join(["textpolicy", "view", str(folder)])),
        ("try it", shlex.join(["textpolicy", "generate", "--run", str(folder), *(asked or ["A QUESTION"])])),
    ]


def summary(history: History, train_seconds: float) -> dict[str, Any]:
    """Return the run as one flat record, for tables over many runs; null where test problems were not evaluated."""
    before, after = history.before, history.after
    return {
        "test_before": None if before is None else before.value,
        "test_after": None if after is None else after.value,
        "test_problems": 0 if after is None else after.total,
        "kept_step": history.kept_step,
        "validation": [{"step": step, "accuracy": rate.value} for step, rate in history.validation],
        "steps": len(history.rows),
        "train_seconds": train_seconds,
        "sampled_tokens": sum(row["sampled_tokens"] for row in history.rows),
        "peak_memory_bytes": max((row.get("peak_memory_bytes", 0.0) for row in history.rows), default=0.0),
    }
