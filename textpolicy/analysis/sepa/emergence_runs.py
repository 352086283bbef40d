"""Read an emergence log (``<run>/emergence/{steps,generations}.jsonl``) back, as one summary per run."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from math import nan
from pathlib import Path
from typing import Any

import numpy as np

from ..._system.files import parse_json
from ...errors import UserError

LARGEST = 1e300  # above it sums are infinite
CORRECT_FROM = 0.99  # the reward that counts as correct where the log has no correctness


@dataclass(frozen=True, slots=True)
class EmergenceRunStats:
    """The numbers of one run; NaN where the log has none."""

    run_dir: str
    steps: int
    step_mean_reward: float  # mean over steps
    generations: int
    gen_reward: float
    correct: int
    gen_correct_rate: float
    gram_pairs: int  # completions with both strategic and other tokens
    gen_gram_entropy_delta: float  # nats: of strategic tokens minus others, mean over those completions
    answers: tuple[tuple[str, bool], ...]  # (prompt, correct), one per completion


@dataclass(frozen=True, slots=True)
class EmergenceGroupStats:
    """The runs of one arm: means over runs, and totals of their steps and completions."""

    runs: int
    steps: int
    generations: int
    gram_pairs: int
    step_mean_reward: float
    gen_reward: float
    gen_correct_rate: float
    gen_gram_entropy_delta: float


def load_emergence_run_stats(run_dir: str | Path) -> EmergenceRunStats:
    """Summarize the run in ``run_dir``. Raises UserError for a run without a logged step."""
    stats = read_run(run_dir)
    if not stats.steps:
        raise UserError(f"{run_dir} has no step in emergence/steps.jsonl; give the folder of a run that logged some")
    return stats


def read_run(run_dir: str | Path) -> EmergenceRunStats:
    """Summarize the run in ``run_dir``; a missing file counts as empty. Raises UserError for a line that is not JSON.

    A run of `textpolicy train` has no such log; its steps are those of its metrics.jsonl.
    """
    folder = Path(run_dir) / "emergence"
    steps = read_rows(folder / "steps.jsonl", "mean_reward")
    generations = read_rows(folder / "generations.jsonl", "reward", "gram_entropy_delta")
    if not folder.exists():
        trained = [row for row in read_rows(Path(run_dir) / "metrics.jsonl", "reward_mean") if row["kind"] == "train"]
        steps = [{"mean_reward": row["reward_mean"]} for row in trained]
    answers = []
    for row in generations:
        metadata, reward = row.get("metadata"), row["reward"]
        right = metadata.get("correctness") if isinstance(metadata, dict) else None
        if right is None:
            right = reward is not None and reward >= CORRECT_FROM
        answers.append((str(row.get("prompt", "")), bool(right)))
    deltas = [row["gram_entropy_delta"] for row in generations if row.get("gram_entropy_delta") is not None]
    correct = sum(right for _, right in answers)
    return EmergenceRunStats(
        run_dir=str(run_dir),
        steps=len(steps),
        step_mean_reward=_mean([row["mean_reward"] for row in steps]),
        generations=len(generations),
        gen_reward=_mean([row["reward"] for row in generations]),
        correct=correct,
        gen_correct_rate=correct / len(answers) if answers else nan,
        gram_pairs=len(deltas),
        gen_gram_entropy_delta=_mean(deltas),
        answers=tuple(answers),
    )


def aggregate_group_stats(runs: Sequence[EmergenceRunStats]) -> EmergenceGroupStats:
    """Average the runs of one arm, each with the same weight. Raises UserError for none."""
    if not runs:
        raise UserError("there is no run to aggregate; give at least one")
    return EmergenceGroupStats(
        runs=len(runs),
        steps=sum(r.steps for r in runs),
        generations=sum(r.generations for r in runs),
        gram_pairs=sum(r.gram_pairs for r in runs),
        step_mean_reward=_mean([r.step_mean_reward for r in runs]),
        gen_reward=_mean([r.gen_reward for r in runs]),
        gen_correct_rate=_mean([r.gen_correct_rate for r in runs]),
        gen_gram_entropy_delta=_mean([r.gen_gram_entropy_delta for r in runs]),
    )


def read_rows(path: Path, *numbers: str) -> list[dict[str, Any]]:
    """Read the lines of a JSONL file; none if it is missing. A last line that a kill cut off is left out.

    The values called ``numbers`` are finite, or None where a line has none or NaN. Raises UserError for any other line.
    """
    if not path.is_file():
        return []
    lines = path.read_bytes().splitlines()
    rows = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line)
        except ValueError as error:
            if number < len(lines):
                raise UserError(f"line {number} of {path} is not JSON ({error}); fix or remove it") from error
            continue
        if not isinstance(row, dict):
            raise UserError(f"line {number} of {path} is not a JSON object; remove it")
        row = {"kind": None, **dict.fromkeys(numbers), **row}
        for name in numbers:
            if (value := row[name]) != value:  # NaN
                row[name] = value = None
            if value is not None and (type(value) not in (int, float) or not abs(value) < LARGEST):
                raise UserError(f"line {number} of {path} has a {name} of {value!s:.40}, which is no number; remove it")
        rows.append(row)
    return rows


def _mean(values: Sequence[float | None]) -> float:
    """Return the mean of the values that are numbers; NaN for none."""
    x = np.array(values, np.float64)  # None becomes NaN
    known = x[~np.isnan(x)]
    return float(known.mean()) if len(known) else nan
