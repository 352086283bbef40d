"""Tasks: nothing judged is trained on, answers are right, and the reward wants the bare number."""

import re

import pytest

from textpolicy.tasks import TASKS, load_task
from textpolicy.tasks.number import number_reward

ANSWER = {"addition": sum, "largest": max}  # worked out here from the question's text


def numbers(problem):
    return tuple(map(int, re.findall(r"\d+", problem.question)))


@pytest.mark.parametrize("name", TASKS)
def test_no_problem_is_in_two_splits_or_solved_in_the_prompt(name):
    task = load_task(name)
    train, validation, test = (
        {tuple(sorted(numbers(p))) for p in split} for split in (task.train, task.validation, task.test)
    )
    asked = task.prompt("?")
    worked = {tuple(sorted(map(int, re.findall(r"\d+", turn["content"])))) for turn in asked if turn["role"] == "user"}
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert not (train | validation | test) & worked
    assert len(test) == len(task.test) >= 200


@pytest.mark.parametrize("name", TASKS)
def test_every_answer_is_right(name):
    task = load_task(name)
    for problem in (*task.train, *task.validation, *task.test):
        assert problem.answer == str(ANSWER[name](numbers(problem)))


@pytest.mark.parametrize("name", TASKS)
def test_the_same_problems_every_time(name):
    assert load_task(name).test == load_task(name).test


def test_no_constant_answer_does_well():
    answers = [p.answer for p in load_task("largest").test]
    assert max(answers.count(a) for a in answers) / len(answers) < 0.1


@pytest.mark.parametrize(
    ("completion", "reward", "correct"),
    [
        ("42", 1.0, True),
        ("41", 0.1, False),
        ("17 + 25 = 42", 0.4, False),
        ("about forty", 0.0, False),
        ("", 0.0, False),
        ("42.", 0.4, False),
        ("42 or 43", 0.0, False),
        ("٤٢", 0.0, False),  # digits, but not these
        ("9" * 5000, 0.0, False),
    ],
)
def test_the_reward_wants_the_bare_right_number(completion, reward, correct):
    scored = number_reward("", completion, {"answer": "42"})
    assert scored["is_correct"] is correct
    assert scored["reward"] == pytest.approx(reward)
