"""Measure the seconds and peak memory of a training step by group size and completion length.

    .venv/bin/python benchmarks/cost.py [--model smollm2-135m | qwen3-0.6b] [--groups 4 8 16 32 64]
                                        [--lengths 64 128 256 512 1024 2048] [--minutes 10]

A step is a rollout of completions of exactly that length, GRPO's credit for made-up rewards, and one update. Cells
are measured one after another, smallest first, each in a process of its own; one that would not end within
--minutes, going by what a token took in the cell before it, is left out and named. A row for each cell is
appended to benchmarks/results/cost.jsonl, and a table is printed. `smollm2-135m` has its weights, `qwen3-0.6b` random
ones of that shape in bfloat16, for a GPU; without --minutes there is no limit, and the whole grid is measured.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe
from rich.console import Console
from rich.table import Table
from update_memory import SHAPES, Asked, made_up_model

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn

from textpolicy.algorithms import algorithm
from textpolicy.engine import Sampling
from textpolicy.losses import Surrogate
from textpolicy.mlx.adapters.merging import attach_lora
from textpolicy.mlx.engine import MLXEngine
from textpolicy.mlx.memory import Workload, preflight
from textpolicy.mlx.models import load_model
from textpolicy.types import Completion, Episode

RESULTS = Path(__file__).parent / "results" / "cost.jsonl"
VOCABULARY = {"smollm2-135m": 49_152, "qwen3-0.6b": 151_936}
LEARNING_RATE = 1e-5


def main() -> None:
    asked = arguments()
    if asked.cell is not None:
        print(json.dumps(measure(asked, *asked.cell)))
        return
    cells = sorted(((g, t) for g in asked.groups for t in asked.lengths), key=lambda cell: cell[0] * cell[1])
    begun, rows, left_out, start, per_token = time.perf_counter(), {}, [], 0.0, 0.0
    for group, length in cells:
        left = 60 * asked.minutes - (time.perf_counter() - begun)
        tokens = asked.prompts * group * length * (asked.warmup + asked.steps)
        if start + per_token * tokens > left:
            left_out.append((group, length))
            continue
        started = time.perf_counter()
        row = rows[group, length] = in_a_process_of_its_own(group, length)
        per_token = 1 / row["tokens_per_second"]
        start = time.perf_counter() - started - per_token * tokens  # seconds: loading the model, measuring its memory
        write({"benchmark": "cost", "minutes": asked.minutes if asked.minutes < np.inf else None, **row, **describe()})
    show(asked, rows)
    if left_out:
        named = ", ".join(f"{group} x {length}" for group, length in left_out)
        print(f"left out, since they would not have ended within {asked.minutes:g} minutes: {named}")


def arguments() -> argparse.Namespace:
    on_cpu = mx.default_device() == mx.cpu
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=VOCABULARY, default="smollm2-135m" if on_cpu else "qwen3-0.6b")
    parser.add_argument("--groups", type=int, nargs="+", default=[4, 8, 16, 32, 64])
    parser.add_argument("--lengths", type=int, nargs="+", default=[64, 128, 256, 512, 1024, 2048])
    parser.add_argument("--prompts", type=int, default=1)
    parser.add_argument("--prompt-tokens", type=int, default=128)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--warmup", type=int, default=0 if on_cpu else 3, help="steps that do not count")
    parser.add_argument("--steps", type=int, default=2 if on_cpu else 5, help="steps that do")
    parser.add_argument("--minutes", type=float, default=np.inf)
    parser.add_argument("--cell", type=int, nargs=2, help=argparse.SUPPRESS)  # this process measures one and prints it
    return parser.parse_args()


def in_a_process_of_its_own(group: int, length: int) -> dict[str, Any]:
    command = [sys.executable, __file__, *sys.argv[1:], "--cell", str(group), str(length)]
    done = subprocess.run(command, stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the cell {group} x {length} ended with exit code {done.returncode}; what it said is above")
    return json.loads(done.stdout)


def measure(asked: argparse.Namespace, group: int, length: int) -> dict[str, Any]:
    """One cell of the table."""
    model = made_ready(asked)
    engine = MLXEngine(model, stop=())  # nothing ends a completion
    plan = preflight(engine, Workload(asked.prompts, group, asked.prompt_tokens, length))
    rng = np.random.default_rng(0)
    prompts = rng.integers(0, VOCABULARY[asked.model], (asked.prompts, asked.prompt_tokens)).tolist()
    mx.reset_peak_memory()
    steps = [one_step(engine, prompts, group, length, seed) for seed in range(asked.warmup + asked.steps)]
    counted = steps[asked.warmup :]
    median = {name: statistics.median(step[name] for step in counted) for name in ("sample", "update", "step")}
    return {
        "model": asked.model,
        "device": "cpu" if mx.default_device() == mx.cpu else "gpu",
        "dtype": str(next(m for m in model.modules() if "lora_a" in m).lora_a.dtype).removeprefix("mlx.core."),
        "threads": os.environ.get("OPENBLAS_NUM_THREADS"),
        "prompts": asked.prompts,
        "prompt_tokens": asked.prompt_tokens,
        "group": group,
        "completion_tokens": length,
        "rank": asked.rank,
        "warmup": asked.warmup,
        "steps": asked.steps,
        "seconds": median,
        "fastest_step_seconds": min(step["step"] for step in counted),
        "tokens_per_second": asked.prompts * group * length / median["step"],
        "peak_bytes": max(step["peak_bytes"] for step in steps),
        "predicted_update_bytes": plan.update_bytes,
        "predicted_decode_bytes": plan.decode_bytes,
        "micro_batch_tokens": plan.micro_batch_tokens,
        "decode_rows": plan.decode_rows,
    }


def one_step(engine: MLXEngine, prompts: list[list[int]], group: int, length: int, seed: int) -> dict[str, float]:
    """Seconds of a step and of its halves, and its peak."""
    started = time.perf_counter()
    completions = engine.sample(prompts, group, Sampling(length, seed=seed))
    sampled = time.perf_counter()
    episodes = [
        Episode.from_completion(prompt, c, reward=reward_of(c), group=i)
        for i, (prompt, members) in enumerate(zip(prompts, completions, strict=True))
        for c in members
    ]
    metrics = engine.update(algorithm("grpo").credit(episodes), Surrogate(), LEARNING_RATE)
    ended = time.perf_counter()
    if not metrics["updated"]:
        raise SystemExit("the step did not move the adapter, so it is no measure of one")
    times = {"sample": sampled - started, "update": ended - sampled, "step": ended - started}
    return {**times, "peak_bytes": metrics["peak_memory_bytes"]}


def reward_of(completion: Completion) -> float:
    """Cheap, and different for nearly any two completions."""
    return float((completion.tokens % 7 == 0).mean())


def made_ready(asked: argparse.Namespace) -> nn.Module:
    """The model with its adapter."""
    if asked.model in SHAPES:
        vocabulary = VOCABULARY[asked.model]
        return made_up_model(Asked(asked.model, "bfloat16", 0, 0, 0, vocabulary, asked.rank))
    return attach_lora(load_model(asked.model)[0], asked.rank)


def write(row: dict[str, Any]) -> None:
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


def show(asked: argparse.Namespace, rows: dict[tuple[int, int], dict[str, Any]]) -> None:
    """Seconds of a step and peak memory, group sizes down and completion lengths across."""
    table = Table(title=f"{asked.model}: seconds of a step, GB at its peak")
    for heading in ("group", *map(str, asked.lengths)):
        table.add_column(heading, justify="right")
    for group in asked.groups:
        cells = [rows.get((group, length)) for length in asked.lengths]
        said = ["" if c is None else f"{c['seconds']['step']:.1f} s, {c['peak_bytes'] / 1e9:.2f}" for c in cells]
        table.add_row(str(group), *said)
    Console().print(table)


if __name__ == "__main__":
    main()
