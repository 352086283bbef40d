"""The routes of the Tinker API, as version 0.38 of its SDK calls them."""

from __future__ import annotations

import asyncio
import json
import secrets
import shutil
import time
from collections.abc import Awaitable, Callable, Mapping, Sequence
from dataclasses import replace
from datetime import UTC, datetime
from typing import Any

from starlette.requests import Request
from starlette.responses import JSONResponse, Response
from starlette.routing import Route

from ..errors import UserError
from . import messages, requests
from .checkpoints import KINDS, About, Name
from .registry import Job, Sampler, Tenant
from .service import RefusedError, Service, ended
from .training import sampler_id

HOLD = 25.0  # seconds for which the wish for a result waits; the SDK gives up after 45
LARGEST = 2**28  # bytes of a request's body
PROTOBUF = "application/x-protobuf"
INSTEAD = {  # of a route that is not here, by the last part of its path
    "create_custom_loss": "run the loss on the client, as forward_backward_custom does",
    "external_weights_urls": "take the checkpoint's folder below checkpoints/ in the server's own",
    "join_sampling_session": "number the requests of a copied sampling client from a random place, as the SDK does",
    "retrieve_futures": "ask retrieve_future for each result, as the SDK does",
}
Handler = Callable[[Request], Awaitable[Response]]


class Api:
    """The handlers, one method for each route."""

    def __init__(self, service: Service) -> None:
        self.service, self.registry = service, service.registry

    def routes(self) -> list[Route]:
        """Return the routes, each below /api/v1/."""
        posts: dict[str, Handler] = {
            "client/config": self.client_config,
            "client/dynamic_config": self.dynamic_config,
            "telemetry": self.telemetry,
            "create_session": self.create_session,
            "session_heartbeat": self.heartbeat,
            "sessions/{session}/finish": self.finish,
            "create_model": self.create_model,
            "load_weights": self.load_weights,
            "get_info": self.get_info,
            "forward_backward": self.forward_backward,
            "optim_step": self.in_order,
            "save_weights": self.in_order,
            "save_weights_for_sampler": self.in_order,
            "save_weights_external": self.in_order,
            "create_sampling_session": self.create_sampler,
            "asample": self.sample,
            "retrieve_future": self.retrieve,
            "cancel_future": self.cancel,
            "weights_info": self.weights_info,
            "copy_weights": self.copy_weights,
        }
        gets: dict[str, Handler] = {
            "healthz": self.health,
            "get_server_capabilities": self.capabilities,
            "samplers/{sampler}": self.sampler,
            "training_runs": self.runs,
            "training_runs/{run}": self.run,
            "training_runs/{run}/checkpoints": self.checkpoints_of,
            "checkpoints": self.all_checkpoints,
            "sessions": self.sessions,
            "sessions/{session}": self.session,
        }
        of_checkpoint = "/api/v1/training_runs/{run}/checkpoints/{kind}/{name}"
        return [
            *(Route(f"/api/v1/{path}", handler, methods=["POST"]) for path, handler in posts.items()),
            *(Route(f"/api/v1/{path}", handler, methods=["GET"]) for path, handler in gets.items()),
            Route(of_checkpoint, self.delete_checkpoint, methods=["DELETE"]),
            Route(f"{of_checkpoint}/publish", self.publish, methods=["POST", "DELETE"]),
            Route(f"{of_checkpoint}/ttl", self.expire, methods=["PUT", "POST", "PATCH"]),
            Route("/api/v1/{path:path}", self.other, methods=["GET", "POST", "PUT", "PATCH", "DELETE"]),
        ]

    async def other(self, request: Request) -> Response:
        """Answer a request for a route that is not here with what to do in its place. Raises RefusedError."""
        asked = f"{request.method} {request.url.path:.120}"
        instead = INSTEAD.get(request.url.path.rpartition("/")[2], "leave it to the hosted service")
        raise RefusedError(f"this server does not answer {asked}; {instead}", 404)

    # ---- the client and its session

    async def client_config(self, request: Request) -> Response:
        """Set the client's limits."""
        return JSONResponse({"fwdbwd_max_chunk_bytes_count": 5_000_000, "proto_compress_fwdbwd": False})

    async def dynamic_config(self, request: Request) -> Response:
        """Ask clients to say when they abandon a request for completions."""
        return JSONResponse({"sample_cancel_enabled": True})

    async def telemetry(self, request: Request) -> Response:
        """Drop what the SDK reports of itself."""
        return JSONResponse({"status": "accepted"})

    async def create_session(self, request: Request) -> Response:
        """Begin a session."""
        asked = requests.read_json(requests.CreateSession, await body(request))
        session, written = self.registry.begin(asked.model_dump(exclude_none=True))
        await ended(written)
        return JSONResponse({"type": "create_session", "session_id": session.id})

    async def heartbeat(self, request: Request) -> Response:
        """Note that a client is there."""
        self.service.session(requests.read_json(requests.OfSession, await body(request)).session_id)
        return JSONResponse({"type": "session_heartbeat"})

    async def finish(self, request: Request) -> Response:
        """End a session: its requests are cancelled, its models dropped, its checkpoints kept."""
        name = request.path_params["session"]
        session = self.registry.sessions.get(name)
        if session is None:
            raise RefusedError(f"there is no session {name!r} on this server", 404)
        if session.ended is None:
            reason = json.loads(await body(request) or b"{}").get("reason") or {}
            await ended(self.registry.finish_session(session, str(reason.get("type", "success"))))
            self.service.worker.post(lambda: self.service.worker.end_session(name, "its session has ended", keep=False))
        return Response(status_code=204)

    # ---- what is answered with a promise

    async def create_model(self, request: Request) -> Response:
        """Make a model."""
        asked = requests.read_json(requests.CreateModel, await body(request))
        self.service.session(asked.session_id)
        config = asked.lora_config or requests.LoraConfig()
        if config.seed is None:  # chosen once, so that a replay begins with the same weights
            config = config.model_copy(update={"seed": secrets.randbits(31)})
        payload = asked.model_copy(update={"lora_config": config}).model_dump_json().encode()
        return await self._create(asked.session_id, asked.model_seq_id, "create_model", payload)

    async def load_weights(self, request: Request) -> Response:
        """Load a checkpoint into a model that is there, or make the model that it holds."""
        sent = await body(request)
        asked = requests.read_json(requests.Addressed, sent)
        if asked.model_id is not None:
            return await self._in_order("load_weights", asked.model_id, asked.seq_id, sent)
        if asked.session_id is None or asked.model_seq_id is None:
            raise UserError("load_weights names no model; give model_id and seq_id, or session_id and model_seq_id")
        self.service.session(asked.session_id)
        return await self._create(asked.session_id, asked.model_seq_id, "load_weights", sent)

    async def forward_backward(self, request: Request) -> Response:
        """Compute log-probs, a loss and its gradient."""
        sent = await body(request)
        parsed = messages.parsed_pass(sent)
        return await self._in_order("forward_backward", parsed.model_id, parsed.seq_id, sent)

    async def in_order(self, request: Request) -> Response:
        """Take a step, or save a model, after what was asked before."""
        kind = request.url.path.rpartition("/")[2]
        sent = await body(request)
        asked = requests.read_json(requests.OfModel, sent)
        return await self._in_order(kind, asked.model_id, asked.seq_id, sent)

    async def sample(self, request: Request) -> Response:
        """Sample completions, read a prompt, or both."""
        asked = requests.read_json(requests.Sample, await body(request))
        if asked.sampling_session_id is None or asked.seq_id is None:
            raise UserError("asample names no sampler; give sampling_session_id and seq_id")
        sampler = self._sampler(asked.sampling_session_id)
        self.service.session(sampler.session)
        params = asked.sampling_params
        if params.seed is None:
            params = params.model_copy(update={"seed": secrets.randbits(62)})
        payload = asked.model_copy(update={"sampling_params": params}).model_dump_json(exclude_none=True).encode()
        # None and [] differ in ``stop``, and only None is left out.
        name = f"{sampler.id}:{asked.seq_id}"
        job = await self.service.submit(Job(name, sampler.id, asked.seq_id, "asample", sampler.session, payload))
        return JSONResponse({
            "request_id": job.id, "sample_sequence_ids": [f"{job.id}:{i}" for i in range(asked.num_samples)]
        })  # fmt: skip

    async def retrieve(self, request: Request) -> Response:
        """Answer with the result of a request, or that it has none yet."""
        asked = requests.read_json(requests.Retrieve, await body(request))
        job = self.registry.jobs.get(asked.request_id)
        if job is None:
            raise RefusedError(f"there is no request {asked.request_id!r} any more; send it again", 410)
        session = self.registry.sessions.get(job.session)
        if session is not None:
            session.seen = time.monotonic()
        result, stopping = ended(job.end), asyncio.ensure_future(self.service.stopping.wait())
        await asyncio.wait((result, stopping), timeout=HOLD, return_when=asyncio.FIRST_COMPLETED)
        stopping.cancel()
        if not result.done():
            return JSONResponse({"type": "try_again", "request_id": job.id, "queue_state": "active"})
        outcome = result.result()
        if job.retrieved is None:
            job.retrieved = time.time()
            self.service.journal.write(("UPDATE jobs SET retrieved = ? WHERE id = ?", (job.retrieved, job.id)))
        return Response(outcome.body, media_type=PROTOBUF if outcome.protobuf else "application/json")

    async def cancel(self, request: Request) -> Response:
        """End a request for completions that nobody waits for."""
        job = self.registry.jobs.get(requests.read_json(requests.Retrieve, await body(request)).request_id)
        if job is not None and job.waiting:
            self.service.worker.cancel(job, "it was cancelled by its client")
        return Response(status_code=204)

    async def _create(self, session: str, number: int, kind: str, payload: bytes) -> Response:
        name = f"{session}:train:{number}"
        if name not in self.registry.tenants:
            self.registry.tenants[name] = Tenant(name, session)
        job = await self.service.submit(Job(f"{name}:0", name, 0, kind, session, payload))
        return JSONResponse({"request_id": job.id, "model_id": name})

    async def _in_order(self, kind: str, model: str, seq: int | None, payload: bytes) -> Response:
        tenant = self.service.tenant(model)
        if not seq:
            raise UserError(f"seq_id of {kind} is {seq}; number the requests of a model from 1")
        job = Job(f"{model}:{seq}", model, seq, kind, tenant.session, payload)
        if seq > tenant.done or job.id in self.registry.jobs:
            await self.service.submit(job)
        return JSONResponse({"request_id": job.id, "model_id": model})

    # ---- samplers and models

    async def create_sampler(self, request: Request) -> Response:
        """Make a sampler of a base model or of a checkpoint."""
        asked = requests.read_json(requests.CreateSampler, await body(request))
        self.service.session(asked.session_id)
        name = sampler_id(asked.session_id, asked.sampling_session_seq_id)
        if name not in self.registry.samplers:
            base = asked.base_model
            if asked.model_path is not None:
                base = self._found(asked.model_path)[1].base
            if base is None:
                raise UserError("a sampler needs a base_model or a model_path; give one")
            self._served(base)
            await ended(self.registry.add_sampler(Sampler(name, asked.session_id, base, asked.model_path)))
        return JSONResponse({"type": "create_sampling_session", "sampling_session_id": name})

    async def sampler(self, request: Request) -> Response:
        """Describe a sampler."""
        sampler = self._sampler(request.path_params["sampler"])
        return JSONResponse({"sampler_id": sampler.id, "base_model": sampler.base, "model_path": sampler.path})

    async def get_info(self, request: Request) -> Response:
        """Describe a model that is trained."""
        tenant = self.service.tenant(requests.read_json(requests.OfModel, await body(request)).model_id)
        model = self._served(tenant.base)
        tokenizer = tenant.base if model.tokenizer_folder is None else str(model.tokenizer_folder)
        data = {"model_name": tenant.base, "tokenizer_id": tokenizer}
        about = {"model_id": tenant.id, "is_lora": True, "lora_rank": tenant.adapter.rank, "model_name": tenant.base}
        return JSONResponse({"type": "get_info", "model_data": data, **about})

    async def capabilities(self, request: Request) -> Response:
        """List the base models."""
        models = [
            {"model_name": name, "max_context_length": model.context, "trainable": True, "sampleable": True}
            for name, model in self.service.models.items()
        ]
        return JSONResponse({"supported_models": models})

    async def health(self, request: Request) -> Response:
        """Say that the server is there."""
        return JSONResponse({"status": "ok"})

    # ---- checkpoints, runs and sessions

    async def weights_info(self, request: Request) -> Response:
        """Describe a checkpoint."""
        sent = json.loads(await body(request))
        _, about = self._found(sent.get("tinker_path") if isinstance(sent, dict) else None)
        adapter = about.adapter
        return JSONResponse({
            "base_model": about.base, "is_lora": True, "lora_rank": about.rank, "train_unembed": adapter["unembed"],
            "train_mlp": adapter["mlp"], "train_attn": adapter["attention"],
        })  # fmt: skip

    async def copy_weights(self, request: Request) -> Response:
        """Copy a checkpoint; one that was copied to the same place before is left alone."""
        asked = requests.read_json(requests.CopyWeights, await body(request))
        folder, about = self._found(asked.source_path)
        run = f"copy-{secrets.token_hex(4)}:train:0"
        if asked.session_id is not None and asked.model_seq_id is not None:
            self.service.session(asked.session_id)
            run = f"{asked.session_id}:train:{asked.model_seq_id}"
        source = Name.of(asked.source_path)
        name, now = Name(run, source.kind, source.name), time.time()
        expires = None if asked.ttl_seconds is None else now + asked.ttl_seconds
        copied = replace(about, created=now, job=f"{run}:copy", expires=expires, public=False)
        write = self.service.checkpoints.write
        await asyncio.to_thread(write, name, copied, lambda new: shutil.copytree(folder, new), overwrite=False)
        return JSONResponse({"tinker_path": str(name)})

    async def runs(self, request: Request) -> Response:
        """List the models that were trained, the newest first."""
        tenants = sorted(self.registry.tenants.values(), key=lambda t: -t.created)
        chosen, cursor = page(request, [t for t in tenants if t.done >= 0 and t.base], 20)
        return JSONResponse({"training_runs": [self._run(t) for t in chosen], "cursor": cursor})

    async def run(self, request: Request) -> Response:
        """Describe a model that was trained."""
        name = request.path_params["run"]
        tenant = self.registry.tenants.get(name)
        if tenant is None:
            raise RefusedError(f"there is no training run {name!r} on this server", 404)
        return JSONResponse(self._run(tenant))

    async def checkpoints_of(self, request: Request) -> Response:
        """List the checkpoints of a model."""
        found = self.service.checkpoints.all(request.path_params["run"])
        return JSONResponse({"checkpoints": [self._checkpoint(name, about) for name, about in found]})

    async def all_checkpoints(self, request: Request) -> Response:
        """List all checkpoints, the newest first."""
        chosen, cursor = page(request, list(self.service.checkpoints.all())[::-1], 100)
        listed = [self._checkpoint(name, about) for name, about in chosen]
        return JSONResponse({"checkpoints": listed, "cursor": cursor})

    async def delete_checkpoint(self, request: Request) -> Response:
        """Delete a checkpoint."""
        self._found(address := self._address(request))
        self.service.checkpoints.delete(address)
        return Response(status_code=204)

    async def publish(self, request: Request) -> Response:
        """Note whether a checkpoint is public; on this machine it is for whoever reaches the server."""
        self._found(address := self._address(request))
        self.service.checkpoints.change(address, public=request.method == "POST")
        return Response(status_code=204)

    async def expire(self, request: Request) -> Response:
        """Set the time after which a checkpoint is deleted."""
        self._found(address := self._address(request))
        sent = json.loads(await body(request) or b"{}")
        seconds = sent.get("ttl_seconds") if isinstance(sent, dict) else None
        if seconds is not None and (not isinstance(seconds, int) or seconds < 1):
            raise UserError(f"ttl_seconds is {seconds!r:.40}; give whole seconds from 1 on, or null for none")
        self.service.checkpoints.change(address, expires=None if seconds is None else time.time() + seconds)
        return Response(status_code=204)

    async def sessions(self, request: Request) -> Response:
        """List the sessions, the newest first."""
        known = sorted(self.registry.sessions.values(), key=lambda s: -s.created)
        chosen, _ = page(request, known, 20)
        return JSONResponse({"sessions": [session.id for session in chosen]})

    async def session(self, request: Request) -> Response:
        """Describe a session."""
        name = request.path_params["session"]
        session = self.registry.sessions.get(name)
        if session is None:
            raise RefusedError(f"there is no session {name!r} on this server", 404)
        return JSONResponse({
            "training_run_ids": [t.id for t in self.registry.tenants.values() if t.session == name],
            "sampler_ids": [s.id for s in self.registry.samplers.values() if s.session == name],
            "user_metadata": _texts(session.about.get("user_metadata")),
            "display_name": session.about.get("display_name"),
        })  # fmt: skip

    def _run(self, tenant: Tenant) -> dict[str, Any]:
        """Return the description of a model that was trained."""
        found = [(name, self._checkpoint(name, about)) for name, about in self.service.checkpoints.all(tenant.id)]
        last = {kind: next((c for n, c in reversed(found) if n.kind == kind), None) for kind in KINDS}
        return {
            "training_run_id": tenant.id, "base_model": tenant.base, "model_owner": "local", "is_lora": True,
            "lora_rank": tenant.adapter.rank, "last_request_time": _time(tenant.used),
            "last_checkpoint": last["weights"], "last_sampler_checkpoint": last["sampler_weights"],
            "user_metadata": _texts(tenant.about),
        }  # fmt: skip

    def _checkpoint(self, name: Name, about: About) -> dict[str, Any]:
        """Return the description of a checkpoint."""
        size = sum(path.stat().st_size for path in self.service.checkpoints.path(name).rglob("*"))
        return {
            "checkpoint_id": f"{name.kind}/{name.name}", "checkpoint_type": KINDS[name.kind],
            "time": _time(about.created), "tinker_path": str(name), "size_bytes": size, "public": about.public,
            "user_metadata": about.user_metadata, "expires_at": None if about.expires is None else _time(about.expires),
        }  # fmt: skip

    def _address(self, request: Request) -> str:
        """Return the path of the checkpoint that an address names."""
        return "tinker://{run}/{kind}/{name}".format(**request.path_params)

    def _found(self, address: Any) -> tuple[Any, About]:
        """Return a checkpoint's folder, and what is known of it. Raises UserError, RefusedError."""
        about = self.service.checkpoints.about(Name.of(address))
        if about is None:
            raise RefusedError(
                f"there is no checkpoint {address} on this server; save it first, or correct its path", 404
            )
        return self.service.checkpoints.found(address)

    def _served(self, name: str) -> Any:
        """Return a base model. Raises RefusedError for one that is not served."""
        try:
            return self.service.training.base(name)
        except UserError as error:
            raise RefusedError(str(error), 404) from error

    def _sampler(self, name: str) -> Sampler:
        """Return a sampler. Raises RefusedError."""
        if name not in self.registry.samplers:
            raise RefusedError(f"there is no sampler {name!r} on this server; create another", 404)
        return self.registry.samplers[name]


async def body(request: Request) -> bytes:
    """Return the body of a request. Raises RefusedError for one that is too large, or packed."""
    if (packed := request.headers.get("content-encoding", "identity")) != "identity":
        raise RefusedError(f"the body is packed with {packed!r:.20}; send it as it is", 415)
    parts, size = [], 0
    async for part in request.stream():
        size += len(part)
        if size > LARGEST:
            raise RefusedError(f"the body has more than {LARGEST} bytes; send less at once", 413)
        parts.append(part)
    return b"".join(parts)


def page(request: Request, found: Sequence[Any], limit: int) -> tuple[Sequence[Any], Mapping[str, int]]:
    """Return the part of a list that is asked for, and its place. Raises UserError."""
    texts = {name: request.query_params.get(name, str(value)) for name, value in (("limit", limit), ("offset", 0))}
    if not all(text.isdecimal() and len(text) < 10 for text in texts.values()):
        raise UserError(f"limit and offset are {texts['limit']!r:.20} and {texts['offset']!r:.20}; give whole numbers")
    limit, offset = int(texts["limit"]), int(texts["offset"])
    return found[offset : offset + limit], {"offset": offset, "limit": limit, "total_count": len(found)}


def _time(seconds: float) -> str:
    """Return a time as text."""
    return datetime.fromtimestamp(seconds, UTC).isoformat()


def _texts(metadata: Mapping[str, Any] | None) -> dict[str, str] | None:
    """Return metadata as the texts that clients read."""
    return None if metadata is None else {name: str(value) for name, value in metadata.items()}
