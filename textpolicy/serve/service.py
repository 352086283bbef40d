"""The parts of the server but HTTP: the journal, what it holds, the checkpoints, and the thread with the models."""

from __future__ import annotations

import asyncio
import threading
import time
from collections.abc import Callable, Mapping
from concurrent.futures import Future
from pathlib import Path
from typing import Any, TypeVar

from .._system.lock import RunLock
from ..errors import ServiceError, TextPolicyError
from ..serving import Model
from .checkpoints import Checkpoints
from .journal import Journal
from .registry import Job, Registry, Session, Tenant
from .sampling import Decoders
from .training import Training
from .worker import ModelThread, Worker

MOST_WAITING = 20_000  # requests
MOST_BYTES = 2**30  # of requests that wait
T = TypeVar("T")


class RefusedError(TextPolicyError):
    """The error that ends an HTTP request with a status of its own."""

    def __init__(self, sentence: str, status: int) -> None:
        super().__init__(sentence)
        self.status = status


class Service:
    """The server of ``models``, whose folder no other server uses meanwhile."""

    def __init__(
        self,
        models: Callable[[], Mapping[str, Model]],
        folder: Path,
        *,
        patience: float = 300.0,
    ) -> None:
        """Take up what an earlier server left in ``folder``. Raises UserError, OSError, and what ``models`` raises.

        That is called in the thread that owns the models: MLX computes what was begun in another in no other.
        """
        folder.mkdir(parents=True, exist_ok=True)
        self.stopping = asyncio.Event()
        self.lock = RunLock(folder)
        self.lock.__enter__()
        self.folder, self.journal = folder, Journal(folder)
        thread = ModelThread()
        self.models = thread.submit(models).result()
        self.registry = Registry(self.journal)
        self.checkpoints = Checkpoints(folder / "checkpoints")
        self.training = Training(self.models, self.registry, self.checkpoints, folder)
        self.decoders = Decoders(self.models, self.registry, self.checkpoints)
        self.decoders.newest = self.training.newest
        self.worker = Worker(thread, self.training, self.decoders, self.registry, patience)
        self.waiting = sum(job.waiting for job in self.registry.jobs.values())
        self.bytes = sum(len(job.payload or b"") for job in self.registry.jobs.values())
        self._counting = threading.Lock()
        for job in self.registry.jobs.values():
            if job.waiting:
                self._count(job)
        self.worker.start()

    def close(self) -> None:
        """End after what is under way; the rest is done by the next server in the folder."""
        self.worker.stop()
        self.journal.close()
        self.lock.__exit__(None, None, None)

    def session(self, name: str) -> Session:
        """Return a session that goes on, and note that its client is there. Raises RefusedError."""
        session = self.registry.sessions.get(name)
        if session is None:
            raise RefusedError(f"there is no session {name!r} on this server; create another client", 404)
        if session.ended is not None:
            raise RefusedError(f"the session {name} has ended; create another client", 410)
        session.seen, session.gone = time.monotonic(), False
        return session

    def tenant(self, name: str) -> Tenant:
        """Return a model that can be trained. Raises RefusedError."""
        tenant = self.registry.tenants.get(name)
        if tenant is None:
            raise RefusedError(f"there is no model {name!r} on this server; create another training client", 404)
        if tenant.lost is not None:
            raise RefusedError(
                f"the model {name} cannot be used, since {tenant.lost}; create another training client", 410
            )
        self.session(tenant.session)
        return tenant

    async def submit(self, job: Job) -> Job:
        """Return the job that answers a request, the same one each time it is asked, once it is on disk.

        Raises RefusedError while too much waits, and where the disk is full.
        """
        known = self.registry.jobs.get(job.id)
        if known is None:
            size = len(job.payload or b"")
            if self.waiting >= MOST_WAITING or self.bytes + size > MOST_BYTES:
                raise RefusedError(f"{self.waiting} requests wait already; ask again in a moment", 429)
            known = job
            with self._counting:
                self.waiting, self.bytes = self.waiting + 1, self.bytes + size
            self.registry.accept(job)
            assert job.committed is not None
            job.committed.add_done_callback(lambda written: self._committed(job, written))
        if known.committed is not None:
            try:
                await ended(known.committed)
            except ServiceError as error:
                raise RefusedError(str(error), 507) from error
        return known

    def _committed(self, job: Job, written: Future[Any]) -> None:
        """Hand over a request that is on disk, or forget one that could not be written."""
        if written.exception() is None:
            self._count(job)
            self.worker.add(job)
        else:
            self.registry.forget(job)
            self._uncount(len(job.payload or b""))

    def _count(self, job: Job) -> None:
        """Count a request as waiting until it ends."""
        size = len(job.payload or b"")
        job.end.add_done_callback(lambda _: self._uncount(size))

    def _uncount(self, size: int) -> None:
        with self._counting:
            self.waiting, self.bytes = self.waiting - 1, self.bytes - size


def ended(future: Future[T]) -> asyncio.Future[T]:
    """Return a future of another thread as one to await, whose cancellation leaves it alone."""
    return asyncio.shield(asyncio.wrap_future(future))
