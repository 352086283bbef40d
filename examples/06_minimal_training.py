"""The smallest training that learns: a reward, an environment, a rollout runner and a trainer, on a real model.

python examples/06_minimal_training.py --steps 12
"""

import argparse
from statistics import mean

import textpolicy as tp  # before mlx: it gives MLX a fast BLAS

# isort: split
import mlx.optimizers as optim

from textpolicy.algorithms import grpo
from textpolicy.environment import TextGenerationEnvironment
from textpolicy.mlx.adapters.merging import attach_lora
from textpolicy.rollout import RolloutRunner, create_strategy


@tp.reward
def short(prompt: str, completion: str, example: dict, truncated: bool = False, **kwargs) -> float:
    """Return 1 for a finished answer of one to four words, less for each further word, and 0 for an empty one."""
    words = len(completion.split())
    return 0.0 if truncated or not words else min(1.0, 4 / words)


def main(steps: int) -> None:
    model, tokenizer = tp.load_model("smollm2-135m")
    attach_lora(model, rank=8)
    policy = tp.create_policy(model, tokenizer, {"max_tokens": 16})
    prompts = ["What is the capital of France?", "What colour is the sky?", "What do cows drink?", "What is 2 + 3?"]
    env = tp.TextGenerationEnv(prompts, short, max_tokens=16, tokenizer=tokenizer, group_size=8)
    runner = RolloutRunner(env, policy=policy, strategy=create_strategy("grpo"), max_steps=32)
    trainer = tp.Trainer(model, grpo.compute_advantages, grpo.policy_loss, optim.Adam(learning_rate=3e-4))

    # A suite of writing tasks shows what else the training changes.
    essays = TextGenerationEnvironment(model, tokenizer, "basic", 5, {"max_tokens": 32})
    print(f"essays before: {essays.evaluate_model('baseline')['mean_score']:.2f}")
    rewards = []
    for _ in range(steps):
        buffer = runner.collect()
        rewards.append(mean(e.rew[0] for e in buffer.episodes))
        result = trainer.train(buffer)
        print(f"step {result['step'] + 1:2}  reward {rewards[-1]:.2f}  gradient {result['grad_norm']:.2f}", flush=True)
    after = essays.evaluate_model()
    print(f"essays after: {after['mean_score']:.2f} ({after['improvement']:+.2f})")
    third = max(steps // 3, 1)
    print(f"reward of the first steps {mean(rewards[:third]):.2f}, of the last ones {mean(rewards[-third:]):.2f}")
    greedy, _ = policy(env.prompt_ids(0), deterministic=True)
    print(f"{prompts[0]} {tp.decode(tokenizer, greedy)!r}")


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=12)
main(parser.parse_args().steps)
