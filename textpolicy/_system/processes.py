"""Fresh interpreters that import this package and whatever this one can, and functions that are sent to them."""

from __future__ import annotations

import os
import subprocess
import sys
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any

from .extras import extra


def worker(serve: str, *arguments: object) -> tuple[subprocess.Popen[bytes], Connection]:
    """A process that calls the function ``serve`` ("module:name") with a pipe's descriptor, and our end of that pipe.

    It imports no script of the user: what it runs comes through the pipe.
    """
    module, name = serve.split(":")
    ours, theirs = Pipe()
    with theirs:
        given = ", ".join(map(repr, (theirs.fileno(), *arguments)))
        process = subprocess.Popen(
            [*interpreter(), f"from {module} import {name}; {name}({given})"],
            pass_fds=[theirs.fileno()],
            env=environment(),
            stdin=subprocess.DEVNULL,
        )
    return process, ours


def interpreter() -> list[str]:
    """The command that runs the Python code after it; nothing from the current folder comes before the path below."""
    return [sys.executable, "-P", "-c"]


def environment(**more: str) -> dict[str, str]:
    """This process's environment and import path, and ``more``."""
    return {**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **more}


def cloudpickle() -> Any:
    """What sends functions defined anywhere, lambdas too, which pickle does not. Raises MissingDependencyError."""
    return extra("cloudpickle", "textpolicy[workers]")
