"""Compare rollouts of few rows with and without drafts: passes of the model, seconds, and completions that differ.

    OPENBLAS_NUM_THREADS=2 .venv/bin/python benchmarks/drafts.py [--rows 2 8] [--temperatures 0.5]

SmolLM2-135M repeats and explains a text, as often as there are rows. Both ways are timed in turn, in one process; the
temperature sets the entropy, which the row has. A row for each is appended to benchmarks/results/drafts.jsonl.
"""

from __future__ import annotations

import argparse
import json
import time
from pathlib import Path

import numpy as np
from machine import describe

import textpolicy as tp  # before mlx: it gives MLX a fast BLAS

# isort: split
from textpolicy.engine import Sampling
from textpolicy.mlx.decode import decoder
from textpolicy.mlx.engine import MLXEngine

TEXT = (
    "The water cycle: water evaporates from the sea, the vapour rises, cools and forms clouds; rain falls from the "
    "clouds, runs off in rivers, and returns to the sea."
)
ASKED = f"Repeat the following text word for word, then explain each of its sentences in turn.\n\n{TEXT}"
RESULTS = Path(__file__).parent / "results" / "drafts.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--rows", type=int, nargs="+", default=[4, 8])
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.5, 1.0])
    parser.add_argument("--tokens", type=int, default=160)
    parser.add_argument("--times", type=int, default=3)
    asked = parser.parse_args()
    model, tokenizer = tp.load_model("smollm2-135m")
    engine = MLXEngine(model, stop=())
    prompt = tokenizer.apply_chat_template([{"role": "user", "content": ASKED}], add_generation_prompt=True)
    made: list[decoder._Decoder] = []
    true = decoder._Decoder.run

    def counted(self: decoder._Decoder) -> list:
        made.append(self)
        return true(self)

    decoder._Decoder.run = counted  # type: ignore[method-assign]
    for rows in asked.rows:
        for temperature in asked.temperatures:
            seconds: dict[bool, list[float]] = {False: [], True: []}
            cpu: dict[bool, list[float]] = {False: [], True: []}
            passes, entropy, differing = {False: 0, True: 0}, [], 0
            for seed in range(asked.times):
                said = {}
                for engine.drafts in (False, True):
                    start, busy = time.perf_counter(), time.process_time()
                    [group] = engine.sample([prompt], rows, Sampling(asked.tokens, temperature, seed=seed))
                    seconds[engine.drafts].append(time.perf_counter() - start)
                    cpu[engine.drafts].append(time.process_time() - busy)
                    passes[engine.drafts] += made[-1].passes
                    said[engine.drafts] = [c.tokens.tolist() for c in group]
                entropy += [float(c.entropy.mean()) for c in group if c.entropy is not None]
                differing += sum(a != b for a, b in zip(said[False], said[True], strict=True))
            row = {
                "benchmark": "drafts",
                "rows": rows,
                "temperature": temperature,
                "entropy": round(float(np.mean(entropy)), 2),
                "tokens": asked.tokens,
                "passes": passes[False],
                "passes_with_drafts": passes[True],
                "seconds": [round(s, 2) for s in seconds[False]],
                "seconds_with_drafts": [round(s, 2) for s in seconds[True]],
                "cpu_seconds": [round(s, 2) for s in cpu[False]],
                "cpu_seconds_with_drafts": [round(s, 2) for s in cpu[True]],
                "fewer_passes": round(passes[False] / passes[True], 3),
                "times_as_fast": round(sum(seconds[False]) / sum(seconds[True]), 3),
                "differing": differing,
                "of": rows * asked.times,
                **describe(),
            }
            print({name: row[name] for name in list(row)[:14]}, flush=True)
            with RESULTS.open("a", encoding="utf-8") as file:
                file.write(json.dumps(row) + "\n")


if __name__ == "__main__":
    main()
