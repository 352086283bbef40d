"""Say what is equal to the last bit when it is computed twice: forwards, gradients, updates of small families.

    .venv/bin/python benchmarks/determinism.py [--family llama ...] [--dtype float32 | bfloat16] [--tokens 128]
    .venv/bin/python benchmarks/determinism.py --family phixtral qwen3_moe --tokens 4 --completions 1 --times 20

Every case is a family with random weights, an adapter, and passes that are compiled or not. A batch of two prompts with
several completions, some of them equal, is scored, differentiated and learnt from some times, from the same state. One
JSON row for each case is appended to benchmarks/results/determinism.jsonl, with the first array that differs, if one
does. A case that fails has the error in its place, and the others go on. The second command has so few tokens that
mlx-lm does not sort them by their experts.
"""

from __future__ import annotations

import argparse
import json
import sys
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx
from mlx.utils import tree_flatten

from textpolicy.config.adapters import Adapter, Full, LoRA, QLoRA
from textpolicy.losses import Surrogate
from textpolicy.mlx.adapters.merging import attach
from textpolicy.mlx.engine import MLXEngine, PolicyObjective
from textpolicy.mlx.state import restore_training_state, training_state
from textpolicy.mlx.trial import first_difference
from textpolicy.types import Batch, Completion, Episode

sys.path.insert(0, str(Path(__file__).parents[1] / "tests"))
from families import tiny_family

RESULTS = Path(__file__).parent / "results" / "determinism.jsonl"
WIDE = {"hidden_size": 128, "intermediate_size": 256, "head_dim": 32, "moe_intermediate_size": 64}
WIDE |= {"linear_key_head_dim": 32, "linear_value_head_dim": 32, "mamba_d_head": 32, "mamba_d_ssm": 128}
WIDE |= {"sliding_window": 64}
FAMILIES: dict[str, tuple[str, dict[str, Any]]] = {
    "llama": ("llama", {}),
    "llama, tied": ("llama", {"tie_word_embeddings": True}),
    "qwen3": ("qwen3", {}),
    "gpt_oss": ("gpt_oss", {"num_experts_per_tok": 3}),
    "phixtral": ("phixtral", {}),
    "qwen3_moe": ("qwen3_moe", {"num_experts_per_tok": 3}),
    "deepseek_v3": ("deepseek_v3", {}),
    "qwen3_next": ("qwen3_next", {"num_experts_per_tok": 3}),
    "falcon_h1": ("falcon_h1", {}),
}
ADAPTERS: dict[str, Adapter] = {"lora": LoRA(rank=8), "qlora": QLoRA(rank=8), "full": Full()}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--family", choices=FAMILIES, nargs="*", default=list(FAMILIES))
    parser.add_argument("--adapter", choices=ADAPTERS, nargs="*", default=list(ADAPTERS))
    parser.add_argument("--dtype", choices=["float32", "bfloat16"], default="float32")
    parser.add_argument("--tokens", type=int, default=128, help="of the longest completion")
    parser.add_argument("--completions", type=int, default=8, help="of each of the two prompts")
    parser.add_argument("--times", type=int, default=2, help="that everything is computed, all equal to the first")
    parser.add_argument("--output", type=Path, default=RESULTS)
    asked = parser.parse_args()
    for family in asked.family:
        for adapter in asked.adapter:
            for compiled in (False, True):
                case = {"family": family, "adapter": adapter, "compiled": compiled}
                case |= {"dtype": asked.dtype, "tokens": asked.tokens, "completions": asked.completions}
                case |= {"times": asked.times, "device": str(mx.default_device())}
                try:
                    found = compare(family, ADAPTERS[adapter], compiled, asked)
                except Exception as error:  # noqa: BLE001 - any failure is a finding
                    found = {"error": f"{type(error).__name__}: {error}".splitlines()[0][:300]}
                with asked.output.open("a", encoding="utf-8") as file:
                    file.write(json.dumps({"benchmark": "determinism", **case, **found, **describe()}) + "\n")
                told = ", ".join(f"{k} {'equal' if v is None else v}" for k, v in found.items())
                print(f"{family:12} {adapter:6} {'compiled' if compiled else 'eager   '}  {told}", flush=True)


def compare(family: str, adapter: Adapter, compiled: bool, asked: argparse.Namespace) -> dict[str, Any]:
    """Return, for each kind of computation, the name of the first array that differs; None where all are equal."""
    name, changes = FAMILIES[family]
    model = tiny_family(name, **{**WIDE, **changes})
    model.set_dtype(getattr(mx, asked.dtype))
    engine = MLXEngine(attach(model, adapter), stop=(), compile=compiled)
    for module in model.modules():
        if "lora_b" in module:  # zeros would hide the gradient of lora_a
            module.lora_b = 0.1 * mx.random.normal(module.lora_b.shape)
    batch = made_up(asked.tokens, asked.completions)
    forwards, gradients, updates = [], [], []
    for _ in range(1 + asked.times):  # of two shapes: the first is met as it is, later ones compiled
        forwards.append({"logprobs": mx.array(engine.score(batch))})
        gradients.append(dict(tree_flatten(engine.gradients(batch, PolicyObjective(Surrogate()))[1])))
    before = {name: mx.array(value) for name, value in training_state(model, engine.optimizer).items()}
    mx.eval(before)
    for _ in range(asked.times):
        restore_training_state(model, engine.optimizer, before, RESULTS)
        engine.update(batch, Surrogate(), 1e-3)
        updates.append(dict(training_state(model, engine.optimizer)))
    found = {}
    for kind, runs in (("forward", forwards[1:]), ("gradient", gradients[1:]), ("update", updates)):
        found[kind] = next(filter(None, (first_difference(runs[0], run) for run in runs[1:])), None)
    return found


def made_up(tokens: int, completions: int) -> Batch:
    """Two prompts that begin alike, with ``completions`` each of random tokens; of several, three are equal."""
    rng, episodes = np.random.default_rng(0), []
    shared = rng.integers(1, 50, tokens // 2).tolist()
    for group in range(2):
        prompt = shared + rng.integers(1, 50, tokens // 4).tolist()
        equal = rng.integers(1, 50, tokens).astype(np.int32)
        for k in range(completions):
            own = equal if k < 3 else rng.integers(1, 50, max(1, tokens - k)).astype(np.int32)
            c = Completion(own, -4 + 0.1 * rng.random(len(own)).astype(np.float32), None)
            episodes.append(Episode.from_completion(prompt, c, reward=0.0, group=group))
    return Batch.pack(episodes, [rng.normal(size=len(e.tokens)).astype(np.float32) * e.mask for e in episodes])


if __name__ == "__main__":
    main()
