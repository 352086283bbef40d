"""Write and read a run's checkpoints: folders that are complete or absent, with a digest of every file; few are kept.

A checkpoint is written beside its place, synced, and renamed. This module knows nothing of engines: the caller fills
a folder with files, and gets a verified one back.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager, suppress
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._system.files import is_litter, read_object, sync
from ..errors import UserError

MANIFEST, STATE = "manifest.json", "state.json"
_FORMAT = 1
_SHARE = 0.05  # of a run's time that checkpoints may cost unless checkpoint.every sets their pace


class UnsoundError(Exception):
    """The error of a checkpoint that is cut off, changed or of another format; the message says which."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """The folder of a verified checkpoint: every file is as it was written."""

    path: Path
    step: int  # training steps that were done
    state: Mapping[str, Any]  # plain JSON values


@dataclass(frozen=True, slots=True)
class Found:
    """The newest sound checkpoint, and the faults of those after it."""

    checkpoint: Checkpoint | None
    faults: tuple[str, ...] = ()


@dataclass(frozen=True, slots=True)
class Checkpoints:
    """The checkpoints in one folder; the last ``keep`` are kept, and that of the best step."""

    folder: Path
    keep: int = 2

    def write(
        self, step: int, state: Mapping[str, Any], fill: Callable[[Path], None], best: int | None = None
    ) -> Checkpoint:
        """Write the checkpoint of ``step`` from ``state`` and the files that ``fill`` puts into the folder it gets.

        The checkpoint of step ``best`` is kept however old. Raises OSError, and then nothing has changed.
        """
        new, path = self.folder / f".{_name(step)}.new", self.folder / _name(step)
        self.folder.mkdir(exist_ok=True)
        self._sweep()
        new.mkdir()
        fill(new)
        (new / STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")
        files = sorted(p for p in new.rglob("*") if p.is_file() and not is_litter(p))
        for file in files:
            sync(file)
        digests = {file.relative_to(new).as_posix(): _digest(file) for file in files}
        manifest = {"format": _FORMAT, "step": step, "files": digests}
        (new / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
        for written in [new / MANIFEST, *(p for p in new.rglob("*") if p.is_dir()), new]:
            sync(written)
        # folders are renamed before their files go, so that one which is half deleted is not a checkpoint any more
        if path.exists():
            os.replace(path, self.folder / f".{_name(step)}.old")
        os.replace(new, path)
        sync(self.folder)
        for old in self.steps()[: -self.keep]:
            if old != best:
                os.replace(self.folder / _name(old), self.folder / f".{_name(old)}.old")
        self._sweep()
        return Checkpoint(path, step, state)

    def latest(self) -> Found:
        """Find the newest sound checkpoint. Raises OSError where the folder cannot be read."""
        faults: list[str] = []
        for step in reversed(self.steps()):
            try:
                return Found(read(self.folder / _name(step)), tuple(faults))
            except UnsoundError as fault:
                faults.append(f"the checkpoint {self.folder / _name(step)} is not sound: {fault}")
        return Found(None, tuple(faults))

    def steps(self) -> list[int]:
        """Return the steps of the checkpoints, sound or not, in order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(m[1]) for p in self.folder.iterdir() if (m := re.fullmatch(r"step-(\d{6,})", p.name)))

    def set_aside(self, after: int) -> None:
        """Rename the checkpoints of steps above ``after``, which are unsound, so that they are never chosen again."""
        for step in self.steps():
            if step > after:
                aside = self.folder / f"unsound-{_name(step)}"
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(self.folder / _name(step), aside)

    def _sweep(self) -> None:
        """Remove unfinished and discarded checkpoints."""
        for path in [*self.folder.glob(".step-*.new"), *self.folder.glob(".step-*.old")]:
            while path.exists():  # on a disk that has no attributes, macOS removes the ._ half of a file with the file
                with suppress(FileNotFoundError):
                    shutil.rmtree(path)


def read(path: Path) -> Checkpoint:
    """Return the checkpoint in the folder ``path`` after checking every byte of it. Raises UnsoundError."""
    try:
        manifest = read_object(path / MANIFEST, "it is damaged")
    except UserError as error:
        raise UnsoundError(str(error)) from error
    if manifest is None:
        raise UnsoundError(f"it lacks {MANIFEST}")
    format, step, files = (manifest.get(name) for name in ("format", "step", "files"))
    if format != _FORMAT or type(step) is not int or _name(step) != path.name or not isinstance(files, dict):
        raise UnsoundError(f"its {MANIFEST} is of format {format!s:.20} and step {step!s:.20}")
    for name, digest in files.items():
        if ".." in Path(name).parts or Path(name).is_absolute() or not (path / name).is_file():
            raise UnsoundError(f"it lacks {name}")
        if _digest(path / name) != digest:
            raise UnsoundError(f"{name} is not as it was written")
    if STATE not in files:
        raise UnsoundError(f"it lacks {STATE}")
    return Checkpoint(path, step, json.loads((path / STATE).read_text(encoding="utf-8")))


def link_tree(source: Path, target: Path) -> None:
    """Copy the folder ``source`` to ``target``, by hard links where the file system has them."""
    for file in sorted(p for p in source.rglob("*") if p.is_file() and not is_litter(p)):
        copy = target / file.relative_to(source)
        copy.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, copy)
        except OSError:  # a file system without hard links
            shutil.copyfile(file, copy)


class Pace:
    """The pace of checkpoints: one every so many steps, or, at 0, as many as cost a twentieth of the time."""

    def __init__(self, every: int, clock: Callable[[], float] = time.perf_counter) -> None:
        """Start with ``every`` (steps) and a monotonic ``clock`` (seconds)."""
        self.every, self.clock = every, clock
        self.began, self.ended = clock(), clock()  # of the last checkpoint, in seconds

    def due(self, step: int) -> bool:
        """Return whether a checkpoint is due after so many steps."""
        if self.every:
            return step % self.every == 0
        cost = self.ended - self.began
        return self.clock() - self.ended >= cost / _SHARE - cost

    @contextmanager
    def timed(self) -> Iterator[None]:
        """Measure what the checkpoint costs that is written within it."""
        self.began = self.clock()
        yield
        self.ended = self.clock()


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
