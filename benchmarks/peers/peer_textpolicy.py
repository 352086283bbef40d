"""This checkout, through ``textpolicy.loop.train.train``."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

from worker import Gate, Task, reward_of

import textpolicy  # noqa: F401  (before mlx: it loads OpenBLAS)
from textpolicy.algorithms import algorithm
from textpolicy.engine import Sampling
from textpolicy.environment.single_turn import TextGenerationEnv
from textpolicy.loop.metrics import Row
from textpolicy.loop.train import Schedule, train
from textpolicy.mlx.adapters.merging import attach_lora
from textpolicy.mlx.engine import MLXEngine
from textpolicy.mlx.memory import limit_memory
from textpolicy.mlx.models import load_model
from textpolicy.types import Episode


def main() -> None:
    task, gate = Task.from_command_line(), Gate()
    limit_memory()  # as a run does
    model, tokenizer = load_model(task.model)
    attach_lora(model, task.rank, task.alpha)
    wide = {"decode_rows": task.rows, "micro_batch_tokens": 16384} if task.on_gpu else {}
    peak = 0
    engine = MLXEngine(model, stop=(), **wide)  # nothing ends a completion
    gate.watch(
        lambda: sum(abs(value).sum().item() for value in engine.weights().values()),
        (lambda: peak) if task.on_gpu else None,
    )

    def on_step(step: int, row: Row, episodes: Sequence[Episode]) -> None:
        nonlocal peak
        peak = max(peak, int(row["peak_memory_bytes"]))  # the engine starts MLX's own count anew in every step
        gate.phases = {"rollout": row["sample_seconds"], "update": row["update_seconds"]}
        gate.generated([(~e.mask).sum() for e in episodes], [e.mask.sum() for e in episodes])
        gate.step()

    gate.step()
    train(
        engine,
        TextGenerationEnv(task.prompts, letters, max_tokens=task.new_tokens, tokenizer=tokenizer, chat=False),
        algorithm("grpo"),
        schedule=Schedule(task.learning_rate, 10**9),
        prompts_per_step=len(task.prompts),
        group_size=task.group,
        sampling=Sampling(task.new_tokens),
        on_step=on_step,
    )


def letters(prompt: str, completion: str, example: dict, **kwargs: Any) -> float:
    return reward_of(completion)


if __name__ == "__main__":
    main()
