"""The server with a tiny model on MLX: what clients get is what the model itself gives."""

import subprocess
import sys
import threading

import numpy as np
import pytest
from asking import Asking, loss_of
from conftest import VOCABULARY, tiny_llama
from running_server import Running, running

from textpolicy.serve import messages

PROMPT, TOKENS = [3, 7, 11], [3, 7, 11, 20, 9, 2]


class Stops:
    """A tokenizer that knows only how a completion ends."""

    eos_token_id, chat_template = 0, None

    def encode(self, text, add_special_tokens=False):
        return [ord(c) % 200 + 1 for c in text]

    def decode(self, ids, skip_special_tokens=True):
        return "".join(chr(40 + i) for i in ids)


def tiny():
    from textpolicy.mlx.tenants.model import Base

    return {"tiny": Base("tiny", tiny_llama(VOCABULARY), Stops(), context=256)}


@pytest.fixture(scope="module")
def ask(tmp_path_factory):
    with running(tiny, tmp_path_factory.mktemp("served") / "server") as server:
        yield Asking(server.url)


def sampled(ask, sampler, seq, tokens=PROMPT, **asked):
    sent = {"sampling_session_id": sampler, "seq_id": seq, "prompt": {"chunks": [{"tokens": tokens}]}, **asked}
    body = ask.result(ask("asample", sent)[1]["request_id"])
    assert isinstance(body, bytes), body
    return messages._messages()["SampleResponse"].FromString(body)


def steps(ask, model, first, count):
    """The losses before so many steps, which ``first`` numbers."""
    found = []
    for i in range(count):
        passed = ask.pass_over(model, first + 2 * i, [TOKENS])[1]["request_id"]
        ask.result(ask.step(model, first + 2 * i + 1, rate=0.01)[1]["request_id"])
        found.append(loss_of(ask.result(passed)))
    return found


def test_a_sampler_has_the_log_probs_of_the_model_that_it_was_taken_from(ask):
    _, model = ask.model("tiny", seed=1)
    losses = steps(ask, model, 1, 3)
    assert losses == sorted(losses, reverse=True)
    save = {"model_id": model, "seq_id": 7, "sampling_session_seq_id": 0}
    sampler = ask.result(ask("save_weights_for_sampler", save)[1]["request_id"])["sampling_session_id"]
    drawn = sampled(ask, sampler, 0, num_samples=3, sampling_params={"max_tokens": 8, "stop": []})
    for place, one in enumerate(drawn.sequences):
        tokens = np.frombuffer(one.tokens, np.int32)
        whole = [*PROMPT, *tokens.tolist()]
        passed = ask.result(ask.pass_over(model, 8 + place, [whole], forward_only=True)[1]["request_id"])
        record = messages._messages()["ForwardBackwardOutput"].FromString(passed).loss_fn_outputs[0]
        scored = np.frombuffer(record.fields["logprobs"].data, np.float32)
        np.testing.assert_allclose(np.frombuffer(one.logprobs, np.float32), scored[len(PROMPT) - 1 :], atol=1e-4)
    read = sampled(ask, sampler, 1, TOKENS, prompt_logprobs=True, sampling_params={"max_tokens": 1})
    found = np.frombuffer(read.prompt_logprobs, np.float32)
    passed = ask.result(ask.pass_over(model, 11, [TOKENS], forward_only=True)[1]["request_id"])
    record = messages._messages()["ForwardBackwardOutput"].FromString(passed).loss_fn_outputs[0]
    np.testing.assert_allclose(found[1:], np.frombuffer(record.fields["logprobs"].data, np.float32), atol=1e-4)
    assert np.isnan(found[0])


def test_a_model_on_mlx_goes_on_after_a_kill_as_if_nothing_had_been(tmp_path):
    with running(tiny, tmp_path / "whole") as server:
        ask = Asking(server.url)
        expected = steps(ask, ask.model("tiny", seed=2)[1], 1, 5)
    killed = Running(tiny, tmp_path / "killed")
    killed.service.models["tiny"].gate = threading.Event()
    ask = Asking(killed.url)
    _, model = ask.model("tiny", seed=2)
    found = steps(ask, model, 1, 3)
    killed.kill()
    with running(tiny, tmp_path / "killed") as server:
        found += steps(Asking(server.url), model, 7, 2)
    np.testing.assert_allclose(found, expected, rtol=1e-6)


def test_a_process_whose_models_compiled_something_ends_well():
    ending = """
import textpolicy.mlx, mlx.core as mx
from textpolicy.serve.worker import ModelThread
kept = [mx.compile(lambda x, i=i: (x * i).sum() + mx.exp(x).max()) for i in range(40)]
ModelThread().submit(lambda: mx.eval([f(mx.ones(10)) for f in kept])).result()
"""
    done = [subprocess.run([sys.executable, "-c", ending], capture_output=True, text=True) for _ in range(3)]
    assert [(ran.returncode, ran.stderr) for ran in done] == [(0, "")] * 3
