"""The tasks: problems with known answers, split for training and evaluation."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import unknown_name
from .addition import addition_task
from .base import Problem as Problem
from .base import Task as Task
from .countdown_game import countdown_task, countdown_tool_task
from .largest import largest_task
from .mathematics import generated_math_task, hub_math_task, math_task
from .own import own_task, task_file
from .own import task_from_rows as task_from_rows

TASKS: dict[str, Callable[[], Task]] = {
    "largest": largest_task,
    "addition": addition_task,
    "countdown": countdown_task,
    "countdown_tool": countdown_tool_task,
    "math": math_task,
    "math_generated": generated_math_task,
    "math_hub": hub_math_task,
}
MEANINGS = {
    "largest": "Name the largest of five numbers from 1 to 99, and nothing else; the default.",
    "addition": "Add two numbers from 1 to 40, and answer with the number alone.",
    "countdown": "Reach a target from three numbers with + - * / and parentheses, scored in exact fractions.",
    "countdown_tool": 'Reach a target as in "countdown", with a calculator that the model may call before it answers.',
    "math": "The MATH data set, answered in \\boxed{}, or made-up problems if it cannot be reached.",
    "math_generated": "Made-up problems: equations, fractions, percentages, divisors, series, combinations.",
    "math_hub": "The MATH data set, five subjects of it; needs the package datasets and, the first time, the network.",
}
REASONING_GYM = "reasoning_gym:"  # and the name of a data set


def load_task(name: str) -> Task:
    """Return the task called ``name``. Raises UserError, with the known names, for an unknown one.

    "reasoning_gym:chain_sum" is the data set chain_sum of reasoning-gym, and likewise for the others.
    "FILE.py:FUNCTION" is the task that the function returns; "FILE.py" alone means its function ``task``.
    """
    if (named := task_file(name)) is not None:
        return own_task(*named)
    if name.startswith(REASONING_GYM):
        from .from_reasoning_gym import reasoning_gym_task

        return reasoning_gym_task(name.removeprefix(REASONING_GYM))
    if name not in TASKS:
        raise unknown_name("task", name, [*TASKS, f"{REASONING_GYM}DATA_SET", "FILE.py:FUNCTION"])
    return TASKS[name]()
