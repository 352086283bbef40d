"""Run GRPO from its parts: a coordinator collects, a buffer stores, a trainer selects from the buffer and learns.

python examples/08_grpo_rollout_buffer.py --steps 8
"""

import argparse
from statistics import mean

import textpolicy as tp  # before mlx: it gives MLX a fast BLAS

# isort: split
import mlx.optimizers as optim

from textpolicy.algorithms import grpo
from textpolicy.mlx.adapters.merging import attach_lora
from textpolicy.rollout import RolloutCoordinator

GROUP = 8  # completions of each prompt
QUESTIONS = ["What do people eat?", "What is in a kitchen?", "Which animals live on a farm?", "What grows in a garden?"]


@tp.reward
def lists(prompt: str, completion: str, example: dict, **kwargs) -> float:
    """Return a third for each different thing after the first, up to three; repetitions earn nothing."""
    things = {part.strip().lower() for part in completion.split(",")} - {""}
    return min(1.0, max(0, len(things) - 1) / 3)


def main(steps: int) -> None:
    model, tokenizer = tp.load_model("smollm2-135m")
    attach_lora(model, rank=8)
    env = tp.TextGenerationEnv(QUESTIONS, lists, max_tokens=16, tokenizer=tokenizer, group_size=GROUP)
    policy = tp.create_policy(model, tokenizer, {"max_tokens": 16})
    asked = len(QUESTIONS) * GROUP
    coordinator = RolloutCoordinator(lambda: env, lambda: policy, "grpo", max_steps=asked, max_episodes=asked)

    buffer = tp.Buffer(max_episodes=asked)
    trainer = tp.Trainer(
        model,
        grpo.compute_advantages,  # of one group: the reward minus the mean of its group
        grpo.policy_loss,
        optim.Adam(learning_rate=3e-4),
        buffer=buffer,
        data_selector_fn=tp.select_informative_data,  # skips groups whose completions all earned the same reward
    )
    rewards = []
    for _ in range(steps):
        for episode in coordinator.collect().episodes:
            buffer.add_episode_from_dict(episode.to_dict())
        rewards.append(mean(episode.rew[0] for episode in buffer.episodes))
        kept = tp.select_informative_data(buffer)["filter_stats"]["prompts_kept"]
        result = trainer.train()
        print(f"step {result['step'] + 1:2}  reward {rewards[-1]:.2f}  groups that differ {kept} of 4", flush=True)
    coordinator.close()

    third = max(steps // 3, 1)
    print(f"reward of the first steps {mean(rewards[:third]):.2f}, of the last ones {mean(rewards[-third:]):.2f}")
    print(f"the trainer emptied the buffer: {buffer.episode_count} episodes are left")
    for i, question in enumerate(QUESTIONS[:2]):
        greedy, _ = policy(env.prompt_ids(i), deterministic=True)
        print(f"{question} {tp.decode(tokenizer, greedy)!r}")


parser = argparse.ArgumentParser()
parser.add_argument("--steps", type=int, default=8)
main(parser.parse_args().steps)
