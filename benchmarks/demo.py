"""Measure how much held-out accuracy on the embedded task rises, over seeds: one JSON row per run.

    .venv/bin/python benchmarks/demo.py --seeds 0 1 2 [-- any flag of `textpolicy train`]

Rows are appended to benchmarks/results/demo.jsonl; the medians are printed.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from pathlib import Path

from machine import describe

RESULTS = Path(__file__).parent / "results" / "demo.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--seeds", type=int, nargs="+", default=[0, 1, 2])
    parser.add_argument("flags", nargs="*", help="passed on to `textpolicy train`, after --")
    asked = parser.parse_args()
    rows = [run(seed, asked.flags) for seed in asked.seeds]
    for name in ("test_before", "test_after", "gain_points", "train_seconds", "wall_seconds", "peak_rss_gb"):
        print(f"{name:>14}  median {statistics.median(row[name] for row in rows):.3f}")


def run(seed: int, flags: list[str]) -> dict:
    """One training run in a process of its own; its row is written before it is returned."""
    with tempfile.TemporaryDirectory() as folder:
        output = Path(folder) / "run"
        command = [sys.executable, "-m", "textpolicy", "train", f"--seed={seed}", f"--output={output}", *flags]
        started = time.perf_counter()
        process = subprocess.Popen(command)
        _, status, usage = os.wait4(process.pid, 0)
        if os.waitstatus_to_exitcode(status):
            raise SystemExit(f"the run with seed {seed} failed; its output is above")
        seconds = time.perf_counter() - started
        summary = json.loads((output / "summary.json").read_text())
        config = json.loads((output / "config.json").read_text())
    unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
    row = {
        "benchmark": "demo",
        "seed": seed,
        "algorithm": config["algorithm"]["name"],
        "task": config["task"],
        "flags": flags,
        **summary,
        "gain_points": 100 * (summary["test_after"] - summary["test_before"]),
        "wall_seconds": seconds,
        "peak_rss_gb": usage.ru_maxrss * unit / 1e9,
        **describe(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    return row


if __name__ == "__main__":
    main()
