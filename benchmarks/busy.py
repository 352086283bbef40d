"""Compare training steps on a quiet machine with steps beside a niced busy process for every core.

    .venv/bin/python benchmarks/busy.py [--steps 6] [--flags --task addition]

Three runs of ``textpolicy train`` with as many steps: on the quiet machine, beside processes that were busy before it
began, and beside such that began after its first step. A row is appended to benchmarks/results/busy.jsonl: seconds of
a step (the median, without the first), and the processor time of the steps. Targets: at most 2.5 and 1.2 of quiet.
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
from contextlib import ExitStack
from pathlib import Path
from typing import Any

from machine import describe

RESULTS = Path(__file__).parent / "results" / "busy.jsonl"
BUSY = [sys.executable, "-c", "import os\nos.nice(19)\nwhile True: pass"]


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--steps", type=int, default=6)
    parser.add_argument("--flags", nargs=argparse.REMAINDER, default=[], help="of textpolicy train")
    asked = parser.parse_args()
    found = {when: trained(asked, when) for when in ("quiet", "before", "later")}
    quiet = found["quiet"]
    ratios = {
        when: {name: round(found[when][name] / quiet[name], 2) for name in ("step_s", "cpu_s")}
        for when in ("before", "later")
    }
    row = {"benchmark": "busy", "steps": asked.steps, "flags": asked.flags, **found, "ratios": ratios, **describe()}
    print(json.dumps(row))
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def trained(asked: argparse.Namespace, busy: str) -> dict[str, Any]:
    """Return seconds and processor time of a run's steps with busy processes ``busy``: "quiet", "before" or "later"."""
    with tempfile.TemporaryDirectory() as folder, ExitStack() as others:
        output = Path(folder, "run")
        command = [sys.executable, "-m", "textpolicy", "train", f"--output={output}", f"--steps={asked.steps}"]
        command += ["--quiet", "--evaluation.problems=4", "--evaluation.every=1000", *asked.flags]
        if busy == "before":
            make_busy(others)
        run = subprocess.Popen(command)
        rows: list[dict[str, Any]] = []
        spent: dict[int, float] = {}
        while run.poll() is None:
            time.sleep(0.05)
            rows = steps_of(output)
            if len(rows) not in spent:
                spent[len(rows)] = processor_seconds(run.pid)
                if busy == "later" and len(rows) == 1:
                    make_busy(others)
        if run.returncode:
            raise SystemExit(f"the run beside processes that are busy {busy!r} ended with {run.returncode}")
        rows, last = steps_of(output), max(spent)
        seconds = [row["sample_seconds"] + row["update_seconds"] for row in rows[1:]]
        versions = json.loads((output / "versions.json").read_text())
        return {
            "step_s": statistics.median(seconds),
            "steps_s": [round(s, 2) for s in seconds],
            "cpu_s": (spent[last] - spent[1]) / (last - 1),
            "blas_threads": versions["blas_threads"],
        }


def make_busy(others: ExitStack) -> None:
    """Start a busy process for each core, which ``others`` ends."""
    for _ in range(os.cpu_count() or 1):
        process = subprocess.Popen(BUSY)
        others.callback(process.wait)
        others.callback(process.kill)
    time.sleep(0.5)


def steps_of(output: Path) -> list[dict[str, Any]]:
    file = output / "metrics.jsonl"
    lines = file.read_text(encoding="utf-8").splitlines(keepends=True) if file.exists() else []
    rows = [json.loads(line) for line in lines if line.endswith("\n")]
    return [row for row in rows if row["kind"] == "train"]


def processor_seconds(pid: int) -> float:
    """Return the user and system time of a process so far, in seconds; Linux alone."""
    fields = Path(f"/proc/{pid}/stat").read_text().rpartition(")")[2].split()
    return (int(fields[11]) + int(fields[12])) / os.sysconf("SC_CLK_TCK")


if __name__ == "__main__":
    main()
