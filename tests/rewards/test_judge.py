"""A judge's scores: against the model read in one pass, and against what a server's log-probs say."""

import json
import math
import threading
from contextlib import contextmanager
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer

import mlx.core as mx
import numpy as np
import pytest
from toy_run import make_model

from textpolicy.errors import UserError
from textpolicy.mlx import judging
from textpolicy.mlx.models import load_model
from textpolicy.rewards import Scorer, judge
from textpolicy.rewards.contract import Request

RUBRIC = "The response greets."
AROUND = "Question:\nSay hello.\n\nResponse:\n\n\nScore:"  # a response
LITTLE = 1e-6  # of the probability, which is what a model of random weights gives to digits


@pytest.fixture(scope="module")
def toy(tmp_path_factory):
    """The toy model, whose tokens are bytes, and its tokenizer."""
    return load_model(make_model(tmp_path_factory.mktemp("judge") / "model"))


def requests(*texts, prompt="Say hello."):
    return [Request(prompt, text) for text in texts]


def scores(grader, *texts, **given):
    return [scored.reward for scored in Scorer(grader).score(requests(*texts, **given))]


def test_the_score_is_the_mean_digit_by_the_probabilities_after_the_whole_message(toy, monkeypatch):
    model, tokenizer = toy
    seen = []
    grader = judge(RUBRIC, model=toy, least=LITTLE)
    read = judging.Reader.__call__
    monkeypatch.setattr(judging.Reader, "__call__", lambda *args: seen.append(args[1:]) or read(*args))
    [score] = scores(grader, "Hello!")
    [(opening, [rest])] = seen
    assert RUBRIC in opening
    assert "Hello!" in rest
    logits = np.array(model(mx.array([tokenizer.encode(opening + rest)]))[0, -1], np.float64)
    p = np.exp(logits - logits.max())
    digits = np.array([p[tokenizer.encode(d)].sum() for d in "0123456789"])
    assert score == pytest.approx((digits * np.arange(10)).sum() / digits.sum() / 9, abs=1e-6)


def test_a_text_has_one_score_whatever_is_judged_with_it_and_the_rubric_is_read_once(toy, monkeypatch):
    lengths = []
    read = judging.Context.read
    monkeypatch.setattr(judging.Context, "read", lambda c, m, t: lengths.append(t.shape[1]) or read(c, m, t))
    texts = ["Hello!", "Bye.", "Good morning to all of you, and to the others", ""]
    together = scores(judge(RUBRIC, model=toy, least=LITTLE), *texts)
    assert len({*together}) == len(texts)
    assert lengths[0] > 150
    assert [n - len(text) for n, text in zip(lengths[1:], texts, strict=True)] == [len(AROUND)] * len(texts)
    alone = judge(RUBRIC, model=toy, least=LITTLE)
    assert [scores(alone, text)[0] for text in reversed(texts)] == together[::-1]
    assert scores(alone, *texts, *texts) == together * 2
    assert len(lengths) == 2 * (1 + len(texts))  # equal ones are read once


def test_pairs_are_judged_in_both_orders_and_a_completion_by_what_it_wins(toy):
    grader = judge(RUBRIC, model=toy, pairs=True, least=LITTLE)
    texts = ["Hello!", "Bye.", "Hi"]
    wins = {(a, b): grader.compare("Say hello.", a, b) for a in texts for b in texts if a != b}
    for a, b in wins:
        assert wins[a, b] + wins[b, a] == pytest.approx(1, abs=1e-12)
    assert len({*wins.values()}) == 6
    won = {a: np.mean([wins[a, b] for b in texts if b != a]) for a in texts}
    assert scores(grader, *texts) == pytest.approx([won[a] for a in texts])
    assert scores(grader, *reversed(texts)) == pytest.approx([won[a] for a in reversed(texts)])
    assert math.isnan(scores(grader, "Hello!")[0])
    with pytest.raises(UserError, match="make it with pairs=True"):
        judge(RUBRIC, model=toy).compare("", "a", "b")


def test_a_judge_that_would_not_answer_with_a_digit_leaves_a_completion_unscorable(toy):
    assert math.isnan(scores(judge(RUBRIC, model=toy), "Hello!")[0])


@contextmanager
def server(logprobs, models=("grader",)):
    """The address of a server whose first tokens have the log-probs that ``logprobs`` gives a message, and messages."""
    asked = []

    class Handler(BaseHTTPRequestHandler):
        def log_message(self, *args):
            pass

        def answer(self, body, status=200):
            data = json.dumps(body).encode()
            self.send_response(status)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def do_GET(self):
            self.answer({"data": [{"id": name} for name in models]})

        def do_POST(self):
            body = json.loads(self.rfile.read(int(self.headers["Content-Length"])))
            assert (body["model"], body["temperature"], body["max_tokens"]) == ("grader", 0, 1)
            message = body["messages"][0]["content"]
            asked.append(message)
            top = [{"token": t, "logprob": l} for t, l in logprobs(message).items()]
            self.answer({"choices": [{"logprobs": {"content": [{"top_logprobs": top}]} if top else None}]})

    with ThreadingHTTPServer(("127.0.0.1", 0), Handler) as http:
        thread = threading.Thread(target=http.serve_forever, daemon=True)
        thread.start()
        yield f"http://127.0.0.1:{http.server_address[1]}/v1", asked
        http.shutdown()
        thread.join()


def by_length(message):
    """Longer responses are better, by one digit a letter; one is not judged at all."""
    said = message.split("Response:\n")[1].split("\n")[0]
    if said == "odd":
        return {"Well": math.log(0.9), "1": math.log(0.1)}
    n = len(said)
    return {str(n): math.log(0.5), f" {n}": math.log(0.1), str(n + 1): math.log(0.2), "Well": math.log(0.2)}


def test_a_servers_log_probs_make_the_score_and_a_file_keeps_it(tmp_path):
    kept = tmp_path / "judged.jsonl"
    with server(by_length) as (url, asked):
        grader = judge(RUBRIC, base_url=url, cache=kept)
        expected = [(3 * 0.6 + 4 * 0.2) / 0.8 / 9, (5 * 0.6 + 6 * 0.2) / 0.8 / 9]
        assert scores(grader, "abc", "abcde", "abc") == pytest.approx(expected + expected[:1])
        assert math.isnan(scores(grader, "odd")[0])
        assert len(asked) == 3
        kept.write_text(kept.read_text() + '{"digest": "cut sho')
        again = judge(RUBRIC, base_url=url, cache=kept)
        assert scores(again, "abcde", "abc", "x", "odd")[:2] == scores(grader, "abcde", "abc")
        assert len(asked) == 4
        assert scores(judge(RUBRIC, base_url=url, cache=kept), "x") == scores(again, "x")
        assert len(asked) == 4
        assert scores(judge("Another.", base_url=url, cache=kept), "x") == scores(again, "x")
        assert len(asked) == 5


def test_the_agreement_with_labels_is_that_of_orders_and_ranks(tmp_path):
    rows = [("ab", 1), ("abcd", 3), ("abc", 5), ("abcdef", 4), ("odd", 2)]
    path = tmp_path / "labelled.jsonl"
    path.write_text("".join(json.dumps({"prompt": "?", "completion": c, "label": n}) + "\n" for c, n in rows))
    with server(by_length) as (url, _):
        found = judge(RUBRIC, base_url=url).agreement(path)
    assert (found.rows, found.unscorable) == (5, 1)
    assert found.concordance == pytest.approx(4 / 6)  # abc is ranked below abcd and abcdef, and should not be
    assert found.correlation == pytest.approx(0.4)  # 1 - 6 (0 + 1 + 4 + 1) / (4 * 15)
    assert str(found).startswith("5 labelled rows, 1 unscorable; 66.7% of pairs")
    path.write_text('{"prompt": "?"}\n')
    with pytest.raises(UserError, match="cannot be read as labelled rows"):
        judge(RUBRIC, base_url=url).agreement(path)


def test_the_reference_is_a_column_that_the_judge_sees():
    with server(by_length) as (url, asked):
        grader = judge(RUBRIC, base_url=url, reference="answer")
        grader(["?"], ["ab"], [{"answer": "forty-two"}])
        assert "Reference:\nforty-two\n" in asked[0]
        with pytest.raises(UserError, match="is to see answer and an example has none"):
            grader(["?"], ["ab"], [{}])


def test_what_cannot_judge_is_one_sentence(toy, tmp_path):
    for given, why in [
        ({}, "a judge needs a model"),
        ({"model": "x", "least": 0.0}, "least is 0.0; set it above 0"),
        ({"model": toy, "cache": tmp_path / "c"}, "give its name, or leave cache out"),
    ]:
        with pytest.raises(UserError, match=why):
            judge(RUBRIC, **given)
    for url, why in [("file:///etc/x", "give an address such as"), ("http://127.0.0.1:9/v1", "did not answer")]:
        with pytest.raises(UserError, match=why):
            judge(RUBRIC, base_url=url, model="grader")(["?"], ["ab"], [{}])
    with server(lambda message: {}, models=("a", "b")) as (url, _):
        with pytest.raises(UserError, match="has the models a, b; choose the judge with model="):
            judge(RUBRIC, base_url=url)(["?"], ["ab"], [{}])
        with pytest.raises(UserError, match="returned no log-probs"):
            judge(RUBRIC, base_url=url, model="grader")(["?"], ["ab"], [{}])
