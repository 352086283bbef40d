"""Measure the tokens per second of rollouts, one after the other and by turns with updates of the same size.

    .venv/bin/python benchmarks/decode_rate.py [--model qwen3-0.6b | small] [--prompts 16] [--group 16] [--tokens 256]

Random weights, bfloat16 on a GPU and float32 on a CPU, a LoRA of rank 16, prompts of as many tokens as completions;
no completion stops early. The first rollout and update compile and do not count. Each rate is the tokens of a rollout
by its seconds. A row is appended to benchmarks/results/decode_rate.jsonl.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
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
from textpolicy.mlx.trial import measured

RESULTS = Path(__file__).parent / "results" / "decode_rate.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="qwen3-0.6b")
    parser.add_argument("--vocabulary", type=int, default=151_936)
    for name, default in {"prompts": 16, "group": 16, "tokens": 256, "times": 6}.items():
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    rows, dtype = asked.prompts * asked.group, "float32" if mx.default_device() == mx.cpu else "bfloat16"
    shape = Asked(asked.model, dtype, rows, asked.tokens, asked.tokens, asked.vocabulary, rank=16)
    engine = MLXEngine(made_up_model(shape), stop=[], decode_rows=rows)
    batch, draw = made_up_batch(shape), np.random.default_rng(0)
    prompts = draw.integers(0, asked.vocabulary, (asked.prompts, asked.tokens)).tolist()

    def rollout(seed: int) -> float:
        _, seconds, _ = measured(lambda: engine.sample(prompts, asked.group, Sampling(asked.tokens, seed=seed)))
        return seconds

    def update(_: int) -> float:
        _, seconds, _ = measured(lambda: engine.update(batch, Surrogate(), 1e-5))
        return seconds

    rollout(0), update(0)
    alone = [rollout(seed) for seed in range(1, 1 + asked.times)]
    by_turns = [(rollout(seed), update(seed)) for seed in range(1, 1 + asked.times)]
    between, updates = ([pair[i] for pair in by_turns] for i in (0, 1))
    row: dict[str, Any] = {
        "benchmark": "decode_rate", "model": asked.model, "rows": rows, "tokens": asked.tokens, "dtype": dtype,
        "alone_s": alone, "between_updates_s": between, "updates_s": updates,
        "tokens_per_s": {
            what: rows * asked.tokens / statistics.median(seconds)
            for what, seconds in {"alone": alone, "between_updates": between}.items()
        },
        "device": str(mx.default_device()), "generic": os.environ.get("TEXTPOLICY_GENERIC_GPU") == "1", **describe(),
    }  # fmt: skip
    print(json.dumps(row))
    with asked.output.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
