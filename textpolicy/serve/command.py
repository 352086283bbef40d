"""The command ``textpolicy serve``: the Tinker API and OpenAI's, over models in this process."""

from __future__ import annotations

import asyncio
import os
import shlex
import signal
from collections.abc import Iterator, Sequence
from contextlib import contextmanager
from pathlib import Path
from typing import Annotated, Any

import uvicorn
from pydantic import Field

from .._system.ports import bound
from ..config.settings import LocalPath, ModelName, Positional, Section
from ..errors import StoppedError, UserError
from ..serving import Model
from .server import LOOPBACK, make_app
from .service import Service

KEY = "TEXTPOLICY_API_KEY"


class ServeArguments(Section):
    """Serve models to programs of the Tinker SDK, and as OpenAI's chat completions, until Ctrl-C."""

    models: Annotated[tuple[ModelName, ...], Positional]
    """Built-in names, folders, GGUF files or hub ids, each of them a base that clients may ask for."""
    host: Annotated[str, Field(min_length=1)] = "127.0.0.1"
    """Address to listen at; anything but this machine's own demands a key."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port; a free one if 0."""
    folder: LocalPath = Path("runs/serve")
    """Checkpoints, the journal of requests and a run folder per training client, kept for the next start."""
    api_key: Annotated[str, Field(min_length=8)] | None = None
    """Key that clients must send, of at least 8 characters; if not given, the one in TEXTPOLICY_API_KEY."""
    session_timeout: Annotated[float, Field(ge=10, allow_inf_nan=False)] = 300.0
    """Seconds without a sign of life after which a client's requests end; its models stay on disk."""


class TinkerServerArguments(ServeArguments):
    """Serve as textpolicy serve does, of which this is the older name."""

    models: Annotated[tuple[ModelName, ...], Positional] = ()
    """Built-in names, folders, GGUF files or hub ids, each of them a base that clients may ask for."""
    model: ModelName = "smollm2-135m"
    """Model to serve where none is named without a flag."""


class Stoppable(uvicorn.Server):
    """The web server, which the first SIGINT or SIGTERM ends once what it answers now has been answered."""

    number: int | None = None  # of that signal
    service: Service | None = None

    @contextmanager
    def capture_signals(self) -> Iterator[None]:
        """Handle the signals within a ``with``; after the first, the next has its default effect."""
        loop = asyncio.get_running_loop()

        def stop(number: int) -> None:
            self.number, self.should_exit = number, True
            if self.service is not None:
                self.service.stopping.set()
            for handled in (signal.SIGINT, signal.SIGTERM):
                loop.remove_signal_handler(handled)

        for number in (signal.SIGINT, signal.SIGTERM):
            loop.add_signal_handler(number, stop, number)
        yield
        for number in (signal.SIGINT, signal.SIGTERM):
            loop.remove_signal_handler(number)


def serve(args: ServeArguments) -> None:
    """Serve until a signal, and print the address. Raises UserError, and StoppedError at the end."""
    key = args.api_key or os.environ.get(KEY) or None
    if args.host not in LOOPBACK and key is None:
        raise UserError(
            f"whoever reaches {args.host} could use this server; give it a key with --api-key or {KEY}, or serve at "
            "127.0.0.1 alone"
        )
    with bound(args.host, args.port) as listening:  # before the work of loading
        service = Service(lambda: load(args.models), args.folder, patience=args.session_timeout)
        try:
            config = uvicorn.Config(
                make_app(service, key, LOOPBACK if args.host in LOOPBACK else ("*",)),
                log_level="warning", lifespan="off", ws="none", timeout_graceful_shutdown=10,
            )  # fmt: skip
            server = Stoppable(config)
            server.service = service
            listening.listen(2048)
            url = f"http://{args.host}:{listening.getsockname()[1]}"
            print(f"serving {', '.join(service.models)} at {url}; its folder is {args.folder}", flush=True)
            print(f"use it with: TINKER_BASE_URL={url} TINKER_API_KEY=tml-{'...' if key else 'local'}", flush=True)
            server.run(sockets=[listening])
        finally:
            service.close()
    if server.number is not None:
        again = f"textpolicy serve {' '.join(map(shlex.quote, args.models))} --folder {shlex.quote(str(args.folder))}"
        raise StoppedError(f"the server has stopped; its clients go on once it is there again: {again}", server.number)


def load(names: Sequence[str]) -> dict[str, Model]:
    """Return the models called ``names``, also by the folders that clients load tokenizers from. Raises UserError."""
    from ..mlx.tenants.model import Base

    models: dict[str, Model] = {}
    for name in names:
        model: Any = Base.load(name)
        models[name] = model
        if model.tokenizer_folder is not None:
            models.setdefault(str(model.tokenizer_folder), model)
    return models
