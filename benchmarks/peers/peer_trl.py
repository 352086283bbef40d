"""TRL's GRPOTrainer in float32 or bfloat16, with transformers' generate or its continuous batching.

Gradient checkpointing, on by default there, is off: it saves memory that this comparison does not need.
"""

from __future__ import annotations

import builtins
import tempfile
from typing import Any

import pyarrow.lib
import torch
from datasets import Dataset
from peft import LoraConfig
from transformers import TrainerCallback
from trl import GRPOConfig, GRPOTrainer
from worker import Gate, Task, reward_of

# Newer pyarrow says that this class lives there; datasets pickles it on some Pythons, and fails if it does not.
builtins.MonthDayNano = pyarrow.lib.MonthDayNano  # type: ignore[attr-defined]

NEVER = -1  # no token


def main() -> None:
    task, gate = Task.from_command_line(), Gate()
    if not task.on_gpu:
        torch.set_num_threads(task.threads)
    with tempfile.TemporaryDirectory() as folder:
        trainer = GRPOTrainer(
            model=task.model,
            reward_funcs=[letters],
            args=settings(task, folder),
            train_dataset=Dataset.from_dict({"prompt": list(task.prompts) * 1000}),
            peft_config=LoraConfig(
                r=task.rank, lora_alpha=task.alpha, target_modules="all-linear", task_type="CAUSAL_LM"
            ),
        )
        gate.watch(
            lambda: sum(p.detach().abs().sum().item() for p in trainer.model.parameters() if p.requires_grad),
            torch.cuda.max_memory_allocated if task.on_gpu else None,
        )
        if task.variant.endswith("continuous"):
            trainer.eos_token_ids = [NEVER]
        time_generation(trainer, gate)
        trainer.add_callback(AtTheGate(gate))
        trainer.train()


def settings(task: Task, folder: str) -> GRPOConfig:
    dtype, _, batching = task.variant.partition("-")
    return GRPOConfig(
        output_dir=folder,
        use_cpu=not task.on_gpu,
        bf16=dtype == "bfloat16",
        model_init_kwargs={"dtype": dtype},
        use_transformers_continuous_batching=batching == "continuous",
        gradient_checkpointing=False,
        per_device_train_batch_size=task.at_once,
        gradient_accumulation_steps=task.rows // task.at_once,
        num_generations=task.group,
        max_completion_length=task.new_tokens,
        # continuous batching has no least length, so nothing ends a completion there
        generation_kwargs={"eos_token_id": NEVER} if batching else {"min_new_tokens": task.new_tokens},
        temperature=1.0,
        beta=0.0,
        optim="adamw_torch",
        learning_rate=task.learning_rate,
        lr_scheduler_type="constant",
        weight_decay=0.0,
        shuffle_dataset=False,
        max_steps=10**6,
        logging_strategy="no",
        save_strategy="no",
        report_to="none",
        disable_tqdm=True,
    )


class AtTheGate(TrainerCallback):
    """Waits before each step of the trainer's own loop."""

    def __init__(self, gate: Gate):
        self.gate = gate

    def on_step_begin(self, *arguments: Any, **how: Any) -> None:
        self.gate.step()


def letters(completions: list[str], **kwargs: Any) -> list[float]:
    return [reward_of(text) for text in completions]


def time_generation(trainer: GRPOTrainer, gate: Gate) -> None:
    generate = trainer._generate_and_score_completions

    def timed(inputs: Any) -> Any:
        with gate.timed("rollout"):
            out = generate(inputs)
        gate.generated(out["prompt_mask"].sum(dim=1), out["completion_mask"].sum(dim=1))
        return out

    trainer._generate_and_score_completions = timed


if __name__ == "__main__":
    main()
