"""Worker processes for reward functions: killed at their time limit, replaced when they die."""

from __future__ import annotations

import pickle
import queue
import signal
import subprocess
import time
import traceback
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from multiprocessing.connection import Connection
from typing import Any

from .._system import processes as _processes
from ..errors import RewardError, UserError
from .contract import name_of

START_LIMIT = 60.0  # seconds until a new worker process has read its functions
ATTEMPTS = 2  # that a call has when its worker dies, by whatever hand
_LOOK = 0.5  # seconds between looks at whether a silent worker still lives


class TooSlowError(Exception):
    """A call took longer than its limit; its worker was killed."""


class WorkerDiedError(Exception):
    """A call's worker processes died, every one of them."""


@dataclass(frozen=True, slots=True)
class Raised:
    """What a function raised in a worker process: exceptions themselves need not travel."""

    kind: str  # the exception's class
    text: str
    trace: str


class WorkerRaisedError(Exception):
    """Carries what a function raised in a worker process, traceback and all."""

    def __init__(self, raised: Raised) -> None:
        super().__init__(raised.trace)
        self.raised = raised


class Workers:
    """``count`` processes that have the ``functions`` and can be asked to call them, from any thread.

    They start when first needed, and end with this object or the program. Functions travel by
    cloudpickle, so lambdas and those of a script's main module do too.
    """

    def __init__(self, functions: Sequence[Callable[..., Any]], count: int) -> None:
        """Raises UserError for functions that cannot travel, MissingDependencyError without cloudpickle."""
        blob = _pickled(functions)
        self._all = [Worker(blob) for _ in range(count)]
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()
        for worker in self._all:
            self._idle.put(worker)
        self.close = weakref.finalize(self, _stop, self._all)  # at the latest when the program ends

    def call(self, index: int, arguments: Mapping[str, Any], limit: float | None) -> Any:
        """What function number ``index`` returns.

        Raises TooSlowError after ``limit`` seconds, WorkerDiedError when its process died in two attempts,
        WorkerRaisedError with what it raised.
        """
        frame = pickle.dumps((index, dict(arguments)))
        worker = self._idle.get()
        try:
            answer = self._asked(worker, frame, limit)
        finally:
            self._idle.put(worker)
        if isinstance(answer, Raised):
            raise WorkerRaisedError(answer)
        return answer

    def _asked(self, worker: Worker, frame: bytes, limit: float | None) -> Any:
        for attempt in range(1, ATTEMPTS + 1):
            try:
                return worker.ask(frame, limit)
            except WorkerDiedError:
                if attempt == ATTEMPTS or not self.close.alive:
                    raise
        raise AssertionError("unreachable")

    def pids(self) -> list[int]:
        """The ids of the processes that run now."""
        return [w.process.pid for w in self._all if w.process is not None and w.process.poll() is None]


def _stop(workers: Sequence[Worker]) -> None:
    for worker in workers:
        worker.stop()


def _pickled(functions: Sequence[Callable[..., Any]]) -> bytes:
    try:
        return bytes(_processes.cloudpickle().dumps(list(functions)))
    except (TypeError, pickle.PicklingError) as error:
        names = ", ".join(map(name_of, functions))
        raise UserError(
            f"the reward {names} cannot be sent to a worker process ({error}); leave out what it holds "
            "that cannot be pickled, or set processes=False"
        ) from error


class Worker:
    """One process and the pipe to it; started when asked, and again after it ended."""

    def __init__(self, functions: bytes) -> None:
        self.functions = functions
        self.process: subprocess.Popen[bytes] | None = None
        self.pipe: Connection | None = None

    def ask(self, frame: bytes, limit: float | None) -> Any:
        """The answer to ``frame``; the process does not outlive a failure to give one."""
        try:
            pipe = self._running()
            return self._exchange(pipe, frame, limit)
        except BaseException:  # an interrupt must not leave its answer to the next call
            self.stop()
            raise

    def stop(self) -> None:
        """Kill the process, if one runs, and wait for it."""
        process, pipe, self.process, self.pipe = self.process, self.pipe, None, None
        if process is not None:
            process.kill()
            process.wait()
        if pipe is not None:
            pipe.close()

    def _running(self) -> Connection:
        if self.pipe is not None and self.process is not None and self.process.poll() is None:
            return self.pipe
        self.stop()
        self.process, self.pipe = _processes.worker(f"{__name__}:serve")
        try:
            self._exchange(self.pipe, self.functions, START_LIMIT)
        except (WorkerDiedError, TooSlowError) as error:
            raise RewardError(
                "a worker process for rewards ended at its start; what it wrote to the standard error says why"
            ) from error
        return self.pipe

    def _exchange(self, pipe: Connection, frame: bytes, limit: float | None) -> Any:
        try:
            pipe.send_bytes(frame)
            self._await(pipe, limit)
            return pickle.loads(pipe.recv_bytes())
        except (EOFError, OSError) as error:
            raise WorkerDiedError("the worker process ended") from error

    def _await(self, pipe: Connection, limit: float | None) -> None:
        deadline = None if limit is None else time.monotonic() + limit
        while not pipe.poll(_LOOK if deadline is None else min(_LOOK, max(0.0, deadline - time.monotonic()))):
            if deadline is not None and time.monotonic() >= deadline:
                raise TooSlowError
            if self.process is None or self.process.poll() is not None:  # a child of it may hold the pipe open
                raise WorkerDiedError("the worker process ended")


def serve(descriptor: int) -> None:
    """What a worker process runs: answer frames until the pipe closes. The first holds the functions."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the parent's
    pipe = Connection(descriptor)
    functions: list[Callable[..., Any]] = []
    while True:
        try:
            frame = pipe.recv_bytes()
        except EOFError:
            return
        if not functions:
            functions = pickle.loads(frame)
            pipe.send_bytes(pickle.dumps(None))
        else:
            pipe.send_bytes(_answer(functions, frame))


def _answer(functions: Sequence[Callable[..., Any]], frame: bytes) -> bytes:
    try:
        index, arguments = pickle.loads(frame)
        return pickle.dumps(functions[index](**arguments))
    except Exception as error:  # noqa: BLE001 (a user's function may raise anything; all of it is sent back)
        return pickle.dumps(Raised(type(error).__name__, str(error), traceback.format_exc()))
