"""Break a decoding step on a CPU into its parts, one JSON row: 2 prompts of 32 tokens x 4 completions of 64.

    OPENBLAS_NUM_THREADS=2 .venv/bin/python benchmarks/decode_parts.py

A step is measured as a whole: as it is, with LoRAs (rank 16 on every linear layer) folded into copies of the weights;
without these copies; and without LoRAs. Of the step without copies the products, the drawing and the attention are
measured alone, each with arrays that the cache of a core does not hold, and what is left is called the rest. Medians;
a quiet machine is wanted.
"""

from __future__ import annotations

import argparse
import json
import os
import statistics
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

import textpolicy as tp
from textpolicy.engine import Sampling
from textpolicy.mlx import engine
from textpolicy.mlx.adapters.merging import attach_lora
from textpolicy.mlx.decode.sampling import Sampler
from textpolicy.mlx.engine import MLXEngine
from textpolicy.mlx.kernels.attention import patches
from textpolicy.mlx.kernels.patching import patched
from textpolicy.mlx.read.prompts import PromptTree

import mlx.core as mx  # isort: skip  (after textpolicy, which gives it a fast BLAS)
import mlx.nn as nn  # isort: skip
import mlx_lm.models.llama as llama  # isort: skip

RESULTS = Path(__file__).parent / "results" / "decode_parts.jsonl"
PROMPTS, PROMPT_TOKENS, GROUP, NEW_TOKENS = 2, 32, 4, 64
ROWS = PROMPTS * GROUP


def main() -> None:
    model, _ = tp.load_model("smollm2-135m")
    draw = np.random.default_rng(0)
    prompts = [draw.integers(10, 40_000, PROMPT_TOKENS).astype(np.int32) for _ in range(PROMPTS)]
    modules = [module for layer in model.model.layers for module in layer.modules()]
    blocks = [module.weight for module in modules if isinstance(module, nn.Linear)]
    inputs = {width: mx.random.normal((ROWS, width)) for width in {weight.shape[1] for weight in blocks}}
    head = model.model.embed_tokens.weight
    hidden, logits = mx.random.normal((ROWS, head.shape[1])), mx.random.normal((ROWS, head.shape[0]))
    sampler, uniform = Sampler(Sampling()), mx.random.uniform(shape=(ROWS,))
    mx.eval(blocks, inputs, hidden, logits, uniform)
    forward = forward_milliseconds(model, prompts)
    with attention_left_out():
        bare = forward_milliseconds(model, prompts)
    parts = {
        "blocks_products": milliseconds(lambda: mx.eval([inputs[w.shape[1]] @ w.T for w in blocks])),
        "head_product": milliseconds(lambda: mx.eval(hidden @ head.T)),
        "drawing": milliseconds(lambda: mx.eval(sampler(logits, mx.arange(ROWS), uniform))),
        "attention": forward - bare,
    }
    plain = step_milliseconds(model, prompts)
    attach_lora(model, rank=16)
    step = step_milliseconds(model, prompts)
    with copies_left_out():
        without_copies = step_milliseconds(model, prompts)
    parts |= {"lora": without_copies - plain, "rest": plain - sum(parts.values())}
    row = {
        "benchmark": "decode_parts",
        "rows": ROWS,
        "prompt_tokens": PROMPT_TOKENS,
        "new_tokens": NEW_TOKENS,
        "weights_gb": (sum(w.nbytes for w in blocks) + head.nbytes) / 1e9,
        "threads": int(os.environ.get("OPENBLAS_NUM_THREADS", os.cpu_count() or 1)),
        "step_milliseconds": step,
        "step_without_copies_milliseconds": without_copies,
        **{f"{name}_milliseconds": value for name, value in parts.items()},
        **describe(),
    }
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    named = ", ".join(f"{k.replace('_', ' ')} {v:.1f}" for k, v in parts.items())
    print(f"a step takes {step:.1f} ms, and without copies {without_copies:.1f}: {named}")


def milliseconds(run: Callable[[], object], runs: int = 15) -> float:
    """The median of one run, after one that does not count."""
    run()
    taken = []
    for _ in range(runs):
        began = time.perf_counter()
        run()
        taken.append(1e3 * (time.perf_counter() - began))
    return statistics.median(taken)


def step_milliseconds(model: Any, prompts: list[np.ndarray]) -> float:
    """A rollout by its tokens; reading the prompts is a fiftieth of it."""
    sampled, sampling = MLXEngine(model, stop=[]), Sampling(max_tokens=NEW_TOKENS, seed=1)
    ids = [prompt.tolist() for prompt in prompts]
    return milliseconds(lambda: sampled.sample(ids, GROUP, sampling), runs=5) / NEW_TOKENS


def forward_milliseconds(model: Any, prompts: list[np.ndarray]) -> float:
    """One token more for every row, somewhere in its completion, without drawing."""
    tree = PromptTree.build([prompt for prompt in prompts for _ in range(GROUP)])
    tokens = mx.array(np.arange(100, 100 + ROWS, dtype=np.int32))[:, None]
    with patched(model, patches()):
        context = tree.read(model, NEW_TOKENS).fork(tree.parents)
        return milliseconds(lambda: mx.eval(context.read(model, tokens)[:, -1]), runs=25)


@contextmanager
def copies_left_out() -> Iterator[None]:
    """LoRAs are added to the products."""
    true = engine.folded
    engine.folded = lambda model, rows: model
    try:
        yield
    finally:
        engine.folded = true


@contextmanager
def attention_left_out() -> Iterator[None]:
    """Its queries in place of what it would give."""
    true = llama.scaled_dot_product_attention
    llama.scaled_dot_product_attention = lambda queries, *arguments, **keywords: queries
    try:
        yield
    finally:
        llama.scaled_dot_product_attention = true


if __name__ == "__main__":
    argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter).parse_args()
    main()
