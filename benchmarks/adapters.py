"""Measure the parameters, bytes, memory and time of every kind of adapter: one JSON row and one process per kind.

    OPENBLAS_NUM_THREADS=1 .venv/bin/python benchmarks/adapters.py [KIND ...]

The built-in model, and one update on 2 prompts of 32 tokens with 4 completions of 16 each. Rows are appended to
results/adapters.jsonl, and the table of docs/10_lora_qlora.md is printed. The second of two updates is measured:
the optimiser's state exists by then, and the peak counts everything that MLX holds, the model included.
"""

from __future__ import annotations

import argparse
import json
import os
import subprocess
import sys
import tempfile
import time
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

from textpolicy.algorithms import algorithm
from textpolicy.config.adapters import KINDS, make_adapter
from textpolicy.losses import Surrogate
from textpolicy.types import Batch, Completion, Episode

MODEL = "smollm2-135m"
RESULTS = Path(__file__).parent / "results" / "adapters.jsonl"
PROMPTS, GROUP, PROMPT_TOKENS, TOKENS = 2, 4, 32, 16


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("kinds", nargs="*", default=list(KINDS), metavar="KIND")
    parser.add_argument("--here", action="store_true", help="measure the one KIND in this process")
    asked = parser.parse_args()
    if asked.here:
        print(json.dumps(measure(asked.kinds[0])))
        return
    for kind in asked.kinds:
        command = [sys.executable, __file__, "--here", kind]
        row = json.loads(subprocess.run(command, check=True, stdout=subprocess.PIPE, text=True).stdout)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps({**row, **describe()}) + "\n")
    print(table(latest()))


def measure(kind: str) -> dict[str, Any]:
    """Sizes in bytes, times in seconds, of a fresh adapter on the model and of an update."""
    from textpolicy.mlx.blas import set_blas_threads

    set_blas_threads(1)
    import mlx.core as mx
    from mlx.utils import tree_flatten

    from textpolicy.mlx.adapters.merging import attach, save_adapter, trainable
    from textpolicy.mlx.engine import MLXEngine
    from textpolicy.mlx.models import load_model

    adapter = make_adapter(kind, {})
    model, tokenizer = load_model(MODEL, dequantize=adapter.dequantize)
    base = sum(a.nbytes for _, a in tree_flatten(model.parameters()))
    with tempfile.TemporaryDirectory() as folder:
        os.environ["TEXTPOLICY_CACHE"] = folder  # so that the SVDs are computed
        started = time.perf_counter()
        attach(model, adapter)
        attach_seconds = time.perf_counter() - started
        save_adapter(model, Path(folder) / "adapter")
        saved = sum(p.stat().st_size for p in (Path(folder) / "adapter").iterdir())
    engine, rows = MLXEngine(model, stop=tokenizer.eos_token_ids), batch()
    engine.update(rows, Surrogate(), adapter.learning_rate)
    mx.clear_cache()
    started = time.perf_counter()
    metrics = engine.update(rows, Surrogate(), adapter.learning_rate)
    return {
        "benchmark": "adapters",
        "kind": kind,
        "trainable_parameters": sum(a.size for a in trainable(model).values()),
        "trained_bytes": sum(a.nbytes for a in trainable(model).values()),
        "base_bytes": base,
        "model_bytes": sum(a.nbytes for _, a in tree_flatten(model.parameters())),
        "saved_bytes": saved,
        "update_peak_bytes": metrics["peak_memory_bytes"],
        "update_seconds": time.perf_counter() - started,
        "attach_seconds": attach_seconds,
    }


def batch() -> Batch:
    """Completions of made-up tokens; half of each group earned a reward."""
    rng, episodes = np.random.default_rng(0), []
    for group in range(PROMPTS):
        prompt = rng.integers(100, 40_000, PROMPT_TOKENS).tolist()
        for i in range(GROUP):
            tokens = rng.integers(100, 40_000, TOKENS).astype(np.int32)
            completion = Completion(tokens, np.full(TOKENS, -10, np.float32), np.ones(TOKENS, np.float32))
            episodes.append(Episode.from_completion(prompt, completion, reward=float(i % 2), group=group))
    return algorithm("grpo").credit(episodes)


def latest() -> list[dict[str, Any]]:
    """The last row of every kind."""
    rows = [json.loads(line) for line in RESULTS.read_text(encoding="utf-8").splitlines()]
    found = {row["kind"]: row for row in rows}
    return [found[kind] for kind in KINDS if kind in found]


def table(rows: list[dict[str, Any]]) -> str:
    """Rows as Markdown, sizes in kB of 10^3 and MB of 10^6 bytes."""
    head = "| kind | parameters trained | trained, kB | model, MB | saved, MB | peak of an update, MB | update, s |"
    lines = [head, "|" + "---|" * 7]
    for row in rows:
        trained = [f"{row['trainable_parameters']:,}", f"{row['trained_bytes'] / 1e3:,.2f}"]
        sizes = [f"{row[f'{name}_bytes'] / 1e6:,.1f}" for name in ("model", "saved", "update_peak")]
        cells = [f"`{row['kind']}`", *trained, *sizes, f"{row['update_seconds']:.1f}"]
        lines.append(f"| {' | '.join(cells)} |")
    return "\n".join(lines)


if __name__ == "__main__":
    main()
