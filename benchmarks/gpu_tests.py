"""Run tests/mlx on a GPU, a process for each part of a file, and append one JSON row of what passed.

    python benchmarks/gpu_tests.py [--generic] [--jobs 12] [--logs FOLDER] [tests/mlx/decode ...]

--generic sets TEXTPOLICY_GENERIC_GPU=1: MLX's own operations, as on every GPU but those of NVIDIA. A kernel that
faults makes everything fail that runs later in its process, so parts are small. All share MLX_PTX_CACHE_DIR, where
one may read a kernel that another is still writing: a part with failures runs again alone, and the row counts both.
"""

from __future__ import annotations

import argparse
import collections
import json
import os
import re
import subprocess
import sys
import time
from concurrent.futures import ThreadPoolExecutor
from pathlib import Path

from machine import describe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "gpu_tests.jsonl"
PYTEST = [sys.executable, "-m", "pytest", "-q", "-p", "no:cacheprovider", "-p", "no:benchmark", "-m", "not slow"]
OUTCOMES = ("passed", "failed", "error", "skipped")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("paths", nargs="*", default=["tests/mlx"])
    parser.add_argument("--generic", action="store_true", help="without our CUDA kernels")
    parser.add_argument("--jobs", type=int, default=12, help="processes at a time")
    parser.add_argument("--part", type=int, default=30, help="tests of a process, at most")
    parser.add_argument("--seconds", type=int, default=300, help="limit of a process")
    parser.add_argument("--logs", type=Path, help="folder for the output of parts with failures")
    asked = parser.parse_args()
    os.environ |= {
        "TEXTPOLICY_GENERIC_GPU": str(int(asked.generic)),
        "PYTHONPATH": f"{ROOT}:{os.environ.get('PYTHONPATH', '')}",
    }
    began = time.perf_counter()
    parts = parts_of(asked.paths, asked.part)
    with ThreadPoolExecutor(asked.jobs) as pool:
        first = list(pool.map(lambda part: run(part, asked.seconds, asked.logs), parts))
    wrong = [i for i, counts in enumerate(first) if counts["failed"] or counts["error"]]
    again = {i: run(parts[i], asked.seconds, asked.logs) for i in wrong}
    total: collections.Counter[str] = collections.Counter()
    for i, counts in enumerate(first):
        total.update(again.get(i, counts))
    row = {
        "benchmark": "gpu_tests",
        "mode": "generic" if asked.generic else "kernels",
        **{outcome: total[outcome] for outcome in OUTCOMES},
        "failed_at_first": sum(first[i]["failed"] + first[i]["error"] for i in wrong),
        "processes": len(parts) + len(wrong),
        "seconds": time.perf_counter() - began,
        **describe(),
    }
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print({key: row[key] for key in ("mode", *OUTCOMES, "failed_at_first", "seconds")})
    sys.exit(bool(total["failed"] or total["error"]))


def parts_of(paths: list[str], size: int) -> list[list[str]]:
    """The tests below ``paths`` in parts of one file and at most ``size`` tests each, the longest files first."""
    listed = subprocess.run([*PYTEST, "--collect-only", *paths], cwd=ROOT, capture_output=True, text=True, check=False)
    files: dict[str, list[str]] = {}
    for line in listed.stdout.splitlines():
        if "::" in line and not line.startswith(("ERROR", "SKIPPED")):
            files.setdefault(line.split("::")[0], []).append(line)
    if not files:
        raise SystemExit(listed.stdout[-2000:] + listed.stderr[-2000:])
    files = dict(sorted(files.items(), key=lambda item: -len(item[1])))
    return [tests[i : i + size] for tests in files.values() for i in range(0, len(tests), size)]


def run(part: list[str], seconds: int, logs: Path | None) -> collections.Counter[str]:
    """The number of tests of ``part`` by outcome; those that a process did not come to are errors."""
    try:
        done = subprocess.run(
            [*PYTEST, "--tb=short", *part], cwd=ROOT, capture_output=True, text=True, timeout=seconds, check=False
        )
        output = done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        output = f"{(late.stdout or b'').decode(errors='replace')}\nnot done in {seconds} s"
    found = {
        outcome: int(n) for n, outcome in re.findall(r"(\d+) (passed|failed|error|skipped)", output.splitlines()[-1])
    }
    counts = collections.Counter(found)
    counts["error"] += max(0, len(part) - sum(counts.values()))
    if logs and (counts["failed"] or counts["error"]):
        logs.mkdir(parents=True, exist_ok=True)
        (logs / (re.sub(r"\W+", "_", part[0]) + ".log")).write_text(output, encoding="utf-8")
        print(part[0].split("::")[0], dict(counts), flush=True)
    return counts


if __name__ == "__main__":
    main()
