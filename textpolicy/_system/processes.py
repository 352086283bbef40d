"""Start Python processes with the same import path, and send functions to them."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from .extras import extra


def worker(serve: str, *arguments: object, **variables: str) -> tuple[subprocess.Popen[bytes], Connection]:
    """Start a process that calls the function ``serve`` ("module:name") with a pipe's descriptor.

    Returns the process and this end of the pipe. It imports no script of the user: all that it runs is sent
    through the pipe. ``variables`` are added to its environment.
    """
    module, name = serve.split(":")
    ours, theirs = Pipe()
    with theirs:
        given = ", ".join(map(repr, (theirs.fileno(), *arguments)))
        process = subprocess.Popen(
            [sys.executable, "-P", "-c", f"from {module} import {name}; {name}({given})"],  # -P: no current folder
            pass_fds=[theirs.fileno()],
            env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **variables},
            stdin=subprocess.DEVNULL,
        )
    return process, ours


def cloudpickle() -> Any:
    """Return cloudpickle, which sends functions defined anywhere, lambdas too. Raises MissingDependencyError."""
    return extra("cloudpickle", "textpolicy[workers]")
