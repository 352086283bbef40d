"""The one pool of worker processes: a call is killed at its time limit, and a process that dies is replaced."""

from __future__ import annotations

import math
import os
import pickle
import queue
import signal
import subprocess
import sys
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing import Pipe
from multiprocessing.connection import Connection
from typing import Any, Self

from .._system.extras import extra
from ..errors import RewardError, UserError
from .contract import name_of

CLOUDPICKLE = ("cloudpickle", "textpolicy[workers]")  # the package that sends any function, and its extra
START_LIMIT = 60.0  # seconds until a new worker process has read its functions
ATTEMPTS = 2  # of a call whose worker dies, whoever killed it
_POLL = 0.5  # seconds between checks that a silent worker is alive


class TooSlowError(Exception):
    """The call took longer than its limit; the process that made it was killed."""


class WorkerDiedError(Exception):
    """The worker process died at every attempt of a call."""


@dataclass(frozen=True, slots=True)
class Raised:
    """The description of an exception in a worker process: exceptions themselves need not be picklable."""

    kind: str  # the exception's class
    text: str
    trace: str
    refused: bool  # it is a UserError, whose text says what to do

    @classmethod
    def of(cls, error: Exception) -> Self:
        """Describe ``error``, in whose handler this is called."""
        return cls(type(error).__name__, str(error), traceback.format_exc(), isinstance(error, UserError))


class WorkerRaisedError(Exception):
    """The function raised in its worker process; the message is the traceback."""

    def __init__(self, raised: Raised) -> None:
        super().__init__(raised.trace)
        self.raised = raised


class Workers:
    """The pool of ``count`` processes that hold ``functions`` and call them on request, from any thread.

    Processes start when first needed, and end with this object or the program. Functions are sent by
    cloudpickle, so lambdas and those of a script's main module can be sent too.
    """

    def __init__(self, functions: Sequence[Callable[..., Any]], count: int) -> None:
        """Pickle the functions. Raises UserError if that fails, MissingDependencyError without cloudpickle."""
        try:
            blob = bytes(extra(*CLOUDPICKLE).dumps(list(functions)))
        except (TypeError, pickle.PicklingError) as error:
            names = ", ".join(map(name_of, functions))
            raise UserError(
                f"the reward {names} cannot be sent to a worker process ({error}); remove what it refers to "
                "that cannot be pickled, or set processes=False"
            ) from error
        self.all = [Worker(blob) for _ in range(count)]
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()
        for worker in reversed(self.all):
            self._idle.put(worker)
        self.close = weakref.finalize(self, _stop_all, self.all, os.getpid())  # at the latest when the program ends

    def call(self, index: int, arguments: Mapping[str, Any], limit: float | None) -> Any:
        """Return what function number ``index`` returns.

        Raises TooSlowError after ``limit`` seconds, WorkerDiedError when its process died in two attempts,
        WorkerRaisedError with what it raised.
        """
        request = pickle.dumps((index, dict(arguments)))
        worker = self._idle.get()
        try:
            for attempt in range(1, ATTEMPTS + 1):
                worker.start()
                try:
                    answer = worker.exchange(request, limit)
                    break
                except WorkerDiedError:
                    if attempt == ATTEMPTS or not self.close.alive:
                        raise
        finally:
            self._idle.put(worker)
        if isinstance(answer, Raised):
            raise WorkerRaisedError(answer)
        return answer

    def pids(self) -> list[int]:
        """Return the ids of the processes that run now."""
        return [w.process.pid for w in self.all if w.process is not None and w.process.poll() is None]


def _stop_all(workers: Sequence[Worker], owner: int) -> None:
    """Stop the ``workers`` of process ``owner``; a fork of it must not stop them when it ends."""
    if os.getpid() == owner:
        for worker in workers:
            worker.stop()


class Worker:
    """The process and the pipe to it."""

    def __init__(self, functions: bytes) -> None:
        self.functions = functions
        self.process: subprocess.Popen[bytes] | None = None
        self.pipe: Connection | None = None

    def start(self) -> None:
        """Start the process unless it runs. Raises RewardError if it does not become ready."""
        if self.process is not None and self.process.poll() is None:
            return
        self.stop()
        self.pipe, theirs = Pipe()
        with theirs:  # the process imports no script of the user: the functions are sent through the pipe
            serving = f"from {__name__} import serve; serve({theirs.fileno()})"
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", serving],  # -P: without the current folder on the import path
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path)},
                stdin=subprocess.DEVNULL,
            )
        try:
            self.exchange(self.functions, START_LIMIT)
        except (WorkerDiedError, TooSlowError) as error:
            raise RewardError(
                "a worker process for rewards ended at its start; see why in what it wrote to the standard error"
            ) from error

    def stop(self) -> None:
        """Kill the process, if one runs, and wait for it."""
        process, pipe, self.process, self.pipe = self.process, self.pipe, None, None
        if process is not None:
            process.kill()
            process.wait()
        if pipe is not None:
            pipe.close()

    def exchange(self, request: bytes, limit: float | None) -> Any:
        """Send ``request`` and return the answer; the process is killed if it gives none.

        Raises TooSlowError after ``limit`` seconds, and WorkerDiedError.
        """
        assert self.process is not None
        assert self.pipe is not None
        deadline = math.inf if limit is None else time.monotonic() + limit
        try:
            self.pipe.send_bytes(request)
            while not self.pipe.poll(min(_POLL, max(0.0, deadline - time.monotonic()))):
                if time.monotonic() >= deadline:
                    raise TooSlowError
                if self.process.poll() is not None:  # a child of it may hold the pipe open
                    raise WorkerDiedError("the worker process ended")
            return pickle.loads(self.pipe.recv_bytes())
        except BaseException as error:  # an interrupt must not leave its answer to the next request
            self.stop()
            if isinstance(error, EOFError | OSError):
                raise WorkerDiedError("the worker process ended") from error
            raise


# ---- what a worker process runs


def serve(descriptor: int) -> None:
    """Receive the functions, then answer requests until the pipe closes."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the parent's
    pipe = Connection(descriptor)
    functions = pickle.loads(pipe.recv_bytes())
    pipe.send_bytes(pickle.dumps(None))
    while True:
        try:
            request = pipe.recv_bytes()
        except EOFError:
            return
        try:
            index, arguments = pickle.loads(request)
            answer = pickle.dumps(functions[index](**arguments))
        except Exception as error:  # noqa: BLE001 (a user's function may raise anything; all of it is sent back)
            answer = pickle.dumps(Raised.of(error))
        pipe.send_bytes(answer)
