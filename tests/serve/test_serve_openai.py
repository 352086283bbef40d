"""OpenAI's completions and chat completions over the same models, with log-probs and token ids."""

import json

import numpy as np
import pytest
from asking import Asking
from made_model import LETTERS, Letters, log_softmax


@pytest.fixture
def ask(server):
    return Asking(server.url)


def test_completions_have_log_probs_and_token_ids_that_belong_together(ask, made):
    sent = {"model": "made/pairs", "prompt": "abc", "max_tokens": 6, "n": 2, "logprobs": 2, "seed": 4}
    status, answer = ask("/v1/completions", {**sent, "return_token_ids": True, "temperature": 1.0})
    assert status == 200
    table = log_softmax(made.table)
    assert [c["index"] for c in answer["choices"]] == [0, 1]
    for choice in answer["choices"]:
        tokens, before = choice["token_ids"], [3, *choice["token_ids"][:-1]]
        assert choice["prompt_token_ids"] == [1, 2, 3]
        assert choice["text"] == Letters().decode(tokens)
        np.testing.assert_allclose(choice["logprobs"]["token_logprobs"], table[before, tokens], rtol=1e-5)
        best = np.argsort(-table[before[0]])[:2]
        assert [*choice["logprobs"]["top_logprobs"][0].values()] == pytest.approx(table[before[0]][best].tolist())
        assert choice["finish_reason"] == ("stop" if tokens[-1] == 0 else "length")
    assert answer["usage"]["prompt_tokens"] == 3
    assert ask("/v1/completions", {**sent, "stream": True})[1].endswith(b"data: [DONE]\n\n")


def test_several_prompts_as_texts_or_ids_are_answered_in_order(ask):
    by_text = ask("/v1/completions", {"model": "made/pairs", "prompt": ["ab", "c"], "max_tokens": 4, "seed": 1})[1]
    by_ids = ask("/v1/completions", {"model": "made/pairs", "prompt": [[1, 2], [3]], "max_tokens": 4, "seed": 1})[1]
    assert [c["text"] for c in by_text["choices"]] == [c["text"] for c in by_ids["choices"]]
    assert len(by_ids["choices"]) == 2


def test_a_chat_completion_is_what_the_model_says_next(ask, made):
    sent = {"model": "made/pairs", "messages": [{"role": "user", "content": "hi"}], "max_tokens": 5, "seed": 4}
    status, answer = ask(
        "/v1/chat/completions", {**sent, "logprobs": True, "top_logprobs": 1, "return_token_ids": True}
    )
    assert status == 200
    [choice] = answer["choices"]
    assert choice["message"] == {"role": "assistant", "content": Letters().decode(choice["token_ids"])}
    entries = choice["logprobs"]["content"]
    assert [e["token"] for e in entries] == [LETTERS[i].strip("\0") for i in choice["token_ids"]]
    assert len(entries[0]["top_logprobs"]) == 1
    events = ask("/v1/chat/completions", {**sent, "stream": True})[1].decode().split("\n\n")
    said = json.loads(events[0].removeprefix("data: "))
    assert said["choices"][0]["delta"]["content"] == choice["message"]["content"]
    assert events[-2:] == ["data: [DONE]", ""]


def test_the_model_may_be_a_checkpoint_or_a_client_whose_newest_weights_answer(ask, made):
    _, model = ask.model(seed=1)
    path = ask.result(ask("save_weights", {"model_id": model, "seq_id": 1, "path": "a"})[1]["request_id"])["path"]
    greedy = {"prompt": "a", "max_tokens": 1, "temperature": 0, "return_token_ids": True}
    before = ask("/v1/completions", {**greedy, "model": path})[1]["choices"][0]["token_ids"]
    for seq in (2, 4, 6):
        ask.pass_over(model, seq, [[1, 9, 1, 9]])
        ask.result(ask.step(model, seq + 1, rate=1.0)[1]["request_id"])
    assert ask("/v1/completions", {**greedy, "model": model})[1]["choices"][0]["token_ids"] == [9]
    assert ask("/v1/completions", {**greedy, "model": path})[1]["choices"][0]["token_ids"] == before
    names = [entry["id"] for entry in ask("/v1/models")[1]["data"]]
    assert names == ["made/pairs", model, path]


@pytest.mark.parametrize(
    ("route", "changed", "status"),
    [
        ("completions", {"model": "other"}, 404),
        ("completions", {"model": "tinker://nobody:train:0/weights/x"}, 404),
        ("completions", {"prompt": [99]}, 400),
        ("completions", {"prompt": []}, 400),
        ("completions", {"temperature": -1}, 400),
        ("completions", {"n": 0}, 400),
        ("completions", {"max_tokens": "many"}, 400),
        ("chat/completions", {"messages": "hello"}, 400),
        ("chat/completions", {"messages": []}, 400),
        ("chat/completions", {"messages": [{"role": "user", "content": "a"}], "tools": ["x"]}, 400),
    ],
)
def test_what_cannot_be_is_one_sentence(ask, route, changed, status):
    found, answer = ask(f"/v1/{route}", {"model": "made/pairs", "prompt": "a", **changed})
    assert found == status
    assert "\n" not in answer["error"]["message"]
