"""Register rewards by name, and sum several with a Scorer: weights, verifiers and penalties."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from textpolicy.rewards import (
    Request,
    RewardConfig,
    Scorer,
    get_reward_function,
    list_registered_functions,
    reward,
    verifier,
)


@reward
def politeness(prompt: str, completion: str, example: Mapping[str, Any], **kwargs: Any) -> float:
    """Return a third for each of please, thank and welcome."""
    return sum(word in completion.lower() for word in ("please", "thank", "welcome")) / 3


@reward(name="right_answer")
def names_the_city(prompt: str, completion: str, example: Mapping[str, Any], **kwargs: Any) -> dict[str, Any]:
    """Return 1 if the example's answer occurs, and report that as correct."""
    is_correct = example["answer"].lower() in completion.lower()
    return {"reward": float(is_correct), "is_correct": is_correct}


@verifier
def no_shouting(prompt: str, completion: str, example: Mapping[str, Any], **kwargs: Any) -> bool:
    return not completion.isupper()


def main() -> None:
    print("Registered:", ", ".join(list_registered_functions()["rewards"]))
    length = get_reward_function("length_reward")
    print("length_reward of 12 words, for a target of 12:", length("", "word " * 12, {}, target_length=12))

    scorer = Scorer(
        [
            RewardConfig("right_answer", verifiers=["no_shouting"], verifier_penalty=-1.0),
            RewardConfig("politeness", weight=0.3),
        ]
    )
    question, example = "Where does the river Seine meet the Eiffel tower?", {"answer": "Paris"}
    for answer in ("In Paris. You are welcome, and thank you!", "In Paris.", "PARIS!", "Please ask again."):
        scored = scorer.score([Request(question, answer, example)])[0]
        parts = ", ".join(f"{name} {score:.2f}" for name, score in scored.scores.items())
        print(f"{scored.reward:5.2f}  correct: {scored.is_correct!s:5}  {answer:42} ({parts})")


if __name__ == "__main__":
    main()
