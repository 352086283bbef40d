"""textpolicy 0.1.11 from PyPI: its coordinator with one batch for the whole step, and its trainer."""

from __future__ import annotations

from typing import Any

from worker import Gate, Task, load_openblas, reward_of

load_openblas()

import mlx.optimizers as optim  # noqa: E402
from mlx_model import linear_names, weights_sum  # noqa: E402

import textpolicy as tp  # noqa: E402
from textpolicy.algorithms import grpo  # noqa: E402
from textpolicy.environment.text_generation import TextGenerationEnv  # noqa: E402
from textpolicy.rollout import RolloutCoordinator  # noqa: E402
from textpolicy.training import Trainer  # noqa: E402


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
    gate.watch(weights_sum(model))
    while True:
        gate.step()
        with gate.timed("rollout"):
            buffer = coordinator.collect()
        batch = grpo.select_all_data(buffer)
        gate.generated(batch["prompt_lengths"], batch["episode_lengths"])
        trainer.train(batch)


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
