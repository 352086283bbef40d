"""Run on each rank: compare gradients and log-probs of all ranks together with those of this process alone.

Prints, from rank 0, a JSON row with the largest difference of each case, divided by the norm where that is above 1.
"""

from __future__ import annotations

import json
import os
import sys
from dataclasses import replace
from pathlib import Path

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1])]

import numpy as np  # noqa: E402

import textpolicy.mlx  # noqa: E402, F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx  # noqa: E402
from families import tiny_family  # noqa: E402
from mlx.utils import tree_flatten  # noqa: E402

from textpolicy.config.adapters import LoRA  # noqa: E402
from textpolicy.devices.team import ALONE  # noqa: E402
from textpolicy.losses import Surrogate  # noqa: E402
from textpolicy.mlx.adapters.merging import attach  # noqa: E402
from textpolicy.mlx.collectives import meet  # noqa: E402
from textpolicy.mlx.engine import MLXEngine, PolicyObjective  # noqa: E402
from textpolicy.types import Batch, Completion, Episode  # noqa: E402

CASES = {"llama": [3, 2, 1, 5], "gpt_oss": [4, 4], "qwen3_next": [1], "mamba2": [2, 1, 1]}  # completions of each prompt


def batch_of(groups: list[int], aggregation: str) -> Batch:
    draw = np.random.default_rng(len(groups))
    episodes = []
    for group, rows in enumerate(groups):
        prompt = draw.integers(0, 60, 3 + 4 * group)
        for n in range(rows):
            tokens = draw.integers(0, 60, 2 + 3 * n + group).astype(np.int32)
            logprobs = draw.normal(-3, 1, len(tokens)).astype(np.float32)
            episodes.append(Episode.from_completion(prompt, Completion(tokens, logprobs), reward=0.0, group=group))
    return Batch.pack(
        episodes, [draw.normal(size=len(e.tokens)).astype(np.float32) * e.mask for e in episodes], aggregation
    )


def main() -> None:
    team = meet(60.0)
    differences = {}
    for family, groups in CASES.items():
        mx.random.seed(0)
        model = tiny_family(family)
        attach(model, LoRA(rank=2), 0)
        draw = np.random.default_rng(0)
        drawn = [
            (name, mx.array(draw.normal(0, 0.1, a.shape), a.dtype))
            for name, a in tree_flatten(model.trainable_parameters())
        ]
        model.load_weights(drawn, strict=False)
        engine = MLXEngine(model, stop=[59])
        for aggregation in ("token-mean", "seq-mean-token-mean"):
            batch, engine.team = batch_of(groups, aggregation), ALONE
            near = np.random.default_rng(0).normal(0, 0.1, batch.targets.shape)  # as far as a few updates take it
            batch = replace(batch, logprobs=(engine.score(batch) + near * batch.scored).astype(np.float32))
            found = []
            for engine.team in (ALONE, team):
                totals, grads = engine.gradients(batch, PolicyObjective(Surrogate()))
                flat = np.concatenate([np.array(a).reshape(-1) for _, a in tree_flatten(grads)])
                found.append({"gradients": flat, "log-probs": engine.score(batch), "loss": np.array(totals["loss"])})
            one, all_ranks = found
            for what, a in one.items():
                off = float(np.abs(a - all_ranks[what]).max() / max(1.0, np.linalg.norm(a)))
                differences[f"{family}, {aggregation}: {what}"] = max(team.exchange(off))
    if team.rank == 0:
        print(json.dumps(differences))
    team.part()


if __name__ == "__main__":
    if "MLX_RANK" not in os.environ:
        raise SystemExit("start it with mlx.launch -n 2")
    main()
