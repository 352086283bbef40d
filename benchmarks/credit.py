"""Time the credit of a step: 256 completions of 1,024 tokens under the `full` recipe, on one core.

    .venv/bin/python benchmarks/credit.py [--recipe full] [--repeats 15]

A row with the fastest and the median time of `Algorithm.tokens` and of `Algorithm.credit`, which also packs
the batch, is appended to benchmarks/results/credit.jsonl. Episodes are made up; their texts are sentences of
mathematical reasoning in pieces as long as a tokenizer's, some with strategic grams.
"""

from __future__ import annotations

import os

os.environ["OPENBLAS_NUM_THREADS"] = os.environ["OMP_NUM_THREADS"] = "1"  # read when NumPy is imported

import argparse
import itertools
import json
import re
import statistics
import sys
import time
from collections.abc import Callable, Iterator
from dataclasses import replace
from pathlib import Path

import numpy as np
from machine import describe

from textpolicy.algorithms import Algorithm, algorithm
from textpolicy.types import Completion, Episode

RESULTS = Path(__file__).parent / "results" / "credit.jsonl"
GROUPS, SIZE, TOKENS, PROMPT = 32, 8, 1024, 128
PIECE = re.compile(r" ?[A-Za-z']{1,6}|\s?[^A-Za-z\s]|\s")  # long words fall into pieces, as they do for a tokenizer

PLAIN = """The train covers 120 km in 3 hours, so its speed is 120 / 3 = 40 km per hour.
Adding both equations gives 5x = 35 and therefore x = 7.
The area of the triangle is half of its base times its height, which is 24.
We substitute y = 2x - 1 into the second equation and simplify.
There are 12 ways to choose the first digit after removing repetitions.
The remainder after division by 9 equals that of the sum of the digits.
Both sides are positive, hence squaring keeps the inequality.
The sequence grows by 4 in every step, so the tenth term is 3 + 9 * 4 = 39.
Each of the 6 faces is painted with one of two colours.
This quadratic factors as (x - 3)(x + 5) and has the roots 3 and -5.
The probability of two heads in a row is 1/2 * 1/2 = 1/4.
Since the angles add up to 180 degrees, the third one measures 65.
After 15 minutes the tank has lost a quarter of its water.
Multiplying the fractions and cancelling common factors leaves 7/12.""".splitlines()

STRATEGIC = """Wait, let me read the question again.
Let me check this with a smaller number.
On second thought, the order of the digits matters.
Notice that every second term is even.
The key is to count the complement.
That doesn't work, because the sum would be odd.
Is there another way to write this product?
What if we assume that n is prime?""".splitlines()


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--recipe", default="full")
    parser.add_argument("--repeats", type=int, default=15)
    asked = parser.parse_args()
    if sys.platform == "linux":
        os.sched_setaffinity(0, {max(os.sched_getaffinity(0))})
    rng = np.random.default_rng(0)
    episodes = [made_up(rng, i // SIZE, float(i % SIZE < 1 + i // SIZE % 7)) for i in range(GROUPS * SIZE)]
    recipe = pooling_from_the_start(replace(algorithm(asked.recipe), length=float(TOKENS)))
    row = {
        "benchmark": "credit",
        "recipe": asked.recipe,
        "completions": len(episodes),
        "tokens": sum(int(e.mask.sum()) for e in episodes),
        "planning_share": round(float(recipe.tokens(episodes).planning.mean()), 4),
        "repeats": asked.repeats,
        "tokens_ms": measured(recipe, recipe.tokens, episodes, asked.repeats),
        "credit_ms": measured(recipe, recipe.credit, episodes, asked.repeats),
        **describe(),
    }
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    print(f"{row['tokens']} tokens, {row['planning_share']:.1%} of them planning")
    for name in ("tokens_ms", "credit_ms"):
        print(f"{name:>10}  median {row[name]['median']:.1f}  fastest {row[name]['min']:.1f}")


def measured(recipe: Algorithm, credit: Callable, episodes: list[Episode], repeats: int) -> dict[str, float]:
    """Milliseconds of ``credit(episodes, controller)``, after two calls that do not count."""
    controller, seconds = recipe.controller(), []
    for _ in range(repeats + 2):
        started = time.perf_counter()
        credit(episodes, controller)
        seconds.append(time.perf_counter() - started)
    kept = [1000 * s for s in seconds[2:]]
    return {"min": round(min(kept), 2), "median": round(statistics.median(kept), 2)}


def pooling_from_the_start(recipe: Algorithm) -> Algorithm:
    """Without delay and gate, so that SEPA has work to do from its second step on."""
    if recipe.pooling is None:
        return recipe
    return replace(recipe, pooling=replace(recipe.pooling, sepa_delay_steps=0, sepa_correct_rate_gate=0.0))


def made_up(rng: np.random.Generator, group: int, reward: float) -> Episode:
    """A completion with surprisals and entropies that are heavy-tailed, as a model's are."""
    entropy = rng.gamma(0.4, 1.2, TOKENS).astype(np.float32)
    completion = Completion(
        tokens=rng.integers(1, 50_000, TOKENS).astype(np.int32),
        logprobs=(-entropy * rng.exponential(1.0, TOKENS)).astype(np.float32),
        entropy=entropy,
    )
    prompt = rng.integers(1, 50_000, PROMPT).tolist()
    pieces = tuple(itertools.islice(written(rng), TOKENS))
    text = "".join(pieces)
    return Episode.from_completion(prompt, completion, reward=reward, group=group, pieces=pieces, text=text)


def written(rng: np.random.Generator) -> Iterator[str]:
    """Pieces of sentence after sentence, one in eight of them with a strategic gram."""
    while True:
        sentences = STRATEGIC if rng.random() < 1 / 8 else PLAIN
        yield from PIECE.findall(sentences[rng.integers(len(sentences))] + "\n")


if __name__ == "__main__":
    main()
