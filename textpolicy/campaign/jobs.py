"""Run jobs as subprocesses, one or several at a time; any of them can be killed, and no finished one is repeated."""

from __future__ import annotations

import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Sequence
from dataclasses import asdict, astuple, dataclass, fields
from functools import partial
from pathlib import Path

from .._system.files import finite, parse_json
from .._system.lock import lock_with_children
from .._system.machine import RUNS
from ..errors import UserError
from ..report.words import duration

_POLL = 0.05  # seconds between checks of the processes
_PATIENCE = 10.0  # seconds for the runs of a killed campaign to end


@dataclass(frozen=True, slots=True)
class Job:
    """The command of one run, ``python -m`` its words, and the folder that it fills."""

    arm: str
    seed: int
    folder: Path
    words: tuple[str, ...]  # the module and its arguments
    finished: Callable[[Path], bool]  # returns whether a folder is that of a finished run
    resumes: bool = False  # whether the same command resumes in its folder; otherwise it needs a new one

    @property
    def name(self) -> str:
        """The arm and the seed, as one word."""
        return f"{self.arm}-seed{self.seed}"

    @property
    def command(self) -> list[str]:
        """The command as a user would type it."""
        return ["python", "-m", *self.words]

    @property
    def done(self) -> bool:
        """Return whether the run is finished."""
        return self.finished(self.folder)


@dataclass(frozen=True, slots=True)
class Attempt:
    """The start of a run, and its end."""

    arm: str
    seed: int
    returncode: int
    seconds: float  # wall-clock, of the whole process


@dataclass(slots=True)
class _Running:
    """The process of a run that has not ended."""

    job: Job
    process: subprocess.Popen[bytes]
    since: float


def carry_out(
    jobs: Sequence[Job],
    root: Path,
    *,
    parallel: int = 1,
    continue_on_error: bool = False,
    enough: Callable[[], bool] = lambda: False,
    log: Callable[[str], None] | None = None,
) -> list[Attempt]:
    """Run the unfinished ``jobs`` in order, at most ``parallel`` at a time, until ``enough()`` between two runs.

    Each of those plans with its share of the machine's memory. After a run that failed no further one starts, unless
    ``continue_on_error``. Each attempt is a line of ``root/progress.jsonl`` and has a log in ``root/logs``. The same
    call resumes where it was killed, once the runs of the killed campaign have ended. Raises UserError while another
    campaign works in ``root``.
    """
    log = log or partial(print, flush=True)  # at once, also into a file or a pipe
    if parallel < 1:
        raise UserError(f"parallel is {parallel}; set it to at least 1")
    waiting, running, attempts = [j for j in jobs if not j.done], list[_Running](), list[Attempt]()
    together = min(parallel, len(waiting))
    root.mkdir(parents=True, exist_ok=True)
    refusal = f"another campaign is running in {root}; wait for it, or choose another folder"
    with lock_with_children(root / "campaign.lock", _PATIENCE, refusal) as lock:
        try:
            changed = True
            while running or waiting:
                if changed and (enough() or (not continue_on_error and any(a.returncode for a in attempts))):
                    waiting = []
                while waiting and len(running) < parallel:
                    running.append(_start(waiting.pop(0), root, lock.fileno(), log, together))
                ended = [r for r in running if r.process.poll() is not None]
                running = [r for r in running if r not in ended]
                attempts += [_finish(r, root, log) for r in ended]
                changed = bool(ended)
                time.sleep(0 if changed else _POLL)
        finally:
            for process in [r.process for r in running]:
                process.terminate()  # the run keeps what it has, unless that takes too long
                try:
                    process.wait(_PATIENCE)
                except subprocess.TimeoutExpired:
                    process.kill()
                    process.wait()
                assert process.stdin is not None
                process.stdin.close()
    return attempts


def read_attempts(root: Path) -> list[Attempt]:
    """Read all attempts in ``root``, oldest first; a run that was killed with its campaign left no record.

    Raises UserError for a whole line that is no attempt.
    """
    path = root / "progress.jsonl"
    lines = path.read_bytes().rpartition(b"\n")[0].splitlines() if path.exists() else []
    attempts = []
    for number, line in enumerate(lines, 1):
        try:
            row = parse_json(line, finite)
            attempt = Attempt(**{f.name: row[f.name] for f in fields(Attempt)})
            if (*map(type, astuple(attempt)[:3]),) != (str, int, int) or not 0 <= attempt.seconds < 2**63:
                raise ValueError("a value of another type")
            attempts.append(attempt)
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"line {number} of {path} is not an attempt at a run; remove the line") from error
    return attempts


def _start(job: Job, root: Path, lock: int, log: Callable[[str], None], together: int) -> _Running:
    """Start or resume a run in a process that ends with this one, one of as many that go on ``together``."""
    resumed = job.resumes and job.folder.exists()
    if job.folder.exists() and not resumed:  # move what a killed or failed run left out of the way
        n = 1
        while (aside := job.folder.with_name(f"{job.folder.name}.unfinished{n}")).exists():
            n += 1
        job.folder.rename(aside)
    path = root / "logs" / f"{job.name}.log"
    for folder in (job.folder.parent, path.parent):
        folder.mkdir(parents=True, exist_ok=True)
    log(f"{job.name}: {'resumed' if resumed else 'started'}, log in {path}")
    with path.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "textpolicy.campaign.attached", *job.words],
            stdin=subprocess.PIPE,  # never written to: it closes when this process ends, and the run with it
            stdout=file,
            stderr=subprocess.STDOUT,
            env={**os.environ, RUNS: str(together)},
            pass_fds=(lock,),  # so that the lock is held until the last run has ended
        )
    return _Running(job, process, time.monotonic())


def _finish(run: _Running, root: Path, log: Callable[[str], None]) -> Attempt:
    """Record the end of a run."""
    job, code = run.job, run.process.returncode
    assert run.process.stdin is not None
    run.process.stdin.close()
    if code == 0 and not job.done:
        code = 1
    attempt = Attempt(job.arm, job.seed, code, time.monotonic() - run.since)
    with (root / "progress.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(asdict(attempt)) + "\n")
    path = root / "logs" / f"{job.name}.log"
    log(f"{job.name}: " + (f"finished in {duration(attempt.seconds)}" if code == 0 else f"failed ({code}), see {path}"))
    return attempt
