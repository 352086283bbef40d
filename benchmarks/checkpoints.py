"""Measure a checkpoint of the built-in model: seconds to write and read it, and its bytes, by kind of adapter.

python benchmarks/checkpoints.py          appends a row to results/checkpoints.jsonl
"""

from __future__ import annotations

import argparse
import json
import statistics
import tempfile
import time
from pathlib import Path

from machine import describe

from textpolicy.config.adapters import KINDS
from textpolicy.mlx.adapters.merging import attach
from textpolicy.mlx.engine import MLXEngine
from textpolicy.mlx.models import load_model
from textpolicy.run.checkpoint import Checkpoints, link_tree, read

REPEATS = 5
STEP_SECONDS = 3.4  # of a training step with the defaults, RESULTS.md


def measure(kind: str) -> dict:
    """Medians of a few checkpoints, the best weights linked from the one before as they are in most steps."""
    adapter = KINDS[kind]()
    model, tokenizer = load_model("smollm2-135m", dequantize=adapter.dequantize)
    engine = MLXEngine(attach(model, adapter), stop=tokenizer.eos_token_ids)
    with tempfile.TemporaryDirectory(dir=".") as folder:
        checkpoints = Checkpoints(Path(folder))
        first = checkpoints.write(0, {}, lambda new: _fill_first(engine, new))
        seconds = []
        for step in range(1, REPEATS + 1):
            began, last = time.perf_counter(), checkpoints.folder / f"step-{step - 1:06d}"
            first = checkpoints.write(step, {}, lambda new, last=last: _fill(engine, new, last))
            seconds.append(time.perf_counter() - began)
        size = sum(p.stat().st_size for p in first.path.rglob("*") if p.is_file())
        began = time.perf_counter()
        engine.read_state(read(first.path).path)
        reading = time.perf_counter() - began
    return {
        "kind": kind,
        "mb": round(size / 1e6, 1),
        "write_seconds": round(statistics.median(seconds), 3),
        "write_seconds_most": round(max(seconds), 3),
        "read_seconds": round(reading, 3),
        "share_of_a_step": round(statistics.median(seconds) / STEP_SECONDS, 3),
    }


def _fill_first(engine: MLXEngine, new: Path) -> None:
    engine.write_state(new)
    engine.write_weights(engine.weights(), new / "best")


def _fill(engine: MLXEngine, new: Path, last: Path) -> None:
    engine.write_state(new)
    link_tree(last / "best", new / "best")


def main() -> None:
    rows = [measure(kind) for kind in ("lora", "tinylora")]
    row = {"benchmark": "checkpoints", "rows": rows, **describe()}
    with (Path(__file__).parent / "results" / "checkpoints.jsonl").open("a") as file:
        file.write(json.dumps(row) + "\n")
    print(json.dumps(rows, indent=2))


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
