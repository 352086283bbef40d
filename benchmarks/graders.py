"""Time every grader on 10,000 hostile texts: one JSON row per grader.

    OPENBLAS_NUM_THREADS=1 PYTHONPATH=. .venv/bin/python benchmarks/graders.py

The texts are those of tests/rewards/hostile_texts.py: deep nesting, long numbers, towers of powers, broken LaTeX,
Unicode of all planes, up to 100,000 characters. A grader that raises ends the benchmark.
"""

from __future__ import annotations

import argparse
import json
import sys
import time
from pathlib import Path

import numpy as np
from machine import describe

ROOT = Path(__file__).parents[1]
RESULTS = ROOT / "benchmarks" / "results" / "graders.jsonl"
sys.path.insert(0, str(ROOT / "tests" / "rewards"))

from graders_under_test import GRADERS, LIMIT, warm_up  # noqa: E402
from hostile_texts import completions  # noqa: E402


def main() -> None:
    arguments = argparse.ArgumentParser(description=__doc__)
    arguments.add_argument("--texts", type=int, default=10_000)
    arguments.add_argument("--seed", type=int, default=0)
    asked = arguments.parse_args()
    texts = list(completions(asked.texts, asked.seed))
    warm_up()
    for name, grade in GRADERS.items():
        seconds = np.array([timed(grade, text) for text in texts])
        row = {
            "benchmark": "graders",
            "grader": name,
            "texts": len(texts),
            "characters": sum(map(len, texts)),
            "seed": asked.seed,
            **{f"p{q}_ms": round(1e3 * float(np.percentile(seconds, q)), 3) for q in (50, 99, 100)},
            "limit_s": LIMIT,
            "at_limit": int((seconds >= LIMIT).sum()),
            "over_limit_by_100_ms": int((seconds > LIMIT + 0.1).sum()),
            **describe(),
        }
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(f"{name:20} p50 {row['p50_ms']:8.3f} ms  p99 {row['p99_ms']:8.3f} ms  longest {row['p100_ms']:9.1f} ms")


def timed(grade, text: str) -> float:
    started = time.perf_counter()
    grade(text)
    return time.perf_counter() - started


if __name__ == "__main__":
    main()
