"""Measure the cost of recording every completion: its share of a step's time, and bytes per token.

    .venv/bin/python benchmarks/recording.py [--pairs 3] [--steps 12]

The default task and model are trained for --steps steps twice in each pair, from the same seeds, once with the
recorder and once without; which comes first alternates. Two figures: the recorder's own seconds as a share of the
steps' (exact, and what is aimed for: below 3%), and the difference of the paired runs (which has the noise of the
machine in it). A row is appended to benchmarks/results/recording.jsonl.
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from machine import describe

from textpolicy.config.settings import Config
from textpolicy.loop.metrics import Row
from textpolicy.loop.train import train
from textpolicy.record.recorder import Recorder
from textpolicy.run.assembly import assemble
from textpolicy.types import Episode

RESULTS = Path(__file__).parent / "results" / "recording.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--pairs", type=int, default=3)
    parser.add_argument("--steps", type=int, default=12)
    asked = parser.parse_args()
    config = Config(steps=asked.steps)
    one_run(Config(steps=2, optimizer={"warmup_steps": 1}), None)  # warms up imports and caches
    pairs = []
    for pair in range(asked.pairs):
        runs: dict[bool, dict[str, Any]] = {}
        for recorded in (True, False) if pair % 2 else (False, True):
            with tempfile.TemporaryDirectory() as folder:
                runs[recorded] = one_run(config, Path(folder) if recorded else None)
        pairs.append(runs)
    row = {"benchmark": "recording", "pairs": asked.pairs, "steps": asked.steps, **said(pairs), **describe()}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=2))


def one_run(config: Config, folder: Path | None) -> dict[str, Any]:
    """Seconds of its steps and of the recorder, tokens and bytes."""
    parts = assemble(config)
    env = parts.splits["train"]
    recorder = None if folder is None else Recorder(folder, env.pieces)
    steps: list[float] = []
    recording: list[float] = []
    tokens = 0.0

    def on_step(step: int, row: Row, episodes: Sequence[Episode]) -> None:
        nonlocal tokens
        tokens += row["sampled_tokens"]
        steps.append(row["sample_seconds"] + row["update_seconds"])
        if recorder is not None:
            began = time.perf_counter()
            recorder.step(step, row, episodes)
            recording.append(time.perf_counter() - began)

    began = time.perf_counter()
    train(
        parts.engine, env, parts.recipe, schedule=parts.schedule, prompts_per_step=parts.rollout.prompts_per_step,
        group_size=parts.rollout.group_size, sampling=parts.sampling, on_step=on_step,
    )  # fmt: skip
    written = sum(f.stat().st_size for f in (folder / "rollouts").iterdir()) if folder else 0
    return {
        "seconds": time.perf_counter() - began, "steps": steps, "recording": recording,
        "tokens": tokens, "bytes": written,
    }  # fmt: skip


def said(pairs: Sequence[dict[bool, dict[str, Any]]]) -> dict[str, Any]:
    recorded = [pair[True] for pair in pairs]
    shares = [sum(r["recording"]) / sum(r["steps"]) for r in recorded]
    return {
        "recorder_share_of_step": statistics.median(shares),
        "recorder_share_of_step_each": shares,
        "recorder_milliseconds_per_step": 1e3 * statistics.median(s for r in recorded for s in r["recording"]),
        "paired_overhead_each": [pair[True]["seconds"] / pair[False]["seconds"] - 1 for pair in pairs],
        "step_seconds": statistics.median(s for pair in pairs for r in pair.values() for s in r["steps"]),
        "bytes_per_token": statistics.median(r["bytes"] / r["tokens"] for r in recorded),
        "tokens_per_run": recorded[0]["tokens"],
    }


if __name__ == "__main__":
    main()
