"""Start a run's other ranks on this machine, or find that ``mlx.launch`` or mpirun has started this process as one."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from .._system.ports import bound
from ..errors import UserError
from .team import GRACE

_LAUNCHED = ("MLX_RANK", "OMPI_COMM_WORLD_RANK", "PMI_RANK")  # in the environment of a rank
VOICE = "TEXTPOLICY_TERMINAL"  # in the environment of a rank above 0 on the machine of rank 0: a descriptor


def launched() -> bool:
    """Return whether this process was started as one of several ranks."""
    several = os.environ.get("MLX_WORLD_SIZE", "2") != "1" and os.environ.get("MLX_HOSTFILE", "?") != ""
    return several and any(name in os.environ for name in _LAUNCHED)


class Others:
    """The processes of ranks 1 and up on this machine, which run the command of this one, rank 0."""

    def __init__(self, devices: int, backend: str) -> None:
        """Start them, and put what ``mlx.launch`` would into the environment of this process and theirs."""
        taken = [bound("127.0.0.1", 0) for _ in range(devices)]
        ports = [socket.getsockname()[1] for socket in taken]
        for socket in taken:
            socket.close()
        self._folder = tempfile.TemporaryDirectory(prefix="textpolicy-ranks-")
        hosts = Path(self._folder.name, "hosts.json")
        hosts.write_text(json.dumps([[f"127.0.0.1:{port}"] for port in ports]))
        if backend == "nccl":
            shared = {"NCCL_HOST_IP": "127.0.0.1", "NCCL_PORT": str(ports[0]), "MLX_WORLD_SIZE": str(devices)}
        else:
            shared = {"MLX_HOSTFILE": str(hosts)}
        gpus = (os.environ.get("CUDA_VISIBLE_DEVICES") or ",".join(map(str, range(devices)))).split(",")
        if backend == "nccl" and len(gpus) < devices:
            raise UserError(f"machine.devices is {devices} and CUDA_VISIBLE_DEVICES names {len(gpus)}; set it to that")
        self._environment = {**shared, "MLX_RANK": "0"}
        os.environ |= self._environment
        self._errors = [Path(self._folder.name, f"{n}.txt") for n in range(1, devices)]
        self._processes = []
        with open(os.dup(2), "wb") as terminal:
            for n in range(1, devices):
                own = {"MLX_RANK": str(n), VOICE: str(terminal.fileno())}
                own |= {"CUDA_VISIBLE_DEVICES": gpus[n]} if backend == "nccl" else {}
                with self._errors[n - 1].open("wb") as errors:
                    started = subprocess.Popen(
                        [sys.executable, *sys.orig_argv[1:]],
                        env={**os.environ, **own},
                        stdin=subprocess.DEVNULL,
                        stdout=subprocess.DEVNULL,
                        stderr=errors,
                        pass_fds=[terminal.fileno()],
                    )
                self._processes.append(started)

    def last_words(self, rank: int) -> str:
        """Return how the process of a dead ``rank`` ended, and the last line that it wrote, in parentheses."""
        try:
            code = self._processes[rank - 1].wait(1.0)
        except subprocess.TimeoutExpired:
            return ""
        said = self._errors[rank - 1].read_text(errors="replace").strip().splitlines()
        how = f"signal {-code}" if code < 0 else f"code {code}"
        line = next((line for line in reversed(said) if not line.startswith("[ring]")), "")
        return f" ({how}{': ' if line else ''}{line[:300]})"

    def end(self) -> None:
        """Wait until all have ended, and end those that do not."""
        for process in self._processes:
            try:
                process.wait(GRACE + 2)
            except subprocess.TimeoutExpired:
                process.kill()
                process.wait()
        self._folder.cleanup()
        for name in self._environment:
            os.environ.pop(name, None)


def start(devices: int, backend: Callable[[], str]) -> Others | None:
    """Start the other ranks of a run on so many ``devices``; None for a run on one, and in a rank. Raises UserError."""
    if launched() or devices == 1:
        return None
    if sys.orig_argv[1:2] == ["-c"] or not sys.orig_argv[1:]:
        raise UserError(
            f"machine.devices is {devices} and this program was not started from a file, so no other rank can run it; "
            "put it into a file, or use textpolicy train"
        )
    return Others(devices, backend())
