"""The server's memory on disk: sessions, models, samplers, and every request with its result, in SQLite.

One thread owns the connection and commits whatever has been asked of it meanwhile in one transaction.
"""

from __future__ import annotations

import queue
import sqlite3
import threading
from collections.abc import Sequence
from concurrent.futures import Future
from pathlib import Path
from typing import Any

from ..errors import ServiceError, UserError

FILE = "journal.sqlite"
VERSION = 1
_TABLES = """
CREATE TABLE sessions (id TEXT PRIMARY KEY, created REAL, about TEXT, ended TEXT);
CREATE TABLE models (
    id TEXT PRIMARY KEY, session TEXT, base TEXT, adapter TEXT, created REAL, about TEXT,
    done INTEGER,       -- the last request that has run
    state TEXT,         -- the folder of the state on disk, and the request after which it was written
    state_seq INTEGER,
    steps INTEGER       -- of the optimiser, so far
);
CREATE TABLE samplers (
    id TEXT PRIMARY KEY, session TEXT, base TEXT, path TEXT, snapshot TEXT, follows TEXT, created REAL
);
CREATE TABLE jobs (
    id TEXT PRIMARY KEY, owner TEXT, seq INTEGER, kind TEXT, session TEXT, accepted REAL,
    payload BLOB,       -- until it is not needed for a replay
    status TEXT,        -- waiting, done, failed or cancelled
    protobuf INTEGER, result BLOB, retrieved REAL
);
CREATE INDEX jobs_of ON jobs (owner, seq);
"""
Statement = tuple[str, Sequence[Any]]


class Journal:
    """The journal in ``folder``; ``write`` and ``read`` may be called from any thread."""

    def __init__(self, folder: Path) -> None:
        """Open the journal, or begin one. Raises UserError for a file that is none, or of another version."""
        self.path = folder / FILE
        self._asked: queue.SimpleQueue[tuple[Sequence[Statement], bool, Future[Any]] | None] = queue.SimpleQueue()
        opened: Future[None] = Future()
        self._thread = threading.Thread(target=self._run, args=(opened,), name="journal", daemon=True)
        self._thread.start()
        opened.result()

    def write(self, *statements: Statement) -> Future[Any]:
        """Carry out the statements, all or none; the future ends once they are on disk, or with a ServiceError."""
        future: Future[Any] = Future()
        self._asked.put((statements, False, future))
        return future

    def read(self, sql: str, *values: Any) -> list[sqlite3.Row]:
        """Return the rows of a query, after everything written before it. Raises ServiceError."""
        future: Future[Any] = Future()
        self._asked.put(([(sql, values)], True, future))
        rows: list[sqlite3.Row] = future.result()
        return rows

    def close(self) -> None:
        """Write what was asked for and close the file."""
        self._asked.put(None)
        self._thread.join()

    def _open(self) -> sqlite3.Connection:
        """Open the file. Raises UserError."""
        try:
            connection = sqlite3.connect(self.path, isolation_level=None, check_same_thread=True)
            connection.row_factory = sqlite3.Row
            for pragma in ("journal_mode = WAL", "synchronous = FULL", "fullfsync = ON", "temp_store = MEMORY"):
                connection.execute(f"PRAGMA {pragma}")
            [found] = connection.execute("PRAGMA user_version").fetchone()
            if found not in (0, VERSION):
                raise UserError(f"{self.path} is of another version ({found}); give the server another --folder")
            if found == 0:
                connection.executescript(f"BEGIN; {_TABLES} PRAGMA user_version = {VERSION}; COMMIT;")
        except sqlite3.Error as error:
            raise UserError(f"{self.path} cannot be used ({error}); give the server another --folder") from error
        return connection

    def _run(self, opened: Future[None]) -> None:
        """Serve the queue until it has a None."""
        try:
            connection = self._open()
        except UserError as error:
            opened.set_exception(error)
            return
        opened.set_result(None)
        last = False
        while not last:
            batch = [self._asked.get()]
            while not self._asked.empty() and len(batch) < 500:
                batch.append(self._asked.get())
            last = batch[-1] is None
            self._carry_out(connection, [asked for asked in batch if asked is not None])
        connection.close()

    def _carry_out(self, connection: sqlite3.Connection, batch: Sequence[tuple[Any, bool, Future[Any]]]) -> None:
        """Carry out the batch in one transaction; where that fails, each by itself."""
        results: list[Any] = []
        try:
            connection.execute("BEGIN IMMEDIATE")
            for statements, reads, _ in batch:
                for sql, values in statements:
                    cursor = connection.execute(sql, values)
                results.append(cursor.fetchall() if reads else None)
            connection.execute("COMMIT")
        except sqlite3.Error as error:
            if connection.in_transaction:
                connection.execute("ROLLBACK")
            if len(batch) > 1:
                for one in batch:
                    self._carry_out(connection, [one])
                return
            for _, _, future in batch:
                future.set_exception(
                    ServiceError(f"the server's journal could not be written ({error}); free some space on its disk")
                )
            return
        for (_, _, future), result in zip(batch, results, strict=True):
            future.set_result(result)
