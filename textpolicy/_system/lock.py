"""Lock a folder for one process, or one process and its children, at a time; a dead process holds no lock."""

from __future__ import annotations

import fcntl
import os
import time
from pathlib import Path
from types import TracebackType
from typing import Self, TextIO

from ..errors import UserError

LOCK = ".lock"


class RunLock:
    """The lock on a run's folder, held within a ``with``; the system releases it when the process ends."""

    def __init__(self, folder: Path) -> None:
        self.folder = folder
        self.file = -1

    def __enter__(self) -> Self:
        """Take the lock. Raises UserError if another process has it, or the folder cannot be written to."""
        try:
            self.file = os.open(self.folder / LOCK, os.O_RDWR | os.O_CREAT | os.O_CLOEXEC, 0o644)
            fcntl.lockf(self.file, fcntl.LOCK_EX | fcntl.LOCK_NB)  # unlike flock, not inherited by children
        except BlockingIOError as error:
            holder = os.read(self.file, 32).decode("ascii", "replace").strip()
            os.close(self.file)
            raise UserError(
                f"process {holder} is using the run in {self.folder}; wait until it ends, or choose another output"
            ) from error
        except OSError as error:
            raise UserError(
                f"the run folder {self.folder} cannot be written to ({error.strerror}); make it writable, "
                "or choose another"
            ) from error
        os.ftruncate(self.file, 0)
        os.pwrite(self.file, str(os.getpid()).encode("ascii"), 0)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        os.close(self.file)


def lock_with_children(path: Path, seconds: float, refusal: str) -> TextIO:
    """Open and lock the file ``path`` until it is closed here and in every process that it was passed to.

    Waits up to so many ``seconds`` for those of an earlier program. Raises UserError with the ``refusal``, OSError.
    """
    file, end = path.open("w"), time.monotonic() + seconds
    while True:
        try:
            fcntl.flock(file, fcntl.LOCK_EX | fcntl.LOCK_NB)
            return file
        except BlockingIOError as error:
            if time.monotonic() > end:
                file.close()
                raise UserError(refusal) from error
        time.sleep(0.1)
