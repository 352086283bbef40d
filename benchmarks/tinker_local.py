"""The embedded task learned by train_math through a Tinker server on this machine: one JSON row per run.

    .venv/bin/python benchmarks/tinker_local.py --algorithms grpo full [--folder FOLDER] [-- any flag of train_math]

Starts SkyRL's Tinker API with SmolLM2-135M in float32 on the CPU. Rows are appended to
benchmarks/results/tinker_local.jsonl. A run that is already in FOLDER is resumed.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
import time
from importlib.metadata import version
from pathlib import Path
from typing import Any

from machine import describe

from textpolicy.cli.tinker_server import served_model
from textpolicy.tinker.server.server import LocalServer, ServerSettings

RESULTS = Path(__file__).parent / "results" / "tinker_local.jsonl"
RANK, ROWS = 16, 16  # of the LoRA; sequences in one pass of the server
RUN: dict[str, Any] = {
    "task": "largest",
    "reduction": "mean",
    "lora-rank": RANK,
    "temperature": 1.0,
    "max-tokens": 4,
    "batch-size": 4,
    "group-size": 8,
    "lr": 5e-4,
    "eval-problems": 48,
    "save-every": 4,
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--algorithms", nargs="+", default=["grpo", "full"])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0])
    parser.add_argument("--steps", type=int, default=12)
    parser.add_argument("--folder", type=Path, help="of the server and the runs; a temporary one if not given")
    parser.add_argument("flags", nargs="*", help="passed on to train_math, after --")
    asked = parser.parse_args()
    if asked.folder is not None:
        benchmark(asked, asked.folder)
        return
    with tempfile.TemporaryDirectory() as folder:
        benchmark(asked, Path(folder))


def benchmark(asked: argparse.Namespace, folder: Path) -> None:
    model = served_model("smollm2-135m")
    settings = ServerSettings(model=model, folder=folder / "server", rank=RANK, train_rows=ROWS, sample_rows=ROWS)
    with LocalServer(settings, say=print) as server:
        for seed in asked.seeds:
            for name in asked.algorithms:
                run(server, name, seed, asked.steps, asked.flags, folder / f"{name}-{seed}")


def run(server: LocalServer, algorithm: str, seed: int, steps: int, flags: list[str], output: Path) -> None:
    """One training run in a process of its own, and its row."""
    settings = {**RUN, "algorithm": algorithm, "max-steps": steps, "eval-every": steps, "seed": seed}
    where = {"model": server.name, "base-url": server.url, "log-dir": output}
    command = [sys.executable, "-m", "textpolicy.tinker.train_math"]
    command += [f"--{name}={value}" for name, value in {**settings, **where}.items()] + flags
    started, resumed = time.perf_counter(), output.exists()
    if subprocess.run([*command, "--resume"] if resumed else command).returncode:
        raise SystemExit(f"the run of {algorithm} with seed {seed} failed; its output is above")
    row = {
        "benchmark": "tinker_local",
        **{name.replace("-", "_"): value for name, value in settings.items()},
        "flags": flags,
        **figures(output),
        "resumed": resumed,
        "wall_seconds": time.perf_counter() - started,  # of this command, which may have gone on with a run
        "tinker": version("tinker"),
        **describe(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    gain = f"{row['test_before']:.1%} -> {row['test_after']:.1%}"
    print(f"{algorithm}, seed {seed}: {gain} in {row['steps']} steps, {row['wall_seconds']:.0f} s", flush=True)


def figures(output: Path) -> dict[str, Any]:
    """What came of a run, from its folder."""
    steps, looks, ledger = (_lines(output / f"{name}.jsonl") for name in ("metrics", "evals", "ledger"))
    before, after = looks[0], looks[-1]
    return {
        "steps": after["step"],
        "test_before": before["accuracy"],
        "test_after": after["accuracy"],
        "test_problems": after["problems"],
        "gain_points": 100 * (after["accuracy"] - before["accuracy"]),
        "intervals": [[look["low"], look["high"]] for look in (before, after)],
        "training_accuracy": [row["correct_rate"] for row in steps],
        "sample_seconds": sum(row["sample_seconds"] for row in steps),
        "update_seconds": sum(row["update_seconds"] for row in steps),
        "logprob_gap_max": max(row.get("logprob_gap_max", 0.0) for row in steps),
        "tokens": ledger[-1]["spent"],
    }


def _lines(path: Path) -> list[Any]:
    return [json.loads(line) for line in path.read_text(encoding="utf-8").splitlines()]


if __name__ == "__main__":
    main()
