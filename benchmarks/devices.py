"""Train on one device and on several of this machine, and compare seconds, weights and what the links take.

    .venv/bin/python benchmarks/devices.py --devices 1 2 [--prompts 32] [--steps 4] [--model FOLDER]

Each count of devices is a process of its own, with its ranks, in the same visit. A step is the ``gpu`` workload of
peers/run.py, doubled: 32 prompts of 256 tokens, 16 completions of 256 tokens, none of which ends before, and one
update of a LoRA of rank 16 on a model of Qwen3-0.6B's shape with random weights in bfloat16. The first step compiles;
the row has the fastest of the others, and how far the gradient of one batch on all ranks is from that on one, beside
how far one is from itself with smaller passes: completions of a random model part ways with the rounding of a batch's
size, so that weights are comparable after one batch alone. One JSON row per count is appended to
benchmarks/results/devices.jsonl.
"""

from __future__ import annotations

import argparse
import json
import subprocess
import sys
import tempfile
from pathlib import Path
from typing import Any

import numpy as np
from machine import describe

RESULTS = Path(__file__).parent / "results" / "devices.jsonl"
SMALL = {"hidden_size": 256, "num_hidden_layers": 4, "intermediate_size": 512, "num_attention_heads": 4}
SMALL |= {"num_key_value_heads": 2, "head_dim": 64, "vocab_size": 2048}


def main() -> None:
    parser = argparse.ArgumentParser(description=(__doc__ or "").splitlines()[0])
    parser.add_argument("--devices", type=int, nargs="+", default=[1, 2])
    parser.add_argument("--prompts", type=int, default=32)
    parser.add_argument("--prompt-tokens", type=int, default=256)
    parser.add_argument("--group", type=int, default=16)
    parser.add_argument("--new-tokens", type=int, default=256)
    parser.add_argument("--steps", type=int, default=4)
    parser.add_argument("--rows", type=int, default=256, help="completions decoded side by side")
    parser.add_argument("--small", action="store_true", help="a model that a CPU trains in seconds")
    parser.add_argument("--alone", type=Path, help=argparse.SUPPRESS)  # train here, and write the outcome into it
    asked = parser.parse_args()
    if asked.alone is not None:
        train_here(asked)
        return
    rows: list[dict[str, Any]] = []
    with tempfile.TemporaryDirectory() as name:
        for devices in asked.devices:
            folder = Path(name, str(devices))
            folder.mkdir()
            command = [sys.executable, __file__, *sys.argv[1:], "--devices", str(devices), "--alone", str(folder)]
            subprocess.run(command, check=True)
            rows.append(json.loads((folder / "row.json").read_text()))
    for row in rows:
        row["times_as_fast"] = rows[0]["seconds"] / row["seconds"]
        with RESULTS.open("a", encoding="utf-8") as file:
            file.write(json.dumps(row) + "\n")
        print(row)


def train_here(asked: argparse.Namespace) -> None:
    sys.path.insert(0, str(Path(__file__).parent / "peers"))
    from write_model import QWEN3

    import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

    # isort: split
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.models import qwen3

    from textpolicy._system.machine import cores_of_each
    from textpolicy.algorithms import algorithm
    from textpolicy.config.adapters import LoRA
    from textpolicy.config.settings import Config
    from textpolicy.engine import Sampling
    from textpolicy.environment.single_turn import TextGenerationEnv
    from textpolicy.loop.train import Schedule, train
    from textpolicy.mlx.adapters.merging import attach
    from textpolicy.mlx.blas import set_blas_threads
    from textpolicy.mlx.engine import MLXEngine
    from textpolicy.mlx.memory import limit_memory
    from textpolicy.run.ranks import joined

    with joined(Config(machine={"devices": asked.devices[0]})) as team:
        limit_memory()
        if mx.default_device() == mx.cpu:
            set_blas_threads(cores_of_each(team.sharing))
        shape = QWEN3 | (SMALL if asked.small else {})
        mx.random.seed(0)
        model = qwen3.Model(qwen3.ModelArgs.from_dict(shape))
        dtype = mx.float32 if asked.small else mx.bfloat16
        model.update(
            tree_map(
                lambda a: mx.random.normal(a.shape, dtype) * 0.02 if a.ndim > 1 else a.astype(dtype), model.parameters()
            )
        )
        mx.eval(model.parameters())
        attach(model, LoRA(rank=16, alpha=32.0), 0)
        engine = MLXEngine(model, stop=(), decode_rows=asked.rows, micro_batch_tokens=16384)
        engine.team = team
        draw = np.random.default_rng(0)
        prompts = [draw.integers(0, shape["vocab_size"], asked.prompt_tokens) for _ in range(asked.prompts)]
        texts = [" ".join(map(str, prompt)) for prompt in prompts]
        env = TextGenerationEnv(texts, even, asked.new_tokens, tokenizer=Numbers(), chat=False)
        rows: list[Any] = []
        last: list[Any] = []

        def on_step(step: int, row: Any, episodes: Any) -> None:
            rows.append({**row, **team.figures(engine.digest())})
            last[:] = [episodes]

        train(
            engine,
            env,
            algorithm("grpo"),
            schedule=Schedule(1e-4, asked.steps),
            prompts_per_step=asked.prompts,
            group_size=asked.group,
            sampling=Sampling(asked.new_tokens),
            on_step=on_step,
        )
        off = difference(engine, team, last[0])
        team.part()
    if team.rank:
        return
    timed = min(rows[1:] or rows, key=lambda row: row["sample_seconds"] + row["update_seconds"])
    waits = {name: value for name, value in timed.items() if name.startswith("rank_") or name == "scaling"}
    row = {
        "benchmark": "devices",
        "devices": team.size,
        **{name: getattr(asked, name) for name in ("prompts", "prompt_tokens", "group", "new_tokens", "rows", "small")},
        "seconds": timed["sample_seconds"] + timed["update_seconds"],
        "rollout_seconds": timed["sample_seconds"],
        "update_seconds": timed["update_seconds"],
        **waits,
        **off,
        "seconds_each": [row["sample_seconds"] + row["update_seconds"] for row in rows],
        **describe(),
    }
    (asked.alone / "row.json").write_text(json.dumps(row))


def difference(engine: Any, team: Any, episodes: Any) -> dict[str, float]:
    """The gradient of all ranks against that of one, and of one against its own with smaller passes, on one batch."""
    from mlx.utils import tree_flatten

    from textpolicy.devices.team import ALONE
    from textpolicy.losses import Surrogate
    from textpolicy.mlx.engine import PolicyObjective
    from textpolicy.types import Batch

    draw = np.random.default_rng(0)
    batch = Batch.pack(episodes[:64], [draw.normal(size=len(e.tokens)) * e.mask for e in episodes[:64]])
    found = []
    for engine.team, engine.micro_batch_tokens in ((ALONE, 16384), (team, 16384), (ALONE, 4096)):
        _, grads = engine.gradients(batch, PolicyObjective(Surrogate()))
        found.append(np.concatenate([np.array(a).reshape(-1) for _, a in tree_flatten(grads)]))
    norm = np.linalg.norm(found[0])
    off, passes = (float(np.linalg.norm(other - found[0]) / norm) for other in found[1:])
    return {"gradient_off": off, "gradient_off_by_smaller_passes": passes}


class Numbers:
    """The tokenizer that writes ids as numbers; prompts are ids already."""

    eos_token_id = None

    def encode(self, text: str) -> list[int]:
        return [int(word) for word in text.split()]

    def decode(self, ids: Any) -> str:
        return " ".join(map(str, ids))


def even(prompt: str, completion: str, example: dict, **kwargs: Any) -> float:
    """The share of even tokens."""
    words = completion.split()
    return sum(int(word) % 2 == 0 for word in words) / max(1, len(words))


if __name__ == "__main__":
    main()
