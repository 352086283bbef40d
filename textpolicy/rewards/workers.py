"""The one pool of worker processes: a call is killed at its time limit, and a process that dies is replaced."""

from __future__ import annotations

import gc
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
_GRACE = 5.0  # seconds that a forked child has to die of its alarm, before its whole worker is killed
_CHILD_DIED = 0  # number of the message that a worker's child died; requests have numbers from 1


class TooSlowError(Exception):
    """The call took longer than its limit; the process that made it was killed."""


class WorkerDiedError(Exception):
    """The worker process died at every attempt of a call."""


class ChildDiedError(WorkerDiedError):
    """The forked child died at the last attempt of a call, and its worker process lives."""


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

    With ``prepare``, each process calls it once and then forks a child, which answers. A late child dies
    of an alarm, which nothing that it computes can put off, and is replaced at once because nothing is
    imported again. ``functions`` and ``prepare`` must then be importable by name.
    """

    def __init__(
        self, functions: Sequence[Callable[..., Any]], count: int, prepare: Callable[[], None] | None = None
    ) -> None:
        """Pickle the functions. Raises UserError if that fails, MissingDependencyError without cloudpickle."""
        dumps = extra(*CLOUDPICKLE).dumps if prepare is None else pickle.dumps
        try:
            blob = bytes(dumps((list(functions), prepare)))
        except (TypeError, pickle.PicklingError) as error:
            names = ", ".join(map(name_of, functions))
            raise UserError(
                f"the reward {names} cannot be sent to a worker process ({error}); remove what it refers to "
                "that cannot be pickled, or set processes=False"
            ) from error
        self.all = [Worker(blob, forks=prepare is not None) for _ in range(count)]
        self._idle: queue.LifoQueue[Worker] = queue.LifoQueue()
        for worker in reversed(self.all):
            self._idle.put(worker)
        self.close = weakref.finalize(self, _stop_all, self.all, os.getpid())  # at the latest when the program ends

    def call(self, index: int, arguments: Mapping[str, Any], limit: float | None) -> Any:
        """Return what function number ``index`` returns.

        Raises TooSlowError after ``limit`` seconds, WorkerDiedError when its process died in two attempts
        (ChildDiedError: when its child did, and attempts share the limit), WorkerRaisedError with what it raised.
        """
        request = pickle.dumps((index, dict(arguments)))
        worker = self._idle.get()
        try:
            for attempt in range(1, ATTEMPTS + 1):
                worker.start()
                started = time.monotonic()
                try:
                    answer = worker.exchange(request, limit)
                    break
                except WorkerDiedError:
                    if attempt == ATTEMPTS or not self.close.alive:
                        raise
                    if worker.forks and limit is not None:
                        limit -= time.monotonic() - started
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

    def __init__(self, functions: bytes, forks: bool) -> None:
        self.functions, self.forks = functions, forks
        self.number = 0  # of the last request; its answer carries the same
        self.process: subprocess.Popen[bytes] | None = None
        self.pipe: Connection | None = None

    def start(self) -> None:
        """Start the process unless it runs. Raises RewardError if it does not become ready."""
        if self.process is not None and self.process.poll() is None:
            return
        self.stop()
        threads = {"OPENBLAS_NUM_THREADS": "1"} if self.forks else {}  # a fork has none of its parent's threads
        self.pipe, theirs = Pipe()
        with theirs:  # the process imports no script of the user: the functions are sent through the pipe
            serving = f"from {__name__} import serve; serve({theirs.fileno()})"
            self.process = subprocess.Popen(
                [sys.executable, "-P", "-c", serving],  # -P: without the current folder on the import path
                pass_fds=[theirs.fileno()],
                env={**os.environ, "PYTHONPATH": os.pathsep.join(sys.path), **threads},
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

        Raises TooSlowError after ``limit`` seconds, WorkerDiedError, or ChildDiedError, after which the process lives.
        """
        assert self.process is not None
        assert self.pipe is not None
        if limit is not None and limit <= 0:
            raise TooSlowError
        self.number += 1
        alarm = limit if self.forks and limit is not None else 0.0
        deadline = math.inf if limit is None else time.monotonic() + limit + (_GRACE if self.forks else 0.0)
        number, answer = -1, None
        try:
            self.pipe.send_bytes(pickle.dumps((self.number, alarm, request)))
            while number not in (_CHILD_DIED, self.number):  # other numbers answer an earlier attempt
                while not self.pipe.poll(min(_POLL, max(0.0, deadline - time.monotonic()))):
                    if time.monotonic() >= deadline:
                        raise TooSlowError
                    if self.process.poll() is not None:  # a child of it may hold the pipe open
                        raise WorkerDiedError("the worker process ended")
                number, answer = pickle.loads(self.pipe.recv_bytes())
        except BaseException as error:  # an interrupt must not leave its answer to the next request
            self.stop()
            if isinstance(error, EOFError | OSError):
                raise WorkerDiedError("the worker process ended") from error
            raise
        if number == self.number:
            return answer
        raise TooSlowError if answer == -signal.SIGALRM else ChildDiedError("the child of the worker process ended")


# ---- what a worker process runs


def serve(descriptor: int) -> None:
    """Receive the functions, then answer requests until the pipe closes; with a ``prepare``, in a forked child."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # ctrl-C is the parent's
    pipe = Connection(descriptor)
    number, _, blob = pickle.loads(pipe.recv_bytes())
    functions, prepare = pickle.loads(blob)
    if prepare is None:
        pipe.send_bytes(pickle.dumps((number, None)))
        _answer(pipe, functions)
        return
    prepare()
    gc.freeze()  # these objects are never garbage, and a child would lose time looking through them
    signal.signal(signal.SIGALRM, signal.SIG_DFL)  # the alarm ends the child
    signal.pthread_sigmask(signal.SIG_UNBLOCK, [signal.SIGALRM])
    pipe.send_bytes(pickle.dumps((number, None)))
    while True:
        child = os.fork()
        if child == 0:
            try:
                _answer(pipe, functions)
                os._exit(0)
            finally:
                os._exit(1)
        status = os.waitstatus_to_exitcode(os.waitpid(child, 0)[1])
        if status == 0:
            return
        pipe.send_bytes(pickle.dumps((_CHILD_DIED, status)))


def _answer(pipe: Connection, functions: Sequence[Callable[..., Any]]) -> None:
    while True:
        try:
            number, alarm, request = pickle.loads(pipe.recv_bytes())
        except EOFError:
            return
        if alarm:
            signal.setitimer(signal.ITIMER_REAL, alarm)
        try:
            index, arguments = pickle.loads(request)
            answer = pickle.dumps((number, functions[index](**arguments)))
        except Exception as error:  # noqa: BLE001 (a user's function may raise anything; all of it is sent back)
            answer = pickle.dumps((number, Raised.of(error)))
        if alarm:
            signal.setitimer(signal.ITIMER_REAL, 0)
        pipe.send_bytes(answer)
