"""Runs as subprocesses, one or several at a time, so that any of them can be killed and none is repeated."""

from __future__ import annotations

import fcntl
import json
import os
import subprocess
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from ..errors import UserError

_POLL = 0.05  # seconds between looks at the runs
_PATIENCE = 10.0  # seconds for the runs of a killed campaign to end


@dataclass(frozen=True, slots=True)
class Job:
    """One run: ``python -m`` its words, which fill its folder."""

    arm: str
    seed: int
    folder: Path
    words: tuple[str, ...]  # the module and its arguments
    finished: Callable[[Path], bool]  # whether the folder is that of a finished run
    resume: tuple[str, ...] | None = None  # words that make it go on in its folder; None begins anew

    @property
    def name(self) -> str:
        return f"{self.arm}-seed{self.seed}"

    @property
    def command(self) -> list[str]:
        """As a person would type it."""
        return ["python", "-m", *self.words]

    @property
    def done(self) -> bool:
        return self.finished(self.folder)


@dataclass(frozen=True, slots=True)
class Attempt:
    """A run that was started, and how it ended."""

    arm: str
    seed: int
    returncode: int
    seconds: float  # wall-clock, of the whole process


@dataclass(slots=True)
class _Started:
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
    say: Callable[[str], None] = print,
) -> list[Attempt]:
    """Run what is not finished yet, in order, at most ``parallel`` at a time; ``enough`` ends it between runs.

    A run that fails keeps those behind it from starting, unless ``continue_on_error``. Each attempt is a line of
    ``root/progress.jsonl`` and has a log in ``root/logs``. The same call goes on where it was killed; it waits for
    nothing but the runs of a killed campaign to notice, and is refused while another one works in ``root``.
    """
    if parallel < 1:
        raise UserError(f"parallel is {parallel}; set it to at least 1")
    waiting, running, attempts = [j for j in jobs if not j.done], list[_Started](), list[Attempt]()
    with _locked(root) as lock:
        try:
            changed = True
            while running or waiting:
                if changed and (enough() or (not continue_on_error and any(a.returncode for a in attempts))):
                    waiting = []
                while waiting and len(running) < parallel:
                    running.append(_start(waiting.pop(0), root, lock, say))
                ended = [s for s in running if s.process.poll() is not None]
                running = [s for s in running if s not in ended]
                attempts += [_ended(s, root, say) for s in ended]
                changed = bool(ended)
                time.sleep(0 if changed else _POLL)
        finally:
            for started in running:
                _stop(started.process)
    return attempts


def read_attempts(root: Path) -> list[Attempt]:
    """All that were ever recorded in ``root``, oldest first; of one that was killed with its campaign there is none."""
    path = root / "progress.jsonl"
    if not path.exists():
        return []
    whole = [line for line in path.read_text(encoding="utf-8").splitlines(keepends=True) if line.endswith("\n")]
    return [Attempt(**json.loads(line)) for line in whole]


def write_whole(path: Path, text: str) -> None:
    """Replace a file, which at every moment is the old one or the new one."""
    path.parent.mkdir(parents=True, exist_ok=True)
    new = path.with_name(path.name + ".new")
    new.write_text(text, encoding="utf-8")
    os.replace(new, path)


def _start(job: Job, root: Path, lock: int, say: Callable[[str], None]) -> _Started:
    resumed = job.resume if job.folder.exists() and job.resume is not None else None
    if resumed is None:
        _clear(job.folder)
    job.folder.parent.mkdir(parents=True, exist_ok=True)
    log = root / "logs" / f"{job.name}.log"
    log.parent.mkdir(parents=True, exist_ok=True)
    say(f"{job.name}: {'started' if resumed is None else 'goes on'}, log in {log}")
    with log.open("ab") as file:
        process = subprocess.Popen(
            [sys.executable, "-m", "textpolicy.campaign.attached", *job.words, *(resumed or ())],
            stdin=subprocess.PIPE,  # never written to: it closes when this process ends, and the run with it
            stdout=file,
            stderr=subprocess.STDOUT,
            pass_fds=(lock,),  # so that the lock is held until the last run is gone
        )
    return _Started(job, process, time.monotonic())


def _ended(started: _Started, root: Path, say: Callable[[str], None]) -> Attempt:
    job, code = started.job, started.process.returncode
    _let_go(started.process)
    if code == 0 and not job.done:
        code = 1
    attempt = Attempt(job.arm, job.seed, code, time.monotonic() - started.since)
    with (root / "progress.jsonl").open("a", encoding="utf-8") as file:
        file.write(json.dumps(_row(attempt)) + "\n")
    log = root / "logs" / f"{job.name}.log"
    say(f"{job.name}: " + (f"finished in {attempt.seconds:.0f} s" if code == 0 else f"failed ({code}), see {log}"))
    return attempt


def _stop(process: subprocess.Popen[bytes]) -> None:
    """Let a run keep what it has, and end it if that takes too long."""
    process.terminate()
    try:
        process.wait(_PATIENCE)
    except subprocess.TimeoutExpired:
        process.kill()
        process.wait()
    _let_go(process)


def _let_go(process: subprocess.Popen[bytes]) -> None:
    assert process.stdin is not None
    process.stdin.close()


def _row(attempt: Attempt) -> dict[str, Any]:
    return {"arm": attempt.arm, "seed": attempt.seed, "returncode": attempt.returncode, "seconds": attempt.seconds}


def _clear(folder: Path) -> None:
    """Move what a killed or failed run left out of the way of the next attempt."""
    if folder.exists():
        n = 1
        while (aside := folder.with_name(f"{folder.name}.unfinished{n}")).exists():
            n += 1
        folder.rename(aside)


@contextmanager
def _locked(root: Path) -> Iterator[int]:
    """A lock on the campaign's folder, which ends with the last process that holds it. Raises UserError."""
    root.mkdir(parents=True, exist_ok=True)
    with (root / "campaign.lock").open("w") as file:
        for left in range(int(_PATIENCE / 0.1), -1, -1):
            try:
                fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
                break
            except BlockingIOError as error:
                if not left:
                    raise UserError(
                        f"another campaign is running in {root}; wait for it, or choose a folder"
                    ) from error
                time.sleep(0.1)
        yield file.fileno()
