"""The thread that owns the models: it trains what is next in each model's order, and decodes between."""

from __future__ import annotations

import shutil
import sys
import threading
import time
import traceback
from collections import deque
from collections.abc import Callable, Sequence
from concurrent.futures import Future
from queue import SimpleQueue
from typing import Any, TypeVar

from .._system.faults import machine_fault
from ..errors import NotFiniteError, TextPolicyError, UserError
from ..serving import Read, Sampled
from . import messages, requests
from .registry import Job, Outcome, Registry, Tenant
from .sampling import Decoders, read_wish
from .training import Training

LATE = 330.0  # seconds after which a request that others wait for will not come: the SDK tries for 300
REST = 3600.0  # seconds without a request after which a model leaves memory
T = TypeVar("T")
KEEP_RESULTS = 600.0  # seconds for which a result is kept after it was retrieved
HOUSEKEEPING = 5.0  # seconds between rounds of it


class ModelThread:
    """The thread that owns the models. It never ends, but waits for the process to.

    MLX frees what a thread has compiled after Python's part of the thread has ended, and where Python is ending
    meanwhile, that aborts the process (benchmarks/upstream/compiled_in_a_thread.py).
    """

    def __init__(self) -> None:
        self._calls: SimpleQueue[tuple[Future[Any], Callable[[], Any]]] = SimpleQueue()
        threading.Thread(target=self._run, name="models", daemon=True).start()

    def submit(self, call: Callable[[], T]) -> Future[T]:
        """Call ``call`` after what was submitted before; return the future of its result."""
        future: Future[T] = Future()
        self._calls.put((future, call))
        return future

    def _run(self) -> None:
        while True:
            future, call = self._calls.get()
            try:
                future.set_result(call())
            except BaseException as error:  # noqa: BLE001 - the caller raises it
                future.set_exception(error)
            del future, call


class Worker:
    """The thread. Everything but its public methods runs in it."""

    def __init__(
        self, thread: ModelThread, training: Training, decoders: Decoders, registry: Registry, patience: float
    ) -> None:
        """Take sessions that are not heard of for ``patience`` seconds for gone."""
        self._thread = thread
        self.training, self.decoders, self.registry, self.patience = training, decoders, registry, patience
        self._posts: deque[Callable[[], None]] = deque()
        self._wake = threading.Condition()
        self._stopping = False
        self._turn: deque[Tenant] = deque()  # models with something to do, in the order of their turns
        self._debt = 0.0  # seconds by which training is ahead of decoding
        self._last_round = time.monotonic()
        self._ended: Future[None] | None = None

    # ---- from other threads

    def start(self) -> None:
        """Begin, with what an earlier process has left undone."""
        for tenant in self.registry.tenants.values():
            if tenant.waiting:
                self._turn.append(tenant)
        for job in list(self.registry.jobs.values()):
            if job.kind == "asample" and job.waiting:
                self.add(job)
        self._ended = self._thread.submit(self._run)

    def post(self, action: Callable[[], None]) -> None:
        """Let the thread call ``action`` soon."""
        with self._wake:
            self._posts.append(action)
            self._wake.notify()

    def add(self, job: Job) -> None:
        """Take in a request that has been written to the journal."""
        self.post(lambda: self._sample(job) if job.kind == "asample" else self._train(job))

    def cancel(self, job: Job, why: str) -> None:
        """End a request for completions."""
        self.post(lambda: self._cancel(job, why))

    def stop(self) -> None:
        """End after what is under way, with every model's state on disk."""
        with self._wake:
            self._stopping = True
            self._wake.notify()
        if self._ended is not None:
            self._ended.result()

    # ---- in the thread

    def _run(self) -> None:
        while not self._stopping:
            try:
                self._round()
            except Exception as error:  # noqa: BLE001 - nobody else would serve the clients that are there
                failure(error)
                time.sleep(0.1)
        for tenant in self.registry.tenants.values():
            if tenant.learner is not None:
                self.training.rest(tenant)

    def _round(self) -> None:
        """Do one thing: a request of a model, or a step of decoding; wait if there is nothing to do."""
        with self._wake:
            if not (self._posts or self._stopping or self._next_to_train() or len(self.decoders)):
                self._wake.wait(HOUSEKEEPING)
            posts = list(self._posts)
            self._posts.clear()
        for action in posts:
            action()
        if time.monotonic() - self._last_round > HOUSEKEEPING:
            self._last_round = time.monotonic()
            self._tidy()
        training = self._next_to_train()
        decoding = len(self.decoders) > 0
        if not (training and decoding):
            self._debt = 0.0
        begun = time.monotonic()
        if training is not None and (not decoding or self._debt <= 0):
            self._train_next(training)
            self._debt += time.monotonic() - begun
        elif decoding:
            self.decoders.turn()
            self._debt -= time.monotonic() - begun

    def _next_to_train(self) -> Tenant | None:
        """Return the model whose turn it is, of those whose next request has come."""
        return next((tenant for tenant in self._turn if tenant.ready is not None and tenant.lost is None), None)

    def _train_next(self, tenant: Tenant) -> None:
        job = tenant.ready
        assert job is not None
        self._turn.remove(tenant)
        try:
            self.training.run(tenant, job)
        except Exception as error:  # noqa: BLE001 - a request that fails, however it does, must not end the server
            self.training.end(tenant, job, failure(error))
        if tenant.waiting:
            self._turn.append(tenant)

    def _train(self, job: Job) -> None:
        """Queue a request of a model."""
        tenant = self.registry.tenants[job.owner]
        if job.seq <= tenant.done:
            self.registry.finish(job, Outcome.of_error("it came after later requests had been carried out", user=True))
            return
        tenant.waiting[job.seq] = job
        if tenant not in self._turn:
            self._turn.append(tenant)

    def _sample(self, job: Job) -> None:
        """Queue a request for completions."""
        sampler = self.registry.samplers.get(job.owner)
        try:
            if sampler is None:
                raise UserError(f"there is no sampler {job.owner!r}; create another")
            assert job.payload is not None
            asked = requests.read_json(requests.Sample, job.payload)
            wish = read_wish(asked, job.id, sampler, self.training.base(sampler.base))
        except TextPolicyError as error:
            self.registry.finish(job, failure(error))
            return

        def answer(sampled: Sequence[Sampled], read: Read | None) -> None:
            body = messages.write_sampled(sampled, read, bool(asked.prompt_logprobs))
            self.registry.finish(job, Outcome("done", body, True))

        wish.answer, wish.refuse = answer, lambda error: self.registry.finish(job, failure(error))
        self.decoders.add(wish)

    def _cancel(self, job: Job, why: str) -> None:
        if job.kind == "asample" and job.payload is not None:
            self.decoders.cancel(job.id)
            self.registry.finish(job, Outcome.of_error(why, user=True, status="cancelled"))

    def _tidy(self) -> None:
        """End what nobody waits for, and forget what is not needed any more."""
        now = time.time()
        for session in list(self.registry.sessions.values()):
            if session.ended is None and not session.gone and time.monotonic() - session.seen > self.patience:
                session.gone = True
                self.end_session(session.id, "its client has not been heard of for long", keep=True)
        for tenant in list(self.registry.tenants.values()):
            if tenant.waiting and tenant.ready is None:
                if time.monotonic() - min(job.seen for job in tenant.waiting.values()) > LATE:
                    self._give_up(tenant)
            elif not tenant.waiting and tenant.learner is not None and now - tenant.used > REST:
                self.training.rest(tenant)
        self.registry.drop_old(KEEP_RESULTS)
        self.training.checkpoints.expire()

    def _give_up(self, tenant: Tenant) -> None:
        """Fail the requests that wait for one that never came, and go on after them."""
        missing = tenant.done + 1
        for seq in sorted(tenant.waiting):
            why = f"request {missing} of this model never came, and this one is to follow it; send its work again"
            self.training.end(tenant, tenant.waiting[seq], Outcome.of_error(why, user=True))

    def end_session(self, session: str, why: str, *, keep: bool) -> None:
        """End the requests of a session; its models rest, or are dropped unless ``keep``. Called in the thread."""
        for job in list(self.registry.jobs.values()):
            if job.session == session:
                self._cancel(job, why)
        for tenant in list(self.registry.tenants.values()):
            if tenant.session == session:
                for seq in sorted(tenant.waiting):
                    self.training.end(tenant, tenant.waiting[seq], Outcome.of_error(why, user=True, status="cancelled"))
                if keep:
                    self.training.rest(tenant)
                else:
                    self.training.drop(tenant)
                    tenant.lost = "its session has ended"
        if not keep:
            for folder in self.registry.drop_samplers(session):
                shutil.rmtree(folder, ignore_errors=True)


def failure(error: BaseException) -> Outcome:
    """Return the outcome of a request that raised ``error``, as one sentence; what nobody expected is logged."""
    if isinstance(error, OSError):
        where = f" {error.filename!r}" if error.filename is not None else ""
        return Outcome.of_error(
            f"the server could not write or read{where} ({error.strerror or error}); free some space or make it "
            "writable, and ask again", user=False
        )  # fmt: skip
    if isinstance(error, UserError | NotFiniteError):
        return Outcome.of_error(str(error), user=True)
    if isinstance(error, TextPolicyError):
        return Outcome.of_error(str(error), user=False)
    if (fault := machine_fault(error)) is not None:
        return Outcome.of_error(fault, user=False)
    print("".join(traceback.format_exception(error)), file=sys.stderr, flush=True)
    shown = " ".join(str(error).split())
    return Outcome.of_error(f"the server failed ({type(error).__name__}: {shown:.200}); its log has more", user=False)
