"""mlx-lm-lora's own GRPO loop, as shipped or with a generation batch as wide as the rollout batch.

As shipped, its generator is as wide as the batch of prompts: with group size 8 and one prompt it decodes
one completion at a time. The variant "wide" changes that width and nothing else.
"""

from __future__ import annotations

import tempfile
from collections.abc import Iterator
from typing import Any

from worker import Gate, Task, load_openblas, reward_of

load_openblas()

import mlx.core as mx  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
import mlx_lm  # noqa: E402
from mlx_lm_lora.trainer import grpo_trainer  # noqa: E402
from mlx_model import attach_lora, weights_sum  # noqa: E402


def main() -> None:
    task, gate = Task.from_command_line(), Gate()
    model, tokenizer = mlx_lm.load(task.model)
    tokenizer.eos_token_ids = set()  # nothing ends a completion
    attach_lora(model, task)
    gate.watch(weights_sum(model), mx.get_peak_memory if task.on_gpu else None)
    time_generation(gate)
    if task.variant == "wide":
        widen(task.rows)
    with tempfile.TemporaryDirectory() as folder:
        grpo_trainer.train_grpo(
            model,
            None,
            tokenizer,
            optim.AdamW(task.learning_rate, weight_decay=0.0),
            [(list(ids), [], text, "") for ids, text in zip(task.prompt_ids, task.prompts, strict=True)],
            reward_funcs=[letters],
            args=settings(task, folder),
            iterate_batches=lambda **how: gated(gate, grpo_trainer.iterate_grpo_batches(**how)),
            end_answer_token="",
        )


def settings(task: Task, folder: str) -> Any:
    never = 10**9
    return grpo_trainer.GRPOTrainingArgs(
        batch_size=len(task.prompts),
        group_size=task.group,
        max_completion_length=task.new_tokens,
        max_seq_length=4096,
        iters=never,
        steps_per_report=never,
        steps_per_save=never,
        adapter_file=f"{folder}/adapters.safetensors",
        beta=0.0,
        temperature=1.0,
        top_p=1.0,
        top_k=0,
        min_p=0.0,
    )


def letters(prompts: Any, completions: list[str], answer: Any, types: Any) -> list[float]:
    return [reward_of(text) for text in completions]


def gated(gate: Gate, batches: Iterator[Any]) -> Iterator[Any]:
    while True:
        gate.step()
        yield next(batches)


def time_generation(gate: Gate) -> None:
    generate = grpo_trainer.generate_grpo

    def timed(**how: Any) -> Any:
        with gate.timed("rollout"):
            completions, texts, rows = generate(**how)
        gate.generated([len(how["prompt_tokens"][i]) for i in rows], [c.size for c in completions])
        return completions, texts, rows

    grpo_trainer.generate_grpo = timed


def widen(rows: int) -> None:
    narrow = grpo_trainer.BatchGenerator

    def wide(*arguments: Any, **how: Any) -> Any:
        return narrow(*arguments, **how | {"completion_batch_size": rows, "prefill_batch_size": rows})

    grpo_trainer.BatchGenerator = wide


if __name__ == "__main__":
    main()
