"""Combine several rewards, one of which counts only if a completion passes a verifier."""

from textpolicy.rewards import RewardConfig, Scorer, reward, verifier
from textpolicy.rewards.contract import Request


@reward
def on_topic(prompt: str, completion: str, example: dict, **kwargs) -> float:
    """Return the share of the example's words that occur."""
    return sum(word in completion.lower() for word in example["words"]) / len(example["words"])


@verifier
def no_repetition(prompt: str, completion: str, example: dict, **kwargs) -> bool:
    """Return whether no word occurs three times in a row."""
    words = completion.lower().split()
    return not any(a == b == c for a, b, c in zip(words, words[1:], words[2:], strict=False))


def main() -> None:
    scorer = Scorer(
        [
            RewardConfig("on_topic", weight=1.0, verifiers=["no_repetition"], verifier_penalty=-0.5),
            RewardConfig("length_reward", weight=0.5, params={"target_length": 12}),
        ]
    )
    example = {"words": ["agent", "reward"]}
    answers = {
        "good": "An agent acts, gets a reward, and learns which actions are worth repeating.",
        "off topic": "It is a part of computer science that many people like to study.",
        "too short": "Agent, reward.",
        "repetitive": "agent agent agent reward reward reward agent agent agent reward reward reward",
    }
    scored = scorer.score([Request("What is reinforcement learning?", text, example) for text in answers.values()])
    for label, result in zip(answers, scored, strict=True):
        parts = ", ".join(f"{name} {value:.2f}" for name, value in result.scores.items())
        print(f"{label:>10}: {result.reward:5.2f}  ({parts})")


if __name__ == "__main__":
    main()
