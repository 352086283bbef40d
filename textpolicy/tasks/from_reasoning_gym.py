"""The tasks "reasoning_gym:DATA_SET", one for each data set of reasoning-gym."""

from __future__ import annotations

from ..environment.libraries.reasoning_gym import INSTRUCTIONS, EntryReward, answer_of, make_dataset
from .base import Message, Problem, Task
from .splits import Splits, distinct

PREFIX = "reasoning_gym:"
TEST, VALIDATION, TRAIN = 100, 50, 500
_SPLIT_SEED = 2026


def reasoning_gym_task(dataset: str) -> Task:
    """Return the task of a data set at its default settings; a repeated question is in one split only.

    Raises UserError for an unknown data set, or one with too few different questions, and MissingDependencyError.
    """
    count = TEST + VALIDATION + TRAIN
    made = make_dataset(dataset, 4 * count, _SPLIT_SEED)
    entries = distinct((made[i] for i in range(4 * count)), lambda entry: entry["question"], count, tries=4)
    problems = [Problem(entry["question"], str(entry["answer"]), entry) for entry in entries]
    cut = Splits.cut(problems, TEST, VALIDATION)
    return Task(
        name=PREFIX + dataset,
        summary=f"{dataset} of reasoning-gym, by its own scorer",
        train=cut.train,
        validation=cut.validation,
        test=cut.test,
        prompt=_ask,
        reward=EntryReward({None: made}, answer_of),
        max_tokens=128,
    )


def _ask(question: str) -> list[Message]:
    return [{"role": "user", "content": f"{question}\n{INSTRUCTIONS}"}]
