"""RolloutCoordinator: what it collects, in this process and in others, and what happens when a worker dies."""

import os
import re
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from toy_tokenizers import Letters

from textpolicy.environment import Environment, TextGenerationEnv
from textpolicy.errors import UserError, WorkerError
from textpolicy.rollout import RolloutCoordinator

pytest.importorskip("cloudpickle", reason="workers need an extra: pip install 'textpolicy[workers]'")


class Steps(Environment):
    """Episodes of three steps."""

    def reset(self):
        self.at = 0
        return np.array([0]), {}

    def step(self, action):
        self.at += 1
        over = self.at == 3
        return {"observation": np.array([self.at]), "reward": 1.0, "terminated": over, "truncated": False, "info": {}}


class Echo:
    """Answers with the prompt; counts how many it was asked in a call."""

    def __init__(self):
        self.calls = []

    def __call__(self, obs, deterministic=False):
        return list(obs), {"logprob": np.zeros(len(obs), np.float32)}

    def sample_batch(self, prompts, deterministic=False):
        self.calls.append(len(prompts))
        return [(list(p), {"logprob": np.zeros(len(p), np.float32)}) for p in prompts]


def length(prompt, completion, example):
    return float(len(completion))


def letters(group_size=1):
    return TextGenerationEnv(["a", "bb", "ccc"], length, tokenizer=Letters(), group_size=group_size)


def walk(obs, deterministic=False):
    return 1, {}


def numbered(worker):
    return lambda obs, deterministic: (worker, {"logprob": 0.0})


# ---- in this process


def test_without_workers_a_runner_collects_here():
    echo = Echo()
    coordinator = RolloutCoordinator(letters, lambda: echo, "grpo", 0, 5)
    assert [e.rew[0] for e in coordinator.collect().episodes] == [1, 2, 3, 1, 2]
    assert [e.rew[0] for e in coordinator.collect().episodes] == [3, 1, 2, 3, 1]
    assert echo.calls == [5, 5]


def test_max_episodes_bounds_a_call():
    echo = Echo()
    assert RolloutCoordinator(letters, lambda: echo, "grpo", 0, 100, 4).collect().episode_count == 4
    assert echo.calls == [4]
    steps = RolloutCoordinator(Steps, lambda: walk, "grpo", 0, 100, 2).collect()
    assert [len(e) for e in steps.episodes] == [3, 3]
    assert len(RolloutCoordinator(Steps, lambda: walk, "grpo", 0, 4, 2).collect()) == 4


def test_a_batch_size_splits_what_is_sampled_in_a_call():
    echo = Echo()
    coordinator = RolloutCoordinator(lambda: letters(group_size=2), lambda: echo, "grpo", 0, 7, batch_size=3)
    buffer = coordinator.collect()
    assert echo.calls == [3, 3, 1]
    assert [e.group for e in buffer.episodes] == [0, 0, 1, 1, 2, 2, 3]


def test_a_batch_can_be_sampled_with_a_model_instead_of_the_policy(tiny_engine):
    class Ids(Letters):
        eos_token_ids = frozenset({0})

        def decode(self, ids):
            return " ".join(map(str, ids))

    coordinator = RolloutCoordinator(
        lambda: TextGenerationEnv(["a"], length, tokenizer=Ids(), group_size=4),
        lambda: walk,
        "grpo",
        max_steps=4,
        batch_size=2,
        model=tiny_engine.model,
        tokenizer=Ids(),
        generation_params={"max_tokens": 3},
    )
    episodes = coordinator.collect().episodes
    assert len(episodes) == 4
    assert all(1 <= len(e.act[0]) <= 3 for e in episodes)
    assert len(episodes[0].as_training().tokens) == 1 + len(episodes[0].act[0])


def test_timings_are_kept_on_request():
    plain = RolloutCoordinator(letters, Echo, "grpo", 0, 3)
    plain.collect()
    assert plain.get_rollout_timing() == plain.get_rollout_generation_profile() == {}
    timed = RolloutCoordinator(letters, Echo, "grpo", 0, 3, profile=True)
    timed.collect()
    seconds = timed.get_rollout_timing()
    assert set(seconds) == {"total", "env_reset", "generation", "env_step", "buffer_store"}
    assert seconds["total"] >= sum(v for k, v in seconds.items() if k != "total") > 0
    assert 0 < timed.get_rollout_generation_profile()["generation_share"] < 1
    timed.reset_rollout_timing()
    assert not any(timed.get_rollout_timing().values())


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"num_workers": -1}, "num_workers is -1"),
        ({"batch_size": 0}, "batch_size is 0"),
        ({"max_episodes": 0}, "max_episodes is 0"),
        ({"batch_size": 2, "num_workers": 2}, "batch_size is 2 and num_workers 2"),
        ({"batch_size": 2}, "the policy answers one prompt at a time"),
        ({"algorithm": "grp"}, "did you mean 'grpo'"),
    ],
)
def test_a_coordinator_that_cannot_work_is_refused(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        RolloutCoordinator(letters, lambda: walk, **{"algorithm": "grpo", **settings})


def test_a_closed_coordinator_says_so():
    with RolloutCoordinator(letters, Echo, "grpo", 0, 3) as coordinator:
        coordinator.collect()
    with pytest.raises(UserError, match="is closed"):
        coordinator.collect()


# ---- in other processes


@pytest.fixture
def make(request):
    """Coordinators that are closed after the test."""
    made = []

    def build(env_fn, policy_fn, workers=2, max_steps=3, **settings):
        made.append(RolloutCoordinator(env_fn, policy_fn, "grpo", workers, max_steps, **settings))
        return made[-1]

    yield build
    for coordinator in made:
        coordinator.close()


def pids(coordinator):
    return [worker.process.pid for worker in coordinator.workers._workers]


def test_workers_collect_with_what_lambdas_make_in_them_and_share_no_group(make):
    here = os.getpid()
    coordinator = make(
        lambda: letters(group_size=3),
        lambda worker: lambda obs, deterministic: ([100 + worker, os.getpid() != here], {"logprob": [0.0, 0.0]}),
    )
    buffer = coordinator.collect()
    assert [e.act[0] for e in buffer.episodes] == [[100, True]] * 3 + [[101, True]] * 3
    assert [e.group for e in buffer.episodes] == [0, 0, 0, 1, 1, 1]
    again = coordinator.collect()
    assert again is not buffer
    assert [e.group for e in again.episodes] == [2, 2, 2, 3, 3, 3]
    assert again.episodes[3].as_training().tokens.tolist() == [98, 98, 101, 1]


def test_policies_made_alike_are_pointed_out(make, caplog):
    make(letters, lambda: Echo()).collect()
    assert "two rollout workers collected exactly the same" in caplog.text
    caplog.clear()
    make(Steps, lambda worker: lambda obs, deterministic: (worker, {})).collect()
    assert caplog.text == ""


@pytest.mark.parametrize("how", [signal.SIGKILL, signal.SIGTERM])
def test_a_worker_killed_while_it_works_is_an_error_within_five_seconds(make, how):
    def slow(obs, deterministic=False):
        time.sleep(60)

    coordinator = make(Steps, lambda worker: slow if worker else lambda obs, deterministic: (0, {}))
    seen = {}

    def kill():
        while not coordinator.workers._workers[1]:
            time.sleep(0.01)
        time.sleep(1.5)
        seen["at"] = time.perf_counter()
        os.kill(coordinator.workers._workers[1].process.pid, how)

    killer = threading.Thread(target=kill)
    killer.start()
    with pytest.raises(WorkerError, match=rf"worker 1 .* died: {how.name} ended it"):
        coordinator.collect()
    assert time.perf_counter() - seen["at"] < 5
    killer.join()


def test_a_worker_that_leaves_says_its_code_though_a_process_of_its_own_lives_on(make, tmp_path):
    def leaves(obs, deterministic=False):
        if child := os.fork():
            (tmp_path / "child").write_text(str(child))
            os._exit(3)
        time.sleep(60)  # and holds the pipe open
        os._exit(0)

    coordinator = make(Steps, lambda: leaves, workers=1)
    with pytest.raises(WorkerError, match=r"worker 0 .* died: it ended with code 3; the next"):
        coordinator.collect()
    os.kill(int((tmp_path / "child").read_text()), signal.SIGKILL)  # which is still there


def test_a_worker_that_no_longer_listens_is_ended(make, monkeypatch):
    def deaf(obs, deterministic=False):
        os.closerange(3, 256)  # its pipe with them
        time.sleep(60)

    monkeypatch.setattr("textpolicy.rollout.workers.PATIENCE", 0.2)
    coordinator = make(Steps, lambda: deaf, workers=1)
    with pytest.raises(WorkerError, match=r"worker 0 .* died: it does not answer") as raised:
        coordinator.collect()
    pid = int(re.search(r"process (\d+)", str(raised.value))[1])
    with pytest.raises(ProcessLookupError):
        os.kill(pid, 0)


def test_a_dead_worker_is_replaced_and_the_others_live_on(make):
    coordinator = make(Steps, lambda worker: lambda obs, deterministic: (worker, {}))
    coordinator.collect()
    first = pids(coordinator)
    os.kill(first[0], signal.SIGKILL)
    coordinator.workers._workers[0].process.wait(5)
    buffer = coordinator.collect()  # it died while idle: nobody was waiting for it
    assert [e.act[0] for e in buffer.episodes] == [0, 1]
    assert pids(coordinator)[0] != first[0]
    assert pids(coordinator)[1] == first[1]


def test_an_answer_that_came_too_late_is_not_taken_for_the_next(make):
    """The worker that did not die answers the question that ended in an error; its answer is dropped."""

    class Counted:
        def __init__(self, worker):
            self.worker, self.n = worker, 0

        def __call__(self, obs, deterministic=False):
            self.n += 1
            if self.worker == 0 and self.n == 1:
                os.kill(os.getpid(), signal.SIGKILL)
            return self.n, {}

    coordinator = make(Steps, Counted)
    with pytest.raises(WorkerError, match="worker 0"):
        coordinator.collect()
    coordinator.workers._workers[0] = None
    coordinator.workers._payload = make(Steps, lambda worker: lambda obs, deterministic: (7, {})).workers._payload
    acts = [e.act for e in coordinator.collect().episodes]
    assert acts == [[7, 7, 7], [4, 5, 6]]


def test_a_worker_that_takes_too_long_is_ended(make):
    coordinator = make(Steps, lambda: lambda obs, deterministic: time.sleep(60), workers=1, worker_seconds=3.0)
    started = time.perf_counter()
    with pytest.raises(WorkerError, match="worker 0 took longer than 3 s and was ended"):
        coordinator.collect()
    assert time.perf_counter() - started < 6


def fails():
    raise KeyError("no such model")


def fails_later(obs, deterministic=False):
    raise ZeroDivisionError("in the policy")


@pytest.mark.parametrize(
    ("policy_fn", "said"), [(fails, "no such model"), (lambda: fails_later, "in the policy"), (lambda: walk, None)]
)
def test_what_is_raised_in_a_worker_is_told_with_its_traceback(make, policy_fn, said):
    coordinator = make(Steps, policy_fn, workers=1)
    if said is None:
        assert coordinator.collect().episode_count == 1
        return
    with pytest.raises(WorkerError, match=f"(?s)worker 0 failed.*Traceback.*{said}"):
        coordinator.collect()
    assert coordinator.workers._workers[0].alive


def test_what_cannot_be_sent_to_a_process_is_refused():
    lock = threading.Lock()
    with pytest.raises(WorkerError, match="cannot be sent to a process"):
        RolloutCoordinator(lambda: lock and Steps(), lambda: walk, "grpo", 1)


def test_closing_leaves_no_process(make):
    coordinator = make(Steps, lambda: walk)
    coordinator.collect()
    processes = [worker.process for worker in coordinator.workers._workers]
    coordinator.close()
    assert all(p.poll() == 0 for p in processes)  # they ended by themselves


def test_workers_end_with_a_parent_that_was_killed(tmp_path):
    script = tmp_path / "parent.py"
    script.write_text(
        "import os, sys, time\n"
        "from textpolicy.environment import TextGenerationEnv\n"
        "from textpolicy.rollout import RolloutCoordinator\n"
        "class Letters:\n"
        "    encode = staticmethod(lambda text: [ord(c) for c in text])\n"
        "    decode = staticmethod(lambda ids: ''.join(map(chr, ids)))\n"
        "env = lambda: TextGenerationEnv(['a'], lambda prompt, completion, example: 1.0, tokenizer=Letters())\n"
        "policy = lambda: lambda obs, deterministic: ([97], {'logprob': [0.0]})\n"
        "c = RolloutCoordinator(env, policy, 'grpo', 1, 2)\n"  # no guard: a worker does not import this script
        "print(c.collect().episode_count, c.workers._workers[0].process.pid, flush=True)\n"
        "time.sleep(60)\n"
    )
    parent = subprocess.Popen([sys.executable, str(script)], stdout=subprocess.PIPE, text=True)
    try:
        count, worker = map(int, parent.stdout.readline().split())
        assert count == 2
    finally:
        parent.kill()
        parent.wait()
        parent.stdout.close()
    ends = time.monotonic() + 5
    while time.monotonic() < ends and _running(worker):
        time.sleep(0.05)
    assert not _running(worker)


def _running(pid):
    try:
        with open(f"/proc/{pid}/stat") as file:
            return file.read().split()[2] != "Z"
    except OSError:
        return False
