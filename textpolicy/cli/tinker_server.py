"""The command ``textpolicy tinker-server``: a Tinker server on this machine, for trials and tests."""

from __future__ import annotations

import shlex
import time
from pathlib import Path
from typing import Annotated

from pydantic import Field

from .._system.cache import cache_folder
from .._system.extras import extra
from ..config.settings import LocalPath, PositiveInt, Section

TINY = "tiny"


class ServerArguments(Section):
    """Start SkyRL's Tinker API on this machine, in an environment that the first start makes (800 MB)."""

    model: str = "smollm2-135m"
    """Built-in name, folder of a model in float32, or tiny: a random one for tests."""
    port: Annotated[int, Field(ge=0, le=65535)] = 8000
    """Port on this machine; a free one if 0."""
    folder: LocalPath | None = None
    """Database, checkpoints and log, kept for the next start; if not given, one in the cache."""
    rank: PositiveInt = 32
    """Largest rank of a LoRA."""
    rows: PositiveInt = 8
    """Sequences in one pass."""
    install: bool = False
    """Make the environment and exit."""


def serve(args: ServerArguments) -> None:
    """Serve until Ctrl-C. Raises UserError, ServiceError."""
    from ..tinker.server.environment import server_python
    from ..tinker.server.server import LocalServer, ServerSettings

    def say(line: str) -> None:
        print(line, flush=True)

    if args.install:
        say(f"the server's Python is {server_python(say)}")
        return
    settings = ServerSettings(
        model=served_model(args.model),
        folder=args.folder or cache_folder() / "tinker" / "server",
        port=args.port,
        rank=args.rank,
        train_rows=args.rows,
        sample_rows=args.rows,
    )
    with LocalServer(settings, say) as server:
        say(f"serving {server.name} at {server.url}; its log is {server.log}")
        say(f"train with: textpolicy train --engine tinker --tinker.base-url {server.url} --tinker.reduction mean \\")
        say(f"    --model {shlex.quote(server.name)}")
        say("stop with Ctrl-C")
        while server.process.poll() is None:
            time.sleep(0.5)


def served_model(name: str) -> Path:
    """Return a folder of ``name`` that a server can read; a built-in is exported in float32 once. Raises UserError."""
    from ..tinker.server.server import tiny_model_folder

    if name == TINY:
        return tiny_model_folder()
    folder = Path(name).expanduser()
    if folder.is_dir():
        return folder
    from ..run.export import ExportArguments, export

    folder = cache_folder() / "tinker" / "models" / name.replace("/", "--")
    folder.parent.mkdir(parents=True, exist_ok=True)
    with extra("filelock", "textpolicy[tinker]").FileLock(folder.with_name(folder.name + ".lock")):
        if not folder.exists():
            export(ExportArguments(to="hf", model=name, dtype="float32", out=folder))
    return folder
