"""Rollout workers: processes with an environment and a policy of their own, watched while they work."""

from __future__ import annotations

import signal
import subprocess
import time
import traceback
from collections.abc import Callable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from multiprocessing.connection import Connection, wait
from typing import Any

import numpy as np

from .._system import processes as _processes
from ..errors import WorkerError
from ..rewards.contract import accepted_keywords
from .runner import RolloutRunner
from .strategy import create_strategy

Fields = Mapping[str, Any]  # of a buffer's Episode, as its ``to_dict`` gives them
PATIENCE = 2.0  # seconds a worker has to end by itself
POLL = 0.2  # seconds between looks whether one has died


@dataclass(frozen=True)
class Work:
    """What a worker does."""

    env_fn: Callable[..., Any]
    policy_fn: Callable[..., Any]
    algorithm: str
    max_steps: int
    max_episodes: int


class Workers:
    """``count`` processes, each with what ``env_fn`` and ``policy_fn`` make in it.

    One that dies ends the ``collect`` in progress with a WorkerError, at once, and is replaced when the
    next begins; the others live on.
    """

    def __init__(self, work: Work, count: int, seconds: float | None = None) -> None:
        """``seconds`` bounds one ``collect``, the start of workers included; None waits for as long as they live."""
        self._payload, self._seconds = _pickled(work), seconds
        self._workers: list[_Worker | None] = [None] * count
        self._asked = 0  # answers to an earlier question are thrown away

    def collect(self) -> list[list[Fields]]:
        """The episodes of each worker, in order. Raises WorkerError."""
        self._asked += 1
        workers = [self._started(i) for i in range(len(self._workers))]
        for worker in workers:
            worker.ask(self._asked)
        deadline = None if self._seconds is None else time.monotonic() + self._seconds
        answers: dict[int, list[Fields]] = {}
        while len(answers) < len(workers):
            self._await([w for w in workers if w.index not in answers], answers, deadline)
        return [answers[w.index] for w in workers]

    def close(self) -> None:
        """End all workers, those that do not listen too."""
        for i, worker in enumerate(self._workers):
            if worker is not None:
                worker.end()
                self._workers[i] = None

    def _started(self, i: int) -> _Worker:
        worker = self._workers[i]
        if worker is None or not worker.alive:
            worker = self._workers[i] = _Worker(i, self._payload)
        return worker

    def _await(self, waiting: Sequence[_Worker], answers: dict[int, list[Fields]], deadline: float | None) -> None:
        """Take the answers that are there, for a moment; look who has died, or is too late."""
        ready = wait([w.connection for w in waiting], POLL)
        for worker in waiting:
            if worker.connection in ready:
                answers |= self._heard(worker)
            elif not worker.alive:  # without closing the pipe, if a process of its own has it
                raise self._dead(worker)
        if deadline is not None and time.monotonic() > deadline:
            self._give_up([w for w in waiting if w.index not in answers])

    def _heard(self, worker: _Worker) -> dict[int, list[Fields]]:
        try:
            asked, episodes, error = worker.connection.recv()
        except (EOFError, ConnectionError) as gone:
            raise self._dead(worker) from gone
        if error:
            raise WorkerError(f"rollout worker {worker.index} failed; mend what it ran:\n{error}")
        return {worker.index: episodes} if asked == self._asked else {}

    def _dead(self, worker: _Worker) -> WorkerError:
        code = worker.ended_within(PATIENCE)
        worker.process.kill()  # one that closed its pipe and lives
        worker.end()
        self._workers[worker.index] = None
        return WorkerError(
            f"rollout worker {worker.index} (process {worker.process.pid}) died: {_reason(code)}; "
            "the next collect() starts another in its place"
        )

    def _give_up(self, waiting: Sequence[_Worker]) -> None:
        if not waiting:
            return
        for worker in waiting:
            worker.process.kill()
            worker.end()
            self._workers[worker.index] = None
        named = ", ".join(str(w.index) for w in waiting)
        raise WorkerError(
            f"rollout worker {named} took longer than {self._seconds:g} s and was ended; raise worker_seconds"
        )


class _Worker:
    """A process and our end of its pipe."""

    def __init__(self, index: int, payload: bytes) -> None:
        self.index = index
        self.process, self.connection = _processes.worker(f"{__name__}:serve", index)
        self._send(payload)

    @property
    def alive(self) -> bool:
        return self.process.poll() is None

    def ask(self, number: int) -> None:
        self._send(number)

    def end(self) -> None:
        self.connection.close()  # which it takes as the word to end
        self.ended_within(PATIENCE)
        self.process.kill()
        self.process.wait()

    def ended_within(self, seconds: float) -> int | None:
        """The exit code, or None if it is still there."""
        with suppress(subprocess.TimeoutExpired):
            self.process.wait(seconds)
        return self.process.poll()

    def _send(self, message: Any) -> None:
        with suppress(ConnectionError):  # it died; whoever waits for its answer finds out
            self.connection.send(message)


def serve(descriptor: int, index: int) -> None:
    """A worker's life: collect when asked, until the pipe at file ``descriptor`` is closed."""
    signal.signal(signal.SIGINT, signal.SIG_IGN)  # Ctrl-C is the parent's to handle
    connection: Connection[Any, Any] = Connection(descriptor)
    runner, error = None, ""
    with suppress(EOFError):
        try:
            runner = _runner(connection.recv(), index)
        except Exception:  # noqa: BLE001 - whatever a user's function raises is told to the parent
            error = traceback.format_exc()
        while True:
            number = connection.recv()
            connection.send((number, *(_collected(runner) if runner else ([], error))))


def _collected(runner: tuple[RolloutRunner, int]) -> tuple[list[Fields], str]:
    """Episodes, or the traceback of what was raised."""
    rollouts, max_episodes = runner
    try:
        return [_plain(e.to_dict()) for e in rollouts.collect(max_episodes).episodes], ""
    except Exception:  # noqa: BLE001 - as above
        return [], traceback.format_exc()


def _runner(payload: bytes, index: int) -> tuple[RolloutRunner, int]:
    work: Work = _processes.cloudpickle().loads(payload)
    env, policy = _made(work.env_fn, index), _made(work.policy_fn, index)
    return RolloutRunner(env, policy, create_strategy(work.algorithm), work.max_steps), work.max_episodes


def _made(make: Callable[..., Any], index: int) -> Any:
    """What ``make`` returns; it is told the worker's number if its signature names ``worker``."""
    return make(worker=index) if "worker" in (accepted_keywords(make) or ()) else make()


def _plain(fields: Fields) -> Fields:
    """Arrays of whatever library as NumPy's, which can be sent."""
    arrays = ("obs", "next_obs", "logprob", "entropy", "value")
    return {k: [np.asarray(entry) for entry in v] if k in arrays else v for k, v in fields.items()}


def _pickled(work: Work) -> bytes:
    try:
        return _processes.cloudpickle().dumps(work)
    except (TypeError, ValueError, RecursionError) as error:
        raise WorkerError(
            f"env_fn or policy_fn cannot be sent to a process ({error}); load models inside the function, "
            "not outside of it"
        ) from error


def _reason(code: int | None) -> str:
    if code is None:
        return "it does not answer"
    if code < 0:
        by = signal.Signals(-code).name
        return f"{by} ended it{' (perhaps for want of memory)' if -code == signal.SIGKILL else ''}"
    return f"it ended with code {code}"
