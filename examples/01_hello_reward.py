"""Score three answers: a reward is a function from a prompt and a completion to a number, and needs only Python."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any


def concise(prompt: str, completion: str, example: Mapping[str, Any], **kwargs: Any) -> float:
    """Return 1 for 10 to 50 words, words / 10 below that, and 1/50 less for each word above 50."""
    words = len(completion.split())
    if words <= 50:
        return min(1.0, words / 10)
    return max(0.0, 1 - (words - 50) / 50)


def main() -> None:
    question = "What is reinforcement learning?"
    answers = {
        "too short": "Learning from rewards.",
        "about right": "An agent tries actions, sees which of them pay, and learns to choose those more often.",
        "too long": " ".join(["It learns by trial and error, and that takes many trials."] * 7),
    }
    print("Scores of three answers to:", question)
    for label, answer in answers.items():
        score = concise(prompt=question, completion=answer, example={})
        print(f"{label:>12}: {len(answer.split()):2d} words -> {score:.2f}  {answer[:50]}...")


if __name__ == "__main__":
    main()
