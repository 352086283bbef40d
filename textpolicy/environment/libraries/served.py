"""Serve our engine on a local port as OpenAI chat completions, for environments that drive the conversation.

Requests wait until the owner of the engine answers them, many at a time. Every session keeps its tokens: a request that
continues the conversation only adds the new messages, so no turn is ever encoded again.
"""

from __future__ import annotations

import json
import queue
import secrets
import threading
import time
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from ...errors import UserError
from ...types import Completion
from ..multi_turn import Describe, with_tools
from ..text.calls import HERMES, CallReader, Grammar, ParseCalls
from ..text.conversation import ChatCodec, Message, Schema, each_text, joined, whole
from ..text.template import TemplateRefusalError, plain
from ..tools import describe_tools

SESSION_HEADER = "X-Session-ID"


@dataclass(eq=False, slots=True)
class Session:
    """The record of one conversation, token for token."""

    codec: ChatCodec
    parse: ParseCalls | None = None  # None: in the ``grammar``, once a request offers tools
    grammar: Callable[[], Grammar] = lambda: HERMES
    messages: list[Message] = field(default_factory=list)  # so far, of both sides, normalised
    tools: Sequence[Schema] = ()
    prompt: list[int] = field(default_factory=list)
    turns: list[Completion] = field(default_factory=list)
    added: list[list[int]] = field(default_factory=list)  # between the turns

    def take(self, messages: Sequence[Message], tools: Sequence[Schema]) -> list[int]:
        """Return the tokens to continue for a request. Raises UserError unless it continues the conversation."""
        sent: list[Message] = [_normal(m) for m in messages]
        read = _named([_read(m) for m in messages])
        schemas = tools if tools and self.codec.shows_tools(tools) else ()
        if not self.turns:
            describe: Describe = describe_tools
            if tools and self.parse is None:
                grammar = self.grammar()
                self.parse, describe = CallReader.of(grammar, tools), partial(describe_tools, form=grammar.form)
            try:
                asked = with_tools(read, tools, self.codec, describe)
                self.prompt = list(self.codec.encode(asked, None, schemas))
            except TemplateRefusalError:  # perhaps of what is said in another way
                said = [_shown(m, self.codec, calls=True) for m in read]
                self.prompt = list(self.codec.encode(with_tools(said, tools, self.codec, describe), None, schemas))
            self.tools = list(tools)
        else:
            known = len(self.messages)
            if sent[:known] != self.messages or len(sent) == known or list(tools) != self.tools:
                raise UserError(
                    "a request rewrites the conversation before it, whose tokens were sampled already; "
                    "use a harness that only adds messages, and no compaction"
                )
            shown = [_shown(m, self.codec) for m in read]
            last = self.turns[-1].tokens
            end = int(last[-1]) if len(last) else None
            self.added.append(self.codec.continuation(shown[: known - 1], shown[known:], end, schemas))
        self.messages = sent
        return [*self.prompt, *joined([turn.tokens.tolist() for turn in self.turns], self.added)]

    def add(self, completion: Completion, number: int) -> Mapping[str, Any]:
        """Add a turn and return its message for the client; ``number`` makes the ids of its tool calls."""
        self.turns.append(completion)
        tokens = completion.tokens.tolist()
        content, heard = self.codec.text(tokens), self.codec.text(tokens, special=True)
        thought = self.codec.thinking(self.added[-1] if self.added else self.prompt).get("thinking", "")
        read = [] if completion.truncated or self.parse is None else self.parse(thought + heard)
        calls = [c for c in read if not c.mistake]
        if calls and calls[0].span:
            content = self.codec.text(list(self.codec.encode_more(heard[: calls[0].span[0] - len(thought)])))
        message: dict[str, Any] = {"role": "assistant", "content": content}
        if calls:
            message["tool_calls"] = [
                {
                    "id": f"call{number:05d}{n:03d}",  # templates of Mistral refuse shorter ones
                    "type": "function",
                    "function": {
                        "name": call.name,
                        "arguments": json.dumps(dict(call.arguments), ensure_ascii=False),
                    },
                }
                for n, call in enumerate(calls)
            ]
        self.messages.append(_normal(message))
        return message

    def drop_request(self) -> None:
        """Forget the tokens of the last request, which will not be answered."""
        if self.added and len(self.added) == len(self.turns):
            self.added.pop()


@dataclass(eq=False, slots=True)
class Request:
    """The request of a client for a turn, waiting for its answer."""

    session: str
    messages: Sequence[Message]
    tools: Sequence[Schema]
    stream: bool = False  # whether the answer is to come as events
    answer: queue.SimpleQueue[tuple[int, Any]] = field(default_factory=queue.SimpleQueue)  # HTTP status and body

    @classmethod
    def of(cls, session: str, sent: bytes) -> Self:
        """Return the request in the body ``sent``. Raises UserError for a body that is none."""
        try:
            body = json.loads(sent)
        except (ValueError, RecursionError) as error:
            raise UserError(f"the body of a request is no JSON ({error}); send an object with 'messages'") from error
        messages, tools = (body.get("messages"), body.get("tools") or []) if isinstance(body, dict) else (None, [])
        if not (isinstance(messages, list) and messages and all(isinstance(m, dict) for m in messages)):
            raise UserError(
                "a request has no list of messages; send {'messages': [{'role': ..., 'content': ...}, ...]}"
            )
        if not isinstance(tools, list) or not all(_is_tool(tool) for tool in tools):
            raise UserError("the tools of a request are no list of functions with names; send OpenAI's format of tools")
        return cls(session, messages, tools, bool(body.get("stream")))

    def reply(self, message: Mapping[str, Any], finish: str, tokens: tuple[int, int]) -> None:
        """Answer with ``message`` as a chat completion; ``tokens`` are the counts of prompt and completion."""
        prompt, completion = tokens
        body = {
            "id": f"chatcmpl-{secrets.token_hex(8)}",
            "object": "chat.completion",
            "created": int(time.time()),
            "model": "textpolicy",
            "choices": [{"index": 0, "message": message, "finish_reason": finish}],
            "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
        }
        self.answer.put((200, body))

    def refuse(self, why: str) -> None:
        """Answer with the error ``why``."""
        self.answer.put((400, refusal(why)))


def refusal(why: str) -> dict[str, Any]:
    """Return the body of an answer that refuses a request."""
    return {"error": {"message": why, "type": "invalid_request_error", "code": "textpolicy"}}


class ModelServer:
    """The server of OpenAI chat completions on 127.0.0.1; a secret in its ``url`` keeps strangers out."""

    def __init__(self) -> None:
        self._requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
        root = f"/{secrets.token_urlsafe(16)}/v1"
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self._requests, root))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}{root}"

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.shutdown()
        self._http.server_close()
        while not self._requests.empty():
            self._requests.get().refuse("the model is gone")

    def waiting(self, already: Sequence[Request], seconds: float) -> list[Request]:
        """Return ``already`` and the requests since, once one arrives or ``seconds`` have passed."""
        found, deadline = list(already), time.monotonic() + seconds
        while (left := deadline - time.monotonic()) > 0:
            try:
                found.append(self._requests.get(timeout=left))
            except queue.Empty:
                return found
            if self._requests.empty():
                return found
        return found


def _handler(requests: queue.SimpleQueue[Request], root: str) -> type[BaseHTTPRequestHandler]:
    """Return the class that puts HTTP requests below the path ``root`` into the queue ``requests``."""

    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            length, status, stream = self.headers.get("content-length", ""), 400, False
            sent = self.rfile.read(int(length) if length.isdecimal() else 0)
            if self.path != f"{root}/chat/completions":  # a stranger, whose body is not read
                status, answer = 404, {"error": {"message": f"there is no {self.command} {self.path[-40:]}"}}
            else:
                try:
                    request = Request.of(self.headers.get(SESSION_HEADER, ""), sent)
                except UserError as error:
                    answer, self.close_connection = refusal(str(error)), True
                else:
                    requests.put(request)
                    status, answer = request.answer.get()
                    stream = status == 200 and request.stream
            if stream:
                events = [*map(json.dumps, chunks(answer)), "[DONE]"]
                kind, data = "text/event-stream", "".join(f"data: {event}\n\n" for event in events).encode()
            else:
                kind, data = "application/json", json.dumps(answer).encode()
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Log nothing: requests are not news."""

    return Handler


# ---- the format of messages


def _is_tool(tool: Any) -> bool:
    """Return whether a tool of a request is a function with a name."""
    match tool:
        case {"function": {"name": str(name)}}:
            return bool(name)
    return False


def chunks(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return a chat completion as the chunks of a stream, with the whole message in the first."""
    [choice] = answer["choices"]
    delta = dict(choice["message"])
    if "tool_calls" in delta:
        delta["tool_calls"] = [{"index": n, **call} for n, call in enumerate(delta["tool_calls"])]
    common = {k: answer[k] for k in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    message = {**common, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    end = {**common, "choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]}
    return [message, end, {**common, "choices": [], "usage": answer["usage"]}]


def _read(message: Message) -> dict[str, Any]:
    """Return a message in whatever format it was sent as one for chat templates. Raises UserError for another."""
    if message.get("content") is None and message.get("role") == "assistant":
        message = {**message, "content": message.get("refusal") or ""}
    return each_text(plain(message), whole)


def _named(messages: Sequence[Message]) -> list[Message]:
    """Return the messages with the name of the tool in each of its results, which only the call says."""
    names = {c.get("id"): c["function"]["name"] for m in messages for c in m.get("tool_calls", ())}
    return [{"name": names.get(m.get("tool_call_id"), "tool"), **m} if m["role"] == "tool" else m for m in messages]


def _normal(message: Message) -> dict[str, Any]:
    """Return role, text and calls, by which two messages are compared. Raises UserError."""
    read = _read(message)
    calls = [(c["function"]["name"], c["function"]["arguments"]) for c in read.get("tool_calls", ())]
    return {"role": read["role"], "content": read["content"], **({"calls": calls} if calls else {})}


def _shown(message: Message, codec: ChatCodec, calls: bool = False) -> Message:
    """Return a message that the chat template can write: a tool's becomes a user's where it has no such role.

    Its ``calls`` become part of its text, or are left out.
    """
    known, texts = message["role"] != "tool" or codec.takes_role("tool"), [message["content"]]
    if calls:
        called = [c["function"] for c in message.get("tool_calls", ())]
        named = [{"name": c["name"], "arguments": c["arguments"]} for c in called]
        texts += [f"<tool_call>{json.dumps(c, ensure_ascii=False)}</tool_call>" for c in named]
    left = {key: value for key, value in message.items() if key not in ("calls", "tool_calls")}
    return {**left, "role": message["role"] if known else "user", "content": "\n".join(filter(None, texts))}
