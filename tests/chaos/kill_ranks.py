"""Kill a random rank of a run of two at a random moment, resume until it is done, and compare with a run in one go.

    python tests/chaos/kill_ranks.py --trials 50

A trial is killed once to three times, each time with all ranks gone within the deadline, which the row has the longest
of. One JSON row is appended to benchmarks/results/chaos.jsonl.
"""

from __future__ import annotations

import argparse
import json
import random
import sys
import tempfile
import time
from collections import Counter
from pathlib import Path

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(ROOT / "tests/devices"), str(ROOT / "tests/chaos")]

from machine import describe  # noqa: E402
from toy_ranks import PHASES, train  # noqa: E402
from toy_run import outcome, settings  # noqa: E402

DEADLINE = 10.0  # seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--seed", type=int, default=0)
    asked = parser.parse_args()
    draw, killed, equal, longest = random.Random(asked.seed), Counter[str](), 0, 0.0
    options = ["--quiet", "--machine.devices", "2", "--machine.deadline", DEADLINE]
    with tempfile.TemporaryDirectory() as name:
        folder = Path(name)
        config = settings(folder, steps=4)
        train(folder, config, "--output", "whole", *options[:-1], 600)
        whole = outcome(folder / "whole")
        for n in range(asked.trials):
            run, words = f"run{n}", [config, "--output", f"run{n}", *options]
            for _ in range(draw.randint(1, 3)):
                phase = draw.choice([p for p in PHASES if p != "finish"])
                fault = f"{draw.randint(0, 1)} {phase} {draw.randint(1, 6)} {draw.choice(['kill', 'later', 'stop'])}"
                struck = folder / "struck"
                struck.unlink(missing_ok=True)
                code, printed, _ = train(folder, *words, fault=fault)
                if struck.exists():
                    killed[phase] += 1
                    longest = max(longest, time.time() - float(struck.read_text()))
                if "resume with" in printed:
                    words = ["--resume", run, *options]
                if code == 0 or (folder / run / "summary.json").exists():
                    break  # it was done before
            if not (folder / run / "summary.json").exists():
                code, printed, _ = train(folder, *words[:-1], 600)  # a busy machine may need long to start
            same = (folder / run / "summary.json").exists() and outcome(folder / run) == whole
            equal += same
            print(n, "equal" if same else f"NOT equal: {fault}: {printed}", flush=True)
    row = {
        "benchmark": "kill_ranks",
        "ranks": 2,
        "trials": asked.trials,
        "equal": equal,
        "kills": killed.total(),
        "phases": dict(killed),
        "deadline": DEADLINE,
        "longest_until_all_are_gone": longest,
        **describe(),
    }
    with (ROOT / "benchmarks/results/chaos.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(row)
    sys.exit(equal != asked.trials)


if __name__ == "__main__":
    main()
