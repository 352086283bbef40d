"""The [rewards] section of a run: how the task's reward is called, and the effect of a call that fails."""

import math
import os
import time

import numpy as np
import pytest
from toy_tokenizers import Letters

from textpolicy.config.flags import parse
from textpolicy.config.settings import Config, read_config
from textpolicy.engine import Sampling
from textpolicy.errors import RewardError, UserError
from textpolicy.loop.collect import collect
from textpolicy.run.assembly import environment, with_scorer
from textpolicy.tasks import Problem, Task
from textpolicy.types import Completion


class Says:
    """The engine that answers every prompt with the given texts."""

    def __init__(self, *texts):
        self.texts = texts

    def sample(self, prompts, n, sampling):
        ids = [np.array([ord(c) for c in text], np.int32) for text in self.texts]
        return [[Completion(i, np.full(len(i), -1, np.float32)) for i in ids] for _ in prompts]


def moody(prompt, completion, example):
    """Hang, raise, return the process id, or return 1."""
    if completion == "hang":
        time.sleep(30)
    if completion == "raise":
        raise RuntimeError("no")
    return os.getpid() if completion == "who" else 1.0


def rewards(*texts, **settings):
    problems = (Problem("?", "!"),)
    task = Task("moody", "", problems, problems, problems, lambda question: question, moody)
    config = Config(rewards=settings)
    env = environment(with_scorer(task, config), problems, Letters(), config)
    return [e.reward for e in collect(Says(*texts), env, [0], len(texts), Sampling(8))]


def test_by_default_a_reward_is_called_here_and_a_failure_stops_the_run():
    assert rewards("ok", "who") == [1.0, os.getpid()]
    with pytest.raises(RewardError, match=r"raised RuntimeError .*completion 'raise'"):
        rewards("ok", "raise")


def test_a_reward_that_hangs_or_raises_can_leave_its_completion_unscored_while_the_others_count():
    started = time.perf_counter()
    found = rewards("ok", "hang", "raise", "ok", time_limit=0.5, concurrency=4, on_failure="unscorable")
    assert [math.isnan(r) for r in found] == [False, True, True, False]
    assert time.perf_counter() - started < 5


def test_a_reward_that_hangs_can_stop_the_run():
    with pytest.raises(RewardError, match=r"too slow .*completion 'hang'"):
        rewards("hang", time_limit=0.2)


def test_worker_processes_call_the_reward_and_all_splits_share_them():
    pytest.importorskip("cloudpickle", reason="workers need an extra: pip install 'textpolicy[workers]'")
    [who] = rewards("who", processes=True)
    assert who != os.getpid()
    problems = (Problem("?", "!"),)
    task = with_scorer(Task("moody", "", problems, problems, problems, str, moody), Config(rewards={"processes": True}))
    splits = [environment(task, problems, Letters(), Config()) for _ in range(3)]
    assert len({id(env.reward_fn) for env in splits}) == 1


def test_every_setting_is_a_flag_of_train():
    flags = [
        "--rewards.time-limit=5",
        "--rewards.concurrency=3",
        "--rewards.on-failure=unscorable",
        "--rewards.correct-from=0.5",
    ]
    given = parse(Config, [*flags, "--rewards.processes"], "train").rewards
    assert given.model_dump() == {
        "time_limit": 5.0,
        "concurrency": 3,
        "processes": True,
        "on_failure": "unscorable",
        "correct_from": 0.5,
    }


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ("time_limit = 0", "rewards.time_limit is 0; input should be greater than 0"),
        ("concurrency = 0", "rewards.concurrency is 0"),
        ('on_failure = "zero"', "rewards.on_failure is zero; input should be 'raise' or 'unscorable'"),
        ("timelimit = 3", "there is no setting 'rewards.timelimit'; did you mean 'time_limit'?"),
    ],
)
def test_a_setting_that_cannot_work_is_one_sentence(tmp_path, text, sentence):
    (tmp_path / "run.toml").write_text(f"[rewards]\n{text}\n")
    with pytest.raises(UserError) as error:
        read_config(tmp_path / "run.toml")
    assert sentence in str(error.value)
