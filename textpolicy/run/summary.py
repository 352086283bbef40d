"""What a finished run says for itself: the closing table and the learning curve."""

from __future__ import annotations

import itertools
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from ..config.settings import Config
from ..loop.evaluation import Rate
from ..loop.metrics import Row


@dataclass
class History:
    """What a run has seen so far: one row per step, one rate per look at a split."""

    rows: list[Row] = field(default_factory=list)
    validation: list[tuple[int, Rate]] = field(default_factory=list)  # (steps done, rate)
    best: tuple[int, Rate] | None = None  # (steps done, rate), the last of the highest
    before: Rate | None = None
    after: Rate | None = None
    kept_step: int = 0

    def state_dict(self) -> dict[str, Any]:
        """What is not in metrics.jsonl, as plain JSON values."""
        assert self.before is not None
        best = None if self.best is None else [self.best[0], *_counts(self.best[1])]
        looks = [[step, *_counts(rate)] for step, rate in self.validation]
        return {"before": _counts(self.before), "validation": looks, "best": best}

    def load_state_dict(self, state: Mapping[str, Any]) -> None:
        """Take over what ``state_dict`` gave."""
        self.before = Rate(*state["before"])
        self.validation = [(step, Rate(*counts)) for step, *counts in state["validation"]]
        step, *counts = state["best"]
        self.best = (step, Rate(*counts))


def _counts(rate: Rate) -> list[int]:
    return [rate.correct, rate.total]


def closing_table(
    history: History, folder: Path, question: str, train_seconds: float, seconds: float
) -> list[tuple[str, str]]:
    """(name, value) lines; ``question`` is one that the model can be asked."""
    assert history.before is not None
    assert history.after is not None
    gain = 100 * (history.after.value - history.before.value)
    tokens = sum(row["sampled_tokens"] for row in history.rows)
    sampling = sum(row["sample_seconds"] for row in history.rows)
    updating = sum(row["update_seconds"] for row in history.rows)
    total = history.after.total
    return [
        ("before training", f"{history.before} of {total} held-out problems right, greedy (95% interval)"),
        ("after training", f"{history.after}, {gain:+.1f} points; adapter of step {history.kept_step}, by validation"),
        ("training", f"{len(history.rows)} steps in {train_seconds:.0f} s ({seconds:.0f} s with all evaluation)"),
        ("time", f"rollouts {sampling:.0f} s, updates {updating:.0f} s"),
        ("speed", f"{tokens:.0f} tokens sampled, {tokens / (sampling + updating):.0f} tokens/s, rollouts and updates"),
        *_memory(history.rows),
        ("adapter", str(folder / "adapter")),
        ("learning curve", str(folder / "learning_curve.png")),
        ("report", str(folder / "report.html")),
        ("look at it", f"textpolicy view {folder}"),
        ("talk to it", f'textpolicy generate --run {folder} "{question}"'),
    ]


def _memory(rows: Sequence[Row]) -> list[tuple[str, str]]:
    """Nothing for an engine whose arrays are elsewhere."""
    peaks = [row["peak_memory_bytes"] for row in rows if "peak_memory_bytes" in row]
    return [("peak memory", f"{max(peaks) / 1e9:.2f} GB in MLX arrays")] if peaks else []


def skipped_in_a_row(rows: Sequence[Row]) -> int:
    """How many of the last steps moved nothing because an update was not finite; not every engine counts those."""
    skips = (row["updated"] == 0 and row.get("skipped", 0) > 0 for row in reversed(rows))
    return sum(1 for _ in itertools.takewhile(bool, skips))


def plot_learning(history: History, path: Path, config: Config) -> None:
    """Accuracy by step as a PNG: sampled in training, greedy on validation, greedy on test."""
    from matplotlib.figure import Figure  # 0.3 s to import, needed once at the end

    figure = Figure(figsize=(7, 4), layout="constrained")
    axes = figure.subplots()
    steps = [row["step"] + 1 for row in history.rows]
    if "accuracy" in history.rows[0]:
        axes.plot(steps, [row["accuracy"] for row in history.rows], color="0.7", lw=1, label="training, sampled")
    else:
        rewards = [row.get("reward_mean", math.nan) for row in history.rows]
        axes.plot(steps, rewards, color="0.7", lw=1, label="training reward")
    _points(axes, history.validation, "C0", "validation, greedy (95%)", line="-")
    ends = [(0, history.before), (history.kept_step, history.after)]
    _points(axes, ends, "C1", "test, greedy (95%)", line="none")
    axes.set(xlabel="training step", ylabel="share of problems right", ylim=(0, 1))
    axes.set_title(f"{config.algorithm.name} on {config.task}, {config.model}, seed {config.seed}", fontsize=10)
    axes.legend(frameon=False, loc="lower right")
    axes.spines[["top", "right"]].set_visible(False)
    figure.savefig(path, dpi=150)


def _points(axes, rates, color: str, label: str, line: str) -> None:  # type: ignore[no-untyped-def]
    steps, values = [s for s, _ in rates], [r.value for _, r in rates]
    low = [r.value - r.interval[0] for _, r in rates]
    high = [r.interval[1] - r.value for _, r in rates]
    axes.errorbar(
        steps, values, yerr=[low, high], color=color, ls=line, marker="o", ms=4, lw=1.5, capsize=2, label=label
    )
