"""Compare the tail of rollouts with and without drafts: passes of the model, seconds, and completions that differ.

    OPENBLAS_NUM_THREADS=2 .venv/bin/python benchmarks/drafts.py [--group 16] [--temperatures 0.6 1.0]

SmolLM2-135M answers questions, each as often as a group has rows, until it ends its answer. The tail begins when so few
rows are left that drafts may be tried (drafts.py, ROWS), with what the others have said. Both ways are timed by turns,
in one process; the temperature sets the entropy, which the row has. A row for each is appended to
benchmarks/results/drafts.jsonl.
"""

from __future__ import annotations

import argparse
import json
import time
from collections.abc import Callable
from itertools import product
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

import textpolicy as tp  # before mlx: it gives MLX a fast BLAS

# isort: split
from textpolicy.engine import Sampling
from textpolicy.mlx.decode.decoder import _Decoder
from textpolicy.mlx.decode.drafts import ROWS
from textpolicy.mlx.engine import MLXEngine

QUESTIONS = [
    "Explain in two sentences why the sky is blue.",
    "What is photosynthesis? Answer in two or three sentences.",
    "Give three tips for learning a language, one line each.",
    "A train goes 60 km in an hour. How far does it go in three hours? Explain each step.",
]
RESULTS = Path(__file__).parent / "results" / "drafts.jsonl"


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--temperatures", type=float, nargs="+", default=[0.6, 1.0])
    parser.add_argument("--tokens", type=int, default=320)
    parser.add_argument("--times", type=int, default=1, help="with other random numbers")
    asked = parser.parse_args()
    model, tokenizer = tp.load_model("smollm2-135m")
    engine = MLXEngine(model, stop=tokenizer.eos_token_ids)
    tail: list[float] = []  # seconds of its passes
    for name in ("write_shared", "write_drafts"):
        setattr(_Decoder, name, in_tail(getattr(_Decoder, name), tail))
    for temperature in asked.temperatures:
        seconds: dict[bool, list[float]] = {False: [], True: []}
        tails: dict[bool, list[float]] = {False: [], True: []}
        passes, entropy, differing = {False: 0, True: 0}, [], 0
        for question, seed in product(QUESTIONS, range(asked.times)):
            prompt = tokenizer.apply_chat_template([{"role": "user", "content": question}], add_generation_prompt=True)
            said = {}
            for engine.drafts in (False, True):
                tail.clear()
                start = time.perf_counter()
                [group] = engine.sample([prompt], asked.group, Sampling(asked.tokens, temperature, seed=seed))
                seconds[engine.drafts].append(time.perf_counter() - start)
                tails[engine.drafts].append(sum(tail))
                passes[engine.drafts] += len(tail)
                said[engine.drafts] = [c.tokens.tolist() for c in group]
            entropy += [float(c.entropy.mean()) for c in group if c.entropy is not None]
            differing += sum(a != b for a, b in zip(said[False], said[True], strict=True))
        row = {
            "benchmark": "drafts",
            "group": asked.group,
            "rows": ROWS,
            "temperature": temperature,
            "entropy": round(float(np.mean(entropy)), 2),
            "tokens": asked.tokens,
            "passes": passes[False],
            "passes_with_drafts": passes[True],
            "seconds": [round(s, 2) for s in tails[False]],
            "seconds_with_drafts": [round(s, 2) for s in tails[True]],
            "of_rollouts": [round(s, 2) for s in seconds[False]],
            "of_rollouts_with_drafts": [round(s, 2) for s in seconds[True]],
            "fewer_passes": round(passes[False] / passes[True], 3),
            "times_as_fast": round(sum(tails[False]) / sum(tails[True]), 3),
            "differing": differing,
            "of": asked.group * asked.times * len(QUESTIONS),
            **describe(),
        }
        print({name: row[name] for name in list(row)[:16]}, flush=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")


def in_tail(write: Callable[[_Decoder, Any], Any], tail: list[float]) -> Callable[[_Decoder, Any], Any]:
    """Return ``write``, a pass, that adds its seconds to ``tail`` while at most ROWS rows are left."""

    def timed(self: _Decoder, active: Any) -> Any:
        few, start = self.running(active.rows).sum() <= ROWS, time.perf_counter()
        after = write(self, active)
        if few:
            tail.append(time.perf_counter() - start)
        return after

    return timed


if __name__ == "__main__":
    main()
