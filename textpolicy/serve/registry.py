"""The state of the server: sessions, models, samplers, and every request with its result; the journal has it all."""

from __future__ import annotations

import json
import secrets
import time
from collections.abc import Mapping
from concurrent.futures import Future
from dataclasses import asdict, dataclass, field
from typing import Any

from ..serving import Adapter, Learner
from .journal import Journal, Statement

REPLAYED = ("forward_backward", "optim_step", "load_weights")  # what changes a model, and is repeated after a restart


@dataclass(frozen=True, slots=True)
class Outcome:
    """The end of a request."""

    status: str  # done, failed or cancelled
    body: bytes
    protobuf: bool = False

    @classmethod
    def of_error(cls, sentence: str, *, user: bool, status: str = "failed") -> Outcome:
        """Return the outcome of a request that failed by the ``user``'s fault or by the server's."""
        body = {"error": sentence, "category": "user" if user else "server"}
        return cls(status, json.dumps(body).encode())


@dataclass(eq=False, slots=True)
class Job:
    """The request, which is answered with a promise of its result."""

    id: str
    owner: str  # the model or the sampler
    seq: int  # its place in the owner's order
    kind: str  # the name of its route
    session: str
    payload: bytes | None  # None once it is not needed
    accepted: float = field(default_factory=time.time)  # seconds since the epoch
    seen: float = field(default_factory=time.monotonic)  # when this process took it in, in seconds of no clock
    retrieved: float | None = None
    end: Future[Outcome] = field(default_factory=Future)
    committed: Future[Any] | None = None  # None: it was, before this process began

    @property
    def waiting(self) -> bool:
        """The fact that it has not ended."""
        return not self.end.done()


@dataclass(eq=False, slots=True)
class Session:
    """The work of one client."""

    id: str
    created: float
    about: Mapping[str, Any]
    ended: str | None = None
    seen: float = field(default_factory=time.monotonic)  # when the client was last heard of
    gone: bool = False  # not heard of for long


@dataclass(eq=False, slots=True)
class Tenant:
    """The model that a client trains."""

    id: str
    session: str
    base: str = ""
    adapter: Adapter = field(default_factory=Adapter)
    created: float = field(default_factory=time.time)
    about: Mapping[str, Any] | None = None
    done: int = -1  # the last request that has run; 0 makes it
    state: str | None = None  # the folder on disk that has its state after request ``state_seq``
    state_seq: int = -1
    steps: int = 0
    lost: str | None = None  # why it cannot be used
    learner: Learner | None = None  # None while it is on disk only
    settled: bool = True  # whether no gradient waits for its step
    waiting: dict[int, Job] = field(default_factory=dict)
    used: float = field(default_factory=time.time)
    kept_at: float = float("-inf")
    keep_cost: float = 0.0  # seconds that writing the state took

    @property
    def ready(self) -> Job | None:
        """The next request, if it has come."""
        return self.waiting.get(self.done + 1)


@dataclass(frozen=True, slots=True)
class Sampler:
    """The sampler of a base model, of a checkpoint, of a snapshot, or of the newest weights published by a model."""

    id: str
    session: str
    base: str
    path: str | None = None
    snapshot: str | None = None
    follows: str | None = None
    created: float = field(default_factory=time.time)


class Registry:
    """The whole of it, as the journal has it."""

    def __init__(self, journal: Journal) -> None:
        self.journal = journal
        self.sessions: dict[str, Session] = {}
        self.tenants: dict[str, Tenant] = {}
        self.samplers: dict[str, Sampler] = {}
        self.jobs: dict[str, Job] = {}
        for row in journal.read("SELECT * FROM sessions"):
            self.sessions[row["id"]] = Session(row["id"], row["created"], json.loads(row["about"]), row["ended"])
        for row in journal.read("SELECT * FROM models"):
            kept = {
                name: row[name] for name in ("id", "session", "base", "created", "done", "state", "state_seq", "steps")
            }
            about = json.loads(row["about"])
            self.tenants[row["id"]] = Tenant(**kept, adapter=Adapter(**json.loads(row["adapter"])), about=about)
        for row in journal.read("SELECT * FROM samplers ORDER BY created"):
            self.samplers[row["id"]] = Sampler(**dict(row))
        for row in journal.read("SELECT * FROM jobs ORDER BY seq"):
            self._recall(row)

    def _recall(self, row: Any) -> None:
        """Take up a request of an earlier process."""
        waits = row["status"] == "waiting"
        names = ("id", "owner", "seq", "kind", "session", "accepted", "retrieved")
        job = Job(**{name: row[name] for name in names}, payload=row["payload"] if waits else None)
        self.jobs[job.id] = job
        if not waits:
            job.end.set_result(Outcome(row["status"], row["result"], bool(row["protobuf"])))
        elif job.kind != "asample":
            tenant = self.tenants.setdefault(job.owner, Tenant(job.owner, job.session))
            if job.seq <= tenant.done:  # it ran, and what it gave could not be written
                why = "its result was lost when the server's disk was full, though it was carried out"
                self.finish(job, Outcome.of_error(why, user=False))
            else:
                tenant.waiting[job.seq] = job

    def begin(self, about: Mapping[str, Any]) -> tuple[Session, Future[Any]]:
        """Begin a session; the future ends once it is on disk."""
        session = Session(secrets.token_hex(8), time.time(), about)
        self.sessions[session.id] = session
        values = (session.id, session.created, json.dumps(about), None)
        return session, self.journal.write(("INSERT INTO sessions VALUES (?, ?, ?, ?)", values))

    def finish_session(self, session: Session, reason: str) -> Future[Any]:
        """Note that a session has ended."""
        session.ended = reason
        return self.journal.write(("UPDATE sessions SET ended = ? WHERE id = ?", (reason, session.id)))

    def accept(self, job: Job) -> None:
        """Take a request in; ``job.committed`` ends once it is on disk."""
        self.jobs[job.id] = job
        values = (job.id, job.owner, job.seq, job.kind, job.session, job.accepted, job.payload)
        sql = "INSERT INTO jobs VALUES (?, ?, ?, ?, ?, ?, ?, 'waiting', 0, NULL, NULL)"
        job.committed = self.journal.write((sql, values))

    def forget(self, job: Job) -> None:
        """Take back a request that could not be written."""
        self.jobs.pop(job.id, None)

    def add_sampler(self, sampler: Sampler) -> Future[Any]:
        """Take in a sampler; the future ends once it is on disk."""
        self.samplers[sampler.id] = sampler
        values = tuple(asdict(sampler).values())
        return self.journal.write((f"INSERT OR REPLACE INTO samplers VALUES ({', '.join('?' * len(values))})", values))

    def drop_samplers(self, session: str) -> list[str]:
        """Forget the samplers of a session that has ended, and return the folders of their snapshots."""
        dropped = [sampler for sampler in self.samplers.values() if sampler.session == session]
        for sampler in dropped:
            del self.samplers[sampler.id]
        self.journal.write(("DELETE FROM samplers WHERE session = ?", (session,)))
        return [sampler.snapshot for sampler in dropped if sampler.snapshot is not None]

    def finish(self, job: Job, outcome: Outcome, *more: Statement) -> None:
        """Write the end of a request, with ``more`` in the same transaction, and let whoever waits have it."""
        keep = job.kind in REPLAYED and outcome.status == "done"
        payload = "payload" if keep else "NULL"
        sql = f"UPDATE jobs SET status = ?, protobuf = ?, result = ?, payload = {payload} WHERE id = ?"
        values = (outcome.status, int(outcome.protobuf), outcome.body, job.id)
        job.payload = None
        # A result that cannot be written is given all the same: a full disk stops no client.
        self.journal.write((sql, values), *more).add_done_callback(lambda _: job.end.set_result(outcome))

    def save_tenant(self, tenant: Tenant) -> Statement:
        """Return the statement that writes what is known of a model."""
        values = (
            tenant.id, tenant.session, tenant.base, json.dumps(asdict(tenant.adapter)), tenant.created,
            json.dumps(tenant.about), tenant.done, tenant.state, tenant.state_seq, tenant.steps,
        )  # fmt: skip
        return f"INSERT OR REPLACE INTO models VALUES ({', '.join('?' * len(values))})", values

    def drop_old(self, seconds: float) -> None:
        """Forget results that were retrieved so many ``seconds`` ago, and all of sessions that have ended."""
        now = time.time()
        old = []
        for job in list(self.jobs.values()):
            session = self.sessions.get(job.session)
            over = session is None or session.ended is not None
            since = job.retrieved if not over else job.retrieved or job.accepted
            tenant = self.tenants.get(job.owner)
            needed = not over and job.kind in REPLAYED and tenant is not None and job.seq > tenant.state_seq
            if not job.waiting and since is not None and now - since > seconds and not needed:
                old.append(job)
        for job in old:
            del self.jobs[job.id]
        if old:
            self.journal.write(*(("DELETE FROM jobs WHERE id = ?", (job.id,)) for job in old))
