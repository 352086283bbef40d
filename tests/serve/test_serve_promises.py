"""Requests are carried out once and in their order, whatever the client, the disk or a kill does meanwhile."""

import os
import sqlite3
import subprocess
import sys
import threading
import time

import pytest
from asking import Asking, a_pass, loss_of
from made_model import MadeModel
from running_server import Running, running

DATA = [[1, 2, 3, 4]]


@pytest.fixture
def ask(server):
    return Asking(server.url)


def losses(ask, model, first, steps):
    """The losses of so many steps, whose requests are numbered from ``first``."""
    found = []
    for i in range(steps):
        passed = ask.pass_over(model, first + 2 * i, DATA)[1]["request_id"]
        stepped = ask.step(model, first + 2 * i + 1)[1]["request_id"]
        found.append(loss_of(ask.result(passed)))
        assert "metrics" in ask.result(stepped)
    return found


def test_a_request_that_is_repeated_is_carried_out_once(ask, made):
    _, model = ask.model(seed=1)
    first = [ask.pass_over(model, 1, DATA)[1]["request_id"] for _ in range(3)]
    assert len(set(first)) == 1
    one = ask.result(first[0])
    assert ask.result(ask.pass_over(model, 1, DATA)[1]["request_id"]) == one  # after it has ended, too
    ask.result(ask.step(model, 2)[1]["request_id"])
    ask.result(ask.step(model, 2)[1]["request_id"])
    assert (made.passes, made.steps) == (1, 1)


def test_a_model_that_is_asked_for_twice_is_one(ask):
    session, model = ask.model(seed=1)
    assert ask.model(session=session)[1] == model
    assert ask(f"sessions/{session}")[1]["training_run_ids"] == [model]


def test_requests_that_come_out_of_order_wait_for_those_before_them(ask, made):
    _, model = ask.model(seed=1)
    expected = losses(ask, model, 1, 3)
    _, other = ask.model(seed=1)
    bodies = [a_pass(other, seq, DATA) for seq in (1, 3, 5)]
    late = [ask("forward_backward", bodies[2])[1]["request_id"], ask.step(other, 4)[1]["request_id"]]
    late += [ask("forward_backward", bodies[1])[1]["request_id"], ask.step(other, 2)[1]["request_id"]]
    passes = made.passes
    ask("healthz")
    assert made.passes == passes
    first = ask("forward_backward", bodies[0])[1]["request_id"]
    assert [loss_of(ask.result(r)) for r in (first, late[2], late[0])] == expected


def test_a_failed_request_leaves_the_model_as_it_was_and_its_order_intact(ask):
    _, model = ask.model(seed=1)
    expected = losses(ask, model, 1, 2)
    _, other = ask.model(seed=1)
    wrong = ask.pass_over(other, 1, DATA, loss="no_such_loss")[1]["request_id"]
    assert ask.result(wrong) == {"error": "there is no loss 'no_such_loss'", "category": "user"}
    assert losses(ask, other, 2, 2) == expected


def test_a_server_that_was_killed_goes_on_where_it_was(tmp_path):
    """With a gradient that no step has used yet, a state on disk before it, and requests that were not begun."""
    with running([MadeModel()], tmp_path / "whole") as server:
        ask = Asking(server.url)
        expected = losses(ask, ask.model(seed=3)[1], 1, 6)
    killed = Running([MadeModel()], tmp_path / "killed")
    ask = Asking(killed.url)
    _, model = ask.model(seed=3)
    found = losses(ask, model, 1, 3)
    kept = ask.pass_over(model, 7, DATA)[1]["request_id"]
    found.append(loss_of(ask.result(kept)))
    killed.service.models["made/pairs"].gate.clear()  # what comes now is not carried out
    promised = [ask.step(model, 8)[1]["request_id"], ask.pass_over(model, 9, DATA)[1]["request_id"]]
    killed.kill()
    with running([MadeModel()], tmp_path / "killed") as server:
        ask = Asking(server.url)
        assert loss_of(ask.result(kept)) == found[-1]  # its result was kept
        assert "metrics" in ask.result(promised[0])
        found.append(loss_of(ask.result(promised[1])))
        assert ask.pass_over(model, 9, DATA)[1]["request_id"] == promised[1]  # a client that did not hear the answer
        ask.result(ask.step(model, 10)[1]["request_id"])
        found += losses(ask, model, 11, 1)
    assert found == expected


def test_completions_that_were_promised_are_sampled_after_a_kill_as_they_would_have_been(tmp_path):
    model = MadeModel()
    killed = Running([model], tmp_path / "server")
    ask = Asking(killed.url)
    session, trained = ask.model(seed=3)
    losses(ask, trained, 1, 1)
    save = {"model_id": trained, "seq_id": 3, "sampling_session_seq_id": 0}
    sampler = ask.result(ask("save_weights_for_sampler", save)[1]["request_id"])["sampling_session_id"]
    prompt = {"chunks": [{"type": "encoded_text", "tokens": [1, 2]}]}
    asked = {"sampling_session_id": sampler, "prompt": prompt, "sampling_params": {"max_tokens": 6, "stop": []}}
    before = ask.result(ask("asample", {**asked, "seq_id": 0})[1]["request_id"])
    model.gate.clear()
    promised = ask("asample", {**asked, "seq_id": 1})[1]["request_id"]
    killed.kill()
    with running([MadeModel()], tmp_path / "server") as server:
        ask = Asking(server.url)
        assert ask.result(f"{sampler}:0") == before
        drawn = ask.result(promised)
        assert ask.result(ask("asample", {**asked, "seq_id": 1})[1]["request_id"]) == drawn
        assert ask("session_heartbeat", {"session_id": session})[0] == 200


def test_a_server_that_was_stopped_has_its_states_on_disk(tmp_path):
    with running([MadeModel()], tmp_path / "server") as server:
        ask = Asking(server.url)
        _, model = ask.model(seed=3)
        losses(ask, model, 1, 2)
    with sqlite3.connect(tmp_path / "server" / "journal.sqlite") as journal:
        [(done, kept)] = journal.execute("SELECT done, state_seq FROM models").fetchall()
        assert done == kept == 4
        assert journal.execute("SELECT count(*) FROM jobs WHERE payload IS NOT NULL").fetchone() == (0,)


def test_two_servers_never_share_a_folder(server):
    script = (
        "import sys, pathlib; from textpolicy.serve.service import Service; Service(dict, pathlib.Path(sys.argv[1]))"
    )
    command = [sys.executable, "-c", script, str(server.service.folder)]
    second = subprocess.run(command, capture_output=True, text=True, check=False)
    assert second.returncode != 0
    assert f"process {os.getpid()} is using" in second.stderr


def test_a_request_that_is_not_known_is_gone(ask):
    assert ask("retrieve_future", {"request_id": "nobody:train:0:1"})[0] == 410


def test_more_than_the_server_holds_is_put_off(ask, made, monkeypatch):
    from textpolicy.serve import service

    _, model = ask.model(seed=1)
    made.gate.clear()
    monkeypatch.setattr(service, "MOST_WAITING", 2)
    assert [ask.pass_over(model, seq, DATA)[0] for seq in (1, 2, 3)] == [200, 200, 429]
    made.gate.set()
    ask.result(f"{model}:2")
    assert ask.pass_over(model, 3, DATA)[0] == 200


def test_a_request_whose_predecessor_never_comes_is_given_up_whatever_the_clock_says(ask, monkeypatch):
    from textpolicy.serve import worker

    _, model = ask.model(seed=1)
    late = ask.step(model, 2)[1]["request_id"]
    monkeypatch.setattr(time, "time", lambda now=time.time: now() - 1e6)  # the clock is set back by days
    monkeypatch.setattr(worker, "LATE", 0.0)
    monkeypatch.setattr(worker, "HOUSEKEEPING", 0.0)
    ask.model(seed=2)  # another round begins
    assert "request 1 of this model never came" in ask.result(late)["error"]


def test_a_server_whose_requests_wait_for_another_does_not_spin(ask, server, monkeypatch):
    _, model = ask.model(seed=1)
    rounds, one = [], server.service.worker._round
    monkeypatch.setattr(server.service.worker, "_round", lambda: (rounds.append(1), one()))
    ask.step(model, 2)
    for _ in range(20):
        ask("healthz")
    assert len(rounds) < 20


def test_a_session_that_ends_ends_what_was_asked_in_it(ask, made, server):
    session, model = ask.model(seed=1)
    save = {"model_id": model, "seq_id": 1, "sampling_session_seq_id": 0}
    ask.result(ask("save_weights_for_sampler", save)[1]["request_id"])
    snapshots = server.service.training.snapshots
    assert len([*snapshots.iterdir()]) == 1
    waiting = ask.step(model, 3)[1]["request_id"]
    assert ask(f"sessions/{session}/finish", {"reason": {"type": "success"}})[0] == 204
    assert ask.result(waiting)["error"] == "its session has ended"
    assert ask.step(model, 4)[0] == 410
    assert ask("session_heartbeat", {"session_id": session})[0] == 410
    rested = threading.Event()
    server.service.worker.post(rested.set)  # after what it does for the session
    rested.wait()
    assert made.closed == 1
    assert [*snapshots.iterdir()] == []


def test_a_cancelled_request_for_completions_ends(ask, made):
    session = ask("create_session", {"tags": []})[1]["session_id"]
    wanted = {"session_id": session, "sampling_session_seq_id": 0, "base_model": "made/pairs"}
    sampler = ask("create_sampling_session", wanted)[1]["sampling_session_id"]
    made.table[:, 0] = -1e9  # never ends by itself
    made.gate.clear()
    asked = {"sampling_session_id": sampler, "seq_id": 0, "prompt": {"chunks": [{"tokens": [1]}]}}
    request = ask("asample", asked)[1]["request_id"]
    assert ask("cancel_future", {"request_id": request})[0] == 204
    threading.Timer(0.2, made.gate.set).start()
    assert "cancelled" in ask.result(request)["error"]


def test_a_disk_that_is_full_refuses_with_a_sentence_and_is_used_again_later(ask, server, monkeypatch):
    _, model = ask.model(seed=1)
    journal, write = server.service.journal, server.service.journal.write
    from concurrent.futures import Future

    from textpolicy.errors import ServiceError

    def full(*statements):
        future = Future()
        future.set_exception(ServiceError("the server's journal could not be written (disk full); free some space"))
        return future

    monkeypatch.setattr(journal, "write", full)
    status, answer = ask.pass_over(model, 1, DATA)
    assert (status, "free some space" in answer["detail"]) == (507, True)
    monkeypatch.setattr(journal, "write", write)
    assert len(losses(ask, model, 1, 1)) == 1
