"""The local Tinker server: SkyRL's API with its JAX engine on the CPU, as a process that ends with this one."""

from __future__ import annotations

import json
import os
import signal
import subprocess
import time
from collections.abc import Callable
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from types import TracebackType
from typing import Self

from ..._system.cache import cache_folder
from ..._system.extras import extra
from ..._system.lock import lock_with_children
from ..._system.ports import bound
from ...errors import ServiceError, UserError
from ..service import answers
from .environment import server_python
from .tiny_model import write_tiny_model

LAUNCHER = Path(__file__).with_name("launcher.py")
_READY = "Initialized TinkerEngine"  # in the engine's log once the model is loaded
_START_LIMIT = 300.0  # seconds
_STOP_LIMIT = 10.0  # seconds, of a server and of one before it in the folder


@dataclass(frozen=True, slots=True, kw_only=True)
class ServerSettings:
    """The model to serve, and the sizes of the server."""

    model: Path  # folder in the Hugging Face layout, config.json with "dtype": "float32"
    folder: Path  # for the server's database, checkpoints and log
    host: str = "127.0.0.1"
    port: int = 0  # 0 is any free one
    rank: int = 32  # the largest of a LoRA
    adapters: int = 9  # at once; one of them is the base model
    train_rows: int = 8  # sequences in one pass; fixed widths are compiled once
    sample_rows: int = 8
    session_timeout: int = 300  # seconds of silence after which a session's adapters are freed

    @property
    def name(self) -> str:
        """The name of the model on the server."""
        return str(self.model.resolve())

    def __post_init__(self) -> None:
        if not (self.model / "config.json").is_file():
            raise UserError(f"{self.model} has no config.json; give the folder of a model in the Hugging Face layout")


class LocalServer:
    """The server at ``url``, whose model is called ``name`` there. It ends with ``stop``, or with the program."""

    def __init__(self, settings: ServerSettings, say: Callable[[str], None] = lambda line: None):
        """Start the server and wait until it answers. Raises UserError, ServiceError."""
        with bound(settings.host, settings.port) as taken:  # before the work of starting a server that would not get it
            self.name, self.port = settings.name, int(taken.getsockname()[1])
        python = server_python(say)
        self.url = f"http://{settings.host}:{self.port}"
        self.log = settings.folder / "server.log"
        try:
            settings.folder.mkdir(parents=True, exist_ok=True)
            refusal = f"another server works in {settings.folder}; stop it, or give this one another --folder"
            self._lock = lock_with_children(settings.folder / "server.lock", _STOP_LIMIT, refusal)
        except OSError as error:
            raise UserError(f"the server's folder {settings.folder} cannot be used ({error.strerror})") from error
        engine = {
            "max_lora_adapters": settings.adapters,
            "max_lora_rank": settings.rank,
            "train_micro_batch_size": settings.train_rows,
            "sample_max_num_sequences": settings.sample_rows,
        }
        flags = {
            "base-model": self.name,
            "backend": "jax",
            "backend-config": json.dumps(engine),
            "database-url": f"sqlite:///{(settings.folder / 'tinker.db').resolve()}",
            "checkpoints-base": str((settings.folder / "checkpoints").resolve()),
            "session-timeout-sec": str(settings.session_timeout),
            "host": settings.host,
            "port": str(self.port),
        }
        environment = {  # JAX on the CPU, with everything that it compiles kept for the next start; nothing is fetched
            "JAX_PLATFORMS": os.environ.get("JAX_PLATFORMS", "cpu"),
            "JAX_COMPILATION_CACHE_DIR": str(cache_folder() / "tinker" / "compiled"),
            "JAX_PERSISTENT_CACHE_MIN_COMPILE_TIME_SECS": "0",
            "JAX_PERSISTENT_CACHE_MIN_ENTRY_SIZE_BYTES": "-1",
            "HF_HUB_OFFLINE": "1",
            "PYTHONPATH": "",
        }
        words = [word for name, value in flags.items() for word in (f"--{name}", value)]
        with self.log.open("ab") as log:
            began = log.tell()
            self.process = subprocess.Popen(
                [str(python), "-P", str(LAUNCHER), *words],
                stdin=subprocess.PIPE,  # closes when this process ends in any way
                stdout=log,
                stderr=subprocess.STDOUT,
                env={**os.environ, **environment},
                start_new_session=True,
                pass_fds=(self._lock.fileno(),),  # so that the folder is locked until the server has ended
            )
        end, text = time.monotonic() + _START_LIMIT, ""
        try:
            while not (_READY in text and answers(self.url)):
                if self.process.poll() is not None or time.monotonic() > end:
                    last = " ".join(text.strip().splitlines()[-1:])
                    raise ServiceError(f"the Tinker server did not start ({last}); its log is {self.log}")
                time.sleep(0.2)
                with self.log.open("rb") as log:
                    log.seek(began)
                    text = log.read().decode(errors="replace")
        except BaseException:
            self.stop()
            raise

    def stop(self) -> None:
        """End the server and its engine."""
        if self.process.poll() is None:
            self.signal(signal.SIGTERM)
            with suppress(subprocess.TimeoutExpired):
                self.process.wait(timeout=_STOP_LIMIT)
        self.signal(signal.SIGKILL)
        self.process.wait()
        if self.process.stdin:
            self.process.stdin.close()
        self._lock.close()

    def signal(self, number: signal.Signals) -> None:
        """Send a signal to the server and its engine, if they are still there."""
        try:
            os.killpg(self.process.pid, number)
        except ProcessLookupError:
            return

    def __enter__(self) -> Self:
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.stop()


def tiny_model_folder(seed: int = 0) -> Path:
    """Return the folder of the tiny random model in the cache, which is written first if it is missing."""
    lock = extra("filelock", "textpolicy[tinker]").FileLock
    folder = cache_folder() / "tinker" / "models" / f"tiny-{seed}"
    folder.parent.mkdir(parents=True, exist_ok=True)
    with lock(folder.with_name(folder.name + ".lock")):
        if not folder.exists():
            new = folder.with_name(f"{folder.name}.tmp-{os.getpid()}")
            write_tiny_model(new, seed)
            new.rename(folder)
    return folder
