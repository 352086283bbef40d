"""What a finished run says for itself: the closing table and the learning curve."""

from __future__ import annotations

import math
from dataclasses import dataclass, field
from pathlib import Path

from .config import Config
from .evaluation import Rate
from .metrics import Row
from .tasks import load_task


@dataclass
class History:
    """What a run has seen so far: one row per step, one rate per look at a split."""

    rows: list[Row] = field(default_factory=list)
    validation: list[tuple[int, Rate]] = field(default_factory=list)  # (steps done, rate)
    before: Rate | None = None
    after: Rate | None = None
    kept_step: int = 0


def closing_table(
    history: History, folder: Path, config: Config, train_seconds: float, seconds: float
) -> list[tuple[str, str]]:
    """(name, value) lines."""
    assert history.before is not None
    assert history.after is not None
    gain = 100 * (history.after.value - history.before.value)
    tokens = sum(row["sampled_tokens"] for row in history.rows)
    sampling = sum(row["sample_seconds"] for row in history.rows)
    updating = sum(row["update_seconds"] for row in history.rows)
    memory = max(row["peak_memory_bytes"] for row in history.rows)
    total = history.after.total
    return [
        ("before training", f"{history.before} of {total} held-out problems right, greedy (95% interval)"),
        ("after training", f"{history.after}, {gain:+.1f} points; adapter of step {history.kept_step}, by validation"),
        ("training", f"{len(history.rows)} steps in {train_seconds:.0f} s ({seconds:.0f} s with all evaluation)"),
        ("time", f"rollouts {sampling:.0f} s, updates {updating:.0f} s"),
        ("speed", f"{tokens:.0f} tokens sampled, {tokens / (sampling + updating):.0f} tokens/s, rollouts and updates"),
        ("peak memory", f"{memory / 1e9:.2f} GB in MLX arrays"),
        ("adapter", str(folder / "adapter")),
        ("learning curve", str(folder / "learning_curve.png")),
        ("report", str(folder / "report.html")),
        ("look at it", f"textpolicy view {folder}"),
        ("talk to it", f'textpolicy generate --run {folder} "{load_task(config.task).test[0].question}"'),
    ]


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
