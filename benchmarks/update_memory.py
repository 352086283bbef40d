"""Compare the peak memory of an update with the naive path: full rows, float32 logits of every position.

    .venv/bin/python benchmarks/update_memory.py [--model small | qwen3-0.6b] [--completion 1024] [--vocabulary 151936]
    .venv/bin/python benchmarks/update_memory.py --model smollm2-135m --vocabulary 49152 --rows 1 --prompt 1 \\
        --completion 8192 --paths "every block checkpointed" "checkpointed, scores kept"
    .venv/bin/python benchmarks/update_memory.py --model smollm2-135m --vocabulary 49152 --rows 1 --prompt 1 \\
        --completion 32768 --updates 1 --paths "every block checkpointed"
    .venv/bin/python benchmarks/update_memory.py --paths textpolicy "distil from its base" "distil from another"

Both take the same step of the same model on the same completions: GRPO's loss, LoRA on every linear layer,
AdamW. Each path runs in a process of its own, so that neither's peak holds what the other left. One row with all
paths is appended to benchmarks/results/update_memory.jsonl. The models have random weights; "small" is narrow, so
that the logits dominate as they do in a large vocabulary and a CPU is done in minutes. A GPU is handed work ahead, and
what waits takes memory, up to MLX's limit: one path has the prediction for that limit, as a run has what it may use.
"""

from __future__ import annotations

import argparse
import json
import math
import subprocess
import sys
import time
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from functools import partial
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
from mlx.utils import tree_flatten
from mlx_lm.models import qwen3

from textpolicy.losses import Surrogate, policy_objective
from textpolicy.mlx.adapters.merging import attach_lora
from textpolicy.mlx.engine import MLXEngine
from textpolicy.mlx.kernels import attention
from textpolicy.mlx.memory import Costs, Workload
from textpolicy.mlx.score.micro_batches import micro_batches
from textpolicy.types import Batch, Completion, Episode

RESULTS = Path(__file__).parent / "results" / "update_memory.jsonl"
LEARNING_RATE = 1e-5
PATHS = {  # the engine's settings; None is the naive path
    "naive": None,
    "textpolicy": {},
    "all rows in one pass": {"micro_batch_tokens": 2**30},
    "micro-batches of one row": {"micro_batch_tokens": 1},
    "every block checkpointed": {"checkpoint_every": 1},
    "held to its prediction": {},
    "checkpointed, scores kept": {"checkpoint_every": 1},
    "distil from its base": {},
    "distil from another": {},
}
BETA = 0.5  # Jensen-Shannon, which takes most
KEPT = "checkpointed, scores kept"  # attention keeps all scores for its gradient, however long the rows are
HELD = "held to its prediction"  # MLX's limit on memory is what passes of that many rows are said to take
SHAPES: dict[str, dict[str, Any]] = {
    "small": {
        "hidden_size": 256,
        "num_hidden_layers": 4,
        "intermediate_size": 768,
        "num_attention_heads": 4,
        "num_key_value_heads": 2,
        "head_dim": 64,
    },
    "qwen3-0.6b": {
        "hidden_size": 1024,
        "num_hidden_layers": 28,
        "intermediate_size": 3072,
        "num_attention_heads": 16,
        "num_key_value_heads": 8,
        "head_dim": 128,
    },
    "smollm2-135m": {
        "hidden_size": 576,
        "num_hidden_layers": 30,
        "intermediate_size": 1536,
        "num_attention_heads": 9,
        "num_key_value_heads": 3,
        "head_dim": 64,
    },
}


@dataclass(frozen=True)
class Asked:
    """One comparison."""

    model: str
    dtype: str
    rows: int
    prompt: int  # tokens
    completion: int  # tokens
    vocabulary: int
    rank: int
    updates: int = 2


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--model", choices=SHAPES, default="small")
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], help="float32 on a CPU, else bfloat16")
    parser.add_argument("--rows", type=int, default=8)
    parser.add_argument("--prompt", type=int, default=64)
    parser.add_argument("--completion", type=int, default=1024)
    parser.add_argument("--vocabulary", type=int, default=151_936)
    parser.add_argument("--rank", type=int, default=16)
    parser.add_argument("--updates", type=int, default=2 if mx.default_device() == mx.cpu else 3)
    parser.add_argument("--path", choices=PATHS, help=argparse.SUPPRESS)  # this process runs one path and prints it
    parser.add_argument("--paths", choices=PATHS, nargs="*", default=list(PATHS))
    given = vars(parser.parse_args())
    chosen = given.pop("paths")
    path, dtype = given.pop("path"), given.pop("dtype") or ("float32" if mx.default_device() == mx.cpu else "bfloat16")
    asked = Asked(**given, dtype=dtype)
    if path is not None:
        print(json.dumps(measure(asked, path)))
        return
    paths = {path: in_a_process_of_its_own(asked, path) for path in chosen}
    base = paths.get("naive", paths[chosen[-1]])
    row = {
        "benchmark": "update_memory",
        **asdict(asked),
        "device": "cpu" if mx.default_device() == mx.cpu else "gpu",
        "paths": paths,
        "share_of_naive" if "naive" in paths else "share_of_last": {
            name: p["peak_bytes"] / base["peak_bytes"] for name, p in paths.items()
        },
        **describe(),
    }
    RESULTS.parent.mkdir(exist_ok=True)
    with RESULTS.open("a", encoding="utf-8") as file:
        file.write(json.dumps(row) + "\n")
    for name, p in paths.items():
        share, time = p["peak_bytes"] / base["peak_bytes"], p["seconds"] / base["seconds"]
        print(
            f"{name:>26}  peak {p['peak_bytes'] / 1e9:6.2f} GB  {share:6.1%}  {p['seconds']:7.1f} s  {time:6.1%}  "
            f"gradient {p['grad_norm']:.5f}"
        )


def in_a_process_of_its_own(asked: Asked, path: str) -> dict[str, Any]:
    flags = [f"--{name}={value}" for name, value in asdict(asked).items()]
    done = subprocess.run([sys.executable, __file__, *flags, f"--path={path}"], stdout=subprocess.PIPE, text=True)
    if done.returncode:
        raise SystemExit(f"the path {path!r} ended with exit code {done.returncode}; what it said is above")
    return json.loads(done.stdout)


def measure(asked: Asked, path: str) -> dict[str, Any]:
    """Of several updates: the optimiser's state comes with the first, and a GPU's compiled pass with the second."""
    model, batch = made_up_model(asked), made_up_batch(asked)
    predicted, rows = None, asked.rows
    if path == KEPT:
        attention._KEPT = math.inf
    if (settings := PATHS[path]) is None:
        step = NaiveStep(model)
    else:
        engine = MLXEngine(model, stop=(), **settings)
        teacher = None
        if path.startswith("distil"):
            other = path.endswith("another")
            teacher = MLXEngine(made_up_model(asked, seed=1), stop=(), **settings) if other else engine
            step = partial(distilled, engine, teacher, not other)
        else:
            step = partial(updated, engine)
        costs = Costs.measure(
            model,
            checkpoint_every=engine.checkpoint_every,
            compiled=engine.compiled,
            teachers=[] if teacher is None else [teacher.model],
        )
        work = Workload(1, asked.rows, asked.prompt, asked.completion)
        rows = max(len(rows) for rows, _ in micro_batches(batch, engine.micro_batch_tokens))
        predicted = costs.update(work, rows * work.row)
        if teacher not in (None, engine):  # which is in memory before, and so in what a run may not use
            predicted += costs.weights
        if path == HELD:
            mx.set_memory_limit(int(predicted))
    results, seconds = [], []
    for _ in range(asked.updates):
        mx.reset_peak_memory()
        started = time.perf_counter()
        results.append(step(batch))
        seconds.append(time.perf_counter() - started)
    return {
        "peak_bytes": max(r["peak_memory_bytes"] for r in results),
        "peaks": [r["peak_memory_bytes"] for r in results],
        "predicted_bytes": predicted,
        "rows_at_once": rows,
        "weights_bytes": sum(value.nbytes for _, value in tree_flatten(model.parameters())),
        "loss": results[0]["loss"],
        "grad_norm": results[0]["grad_norm"],
        "seconds": min(seconds),
    }


def updated(engine: MLXEngine, batch: Batch) -> Mapping[str, float]:
    return engine.update(batch, Surrogate(), LEARNING_RATE)


def distilled(engine: MLXEngine, teacher: MLXEngine, reference: bool, batch: Batch) -> Mapping[str, float]:
    return engine.distil(batch, batch, teacher, BETA, LEARNING_RATE, reference=reference)


class NaiveStep:
    """What a loop that shares and chunks nothing does."""

    def __init__(self, model: nn.Module):
        self.model, self.optimizer = model, optim.AdamW(LEARNING_RATE, weight_decay=0.0, bias_correction=True)

    def __call__(self, batch: Batch) -> dict[str, float]:
        rows = batch.map(mx.array)

        def loss(model: nn.Module) -> mx.array:
            logits = model(rows.inputs).astype(mx.float32)
            picked = mx.take_along_axis(logits, rows.targets[..., None], axis=-1)[..., 0]
            return policy_objective(picked - mx.logsumexp(logits, axis=-1), rows, mx, Surrogate())

        value, gradients = nn.value_and_grad(self.model, loss)(self.model)
        gradients, norm = optim.clip_grad_norm(gradients, 1.0)
        self.optimizer.update(self.model, gradients)
        mx.eval(value, norm, self.model.parameters(), self.optimizer.state)
        return {"loss": value.item(), "grad_norm": norm.item(), "peak_memory_bytes": float(mx.get_peak_memory())}


def made_up_model(asked: Asked, seed: int = 0) -> nn.Module:
    """Qwen3 with random weights, the same in every process, and a LoRA that is not zero."""
    mx.random.seed(seed)
    arguments = {"model_type": "qwen3", "rms_norm_eps": 1e-6, "rope_theta": 1e6, "tie_word_embeddings": True}
    longest = {"max_position_embeddings": 40_960, "vocab_size": asked.vocabulary}
    model = qwen3.Model(qwen3.ModelArgs(**arguments, **longest, **SHAPES[asked.model]))
    model.set_dtype(getattr(mx, asked.dtype))
    attach_lora(model, asked.rank)
    for module in model.modules():
        if "lora_b" in module:
            module.lora_b = (0.02 * mx.random.normal(module.lora_b.shape)).astype(module.lora_b.dtype)
    mx.eval(model.parameters())
    return model


def made_up_batch(asked: Asked) -> Batch:
    """One group: random completions of full length after one prompt, half of them good."""
    rng = np.random.default_rng(0)
    prompt = rng.integers(0, asked.vocabulary, asked.prompt)
    episodes, advantages = [], []
    for row in range(asked.rows):
        tokens = rng.integers(0, asked.vocabulary, asked.completion).astype(np.int32)
        c = Completion(tokens, np.full(asked.completion, -np.log(asked.vocabulary), np.float32), None)
        episodes.append(Episode.from_completion(prompt.tolist(), c, reward=float(row % 2), group=0))
        advantages.append(np.full(len(episodes[-1].tokens), row % 2 - 0.5, np.float32) * episodes[-1].mask)
    return Batch.pack(episodes, advantages)


if __name__ == "__main__":
    main()
