"""Countdown with two numbers, to both of which one of + - * / is done: stages.py sft trains on it."""

from functools import partial

from textpolicy.environment.text.conversation import as_messages
from textpolicy.rewards.countdown import countdown_reward_with_info
from textpolicy.tasks.base import Problem, Task
from textpolicy.tasks.countdown import format_countdown_prompt, generate_countdown_problems
from textpolicy.tasks.countdown_game import solve_countdown
from textpolicy.tasks.splits import Splits, distinct


def task() -> Task:
    made = generate_countdown_problems(5000, 2, (1, 50), (2, 100), seed=2026, use_all=True)
    draws = distinct(made, lambda p: (p["target"], *sorted(p["numbers"])), 1100, tries=3)
    problems = [
        Problem(
            format_countdown_prompt(p["target"], p["numbers"], use_all=True),
            solve_countdown(p["numbers"], p["target"], use_all=True) or "",
            p,
        )
        for p in draws
    ]
    cut = Splits.cut(problems, 200, 100)
    return Task(
        name="countdown_pairs",
        summary="reach a target from two numbers with one of + - * /",
        train=cut.train,
        validation=cut.validation,
        test=cut.test,
        prompt=as_messages,
        reward=partial(countdown_reward_with_info, use_all=True),
        max_tokens=24,
    )
