"""textpolicy 0.1.11 from PyPI: its coordinator with one batch for the whole step, and its trainer.

On a GPU one graph over all completions of the step would not fit, and the trainer accumulates no gradients: there a
step of the optimiser is taken for each group, which costs it no more than one for all.
"""

from __future__ import annotations

from collections.abc import Iterator
from itertools import accumulate
from typing import Any

from worker import Gate, Task, load_openblas, reward_of

load_openblas()

import mlx.core as mx  # noqa: E402
import mlx.optimizers as optim  # noqa: E402
from mlx_model import linear_names, weights_sum  # noqa: E402

import textpolicy as tp  # noqa: E402
from textpolicy.algorithms import grpo  # noqa: E402
from textpolicy.environment.single_turn import TextGenerationEnv  # noqa: E402
from textpolicy.rollout import RolloutCoordinator  # noqa: E402
from textpolicy.training.trainer import Trainer  # noqa: E402


def main() -> None:
    task, gate = Task.from_command_line(), Gate()
    model, tokenizer = tp.load_model(task.model)
    tokenizer.eos_token_ids = []  # nothing ends a completion
    tp.apply_lora(model, len(model.layers), task.rank, task.alpha / task.rank, lora_keys=linear_names(model))
    tp.freeze_base(model)
    trainer = Trainer(
        model, grpo.compute_advantages, grpo.policy_loss, optim.AdamW(task.learning_rate, weight_decay=0.0)
    )
    coordinator = coordinate(task, model, tokenizer)
    gate.watch(weights_sum(model), mx.get_peak_memory if task.on_gpu else None)
    while True:
        gate.step()
        with gate.timed("rollout"):
            buffer = coordinator.collect()
        batch = grpo.select_all_data(buffer)
        gate.generated(batch["prompt_lengths"], batch["episode_lengths"])
        for part in parts(batch, task.group if task.on_gpu else task.rows):
            trainer.train(part)


def parts(batch: dict[str, Any], rows: int) -> Iterator[dict[str, Any]]:
    """The batch in pieces of so many completions; log-probs lie in one row, the rest has one entry for each."""
    begins = [0, *accumulate(batch["episode_lengths"])]
    for first in range(0, len(begins) - 1, rows):
        part = slice(first, first + rows)
        tokens = slice(begins[first], begins[min(first + rows, len(begins) - 1)])
        yield {key: value[tokens if key == "logprob" else part] for key, value in batch.items()}


def coordinate(task: Task, model: Any, tokenizer: Any) -> RolloutCoordinator:
    how = {"max_tokens": task.new_tokens, "temperature": 1.0, "top_p": 1.0}
    policy = tp.create_policy(model, tokenizer, how)
    return RolloutCoordinator(
        env_fn=lambda: TextGenerationEnv(
            list(task.prompts), letters, task.new_tokens, tokenizer=tokenizer, group_size=task.group
        ),
        policy_fn=lambda: policy,
        algorithm="grpo",
        max_steps=task.rows,
        batch_size=task.rows,
        model=model,
        tokenizer=tokenizer,
        generation_params=how,
    )


def letters(prompt: str, completion: str, example: dict, **kwargs: Any) -> float:
    return reward_of(completion)


if __name__ == "__main__":
    main()
