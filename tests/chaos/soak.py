"""Many steps in one process: resident memory and open files stay where they are.

    python tests/chaos/soak.py --steps 500 --record     the embedded model, small steps
    python tests/chaos/soak.py --steps 300 --toy        a random model of two layers

Memory is flat if the mean of the last hundred steps is within 2% of that of steps 100 to 200.
"""

from __future__ import annotations

import argparse
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from statistics import fmean
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(Path(__file__).parent)]
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")

import toy_run  # noqa: E402

from textpolicy._system.machine import resident  # noqa: E402
from textpolicy.cli.main import main as textpolicy  # noqa: E402
from textpolicy.run import training_run as run  # noqa: E402

SMALL = [
    "--rollout.prompts-per-step=2",
    "--rollout.group-size=4",
    "--adapter.layers=4",
    "--evaluation.every=100",
    "--evaluation.problems=4",
    "--checkpoint.every=10",
]


def soak(argv: list[str], steps: int) -> dict[str, Any]:
    """Train, and measure the process after every step."""
    memory: list[int] = []
    files: list[int] = []
    shapes: list[int] = []
    true = run.Run.on_step

    def on_step(self: run.Run, *arguments: Any) -> None:
        true(self, *arguments)
        memory.append(resident(os.getpid()))
        files.append(len(os.listdir("/dev/fd")))
        shapes.append(len(self.parts.engine._gradients.known))

    run.Run.on_step = on_step  # type: ignore[method-assign]
    began = time.perf_counter()
    try:
        code = textpolicy(["train", *argv, f"--steps={steps}"])
    finally:
        run.Run.on_step = true  # type: ignore[method-assign]
    if code != 0:
        raise RuntimeError(f"the run ended with {code}")
    early, late = fmean(memory[100:200]), fmean(memory[-100:])
    return {
        "benchmark": "soak",
        "steps": len(memory),
        "resident_mb_100_to_200": round(early / 1e6, 1),
        "resident_mb_last_100": round(late / 1e6, 1),
        "growth": round(late / early - 1, 4),
        "files_100": files[100],
        "files_last": files[-1],
        "compiled_shapes_most": max(shapes),
        "seconds": round(time.perf_counter() - began, 1),
    }


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--steps", type=int, default=500)
    parser.add_argument("--toy", action="store_true")
    parser.add_argument("--record", action="store_true", help="append the row to benchmarks/results/soak.jsonl")
    args = parser.parse_args(argv)
    with tempfile.TemporaryDirectory() as folder:
        toy_run.register()
        given = [str(toy_run.settings(Path(folder)))] if args.toy else SMALL
        row = soak([*given, f"--output={folder}/run"], args.steps)
    row["model"] = "toy" if args.toy else "smollm2-135m"
    if args.record:
        from machine import describe

        with (ROOT / "benchmarks" / "results" / "soak.jsonl").open("a") as file:
            file.write(json.dumps({**row, **describe()}) + "\n")
    print(json.dumps(row))
    return 0 if abs(row["growth"]) <= 0.02 and row["files_last"] <= row["files_100"] else 1


if __name__ == "__main__":
    sys.exit(main())
