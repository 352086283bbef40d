"""Checkpoints of a run: folders that are there whole or not at all, with a digest of every file; the last few are kept.

A checkpoint is written beside its place, synced, and renamed. It knows nothing of engines: who writes one fills
a folder with files, and gets a sound one back.
"""

from __future__ import annotations

import hashlib
import json
import os
import re
import shutil
import time
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from .._system.files import sync

MANIFEST, STATE = "manifest.json", "state.json"
_FORMAT = 1
_SHARE = 0.05  # of a run's time that checkpoints may cost if nobody says how often they come


class UnsoundError(Exception):
    """A checkpoint that is cut off, changed or of another format; the message says what is wrong with it."""


@dataclass(frozen=True, slots=True)
class Checkpoint:
    """One whose every file is as it was written."""

    path: Path
    step: int  # training steps that were done
    state: Mapping[str, Any]  # plain JSON values


@dataclass(frozen=True, slots=True)
class Found:
    """The newest sound checkpoint, and what is wrong with those after it."""

    checkpoint: Checkpoint | None
    faults: tuple[str, ...] = ()


class Checkpoints:
    """Those in one folder, of which the last ``keep`` stay, and that of the best step."""

    def __init__(self, folder: Path, keep: int = 2) -> None:
        self.folder, self.keep = folder, keep

    def write(
        self, step: int, state: Mapping[str, Any], fill: Callable[[Path], None], best: int | None = None
    ) -> Checkpoint:
        """Make the checkpoint of ``step`` from ``state`` and the files that ``fill`` puts into the folder it is given.

        ``best`` is the step whose checkpoint stays however old. Raises OSError, with everything before untouched.
        """
        new, path = self.folder / f".{_name(step)}.new", self.folder / _name(step)
        self.folder.mkdir(exist_ok=True)
        self._sweep()
        new.mkdir()
        fill(new)
        (new / STATE).write_text(json.dumps(state) + "\n", encoding="utf-8")
        _seal(new, step)
        if path.exists():
            os.replace(path, self.folder / f".{_name(step)}.old")
        os.replace(new, path)
        sync(self.folder)
        self._prune(best)
        return Checkpoint(path, step, state)

    def latest(self) -> Found:
        """The newest sound one. Raises OSError where the folder cannot be read."""
        faults: list[str] = []
        for step in reversed(self.steps()):
            try:
                return Found(read(self.folder / _name(step)), tuple(faults))
            except UnsoundError as fault:
                faults.append(f"the checkpoint {self.folder / _name(step)} is not sound: {fault}")
        return Found(None, tuple(faults))

    def steps(self) -> list[int]:
        """Of the checkpoints that are there, sound or not, in order."""
        if not self.folder.is_dir():
            return []
        return sorted(int(m[1]) for p in self.folder.iterdir() if (m := re.fullmatch(r"step-(\d{6,})", p.name)))

    def set_aside(self, after: int) -> None:
        """Rename the checkpoints of steps above ``after``, which are not sound, so that they are never chosen again."""
        for step in self.steps():
            if step > after:
                aside = self.folder / f"unsound-{_name(step)}"
                shutil.rmtree(aside, ignore_errors=True)
                os.replace(self.folder / _name(step), aside)

    def _prune(self, best: int | None) -> None:
        """A folder is renamed before its files go, so that what is cut short here is no checkpoint any more."""
        for step in self.steps()[: -self.keep]:
            if step != best:
                os.replace(self.folder / _name(step), self.folder / f".{_name(step)}.old")
        self._sweep()

    def _sweep(self) -> None:
        """Remove what was on its way in or out."""
        for path in [*self.folder.glob(".step-*.new"), *self.folder.glob(".step-*.old")]:
            shutil.rmtree(path)


def read(path: Path) -> Checkpoint:
    """The checkpoint in the folder ``path``, every byte of it checked. Raises UnsoundError."""
    try:
        manifest = json.loads((path / MANIFEST).read_text(encoding="utf-8"))
        format, step, files = manifest["format"], int(manifest["step"]), dict(manifest["files"])
    except (OSError, ValueError, KeyError, TypeError) as error:
        raise UnsoundError(f"its {MANIFEST} cannot be read ({error!r})") from error
    if format != _FORMAT or _name(step) != path.name:
        raise UnsoundError(f"its {MANIFEST} is of format {format} and step {step}")
    for name, digest in files.items():
        if ".." in Path(name).parts or Path(name).is_absolute() or not (path / name).is_file():
            raise UnsoundError(f"it lacks {name}")
        if _digest(path / name) != digest:
            raise UnsoundError(f"{name} is not as it was written")
    if STATE not in files:
        raise UnsoundError(f"it lacks {STATE}")
    return Checkpoint(path, step, json.loads((path / STATE).read_text(encoding="utf-8")))


def link_tree(source: Path, target: Path) -> None:
    """Make the folder ``target`` of the same files as ``source``, by hard links where there are such."""
    for file in sorted(p for p in source.rglob("*") if p.is_file()):
        there = target / file.relative_to(source)
        there.parent.mkdir(parents=True, exist_ok=True)
        try:
            os.link(file, there)
        except OSError:  # a file system without hard links
            shutil.copyfile(file, there)


class Pace:
    """When the next checkpoint is due: every so many steps, or, at 0, as often as they cost a twentieth of the time.

    Times are in seconds, of a clock that only runs forward.
    """

    def __init__(self, every: int, clock: Callable[[], float] = time.perf_counter) -> None:
        self.every, self.clock = every, clock
        self.began, self.ended = clock(), clock()  # of the last checkpoint, in seconds

    def due(self, step: int) -> bool:
        """Whether one is due after so many steps."""
        if self.every:
            return step % self.every == 0
        cost = self.ended - self.began
        return self.clock() - self.ended >= cost / _SHARE - cost

    def begin(self) -> None:
        """A checkpoint is being written."""
        self.began = self.clock()

    def end(self) -> None:
        """It is there."""
        self.ended = self.clock()


def _name(step: int) -> str:
    return f"step-{step:06d}"


def _seal(folder: Path, step: int) -> None:
    """Sync every file, and write down what they are."""
    files = sorted(p for p in folder.rglob("*") if p.is_file())
    for file in files:
        sync(file)
    digests = {file.relative_to(folder).as_posix(): _digest(file) for file in files}
    manifest = {"format": _FORMAT, "step": step, "files": digests}
    (folder / MANIFEST).write_text(json.dumps(manifest, indent=2) + "\n", encoding="utf-8")
    for path in [folder / MANIFEST, *(p for p in folder.rglob("*") if p.is_dir()), folder]:
        sync(path)


def _digest(path: Path) -> str:
    with path.open("rb") as file:
        return hashlib.file_digest(file, "sha256").hexdigest()
