"""Attach, train, save, reload and merge a LoRA and a QLoRA from Python. MODEL_ID=... selects another model.

python examples/11_lora_qlora.py
"""

import os
import tempfile
from pathlib import Path

import textpolicy as tp  # before mlx: it gives MLX a fast BLAS

# isort: split
import mlx.optimizers as optim

from textpolicy.rollout import RolloutRunner, create_strategy

MODEL = os.environ.get("MODEL_ID", "smollm2-135m")
LORA = {"lora_layers": 8, "lora_rank": 8, "lora_scale": 4.0}


@tp.reward
def terse(prompt, completion, example, **kwargs):
    """Return 1 for a completion without letters, less for more letters."""
    return 1.0 / (1.0 + len(completion) / 10)


def train(model, tokenizer, steps, max_tokens=12):
    """Train a few steps and return the mean reward of each."""
    env = tp.TextGenerationEnv(["Say hello."], terse, max_tokens=max_tokens, tokenizer=tokenizer, group_size=8)
    policy = tp.create_policy(model, tokenizer, {"max_tokens": max_tokens})
    runner = RolloutRunner(env, policy=policy, strategy=create_strategy("grpo"), max_steps=8)
    trainer = tp.Trainer(model, tp.compute_advantages, tp.policy_loss, optim.Adam(learning_rate=1e-3))
    rewards = []
    for _ in range(steps):
        buffer = runner.collect()
        rewards.append(sum(episode.rew[0] for episode in buffer.episodes) / 8)
        trainer.train(buffer)
    return rewards


def report(name, stats, rewards):
    print(f"{name}: {stats['trainable_parameters']:,} of {stats['total_parameters']:,} parameters are trainable")
    print(f"  model {stats['bytes_before'] / 1e6:.0f} MB before, {stats['bytes_after'] / 1e6:.0f} MB with adapters")
    print(f"  reward by step: {', '.join(f'{r:.2f}' for r in rewards)}")


model, tokenizer = tp.load_model(MODEL)
model, stats = tp.create_lora_setup(model, LORA)
report("LoRA", stats, train(model, tokenizer, steps=5))

with tempfile.TemporaryDirectory() as folder:
    tp.save_adapters(model, Path(folder) / "adapter")
    reloaded, _ = tp.reload_model(MODEL, Path(folder) / "adapter")
ids = tp.encode(tokenizer, "Say hello.")[None]
said = model(ids)
print(f"  reloaded: logits differ by {abs(reloaded(ids) - said).max().item():.1e} at most")
merged = tp.merge_weights(model)
print(f"  merged into the weights: by {abs(merged(ids) - said).max().item():.1e}")

model, _ = tp.load_model(MODEL, dequantize=False)  # as stored: 4 bits
model, stats = tp.create_qlora_setup(model, LORA, {})
report("QLoRA", stats, train(model, tokenizer, steps=2, max_tokens=4))
