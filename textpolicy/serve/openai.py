"""The completions and chats of OpenAI's API over the same models, with log-probs and token ids as vLLM names them."""

from __future__ import annotations

import asyncio
import json
import secrets
import time
from collections.abc import Callable, Mapping, Sequence
from concurrent.futures import Future
from functools import cache
from typing import Annotated, Any

from pydantic import AliasChoices, Field
from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..engine import Sampling
from ..environment.libraries import served
from ..environment.text.calls import grammar_of
from ..environment.text.conversation import ChatCodec
from ..environment.text.pieces import Pieces
from ..errors import UserError
from ..serving import Sampled
from ..types import token_ids
from . import requests
from .api import body
from .checkpoints import Name
from .registry import Sampler, Tenant
from .sampling import Wish, limit_of
from .service import MOST_WAITING, RefusedError, Service, ended

PATHS = ("/v1", "/oai/api/v1")  # the second is that of the hosted service
SILENT = 1.0  # seconds between checks that the client is still there


class Wanted(requests.Asked):
    """The settings that both kinds of completions take."""

    model: str
    n: Annotated[int, Field(ge=1, le=4096)] = 1
    max_tokens: requests.Place | None = Field(
        None, validation_alias=AliasChoices("max_completion_tokens", "max_tokens")
    )
    temperature: float = 1.0
    top_p: float = 1.0
    top_k: int = -1
    min_p: float = 0.0
    repetition_penalty: float = 1.0
    seed: int | None = None
    stop: str | list[str] | None = None
    stop_token_ids: list[int] | None = None
    stream: bool = False
    return_token_ids: bool = False


class Chat(Wanted):
    """The wish for the next message of a conversation; messages and tools are read by ``served.Request``."""

    logprobs: bool = False
    top_logprobs: Annotated[int, Field(ge=0, le=1024)] = 0


class Completions(Wanted):
    """The wish for the continuation of texts, or of token ids."""

    prompt: str | list[int] | list[str] | list[list[int]]
    logprobs: Annotated[int, Field(ge=0, le=1024)] | None = None
    echo: bool = False


class OpenAI:
    """The handlers, one method for each route."""

    def __init__(self, service: Service) -> None:
        self.service = service
        self._codec: Callable[[Any], ChatCodec] = cache(lambda model: ChatCodec.of(model.tokenizer))
        self._pieces: Callable[[Any], Pieces] = cache(lambda model: Pieces(self._codec(model).decode_all))
        self._number = 0

    def routes(self) -> list[Route]:
        """Return the routes."""
        return [
            Route(f"{path}/{name}", handler, methods=[method])
            for path in PATHS
            for method, name, handler in (
                ("GET", "models", self.models),
                ("POST", "chat/completions", self.chat),
                ("POST", "completions", self.completions),
            )
        ]

    async def models(self, request: Request) -> Response:
        """List what ``model`` may be: base models, training clients by their ids, and checkpoints by their paths."""
        trained = (t.id for t in self.service.registry.tenants.values() if t.lost is None and t.done >= 0)
        names = [*self.service.models, *trained, *(str(name) for name, _ in self.service.checkpoints.all())]
        listed = [{"id": name, "object": "model", "created": 0, "owned_by": "textpolicy"} for name in names]
        return JSONResponse({"object": "list", "data": listed})

    async def chat(self, request: Request) -> Response:
        """Sample the next message of a conversation."""
        sent = await body(request)
        asked, chat = requests.read_json(Chat, sent), served.Request.of("", sent)
        named = self._named(asked.model)
        model = self.service.training.base(named[0].base)
        codec = self._codec(model)
        sessions = [served.Session(codec, grammar=lambda: grammar_of(codec, model.tokenizer)) for _ in range(asked.n)]
        prompt, *_ = [session.take(chat.messages, chat.tools) for session in sessions]
        sampled = await self._sample(request, asked, *named, prompt, asked.top_logprobs)
        choices = []
        for i, (session, one) in enumerate(zip(sessions, sampled, strict=True)):
            self._number += 1
            message = session.add(one.completion, self._number)
            finish = "length" if one.completion.truncated else "tool_calls" if "tool_calls" in message else "stop"
            choice = {"index": i, "message": message, "finish_reason": finish}
            if asked.logprobs:
                choice["logprobs"] = {"content": _content(self._pieces(model), one)}
            if asked.return_token_ids:
                choice["token_ids"] = one.completion.tokens.tolist()
            choices.append(choice)
        answer = _answer("chat.completion", asked.model, choices, [prompt], sampled)
        if asked.return_token_ids:
            answer["prompt_token_ids"] = prompt
        return _sent(answer, [event for one in _alone(answer) for event in served.chunks(one)], stream=asked.stream)

    async def completions(self, request: Request) -> Response:
        """Sample continuations of texts or of token ids."""
        asked = requests.read_json(Completions, await body(request))
        named = self._named(asked.model)
        model = self.service.training.base(named[0].base)
        codec = self._codec(model)
        given: Sequence[Any] = [asked.prompt]
        if isinstance(asked.prompt, list) and asked.prompt and not isinstance(asked.prompt[0], int):
            given = asked.prompt
        if asked.echo:
            raise UserError("echo is not served here; ask the Tinker API for prompt log-probs")
        prompts = [list(codec.encode(p, False)) if isinstance(p, str) else p for p in given]
        found = await asyncio.gather(
            *(self._sample(request, asked, *named, prompt, asked.logprobs or 0) for prompt in prompts)
        )
        choices: list[dict[str, Any]] = []
        for prompt, sampled in zip(prompts, found, strict=True):
            for one in sampled:
                tokens = one.completion.tokens.tolist()
                finish = "length" if one.completion.truncated else "stop"
                choice = {"index": len(choices), "text": codec.text(tokens), "finish_reason": finish, "logprobs": None}
                if asked.logprobs is not None:
                    choice["logprobs"] = _table(self._pieces(model), one)
                if asked.return_token_ids:
                    choice |= {"token_ids": tokens, "prompt_token_ids": prompt}
                choices.append(choice)
        flat = [one for sampled in found for one in sampled]
        answer = _answer("text_completion", asked.model, choices, prompts, flat)
        return _sent(answer, _alone(answer), stream=asked.stream)

    def _named(self, name: str) -> tuple[Sampler, Tenant | None]:
        """Return what ``model`` names: a base, a checkpoint, or a training client's newest weights.

        Raises UserError, RefusedError.
        """
        if name in self.service.models:
            return Sampler("", "", name), None
        if name in self.service.registry.tenants:
            tenant = self.service.tenant(name)
            return Sampler("", "", tenant.base), tenant
        if name.startswith("tinker://"):
            about = self.service.checkpoints.about(Name.of(name))
            if about is None:
                raise RefusedError(f"there is no checkpoint {name} on this server; save it first", 404)
            return Sampler("", "", about.base, name), None
        raise RefusedError(
            f"there is no model {name!r:.120} here; ask for one of {', '.join(self.service.models)}, a tinker:// path, "
            "or the id of a training client", 404
        )  # fmt: skip

    async def _sample(
        self,
        request: Request,
        asked: Wanted,
        sampler: Sampler,
        trained: Tenant | None,
        prompt: Sequence[int],
        top: int,
    ) -> Sequence[Sampled]:
        """Sample the completions of one prompt; a client that leaves ends them. Raises UserError."""
        model = self.service.training.base(sampler.base)
        if len(self.service.decoders) >= MOST_WAITING:
            raise RefusedError("too many requests wait already; ask again in a moment", 429)
        limit = limit_of(asked.max_tokens, model, len(prompt))
        settings = Sampling(
            max_tokens=max(limit, 1), temperature=asked.temperature, top_p=asked.top_p, top_k=max(asked.top_k, 0),
            min_p=asked.min_p, repetition_penalty=asked.repetition_penalty,
            seed=(secrets.randbits(62) if asked.seed is None else asked.seed) % 2**63,
        )  # fmt: skip
        strings = (asked.stop,) if isinstance(asked.stop, str) else tuple(asked.stop or ())
        stop = None if asked.stop_token_ids is None else model.stop | {*asked.stop_token_ids}
        result: Future[Sequence[Sampled]] = Future()
        wish = Wish(
            f"oai:{secrets.token_hex(8)}", sampler, token_ids(prompt, model.vocabulary), asked.n, settings, stop,
            strings, top, empty=limit == 0, trained=trained, answer=lambda sampled, read: result.set_result(sampled),
            refuse=result.set_exception,
        )  # fmt: skip
        worker = self.service.worker
        worker.post(lambda: self.service.decoders.add(wish))
        waits = ended(result)
        while not waits.done():
            await asyncio.wait((waits,), timeout=SILENT)
            if not waits.done() and await request.is_disconnected():
                worker.post(lambda: self.service.decoders.cancel(wish.key))
                raise RefusedError("its client has gone", 499)
        return waits.result()


def _answer(
    kind: str, model: str, choices: list[dict[str, Any]], prompts: Sequence[Sequence[int]], sampled: Sequence[Sampled]
) -> dict[str, Any]:
    """Return the body of an answer."""
    read, written = sum(map(len, prompts)), sum(len(one.completion.tokens) for one in sampled)
    return {
        "id": f"{'chatcmpl' if kind == 'chat.completion' else 'cmpl'}-{secrets.token_hex(8)}",
        "object": kind, "created": int(time.time()), "model": model, "choices": choices,
        "usage": {"prompt_tokens": read, "completion_tokens": written, "total_tokens": read + written},
    }  # fmt: skip


def _alone(answer: Mapping[str, Any]) -> list[dict[str, Any]]:
    """Return an answer of several choices as answers of one each."""
    return [{**answer, "choices": [choice]} for choice in answer["choices"]]


def _sent(answer: Mapping[str, Any], events: Sequence[Mapping[str, Any]], *, stream: bool) -> Response:
    """Return the response with an answer, or with the ``events`` of its stream."""
    if not stream:
        return JSONResponse(answer)
    text = "".join(f"data: {event}\n\n" for event in [*map(json.dumps, events), "[DONE]"])
    return Response(text, media_type="text/event-stream")


def _content(pieces: Pieces, one: Sampled) -> list[dict[str, Any]]:
    """Return the log-probs of a completion as chat completions have them."""

    def entry(text: str, logprob: float) -> dict[str, Any]:
        return {"token": text, "logprob": logprob, "bytes": list(text.encode("utf-8", "replace"))}

    content = []
    texts = pieces(one.completion.tokens)
    for i, (text, logprob) in enumerate(zip(texts, one.completion.logprobs.tolist(), strict=True)):
        others = []
        if one.alternatives is not None:
            row = zip(one.alternatives.tokens[i].tolist(), one.alternatives.logprobs[i].tolist(), strict=True)
            others = [entry(pieces([other])[0], likely) for other, likely in row]
        content.append({**entry(text, logprob), "top_logprobs": others})
    return content


def _table(pieces: Pieces, one: Sampled) -> dict[str, Any]:
    """Return the log-probs of a completion as completions have them."""
    content = _content(pieces, one)
    offsets = [0]
    for c in content:
        offsets.append(offsets[-1] + len(c["token"]))
    return {
        "tokens": [c["token"] for c in content],
        "token_logprobs": [c["logprob"] for c in content],
        "top_logprobs": [{other["token"]: other["logprob"] for other in c["top_logprobs"]} for c in content],
        "text_offset": offsets[:-1],
    }
