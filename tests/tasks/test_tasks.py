"""Tasks: nothing judged is trained on, answers are right, and the reward wants the bare number."""

import itertools
import re
import sys
import time
from fractions import Fraction
from functools import partial
from math import comb, gcd, lcm
from types import SimpleNamespace

import pytest
from hypothesis import given
from hypothesis import strategies as st

from textpolicy.errors import MissingDependencyError, UserError
from textpolicy.rewards.scoring import call_reward
from textpolicy.tasks import TASKS, load_task
from textpolicy.tasks.countdown import evaluate_expression, is_solvable
from textpolicy.tasks.countdown_game import calculate, solve_countdown
from textpolicy.tasks.hub import reachable
from textpolicy.tasks.number import number_reward
from textpolicy.tasks.splits import distinct

ANSWER = {"addition": sum, "largest": max}  # worked out here from the question's text
OFFLINE = sorted({*TASKS} - {"math", "math_hub"})


def numbers(problem):
    return tuple(map(int, re.findall(r"\d+", problem.question)))


@pytest.mark.parametrize("name", ANSWER)
def test_no_problem_is_in_two_splits_or_solved_in_the_prompt(name):
    task = load_task(name)
    train, validation, test = (
        {tuple(sorted(numbers(p))) for p in split} for split in (task.train, task.validation, task.test)
    )
    messages = task.prompt("?")
    worked = {
        tuple(sorted(map(int, re.findall(r"\d+", turn["content"])))) for turn in messages if turn["role"] == "user"
    }
    assert not train & validation
    assert not train & test
    assert not validation & test
    assert not (train | validation | test) & worked
    assert len(test) == len(task.test) >= 200


@pytest.mark.parametrize("name", ANSWER)
def test_every_answer_is_right(name):
    task = load_task(name)
    for problem in (*task.train, *task.validation, *task.test):
        assert problem.answer == str(ANSWER[name](numbers(problem)))


@pytest.mark.parametrize("name", [*OFFLINE])
def test_a_task_has_the_same_problems_every_time(name):
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


# ---- countdown and its solver


@pytest.mark.parametrize("name", OFFLINE)
def test_the_answer_shown_is_one_that_the_reward_accepts(name):
    task = load_task(name)
    for problem in (*task.train[:30], *task.validation[:30], *task.test[:30]):
        answer = problem.answer if not name.startswith("math") else f"It is \\boxed{{{problem.answer}}}."
        assert call_reward(task.reward, problem.question, answer, problem.example).is_correct


@pytest.mark.parametrize("name", OFFLINE)
def test_no_question_is_in_two_splits(name):
    task = load_task(name)
    splits = [{p.question for p in split} for split in (task.train, task.validation, task.test)]
    assert not splits[0] & splits[1]
    assert not (splits[0] | splits[1]) & splits[2]
    assert len(splits[2]) == len(task.test) >= 200


@given(st.lists(st.integers(1, 12), min_size=1, max_size=4), st.integers(0, 60), st.booleans())
def test_the_solver_finds_a_solution_exactly_when_there_is_one(numbers, target, use_all):
    found = solve_countdown(numbers, target, use_all)
    assert (found is not None) is is_solvable(numbers, target, use_all)
    if found is not None:
        result = evaluate_expression(found, numbers)
        assert result.value == target
        assert len(result.numbers_used) == len(numbers) or not use_all


def test_the_calculator_is_exact_and_refuses_text_that_is_no_arithmetic():
    assert calculate("(2 + 3) * 4 / 7") == "20/7"
    with pytest.raises(UserError, match="contains"):
        calculate("__import__('os')")


def test_the_tool_task_is_countdown_with_a_calculator():
    plain, tool = load_task("countdown"), load_task("countdown_tool")
    assert (plain.test, plain.tools, tool.tools) == (tool.test, (), (calculate,))


# ---- mathematics


def answer_to(question):
    """The answer worked out from the question's text."""
    n = [int(x) for x in re.findall(r"-?\d+", question)]
    if question.startswith("Solve"):
        return Fraction(n[2] - n[1], n[0])
    if "lowest terms" in question:
        return sum(Fraction(part) for part in re.findall(r"\d+(?:/\d+)?", question))
    if "%" in question:
        return Fraction(n[0] * n[1], 100)
    if "divisor" in question:
        return gcd(*n)
    if "multiple" in question:
        return lcm(*n)
    if "series" in question or "terms of" in question:
        count, first, second = n[:3]
        return sum(first + i * (second - first) for i in range(count))
    return comb(n[1], n[0])


def test_the_answers_of_made_up_problems_are_right():
    task = load_task("math_generated")
    for problem in (*task.train, *task.validation, *task.test):
        written = re.sub(r"\\frac\{(-?\d+)\}\{(\d+)\}", r"\1/\2", problem.answer)
        assert Fraction(written) == answer_to(problem.question), problem


class Datasets:
    """In place of the real library: rows as the data set has them, one without a box, and an empty cache."""

    config = SimpleNamespace(HF_HUB_OFFLINE=False)
    exceptions = SimpleNamespace(DatasetsError=KeyError)

    @classmethod
    def load_dataset(cls, name, subject, split):
        if cls.config.HF_HUB_OFFLINE:
            raise ConnectionError("offline mode is enabled\nand more")
        assert name == "EleutherAI/hendrycks_math"
        rows = [{"problem": f"{subject} {split} {i}", "solution": f"so \\boxed{{{i}}}"} for i in range(100)]
        return [*rows, {"problem": "open", "solution": "no box"}]


@pytest.fixture
def hub(monkeypatch):
    """The two libraries; a hub whose answer is given as a function."""

    def made(answer):
        class HfApi:
            dataset_info = staticmethod(lambda name, timeout: answer())

        libraries = {
            "datasets": Datasets,
            "huggingface_hub": SimpleNamespace(constants=SimpleNamespace(HF_HUB_OFFLINE=False), HfApi=HfApi),
        }
        monkeypatch.setattr("textpolicy.tasks.hub.extra", lambda module, install: libraries[module])
        return libraries

    return made


def test_without_the_library_made_up_problems_replace_the_data_set_with_a_warning(monkeypatch, caplog):
    monkeypatch.setitem(sys.modules, "datasets", None)
    assert load_task("math").name == "math_generated"
    assert "made-up problems replace EleutherAI/hendrycks_math: datasets is not installed" in caplog.text
    with pytest.raises(MissingDependencyError, match="datasets is not installed"):
        load_task("math_hub")


@pytest.mark.parametrize("answer", [lambda: time.sleep(5), lambda: {}["no such host"]])
def test_a_hub_that_does_not_answer_is_given_up_at_once_with_one_warning(hub, monkeypatch, caplog, answer):
    monkeypatch.setattr("textpolicy.tasks.hub.reachable", partial(reachable, seconds=0.2))
    hub(answer)
    started = time.perf_counter()
    assert load_task("math").name == "math_generated"
    assert time.perf_counter() - started < 3
    [line] = caplog.messages
    assert "made-up problems replace EleutherAI/hendrycks_math" in line
    assert "the hub does not answer, and the cache does not have it" in line
    with pytest.raises(UserError, match="EleutherAI/hendrycks_math cannot be read"):
        load_task("math_hub")
    assert Datasets.config.HF_HUB_OFFLINE is False  # as it was


def test_a_hub_that_is_switched_off_gets_no_request(hub):
    calls = []
    hub(lambda: calls.append(1))["huggingface_hub"].constants.HF_HUB_OFFLINE = True
    assert load_task("math").name == "math_generated"
    assert calls == []


def test_the_hubs_problems_are_read_shuffled_and_split(hub):
    hub(lambda: None)
    task = load_task("math")
    assert task.name == "math_hub"
    assert (len(task.test), len(task.validation), len(task.train)) == (200, 100, 400)
    assert all(" test " in p.question for p in task.test)
    assert all(" train " in p.question for p in (*task.train, *task.validation))
    assert len({p.question.split()[0] for p in task.test}) == 5
    problem = task.test[0]
    assert problem.answer == problem.question.split()[-1]


def test_an_unknown_task_names_the_known_ones():
    with pytest.raises(
        UserError,
        match=r"did you mean 'countdown'\? choose one of FILE.py:FUNCTION, addition, .*reasoning_gym:DATA_SET",
    ):
        load_task("countdwn")


def test_a_data_set_of_reasoning_gym_is_a_task():
    pytest.importorskip("reasoning_gym", reason="reasoning-gym is an extra: pip install 'textpolicy[reasoning-gym]'")
    task = load_task("reasoning_gym:chain_sum")
    assert (len(task.train), len(task.validation), len(task.test)) == (500, 50, 100)
    questions = {p.question for p in (*task.train, *task.validation, *task.test)}
    assert len(questions) == 650
    for problem in task.test[:20]:
        assert call_reward(task.reward, "", f"<answer>{problem.answer}</answer>", problem.example).is_correct
    with pytest.raises(UserError, match="did you mean 'chain_sum'"):
        load_task("reasoning_gym:chain_sums")


def test_fewer_different_problems_than_requested_are_refused():
    assert distinct([1, 2, 1, 3], lambda n: n, 3) == [1, 2, 3]
    with pytest.raises(UserError, match="only 2 of 3 problems differ; ask for fewer, or for a wider range"):
        distinct(itertools.cycle([1, 2]), lambda n: n, 3)
