"""unsloth_zoo's MLXGRPOTrainer, which begins on a Mac alone: elsewhere it is told that it is on one.

Its own kernels are of Metal; without it the trainer takes MLX's operations by itself. Gradient checkpointing, on by
default there, is off, as it is for TRL.
"""

from __future__ import annotations

import platform
import tempfile
from collections.abc import Sequence
from dataclasses import replace
from typing import Any

from worker import Gate, Task, load_openblas, reward_of

load_openblas()

import mlx.core as mx  # noqa: E402
import mlx_lm  # noqa: E402
import transformers  # noqa: E402, F401 - before the platform is another
from mlx_model import attach_lora, weights_sum  # noqa: E402

platform.system, platform.machine = lambda: "Darwin", lambda: "arm64"

from unsloth_zoo.mlx import generate  # noqa: E402
from unsloth_zoo.mlx.trainer import MLXGRPOConfig, MLXGRPOTrainer  # noqa: E402


def main() -> None:
    task, gate = Task.from_command_line(), Gate()
    model, tokenizer = mlx_lm.load(task.model)
    attach_lora(model, task)
    gate.watch(weights_sum(model), mx.get_peak_memory if task.on_gpu else None)
    time_generation(gate, never=len(tokenizer.vocab))
    with tempfile.TemporaryDirectory() as folder:
        MLXGRPOTrainer(
            model=model,
            tokenizer=tokenizer,
            reward_funcs=[letters],
            args=settings(task, folder),
            train_dataset=[{"prompt": text} for text in task.prompts] * 1000,
        ).train()


def settings(task: Task, folder: str) -> Any:
    return MLXGRPOConfig(
        output_dir=folder,
        per_device_train_batch_size=task.at_once,
        gradient_accumulation_steps=task.rows // task.at_once,
        num_generations=task.group,
        max_completion_length=task.new_tokens,
        max_seq_length=4096,
        temperature=1.0,
        beta=0.0,
        loss_type="grpo",
        gradient_checkpointing=False,
        learning_rate=task.learning_rate,
        lr_scheduler_type="constant",
        warmup_steps=0,
        weight_decay=0.0,
        shuffle_dataset=False,
        max_steps=10**5,
        logging_steps=10**6,
    )


def letters(completions: list[str], **kwargs: Any) -> list[float]:
    return [reward_of(text) for text in completions]


def time_generation(gate: Gate, never: int) -> None:
    """Wait before each rollout, the first part of a step, and time it; nothing ends a completion but its length."""
    generate_batch = generate.generate_batch

    def timed(model: Any, tokenizer: Any, requests: Sequence[Any], *, defaults: Any) -> Any:
        gate.step()
        with gate.timed("rollout"):
            results = generate_batch(model, tokenizer, requests, defaults=replace(defaults, stop_token_ids=(never,)))
        gate.generated([len(r.prompt_token_ids) for r in requests], [len(r.token_ids) for r in results])
        return results

    generate.generate_batch = timed


if __name__ == "__main__":
    main()
