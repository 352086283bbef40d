"""Our engine as a chat model behind a local port, for environments that drive the conversation themselves.

Requests wait until whoever owns the engine answers them, many at a time. Every session keeps its tokens: a request that
goes on from what was said before only adds the new messages, so no turn is ever encoded again.
"""

from __future__ import annotations

import json
import queue
import secrets
import threading
import time
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from http.server import BaseHTTPRequestHandler, ThreadingHTTPServer
from types import TracebackType
from typing import Any, Self

from ...errors import UserError
from ...types import Completion, Episode
from ..multi_turn import with_tools
from ..text.chat import ChatCodec, Message, Schema, whole
from ..text.conversation import joined
from ..tools import ParseCalls, ToolCall

SESSION_HEADER = "X-Session-ID"


@dataclass(eq=False, slots=True)
class Session:
    """One conversation, token for token."""

    codec: ChatCodec
    parse: ParseCalls
    heard: list[Message] = field(default_factory=list)  # as the other side sent it, and ours as we sent it
    tools: Sequence[Schema] = ()
    prompt: list[int] = field(default_factory=list)
    turns: list[Completion] = field(default_factory=list)
    added: list[list[int]] = field(default_factory=list)  # between the turns

    def take(self, messages: Sequence[Message], tools: Sequence[Schema]) -> list[int]:
        """The tokens to continue for ``messages``. Raises UserError if they do not go on from what was said before."""
        sent: list[Message] = [_normal(m) for m in messages]
        if not self.turns:
            self.prompt, self.tools = list(self._opening(sent, tools)), list(tools)
        else:
            new = sent[len(self.heard) :]
            if sent[: len(self.heard)] != self.heard or not new or list(tools) != self.tools:
                raise UserError(
                    "a request rewrites the conversation before it, whose tokens were sampled already; "
                    "use a harness that only adds messages, and no compaction"
                )
            self.added.append(self._between(new))
        self.heard = sent
        return self.tokens

    @property
    def tokens(self) -> list[int]:
        """All so far."""
        return [*self.prompt, *joined([turn.tokens.tolist() for turn in self.turns], self.added)]

    def say(self, completion: Completion, number: int) -> Mapping[str, Any]:
        """Add a turn; the message for the other side, with its calls taken apart."""
        self.turns.append(completion)
        text = self.codec.text(completion.tokens.tolist())
        calls = [] if completion.truncated else [c for c in self.parse(text) if not c.mistake]
        message: dict[str, Any] = {"role": "assistant", "content": _before_calls(text) if calls else text}
        if calls:
            message["tool_calls"] = [_wire(call, f"call_{number}_{n}") for n, call in enumerate(calls)]
        self.heard.append(_normal(message))
        return message

    def unsay(self) -> None:
        """Forget the request that was taken last, which will not be answered."""
        if self.added and len(self.added) == len(self.turns):
            self.added.pop()

    def episode(self, **scored: Any) -> Episode:
        """The conversation as one row."""
        return Episode.from_turns(self.prompt, self.turns, self.added, **scored)

    def _opening(self, messages: Sequence[Message], tools: Sequence[Schema]) -> Sequence[int]:
        prompt = with_tools([_shown(m, self.codec) for m in messages], tools, self.codec)
        return self.codec.encode(prompt, None, tools)

    def _between(self, new: Sequence[Message]) -> list[int]:
        before = [_shown(m, self.codec) for m in self.heard[:-1]]
        last = self.turns[-1].tokens
        end = int(last[-1]) if len(last) else None
        return self.codec.continuation(before, [_shown(m, self.codec) for m in new], end, self.tools)


@dataclass(eq=False, slots=True)
class Request:
    """A turn that somebody waits for."""

    session: str
    messages: Sequence[Message]
    tools: Sequence[Schema]
    answer: queue.SimpleQueue[tuple[int, Any]] = field(default_factory=queue.SimpleQueue)  # HTTP status and body

    def reply(self, message: Mapping[str, Any], finish: str, tokens: tuple[int, int]) -> None:
        """Answer with a ``message``; ``tokens`` are those of prompt and completion."""
        self.answer.put((200, _chat_completion(message, finish, tokens)))

    def refuse(self, why: str) -> None:
        """Answer that this cannot be done."""
        self.answer.put((400, {"error": {"message": why, "type": "invalid_request_error", "code": "textpolicy"}}))


class ModelServer:
    """Takes OpenAI chat completions on 127.0.0.1 and lets them wait. ``url`` has a secret, so strangers cannot ask."""

    def __init__(self) -> None:
        self._requests: queue.SimpleQueue[Request] = queue.SimpleQueue()
        self._secret = secrets.token_urlsafe(16)
        self._http = ThreadingHTTPServer(("127.0.0.1", 0), _handler(self._requests, f"/{self._secret}/v1"))
        self._http.daemon_threads = True
        self.url = f"http://127.0.0.1:{self._http.server_port}/{self._secret}/v1"

    def __enter__(self) -> Self:
        threading.Thread(target=self._http.serve_forever, daemon=True).start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self._http.shutdown()
        self._http.server_close()
        while not self._requests.empty():
            self._requests.get().refuse("the model is gone")

    def waiting(self, already: Sequence[Request], seconds: float) -> list[Request]:
        """``already`` and what has come since, once something comes or ``seconds`` have passed."""
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
    class Handler(BaseHTTPRequestHandler):
        protocol_version = "HTTP/1.1"

        def do_POST(self) -> None:
            sent = self.rfile.read(int(self.headers.get("content-length", 0)))
            if self.path != f"{root}/chat/completions":  # a stranger, whose body is not looked at
                self._send(404, {"error": {"message": f"there is no {self.command} {self.path[-40:]}"}})
                return
            body = json.loads(sent)
            request = Request(self.headers.get(SESSION_HEADER, ""), body["messages"], body.get("tools") or ())
            requests.put(request)
            status, answer = request.answer.get()
            if status == 200 and body.get("stream"):
                self._stream(answer)
            else:
                self._send(status, answer)

        def _send(self, status: int, answer: Any) -> None:
            self._write(status, "application/json", json.dumps(answer).encode())

        def _stream(self, answer: Any) -> None:
            """The whole answer as one event: it is all there."""
            events = [json.dumps(chunk) for chunk in _chunks(answer)]
            self._write(200, "text/event-stream", "".join(f"data: {e}\n\n" for e in [*events, "[DONE]"]).encode())

        def _write(self, status: int, kind: str, data: bytes) -> None:
            self.send_response(status)
            self.send_header("Content-Type", kind)
            self.send_header("Content-Length", str(len(data)))
            self.end_headers()
            self.wfile.write(data)

        def log_message(self, format: str, *arguments: Any) -> None:
            """Nothing: requests are no news."""

    return Handler


# ---- the wire


def _chat_completion(message: Mapping[str, Any], finish: str, tokens: tuple[int, int]) -> dict[str, Any]:
    prompt, completion = tokens
    return {
        "id": f"chatcmpl-{secrets.token_hex(8)}",
        "object": "chat.completion",
        "created": int(time.time()),
        "model": "textpolicy",
        "choices": [{"index": 0, "message": message, "finish_reason": finish}],
        "usage": {"prompt_tokens": prompt, "completion_tokens": completion, "total_tokens": prompt + completion},
    }


def _chunks(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """A chat completion as the chunks of a stream."""
    [choice] = answer["choices"]
    delta = dict(choice["message"])
    if "tool_calls" in delta:
        delta["tool_calls"] = [{"index": n, **call} for n, call in enumerate(delta["tool_calls"])]
    common = {k: answer[k] for k in ("id", "created", "model")} | {"object": "chat.completion.chunk"}
    said = {**common, "choices": [{"index": 0, "delta": delta, "finish_reason": None}]}
    ended = {**common, "choices": [{"index": 0, "delta": {}, "finish_reason": choice["finish_reason"]}]}
    return [said, ended, {**common, "choices": [], "usage": answer["usage"]}]


def _wire(call: ToolCall, ident: str) -> dict[str, Any]:
    function = {"name": call.name, "arguments": json.dumps(dict(call.arguments), ensure_ascii=False)}
    return {"id": ident, "type": "function", "function": function}


def _before_calls(text: str) -> str:
    return text.split("<tool_call>")[0].strip()


def _normal(message: Message) -> dict[str, Any]:
    """What makes two messages the same: role, text and calls, however they were written."""
    normal = {"role": message["role"], "content": _text(message.get("content"))}
    if calls := message.get("tool_calls"):
        normal["calls"] = [(c["function"]["name"], json.loads(c["function"]["arguments"])) for c in calls]
    return normal


def _text(content: Any) -> str:
    """The text of a content, which may be None or a list of parts."""
    if isinstance(content, list):
        return whole("".join(part.get("text", "") for part in content))
    return whole(content or "")


def _shown(message: Message, codec: ChatCodec) -> Message:
    """A message as the chat template can write it."""
    known = message["role"] != "tool" or codec.takes_role("tool")
    return {"role": message["role"] if known else "user", "content": message["content"]}
