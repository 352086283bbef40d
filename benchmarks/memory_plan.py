"""Compare the memory that is predicted for updates and rollouts with their peaks, by the length of completions.

    .venv/bin/python benchmarks/memory_plan.py [--model small qwen3-0.6b] [--length 256 512 1024 2048 4096]
    TEXTPOLICY_GENERIC_GPU=1 .venv/bin/python benchmarks/memory_plan.py

Each update and rollout has a process of its own: random weights, a LoRA, one prompt of 128 tokens, and as many
completions of full length as the default micro-batch holds; a rollout has 16 times as many, at most 256. Three updates,
or two rollouts, as a run makes them, of which in the second about half of the rows stop before; the largest peak
counts. Rows are appended to benchmarks/results/memory_plan.jsonl; the target is a prediction of 1 to 1.3 times the
peak.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe
from update_memory import SHAPES, Asked, made_up_batch, made_up_model

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx

from textpolicy.engine import Sampling
from textpolicy.losses import Surrogate
from textpolicy.mlx.engine import MLXEngine
from textpolicy.mlx.memory import Costs, Workload, hold
from textpolicy.mlx.trial import measured

RESULTS = Path(__file__).parent / "results" / "memory_plan.jsonl"
PROMPT, VOCABULARY, MICRO_BATCH = 128, 151_936, 8192


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, nargs="*", default=list(SHAPES))
    parser.add_argument("--length", type=int, nargs="*", default=[256, 512, 1024, 2048, 4096])
    parser.add_argument("--kind", choices=["update", "rollout"], nargs="*", default=["update", "rollout"])
    parser.add_argument("--checkpoint-every", type=int, default=0)
    parser.add_argument("--vocabulary", type=int, default=VOCABULARY)
    parser.add_argument("--tokens", type=int, default=MICRO_BATCH, help="of a micro-batch")
    parser.add_argument("--output", type=Path, default=RESULTS)
    parser.add_argument("--alone", action="store_true", help=argparse.SUPPRESS)  # measure here, and print it
    asked = parser.parse_args()
    if asked.alone:
        print(json.dumps(compare(asked, asked.model[0], asked.kind[0], asked.length[0])))
        return
    for model in asked.model:
        for kind in asked.kind:
            for length in asked.length:
                case = [f"--model={model}", f"--kind={kind}", f"--length={length}"]
                case += [f"--checkpoint-every={asked.checkpoint_every}", f"--vocabulary={asked.vocabulary}"]
                command = [sys.executable, __file__, "--alone", f"--tokens={asked.tokens}", *case]
                done = subprocess.run(command, capture_output=True, text=True)
                last = (done.stderr.strip().splitlines() or ["nothing"])[-1][:300]
                found = {"error": last} if done.returncode else json.loads(done.stdout)
                row = {"benchmark": "memory_plan", "model": model, "kind": kind, "completion": length, **found}
                row |= {"device": str(mx.default_device()), "generic": os.environ.get("TEXTPOLICY_GENERIC_GPU") == "1"}
                with asked.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({**row, **describe()}) + "\n")
                told = found.get("error") or (
                    f"{found['rows']:4} rows  predicted {found['predicted_bytes'] / 1e9:7.3f} GB  "
                    f"peak {found['peak_bytes'] / 1e9:7.3f} GB  ratio {found['ratio']:.3f}"
                )
                print(f"{model:>10} {kind:>8} {length:5}  {told}", flush=True)


def compare(asked: argparse.Namespace, name: str, kind: str, length: int) -> dict[str, Any]:
    """Return the predicted and the measured peak of updates or rollouts, with the seconds that they take."""
    fit = max(1, asked.tokens // (PROMPT + length))
    rows = fit if kind == "update" else min(256, 16 * fit)
    dtype = "float32" if mx.default_device() == mx.cpu else "bfloat16"
    shape = Asked(name, dtype, rows, PROMPT, length, asked.vocabulary, rank=16)
    model, work = made_up_model(shape), Workload(1, rows, PROMPT, length)
    rng = np.random.default_rng(1)
    stop = rng.choice(asked.vocabulary, round(0.7 * asked.vocabulary / length), replace=False).tolist()
    engine = MLXEngine(
        model, stop=stop, micro_batch_tokens=rows * work.row, decode_rows=rows, checkpoint_every=asked.checkpoint_every
    )
    began = time.perf_counter()
    costs = Costs.measure(model, checkpoint_every=engine.checkpoint_every, compiled=engine.compiled)
    measuring = time.perf_counter() - began
    update, decode = costs.update(work, rows * work.row), costs.decode(work, rows)
    hold(engine, costs, update, decode)
    peaks, seconds = [], []
    for seed in range(3 if kind == "update" else 2):
        if kind == "update":
            batch = made_up_batch(shape)
            metrics, took, _ = measured(lambda batch=batch: engine.update(batch, Surrogate(), 1e-5))
            peak = metrics["peak_memory_bytes"]
        else:
            engine.stop = np.array(stop if seed else [], np.int32)
            prompt = rng.integers(0, asked.vocabulary, PROMPT).tolist()
            sampling = Sampling(length, seed=seed)
            _, took, peak = measured(lambda prompt=prompt, sampling=sampling: engine.sample([prompt], rows, sampling))
        peaks.append(peak)
        seconds.append(took)
    predicted = update if kind == "update" else decode
    return {
        "rows": rows,
        "prompt": PROMPT,
        "checkpoint_every": asked.checkpoint_every,
        "dtype": dtype,
        "predicted_bytes": predicted,
        "peak_bytes": max(peaks),
        "ratio": predicted / max(peaks),
        "peaks": peaks,
        "seconds": min(seconds),
        "seconds_of_measuring": measuring,
        "weights_bytes": costs.weights,
    }


if __name__ == "__main__":
    main()
