"""Run tests/mlx on a GPU, some tests in each process, and append one JSON row of what passed for each mode.

    python benchmarks/gpu_tests.py [--mode generic kernels] [--jobs 16] [--logs FOLDER] [tests/mlx/decode ...]

The mode generic sets TEXTPOLICY_GENERIC_GPU=1: MLX's own operations, as on every GPU but those of NVIDIA. Both modes
share the processes, so the seconds of a row are those of all modes. A kernel that faults makes everything fail that
runs later in its process, and two processes may meet in MLX_PTX_CACHE_DIR, where one reads a kernel that the other is
still writing: tests that fail, or are not reached, run once more in processes of at most five. The row counts both.

--outcomes FILE keeps the outcome of every test, a line for each process as it ends; a test that has passed or been
skipped there is counted and not run again. --limit ends everything after so many seconds.
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
from collections.abc import Iterable
from concurrent.futures import ThreadPoolExecutor
from itertools import chain, zip_longest
from pathlib import Path

from machine import describe

ROOT = Path(__file__).resolve().parents[1]
RESULTS = Path(__file__).parent / "results" / "gpu_tests.jsonl"
PYTEST = [sys.executable, "-m", "pytest", "-p", "no:cacheprovider", "-p", "no:benchmark", "-m", "not slow"]
MODES = {"generic": "1", "kernels": "0"}  # of TEXTPOLICY_GENERIC_GPU
OUTCOMES = ("passed", "failed", "error", "skipped", "not reached")
TOLD = re.compile(r"^(tests/\S+?::.+?) (PASSED|FAILED|ERROR|SKIPPED|XFAIL)\b", re.MULTILINE)
WRONG = ("failed", "error", "not reached")


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("paths", nargs="*", default=["tests/mlx"])
    parser.add_argument("--mode", nargs="+", choices=MODES, default=list(MODES))
    parser.add_argument("--jobs", type=int, default=12, help="processes at a time")
    parser.add_argument("--part", type=int, default=30, help="tests of a process, at most")
    parser.add_argument("--seconds", type=int, default=300, help="limit of a process")
    parser.add_argument("--limit", type=float, default=3600, help="seconds after which nothing is begun or goes on")
    parser.add_argument("--logs", type=Path, help="folder for the output of parts with failures")
    parser.add_argument("--outcomes", type=Path, help="file of the outcomes of tests, read and added to")
    asked = parser.parse_args()
    began = time.monotonic()
    listed, found = collected(asked.paths), known(asked.outcomes)
    first = {mode: dict.fromkeys(listed, "not reached") | found[mode] for mode in asked.mode}
    last = {mode: dict(outcomes) for mode, outcomes in first.items()}
    processes = dict.fromkeys(asked.mode, 0)
    for attempt, size in ((first, asked.part), (last, 5)):
        parts = {
            mode: parts_of([t for t in listed if last[mode][t] in WRONG], size, asked.paths) for mode in asked.mode
        }
        with ThreadPoolExecutor(asked.jobs) as pool:
            queue = filter(None, chain(*zip_longest(*([(mode, p) for p in parts[mode]] for mode in asked.mode))))
            done = pool.map(lambda one: (one[0], run(*one, asked, began + asked.limit)), list(queue))
            for mode, outcomes in done:
                processes[mode] += 1
                reached = {test: told for test, told in outcomes.items() if told != "not reached"}
                for outcomes_so_far in (attempt, last):
                    outcomes_so_far[mode] |= reached
    for mode in asked.mode:
        counted = collections.Counter(last[mode][test] for test in listed)
        row = {
            "benchmark": "gpu_tests",
            "mode": mode,
            "paths": asked.paths,
            **{outcome: counted[outcome] for outcome in OUTCOMES},
            "wrong_at_first": sum(first[mode][test] in WRONG for test in listed),
            "known_before": sum(found[mode].get(test) not in (None, *WRONG) for test in listed),
            "processes": processes[mode],
            "seconds": time.monotonic() - began,
            **describe(),
        }
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print({key: row[key] for key in ("mode", *OUTCOMES, "wrong_at_first", "seconds")})
        for test in listed:
            if last[mode][test] in WRONG:
                print(mode, last[mode][test], test)
    sys.exit(any(last[mode][test] in WRONG for mode in asked.mode for test in listed))


def collected(paths: list[str]) -> list[str]:
    """The names of the tests below ``paths``."""
    command = [*PYTEST, "-q", "--collect-only", *paths]
    told = subprocess.run(command, cwd=ROOT, capture_output=True, text=True, check=False)
    tests = [line for line in told.stdout.splitlines() if "::" in line and not line.startswith(("ERROR", "SKIPPED"))]
    if told.returncode:
        raise SystemExit(told.stdout[-2000:] + told.stderr[-2000:])
    return tests


def known(file: Path | None) -> dict[str, dict[str, str]]:
    """The outcomes of tests by mode that ``file`` has."""
    found: dict[str, dict[str, str]] = {mode: {} for mode in MODES}
    for line in file.read_text(encoding="utf-8").splitlines() if file and file.exists() else ():
        row = json.loads(line)
        found[row["mode"]] |= row["outcomes"]
    return found


def parts_of(tests: Iterable[str], size: int, paths: list[str]) -> list[list[str]]:
    """The tests in parts of at most ``size``; those of a path before the next, long files first, files kept together.

    Small files share a part, since a process takes seconds to import what it needs and to find the GPU.
    """
    files: dict[str, list[str]] = {}
    for test in tests:
        files.setdefault(test.split("::")[0], []).append(test)

    def order(file: str) -> tuple[int, int]:
        return next(i for i, path in enumerate(paths) if file.startswith(path.split("::")[0])), -len(files[file])

    files = {file: files[file] for file in sorted(files, key=order)}
    ordered = list(chain.from_iterable(files.values()))
    return [ordered[i : i + size] for i in range(0, len(ordered), size)]


def run(mode: str, part: list[str], asked: argparse.Namespace, end: float) -> dict[str, str]:
    """The outcome of each test of ``part``."""
    outcomes, began = dict.fromkeys(part, "not reached"), time.monotonic()
    if began >= end:
        return outcomes
    path = f"{ROOT}:{os.environ.get('PYTHONPATH', '')}"
    env = {**os.environ, "TEXTPOLICY_GENERIC_GPU": MODES[mode], "PYTHONPATH": path}
    seconds = min(asked.seconds, end - began)
    try:
        done = subprocess.run(
            [*PYTEST, "-v", "--tb=short", *part], cwd=ROOT, env=env, capture_output=True, text=True, timeout=seconds
        )
        output = done.stdout + done.stderr
    except subprocess.TimeoutExpired as late:
        output = f"{(late.stdout or b'').decode(errors='replace')}\nnot done in {seconds:.0f} s"
    for test, told in TOLD.findall(output):
        if test in outcomes and outcomes[test] != "failed":  # an error at its end follows that a test has passed
            outcomes[test] = "skipped" if told == "XFAIL" else told.lower()
    wrong = collections.Counter(outcome for outcome in outcomes.values() if outcome in WRONG)
    if asked.outcomes:
        row = {"mode": mode, "seconds": time.monotonic() - began, "outcomes": outcomes}
        with asked.outcomes.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
    if wrong:
        print(f"{time.monotonic() - began:5.0f} s  {mode}  {part[0]}  {dict(wrong)}", flush=True)
        if asked.logs:
            asked.logs.mkdir(parents=True, exist_ok=True)
            name = re.sub(r"\W+", "_", f"{mode} {part[0]}")[:150]
            (asked.logs / f"{name}_{len(part)}.log").write_text(output, encoding="utf-8")
    return outcomes


if __name__ == "__main__":
    main()
