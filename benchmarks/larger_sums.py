"""The task addition with numbers up to 99, of which the small model solves next to none: stages.py sft trains on it."""

from textpolicy.tasks.addition import addition_task
from textpolicy.tasks.base import Task


def task() -> Task:
    return addition_task(99)
