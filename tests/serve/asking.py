"""Requests to a server without the SDK, as a client that misbehaves sends them."""

from __future__ import annotations

import json
from urllib.error import HTTPError
from urllib.request import Request, urlopen

import numpy as np

from textpolicy.serve import messages


class Asking:
    """A client of the server at ``url``."""

    def __init__(self, url, key=None):
        self.url, self.headers = url, {} if key is None else {"X-API-Key": key}

    def __call__(self, path, sent=None, method=None, **headers):
        """Status and body of an answer; JSON is read."""
        data = sent if isinstance(sent, bytes) or sent is None else json.dumps(sent).encode()
        path = path if path.startswith("/") else f"/api/v1/{path}"
        given = {**self.headers, **{name.replace("_", "-"): value for name, value in headers.items()}}
        request = Request(self.url + path, data, given, method=method or ("GET" if data is None else "POST"))
        try:
            with urlopen(request, timeout=60) as reply:
                status, body, kind = reply.status, reply.read(), reply.headers.get_content_type()
        except HTTPError as error:
            status, body, kind = error.code, error.read(), error.headers.get_content_type()
        return status, json.loads(body) if kind == "application/json" else body

    def result(self, request):
        """The result of a request that was answered with a promise."""
        while True:
            status, found = self("retrieve_future", {"request_id": request})
            assert status == 200, (status, found)
            if not (isinstance(found, dict) and found.get("type") == "try_again"):
                return found

    def model(self, base="made/pairs", session=None, **lora):
        """A new session and a model in it."""
        session = session or self("create_session", {"tags": []})[1]["session_id"]
        asked = {"session_id": session, "model_seq_id": 0, "base_model": base, "lora_config": {"rank": 4, **lora}}
        return session, self.result(self("create_model", asked)[1]["request_id"])["model_id"]

    def step(self, model, seq, rate=0.1):
        adam = {"learning_rate": rate}
        return self("optim_step", {"model_id": model, "seq_id": seq, "adam_params": adam})

    def pass_over(self, model, seq, data, loss="cross_entropy", forward_only=False):
        return self("forward_backward", a_pass(model, seq, data, loss, forward_only))


def a_pass(model, seq, data, loss="cross_entropy", forward_only=False):
    """The body of forward_backward over sequences of tokens; a tuple has its targets, or a dict of its arrays."""
    made = messages._messages()["ForwardBackwardRequest"](
        model_id=model, seq_id=seq, loss_fn=loss, forward_only=forward_only
    )
    for one in data:
        tokens, inputs = (
            one
            if isinstance(one, tuple)
            else (
                one[:-1],
                {"target_tokens": one[1:], "weights": np.ones(len(one) - 1)},
            )
        )
        datum = made.data.add()
        datum.model_input.add().encoded_text.tokens = np.asarray(tokens, np.int32).tobytes()
        for name, values in inputs.items():
            array = np.asarray(values)
            whole = array.dtype.kind == "i"
            tensor = datum.loss_fn_inputs[name]
            tensor.dense = array.astype(np.int64 if whole else np.float32).tobytes()
            tensor.dtype = 2 if whole else 1
            tensor.shape.extend(array.shape)
    return made.SerializeToString()


def loss_of(body):
    """The sum of the loss in the answer to forward_backward."""
    return messages._messages()["ForwardBackwardOutput"].FromString(body).metrics["loss:sum"]
