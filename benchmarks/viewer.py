"""Time the viewer on a large run: 100,000 completions, written by the real recorder.

    .venv/bin/python benchmarks/viewer.py [--completions 100000] [--tokens 64] [--keep FOLDER]

The run is made up and recorded step by step as a training run is, 128 completions a step. Then `textpolicy view` is
started in a process of its own: seconds from its start to the first page, the computing of its process beside them
(which other work on the machine changes less), and of each filter the median and longest of --repeats requests, the
whole page received. A row is appended to benchmarks/results/viewer.jsonl. Aimed for: 2 s to open, 0.5 s to filter.
"""

from __future__ import annotations

import argparse
import json
import resource
import statistics
import subprocess
import sys
import tempfile
import time
import urllib.request
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

from textpolicy.algorithms import algorithm
from textpolicy.record.recorder import Recorder
from textpolicy.types import Completion, Episode

RESULTS = Path(__file__).parent / "results" / "viewer.jsonl"
PROMPTS, SAMPLES, VOCABULARY, PROBLEMS = 16, 8, 49_152, 1_000
FILTERS = {
    "one step": "?step_from=100&step_to=100",
    "one prompt": "?prompt=7",
    "a reward": "?reward_from=1",
    "cut off": "?finish=length",
    "all four": "?step_from=100&step_to=600&prompt=7&reward_to=0&finish=stop",
    "best first": "?sort=best",
    "the last page": "?page=999999",
    "words": "?words=w123+",
}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--completions", type=int, default=100_000)
    parser.add_argument("--tokens", type=int, default=64, help="of a completion, on average")
    parser.add_argument("--repeats", type=int, default=5)
    parser.add_argument("--keep", type=Path, help="make the run there, or use the one that is there")
    asked = parser.parse_args()
    with tempfile.TemporaryDirectory() as temporary:
        run = asked.keep or Path(temporary) / "run"
        seconds = 0.0 if run.exists() else make_run(run, asked.completions, asked.tokens)
        row = {"benchmark": "viewer", "completions": asked.completions, "mean_tokens": asked.tokens}
        row |= {"record_seconds": seconds, **size(run), **measure(run, asked.repeats), **describe()}
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(row, indent=2))


def make_run(run: Path, completions: int, tokens: int) -> float:
    """Record so many made-up completions; returns the seconds that the recorder took."""
    run.mkdir(parents=True)
    (run / "config.json").write_text("{}")
    rng, spelled = np.random.default_rng(0), [f" w{i}" for i in range(VOCABULARY)]
    recorder, recipe, seconds = Recorder(run, lambda ids: [spelled[i] for i in ids]), algorithm("gtpo"), 0.0
    with (run / "metrics.jsonl").open("w") as metrics:
        for step in range(-(-completions // (PROMPTS * SAMPLES))):
            episodes = made_up(rng, tokens, spelled)
            told = recipe.credited(episodes, recipe.tokens(episodes))
            began = time.perf_counter()
            recorder.step(step, {}, told)
            seconds += time.perf_counter() - began
            row = {"kind": "train", "step": step, "reward_mean": float(np.mean([e.reward for e in episodes]))}
            metrics.write(json.dumps(row) + "\n")
    return seconds


def made_up(rng: np.random.Generator, tokens: int, spelled: list[str]) -> list[Episode]:
    out = []
    for group, problem in enumerate(rng.choice(PROBLEMS, PROMPTS, replace=False).tolist()):
        prompt = np.random.default_rng(problem).integers(0, VOCABULARY, 100).tolist()
        for _ in range(SAMPLES):
            n = int(rng.integers(1, 2 * tokens))
            ids = np.minimum(rng.zipf(1.2, n), VOCABULARY - 1).astype(np.int32)
            cut, logprobs, entropy = bool(rng.random() < 0.1), -rng.random(n), rng.random(n)
            completion = Completion(ids, logprobs.astype(np.float32), entropy.astype(np.float32), truncated=cut)
            said: dict[str, Any] = {
                "text": "".join(spelled[i] for i in ids),
                "prompt": "".join(spelled[i] for i in prompt),
                "prompt_index": problem,
                "reward": float(rng.random() < 0.5),
            }
            out.append(Episode.from_completion(prompt, completion, group=group, **said))
    return out


def size(run: Path) -> dict[str, float]:
    files = list((run / "rollouts").iterdir())
    return {"files": len(files), "megabytes": sum(f.stat().st_size for f in files) / 1e6}


def measure(run: Path, repeats: int) -> dict[str, Any]:
    """Seconds to the first page, and of each filter."""
    openings = [opening(run) for _ in range(repeats)]
    with viewer_of(run) as address:
        fetch(address)
        times = {name: [fetch(address + query) for _ in range(repeats)] for name, query in FILTERS.items()}
    return {
        "open_seconds": statistics.median(o["wall"] for o in openings),
        "open_seconds_each": [o["wall"] for o in openings],
        "open_cpu_seconds": statistics.median(o["cpu"] for o in openings),
        "filter_seconds": {name: {"median": statistics.median(t), "longest": max(t)} for name, t in times.items()},
    }


def opening(run: Path) -> dict[str, float]:
    """Seconds from the start of the command to its first page, and what its process computed until it was stopped."""
    before = resource.getrusage(resource.RUSAGE_CHILDREN)
    began = time.perf_counter()
    with viewer_of(run) as address:
        fetch(address)
        wall = time.perf_counter() - began
    after = resource.getrusage(resource.RUSAGE_CHILDREN)
    return {"wall": wall, "cpu": after.ru_utime + after.ru_stime - before.ru_utime - before.ru_stime}


@contextmanager
def viewer_of(run: Path) -> Iterator[str]:
    """The address of a viewer in a process of its own."""
    command = [sys.executable, "-m", "textpolicy", "view", str(run)]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True) as viewer:
        try:
            assert viewer.stdout is not None
            yield viewer.stdout.readline().split()[0]
        finally:
            viewer.terminate()


def fetch(address: str) -> float:
    began = time.perf_counter()
    with urllib.request.urlopen(address) as answer:
        answer.read()
    return time.perf_counter() - began


if __name__ == "__main__":
    main()
