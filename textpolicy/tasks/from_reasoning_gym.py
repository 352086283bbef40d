"""The tasks "reasoning_gym:DATA_SET", one for each data set of reasoning-gym."""

from __future__ import annotations

from functools import partial

from ..environment.libraries.reasoning_gym import INSTRUCTIONS, EntryReward, answer_of, make_dataset
from .base import Message, Problem, Task
from .splits import Splits, distinct, question_key

PREFIX = "reasoning_gym:"
TEST, VALIDATION, TRAIN = 100, 50, 500
_SPLIT_SEED = 2026


def reasoning_gym_task(dataset: str) -> Task:
    """Return the task of a data set at its default settings; a repeated question is in one split only.

    Raises UserError for an unknown data set, or one with too few different questions or a scorer that gives full marks
    to nonsense, and MissingDependencyError.
    """
    count = TEST + VALIDATION + TRAIN
    choose = partial(distinct, key=lambda entry: question_key(entry["question"]), count=count, tries=4)
    made = make_dataset(dataset, 4 * count, _SPLIT_SEED, choose=choose)
    problems = [Problem(entry["question"], entry["answer"], entry) for entry in made.entries]
    cut = Splits.cut(problems, TEST, VALIDATION)
    return Task(
        name=PREFIX + dataset,
        summary=f"{dataset} of reasoning-gym, by its own scorer",
        train=cut.train,
        validation=cut.validation,
        test=cut.test,
        prompt=_ask,
        reward=EntryReward({None: made.library}, answer_of),
        max_tokens=128,
    )


def _ask(question: str) -> list[Message]:
    return [{"role": "user", "content": f"{question}\n{INSTRUCTIONS}"}]
