"""Time the planning masks of a step's completions: one JSON row per case.

    OPENBLAS_NUM_THREADS=1 .venv/bin/python benchmarks/planning_mask.py

The text is made up of the most common English words and the built-in grams, so that words of grams are everywhere
and the quick tests that spare a search succeed rarely: real completions cost less.
"""

from __future__ import annotations

import argparse
import json
import random
import statistics
import time
from collections.abc import Callable
from pathlib import Path

import numpy as np
from machine import describe

from textpolicy.algorithms.grams import DEFAULT_STRATEGIC_GRAMS
from textpolicy.algorithms.planning import PlanningGrams, planning_masks
from textpolicy.environment.text.pieces import Pieces, text_decode
from textpolicy.mlx.models import load_model

RESULTS = Path(__file__).parent / "results" / "planning_mask.jsonl"
COMMON = (
    "the of and to a in is it you that he was for on are with as his they be at one have this from or had by not but "
    "what all were when we there can an your which their said if do will each about how up out them then she many some "
    "so these would other into has more her two like him see time could no make than first been its who now people"
)
CASES = ((1, 2048), (256, 1024))  # completions, tokens of each


def main() -> None:
    _, tokenizer = load_model("smollm2-135m")
    grams, decode = PlanningGrams(DEFAULT_STRATEGIC_GRAMS), text_decode(tokenizer)
    for completions, tokens in CASES:
        ids = [np.array(tokenizer.encode(made_up(tokens, seed)))[:tokens] for seed in range(completions)]
        read = Pieces(decode)
        cold = seconds(lambda ids=ids, read=read: [read(i) for i in ids], runs=1)
        warm = seconds(lambda ids=ids, read=read: [read(i) for i in ids])
        pieces = [read(i) for i in ids]
        mask = seconds(lambda pieces=pieces: planning_masks(pieces, grams))
        row = {
            "benchmark": "planning_mask",
            "completions": completions,
            "tokens": sum(map(len, ids)),
            "characters": sum(len("".join(p)) for p in pieces),
            "grams": len(grams.phrases),
            "marked": float(planning_masks(pieces, grams).mean()),
            "pieces_first_seconds": cold,
            "pieces_again_seconds": warm,
            "mask_seconds": mask,
            **describe(),
        }
        RESULTS.parent.mkdir(exist_ok=True)
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        texts = f"texts {1e3 * cold:.1f} ms at first, then {1e3 * warm:.1f} ms"
        print(f"{completions} x {tokens} tokens: {texts}; mask {1e3 * mask:.2f} ms")


def made_up(words: int, seed: int) -> str:
    """At least ``words`` words, a gram in place of one in fifty."""
    rng, common = random.Random(seed), COMMON.split()
    return " ".join(rng.choice(DEFAULT_STRATEGIC_GRAMS if rng.random() < 0.02 else common) for _ in range(words))


def seconds(call: Callable[[], object], runs: int = 15) -> float:
    """The median time of a call."""
    times = []
    for _ in range(runs):
        started = time.perf_counter()
        call()
        times.append(time.perf_counter() - started)
    return statistics.median(times)


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
