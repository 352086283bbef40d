"""The engine behind a local port: its HTTP answers, and sessions that keep their tokens."""

import http.client
import json
import threading
import urllib.error
import urllib.parse
import urllib.request

import numpy as np
import pytest
from chat_tokenizers import CALLS, TOOL_SPECIAL, chat_tokenizer

from textpolicy.environment.libraries.served import ModelServer, Session
from textpolicy.environment.text.calls import grammar_of
from textpolicy.environment.text.conversation import ChatCodec
from textpolicy.environment.tools import parse_calls
from textpolicy.errors import UserError
from textpolicy.types import Completion, Episode

USER = {"role": "user", "content": "the user"}
TOOL = {"type": "function", "function": {"name": "add", "description": "Add.", "parameters": {"type": "object"}}}


def completion(tokenizer, text):
    tokens = [*tokenizer.encode(text, add_special_tokens=False), tokenizer.eos_token_id]
    return Completion(np.array(tokens, np.int32), np.zeros(len(tokens), np.float32))


@pytest.fixture
def tokenizer():
    return chat_tokenizer("chatml")


@pytest.fixture
def session(tokenizer):
    return Session(ChatCodec.of(tokenizer), parse_calls)


def test_a_session_only_grows(tokenizer, session):
    first = session.take([USER], [])
    answer = session.add(completion(tokenizer, "hello"), 0)
    assert answer == {"role": "assistant", "content": "hello"}
    second = session.take([USER, answer, {"role": "user", "content": [{"type": "text", "text": "ans"}]}], [])
    assert second[: len(first)] == first
    assert tokenizer.decode(second[len(first) :]) == (
        "hello<|im_end|>\n<|im_start|>user\nans<|im_end|>\n<|im_start|>assistant\n"
    )


def test_half_a_character_is_read_as_a_question_mark_and_is_the_same_when_it_is_sent_again(tokenizer, session):
    session.take([USER], [])
    answer = session.add(completion(tokenizer, "hello"), 0)
    half = {"role": "user", "content": "a\ud800b"}
    assert "a?b" in tokenizer.decode(session.take([USER, answer, half], []))
    again = session.add(completion(tokenizer, "hello"), 1)
    session.take([USER, answer, half, again, USER], [])


@pytest.mark.parametrize(
    "messages",
    [
        [{"role": "user", "content": "other"}, {"role": "assistant", "content": "hello"}, USER],
        [USER, {"role": "assistant", "content": "hell"}, USER],
        [USER, {"role": "assistant", "content": "hello"}],
        [USER],
    ],
)
def test_a_request_that_rewrites_the_conversation_is_refused(tokenizer, session, messages):
    session.take([USER], [])
    session.add(completion(tokenizer, "hello"), 0)
    with pytest.raises(UserError, match="rewrites the conversation"):
        session.take(messages, [])


def test_calls_go_out_as_the_wire_has_them_and_come_back_as_they_are_sent(tokenizer, session):
    session.take([USER], [TOOL])
    text = 'I add. <tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    answer = session.add(completion(tokenizer, text), 3)
    assert answer["content"] == "I add."
    [call] = answer["tool_calls"]
    assert (call["id"], call["function"]["name"]) == ("call00003000", "add")
    assert json.loads(call["function"]["arguments"]) == {"a": 1}
    spaced = {**call, "function": {"name": "add", "arguments": '{ "a" : 1 }'}}
    echoed = {"role": "assistant", "content": "I add.", "tool_calls": [spaced]}
    result = {"role": "tool", "tool_call_id": "call00003000", "content": "2"}
    tokens = session.take([USER, echoed, result], [TOOL])
    assert tokenizer.decode(tokens).count(text) == 1  # as it was sampled
    assert tokenizer.decode(tokens).endswith("<tool_response>\n2\n</tool_response><|im_end|>\n<|im_start|>assistant\n")


def test_text_that_is_no_tool_call_is_returned_as_text(tokenizer, session):
    session.take([USER], [TOOL])
    assert (
        session.add(completion(tokenizer, "<tool_call>add</tool_call>"), 0)["content"] == "<tool_call>add</tool_call>"
    )


@pytest.mark.parametrize("family", TOOL_SPECIAL)
def test_calls_of_every_grammar_are_sent_as_the_wire_has_them(family):
    tokenizer = chat_tokenizer(family, tools=True)
    codec = ChatCodec.of(tokenizer)
    session = Session(codec, grammar=lambda: grammar_of(codec, tokenizer))
    assert "add" in tokenizer.decode(session.take([USER], [TOOL]))
    text = f"I add.\n\n{CALLS[family]}" if family not in ("llama3", "gpt_oss") else CALLS[family]
    answer = session.add(completion(tokenizer, text), 0)
    [call] = answer["tool_calls"]
    assert (call["function"]["name"], json.loads(call["function"]["arguments"])) == ("add", {"a": 40, "b": 2})
    assert ("I add." in answer["content"]) is (family not in ("llama3", "gpt_oss"))
    assert "add(" not in answer["content"]
    assert "40" not in answer["content"]
    result = {"role": "tool", "tool_call_id": call["id"], "content": "the sum"}
    tokens = session.take([USER, answer, result], [TOOL])
    assert "the sum" in tokenizer.decode(tokens).split(text)[1]
    assert session.add(completion(tokenizer, "42"), 1) == {"role": "assistant", "content": "42"}


def test_nothing_is_a_call_where_no_tools_are_offered(tokenizer):
    session = Session(ChatCodec.of(tokenizer))
    session.take([USER], [])
    text = '<tool_call>{"name": "add", "arguments": {"a": 1}}</tool_call>'
    assert session.add(completion(tokenizer, text), 0) == {"role": "assistant", "content": text}


@pytest.mark.parametrize("family", TOOL_SPECIAL)
@pytest.mark.parametrize(("as_text", "calls"), [(True, list), (False, tuple), (False, np.array)])
def test_calls_of_earlier_turns_are_shown_in_the_opening_of_a_harness(family, as_text, calls):
    tokenizer = chat_tokenizer(family, tools=True)
    session = Session(ChatCodec.of(tokenizer))
    arguments = json.dumps({"a": 4711}) if as_text else {"a": 4711}
    call = {"id": "call12345", "type": "function", "function": {"name": "add", "arguments": arguments}}
    asked = {"role": "assistant", "content": None, "tool_calls": calls([call])}
    result = {"role": "tool", "tool_call_id": "call12345", "content": "4712"}
    said = {"role": "assistant", "content": "It is done."}
    written = tokenizer.decode(session.take([USER, asked, result, said, USER], []))
    assert written.index("add") < written.index("4711") < written.index("4712")


def test_a_call_and_a_refusal_of_the_old_format_are_shown_and_a_user_who_says_nothing_is_refused():
    tokenizer = chat_tokenizer("qwen3", tools=True)
    called = {"role": "assistant", "content": None, "function_call": {"name": "add", "arguments": '{"a": 4711}'}}
    refused = {"role": "assistant", "content": None, "refusal": "I will not."}
    written = tokenizer.decode(Session(ChatCodec.of(tokenizer)).take([USER, called, USER, refused, USER], []))
    assert written.index("add") < written.index("4711") < written.index("I will not.")
    with pytest.raises(UserError, match="lacks one of"):
        Session(ChatCodec.of(tokenizer)).take([{"role": "user", "content": None}], [])


def test_a_request_that_was_not_answered_leaves_no_tokens(tokenizer, session):
    session.take([USER], [])
    answer = session.add(completion(tokenizer, "hello"), 0)
    session.take([USER, answer, USER], [])
    session.drop_request()
    assert Episode.from_turns(session.prompt, session.turns, session.added, reward=0.0, group=0).mask[-1]


# ---- the wire


def post(url, body):
    request = urllib.request.Request(url, json.dumps(body).encode(), {"X-Session-ID": "s", "Content-Type": "json"})
    with urllib.request.urlopen(request, timeout=10) as response:
        return response.headers["Content-Type"], response.read().decode()


@pytest.fixture
def serving():
    """A server, a function that posts to it in a thread, and the list of its answers."""
    answers = []
    with ModelServer() as server:

        def ask(body, path="/chat/completions"):
            def wait():
                try:
                    answers.append(post(server.url + path, body))
                except urllib.error.HTTPError as error:
                    answers.append((error.code, error.read().decode()))
                    error.close()

            thread = threading.Thread(target=wait)
            thread.start()
            return thread

        yield server, ask, answers


def test_a_request_waits_for_its_answer(serving):
    server, ask, answers = serving
    thread = ask({"messages": [USER], "tools": [TOOL]})
    [request] = server.waiting([], 5)
    assert (request.session, request.messages, request.tools, answers) == ("s", [USER], [TOOL], [])
    request.reply({"role": "assistant", "content": "hi"}, "stop", (3, 2))
    thread.join()
    kind, body = answers[0]
    assert kind == "application/json"
    [choice] = json.loads(body)["choices"]
    assert (choice["message"]["content"], choice["finish_reason"]) == ("hi", "stop")
    assert json.loads(body)["usage"] == {"prompt_tokens": 3, "completion_tokens": 2, "total_tokens": 5}


def test_a_stream_has_the_same_answer_in_events(serving):
    server, ask, answers = serving
    thread = ask({"messages": [USER], "stream": True})
    [request] = server.waiting([], 5)
    calls = [{"id": "c", "type": "function", "function": {"name": "add", "arguments": "{}"}}]
    request.reply({"role": "assistant", "content": "", "tool_calls": calls}, "tool_calls", (3, 2))
    thread.join()
    kind, body = answers[0]
    assert kind == "text/event-stream"
    events = [line.removeprefix("data: ") for line in body.split("\n\n") if line]
    assert events[-1] == "[DONE]"
    message, ended, usage = map(json.loads, events[:-1])
    assert message["choices"][0]["delta"]["tool_calls"] == [{"index": 0, **calls[0]}]
    assert ended["choices"][0]["finish_reason"] == "tool_calls"
    assert usage["usage"]["total_tokens"] == 5


def test_strangers_and_refusals_get_an_error(serving):
    server, ask, answers = serving
    ask({"messages": []}, "/other").join()
    assert answers.pop()[0] == 404
    thread = ask({"messages": [USER]})
    [request] = server.waiting([], 5)
    request.refuse("too long")
    thread.join()
    assert (answers[0][0], json.loads(answers[0][1])["error"]["message"]) == (400, "too long")
    without_secret = server.url.split("/")[2]
    with pytest.raises(urllib.error.HTTPError, match="404") as caught:
        post(f"http://{without_secret}/v1/chat/completions", {"messages": [USER]})
    caught.value.close()


@pytest.mark.parametrize(
    ("body", "what"),
    [
        (b"", "is no JSON"),
        (b"{'messages': []}", "is no JSON"),
        (b'{"messages": [', "is no JSON"),
        (b"\xff\xfe", "is no JSON"),
        (b"[" * 100_000, "is no JSON"),
        (b"7", "has no list of messages"),
        (b"[]", "has no list of messages"),
        (b"{}", "has no list of messages"),
        (b'{"messages": "hi"}', "has no list of messages"),
        (b'{"messages": []}', "has no list of messages"),
        (b'{"messages": ["hi"]}', "has no list of messages"),
        (b'{"messages": {"role": "user", "content": "hi"}}', "has no list of messages"),
        (b'{"messages": [{}], "tools": "add"}', "no list of functions with names"),
        (b'{"messages": [{}], "tools": [{"name": "add"}]}', "no list of functions with names"),
        (b'{"messages": [{}], "tools": [{"function": {"name": null}}]}', "no list of functions with names"),
        (b'{"messages": [{}], "tools": {"function": {"name": "add"}}}', "no list of functions with names"),
    ],
)
def test_a_body_that_is_no_request_gets_an_answer_that_says_what_to_send(body, what):
    with ModelServer() as server:
        request = urllib.request.Request(server.url + "/chat/completions", body)
        with pytest.raises(urllib.error.HTTPError, match="400") as caught:
            urllib.request.urlopen(request, timeout=10)
        answer = json.loads(caught.value.read())
        caught.value.close()
        assert what in answer["error"]["message"]
        assert "; send " in answer["error"]["message"]
        assert server.waiting([], 0.01) == []


@pytest.mark.parametrize("length", [None, "many", "-1", "0"])
def test_a_request_whose_length_is_unknown_gets_an_answer(length):
    with ModelServer() as server:
        place = urllib.parse.urlsplit(server.url)
        connection = http.client.HTTPConnection(place.netloc, timeout=10)
        connection.putrequest("POST", f"{place.path}/chat/completions")
        if length is not None:
            connection.putheader("Content-Length", length)
        connection.endheaders()
        assert connection.getresponse().status == 400
        connection.close()


def test_closing_a_server_answers_every_waiting_request():
    with ModelServer() as server:
        answers = []

        def wait():
            with pytest.raises(urllib.error.HTTPError) as caught:
                post(server.url + "/chat/completions", {"messages": [USER]})
            answers.append(caught.value.code)
            caught.value.close()

        thread = threading.Thread(target=wait)
        thread.start()
        while server._requests.empty():
            pass
    thread.join(5)
    assert answers == [400]


def test_requests_are_taken_together():
    with ModelServer() as server:
        threads = [
            threading.Thread(target=post, args=(server.url + "/chat/completions", {"messages": [USER]}))
            for _ in range(4)
        ]
        for thread in threads:
            thread.start()
        waiting = []
        while len(waiting) < 4:
            waiting = server.waiting(waiting, 0.05)
        for request in waiting:
            request.reply({"role": "assistant", "content": ""}, "stop", (1, 1))
        for thread in threads:
            thread.join(5)
    assert server.waiting([], 0.01) == []
