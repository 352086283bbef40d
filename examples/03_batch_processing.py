"""Score many completions at once: a weighted sum of your own reward and a built-in one, as an array."""

from statistics import mean

from textpolicy.rewards import RewardConfig, create_mlx_optimized_batch_processor, reward


@reward
def clarity(prompt: str, completion: str, example: dict, **kwargs) -> float:
    """Return the share of words of at most seven letters."""
    words = completion.split()
    return sum(len(word.strip(".,!?")) <= 7 for word in words) / max(len(words), 1)


def main() -> None:
    score = create_mlx_optimized_batch_processor(
        [
            RewardConfig("clarity", weight=0.6),
            RewardConfig("length_reward", weight=0.4, params={"target_length": 15}),
        ]
    )
    question = "What is reinforcement learning?"
    completions = [
        "It learns from rewards.",
        "An agent tries things, sees what pays, and does more of what paid, again and again.",
        "Reinforcement learning constitutes sequential decision optimisation through environmental interaction.",
    ]
    rewards = score([question] * 3, completions, [{}] * 3)
    for value, text in zip(rewards.tolist(), completions, strict=True):
        print(f"{value:.3f}  {text}")

    ten = [f"This is answer number {n}, and it is {'very ' * 4 * n}long." for n in range(10)]
    rewards = score([question] * 10, ten, [{}] * 10).tolist()
    print(f"{len(rewards)} more: the best is number {rewards.index(max(rewards))}, the average {mean(rewards):.3f}")


if __name__ == "__main__":
    main()
