"""Tasks that ship with textpolicy."""

from __future__ import annotations

from collections.abc import Callable

from ..errors import unknown_name
from .addition import addition_task
from .base import Problem as Problem
from .base import Task as Task
from .largest import largest_task

TASKS: dict[str, Callable[[], Task]] = {"largest": largest_task, "addition": addition_task}


def load_task(name: str) -> Task:
    """The task called ``name``; an unknown name is a ``UserError`` that lists the known ones."""
    if name not in TASKS:
        raise unknown_name("task", name, TASKS)
    return TASKS[name]()
