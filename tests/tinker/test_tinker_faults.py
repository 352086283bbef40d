"""Slow, failing and dying servers and clients: the run continues, or ends in one sentence and resumes."""

import asyncio
import os
import signal
import subprocess
import sys
import threading
import time

import numpy as np
import pytest
from faulty_proxy import Fault, FaultyProxy
from fixed_episodes import fixed_episodes

from textpolicy.algorithms import algorithm
from textpolicy.engine import Sampling
from textpolicy.errors import ServiceError
from textpolicy.tinker.engine import TinkerEngine

HOW = algorithm("grpo")
PROMPTS = [e.tokens[~e.mask].tolist() for e in fixed_episodes()[::4]]


def one_step(engine):
    """What a step samples, and the log-probs after its update, kept and put back."""
    completions = [c for group in engine.sample(PROMPTS, 4, Sampling(max_tokens=6, seed=1)) for c in group]
    batch = HOW.credit(fixed_episodes(1))
    engine.update(batch, HOW.surrogate, 1e-2)
    engine.restore(engine.weights())
    return [c.tokens.tolist() for c in completions], engine.score(batch)


def now_and_then(path, before):
    """Some of the first requests of each kind go wrong, each in its own way."""
    name = path.rsplit("/", 1)[-1]
    return {
        ("asample", 0): Fault(status=429),
        ("asample", 2): Fault(seconds=1.0),
        ("save_weights_for_sampler", 0): Fault(drop=True),
        ("forward_backward", 0): Fault(status=500),
        ("forward_backward", 1): Fault(lost=True),  # done, and asked for again
        ("optim_step", 0): Fault(drop=True),
        ("optim_step", 1): Fault(lost=True),
        ("retrieve_future", 2): Fault(drop=True),
        ("retrieve_future", 4): Fault(status=429),
        ("load_weights", 0): Fault(lost=True),
    }.get((name, before))


@pytest.mark.slow
def test_a_server_that_delays_drops_and_fails_now_and_then_changes_nothing(tinker, tinker_server):
    expected = one_step(tinker())
    with FaultyProxy(tinker_server.url, now_and_then) as proxy:
        completions, logprobs = one_step(tinker(base_url=proxy.url))
    met = {(path.rsplit("/", 1)[-1], fault) for path, fault in proxy.faults}
    assert len(met) >= 9
    assert completions == expected[0]
    np.testing.assert_array_equal(logprobs, expected[1])


def test_a_refused_key_is_one_sentence_that_does_not_show_it(tinker_server, no_tinker_account, monkeypatch):
    monkeypatch.setenv("TINKER_API_KEY", "tml-planted-secret")
    with FaultyProxy(tinker_server.url, lambda path, n: None if "healthz" in path else Fault(status=401)) as proxy:
        connecting = pytest.raises(ServiceError, match="check TINKER_API_KEY")
        with connecting as refused:
            TinkerEngine.connect(tinker_server.name, base_url=proxy.url)
    assert "planted-secret" not in str(refused.value)
    assert "\n" not in str(refused.value)


# ---- kill -9


CLIENT = """
import sys
from fixed_episodes import fixed_episodes
from textpolicy.algorithms import algorithm
from textpolicy.tinker.engine import TinkerEngine

url, model = sys.argv[1:]
engine = TinkerEngine.connect(model, rank=4, seed=3, base_url=url)
how = algorithm("grpo")
batch = how.credit(fixed_episodes(1))
engine.update(batch, how.surrogate, 1e-2)
print(engine.save_state("before"), flush=True)
print(*engine.score(batch).ravel().tolist(), flush=True)
while True:
    engine.update(batch, how.surrogate, 1e-2)
    print("step", flush=True)
"""


def test_a_client_killed_in_a_step_is_resumed_by_another(tinker, tinker_server, tmp_path):
    script = tmp_path / "client.py"
    script.write_text(CLIENT)
    command = [sys.executable, str(script), tinker_server.url, tinker_server.name]
    path = [p for p in sys.path if p]
    with subprocess.Popen(command, stdout=subprocess.PIPE, text=True, env=environment(path)) as client:
        state, *before = client.stdout.readline().split()
        before = np.array(client.stdout.readline().split(), np.float32)
        assert client.stdout.readline() == "step\n"
        time.sleep(0.1)  # in the middle of the next one
        client.send_signal(signal.SIGKILL)
    resumed = tinker(resume=state)
    batch = HOW.credit(fixed_episodes(1))
    np.testing.assert_array_equal(resumed.score(batch).ravel(), before)
    assert resumed.update(batch, HOW.surrogate, 1e-2)["updated"] == 1


def environment(path):
    return {**os.environ, "PYTHONPATH": os.pathsep.join(path)}


@pytest.mark.slow
def test_a_server_killed_in_a_step_is_one_sentence_and_a_new_one_resumes(served_by, connected):
    batch = HOW.credit(fixed_episodes(1))
    with served_by("killed") as server:
        engine = connected(server, patience=1.0)
        engine.update(batch, HOW.surrogate, 1e-2)
        state, before = engine.save_state("before"), engine.score(batch)
        killer = threading.Timer(0.05, server.process.kill)
        killer.start()
        with pytest.raises(ServiceError) as lost:
            update_for_ever(engine, batch)
        killer.join()
        engine.close()  # else its heartbeats continue
    assert "resume from the last checkpoint" in str(lost.value)
    assert "\n" not in str(lost.value)
    with served_by("killed") as server:
        resumed = connected(server, resume=state)
        np.testing.assert_array_equal(resumed.score(batch), before)
    loop = resumed.service.client.holder.get_loop()
    beating = heartbeats(loop)
    began = time.monotonic()
    resumed.close()
    assert time.monotonic() - began < 10  # of 120 that a server may be gone
    while heartbeats(loop) != beating - 1:
        assert time.monotonic() - began < 20


def heartbeats(loop):
    """The number of sessions that the SDK keeps alive in its ``loop``, of which a process has one."""

    async def count():
        return [task.get_coro().__name__ for task in asyncio.all_tasks()].count("_session_heartbeat")

    return asyncio.run_coroutine_threadsafe(count(), loop).result(5)


def update_for_ever(engine, batch):
    while True:
        engine.update(batch, HOW.surrogate, 1e-2)
