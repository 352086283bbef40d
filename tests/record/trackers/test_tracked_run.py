"""A run sends every step and evaluation to its trackers, and ends with the doctor's findings."""

import re

import pytest
from conftest import make_tiny_engine

from textpolicy.config.settings import Config
from textpolicy.run import training_run as runs
from textpolicy.tasks import TASKS, Problem, Task


class Numbers:
    """A tokenizer whose text is the ids themselves."""

    eos_token_id = 0

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(str(i) for i in ids)


class Kept:
    """A sink that keeps what it receives."""

    def __init__(self):
        self.steps, self.evaluations, self.closed = [], [], 0

    def step(self, step, row, episodes):
        self.steps.append((step, row["reward_mean"], len(episodes)))

    def evaluated(self, step, split, row, episodes):
        self.evaluations.append((step, split))

    def close(self):
        self.closed += 1


@pytest.fixture
def tiny_run(monkeypatch, tmp_path):
    """Train a tiny random model for two steps with a given reward and return its sink."""

    def start(reward):
        problems = [Problem(f"{n} 3", "7") for n in range(1, 9)]
        parts = {"train": tuple(problems), "validation": tuple(problems[:2]), "test": tuple(problems[:2])}
        monkeypatch.setitem(TASKS, "tiny", lambda: Task("tiny", "", prompt=lambda q: q, reward=reward, **parts))
        engine = make_tiny_engine(vocabulary=16), Numbers()
        monkeypatch.setattr("textpolicy.run.assembly.build_engine", lambda *_: engine)
        kept = Kept()
        monkeypatch.setattr(runs, "open_trackers", lambda config, folder, before, kept_bytes: [kept])
        small = {"rollout": {"prompts_per_step": 2, "group_size": 4, "max_tokens": 3}, "optimizer": {"warmup_steps": 1}}
        runs.run(Config(task="tiny", steps=2, output=tmp_path / "run", evaluation={"every": 1}, **small))
        return kept

    return start


def test_trackers_get_every_step_and_evaluation_and_are_closed_once(tiny_run, capsys):
    kept = tiny_run(lambda prompt, completion, example: (float(len(completion)), completion == "7"))
    assert [(step, episodes) for step, _, episodes in kept.steps] == [(0, 8), (1, 8)]
    assert kept.evaluations[:4] == [(0, "test"), (0, "validation"), (1, "validation"), (2, "validation")]
    assert kept.evaluations[4][1] == "test"
    assert kept.closed == 1


def test_a_run_ends_with_the_doctors_findings(tiny_run, capsys):
    tiny_run(lambda prompt, completion, example: (0.25, False))
    last = " ".join(capsys.readouterr().out.split("\ntry it: ")[1].split())
    assert re.search(
        r"doctor: The adapter did not move: in 2 of 2 steps the rewards within every group were equal", last
    )
    reason = "one reward for all their completions (mean always 0.25), because the reward is the same"
    assert f"doctor: 100% of the groups had no signal, {reason}" in last
