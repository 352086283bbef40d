"""Read paths as people write them, and JSON as it may be damaged; write files atomically; list what a folder holds."""

from __future__ import annotations

import errno
import fcntl
import json
import math
import os
from collections.abc import Callable
from contextlib import suppress
from pathlib import Path
from typing import Any, BinaryIO

from ..errors import UserError

_LITTER = {  # what Finder, Spotlight, Time Machine and the trash leave in folders and at the top of volumes
    *(".DS_Store", ".localized", "Icon\r", ".AppleDouble", ".AppleDB", ".AppleDesktop", ".LSOverride", ".apdisk"),
    *(".DocumentRevisions-V100", ".Spotlight-V100", ".fseventsd", ".TemporaryItems", ".Trashes", ".VolumeIcon.icns"),
    *("__MACOSX", "Network Trash Folder", "Temporary Items", ".com.apple.timemachine.donotpresent"),
}
_DEEPEST = 64  # lists and objects in one another: no file has as many, and what walks them calls itself


def of_a_checkout(path: Path) -> str:
    """Return the words to add where ``path`` is missing and looks like a file that only the repository has, or ""."""
    first = os.path.relpath(path).split(os.sep)[0]
    ours = first in ("examples", "experiments", "scripts", "benchmarks")
    return f"; {first}/ comes with a checkout of the repository, not with the package" if ours else ""


def local_path(given: Any) -> Any:
    """Return a path as text with the home folder in place of ``~``; anything but text and paths as it is.

    A relative path whose name begins with ``~`` becomes absolute, so that it is read only once. Raises UserError for
    a user who is not known and a name that no file can have, or that is not UTF-8, as settings and tables need.
    """
    if not isinstance(given, str | os.PathLike):
        return given
    text = os.fspath(given)
    if not text:  # of a shell variable that is not set; pathlib would take the folder that one is in
        raise UserError("a path is empty; give one, or leave its setting out")
    if "\0" in text:
        raise UserError(f"the path {text!r} has a zero byte; choose another")
    if not text.isascii() and any("\ud800" <= letter <= "\udfff" for letter in text):
        raise UserError(f"the path {text!r} has a name that is not UTF-8; rename it")
    full = os.path.expanduser(text)
    if full.startswith("~"):
        raise UserError(f"the path {text!r} begins with the home of a user who is not known; write ./{text} for a name")
    return os.path.abspath(full) if Path(full).parts[:1] and Path(full).parts[0].startswith("~") else full


def parse_json(text: str | bytes, number: Callable[[str], float] = float) -> Any:
    """Parse JSON whose floats ``number`` makes, as of the words NaN and Infinity, which Python writes.

    Raises ValueError for anything else, and for lists and objects more than 64 deep.
    """
    try:
        values = json.loads(text, parse_float=number, parse_constant=number)
    except RecursionError as error:
        raise ValueError("it is nested too deeply") from error
    level = [values]
    for _ in range(_DEEPEST):
        inside = [
            value.values() if isinstance(value, dict) else value for value in level if type(value) in (dict, list)
        ]
        level = [value for values_inside in inside for value in values_inside]
        if not level:
            return values
    raise ValueError("it is nested too deeply")


def finite(text: str) -> float:
    """Return the number that ``text`` spells. Raises ValueError for what is none, or infinite."""
    if not math.isfinite(value := float(text)):
        raise ValueError(f"{text} is not a finite number")
    return value


def read_object(path: Path, advice: str) -> dict[str, Any] | None:
    """Read the JSON object in the file ``path``, all of whose numbers are finite; None if there is no such file.

    Raises UserError, which ends with the ``advice``, for a file that cannot be read, for what is no file, such as a
    pipe that nobody writes to, and for any other content.
    """
    if not os.path.exists(path):
        return None
    try:
        if not path.is_file():
            raise OSError(errno.EINVAL, "it is not a file")
        values = parse_json(path.read_text(encoding="utf-8"), finite)
    except OSError as error:
        raise UserError(f"{path} cannot be read ({error.strerror}); {advice}") from error
    except ValueError as error:
        raise UserError(f"{path} is not JSON ({error}); {advice}") from error
    if not isinstance(values, dict):
        raise UserError(f"{path} is not a JSON object; {advice}")
    return values


def write_whole(path: Path, text: str) -> None:
    """Replace the file ``path`` by ``text`` in UTF-8, atomically. Raises OSError."""
    fill_whole(path, lambda file: file.write(text.encode("utf-8")))


def fill_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it to ``path``. Raises OSError.

    Of several processes that do so at once, each waits for the one before, so that the file is always a whole one. A
    device or a pipe is written to, and never replaced.
    """
    if path.exists() and not path.is_file():
        with path.open("wb") as file:
            write(file)
        return
    new = path.with_name(f".{path.name}.new")
    while True:
        with os.fdopen(os.open(new, os.O_WRONLY | os.O_CREAT | os.O_CLOEXEC, 0o666), "wb") as file:
            with suppress(OSError):  # a file system without locks
                fcntl.flock(file, fcntl.LOCK_EX)
            try:
                if not os.path.samestat(os.fstat(file.fileno()), new.stat()):
                    continue
            except FileNotFoundError:  # renamed by the process that had the lock
                continue
            file.truncate()
            write(file)
            file.flush()
            to_disk(file.fileno())
            os.replace(new, path)
        break
    sync(path.parent)


def to_disk(descriptor: int) -> None:
    """Wait until what was written through ``descriptor`` is on the disk itself. Raises OSError.

    macOS's fsync ends once the drive has the data, which it may keep in its cache and reorder; F_FULLFSYNC empties
    that cache. File systems without it (network, FUSE) refuse, and then fsync is what there is.
    """
    full = getattr(fcntl, "F_FULLFSYNC", None)
    if full is not None:
        try:
            fcntl.fcntl(descriptor, full)
            return
        except OSError as error:
            if error.errno in (errno.ENOSPC, errno.EIO, errno.EDQUOT):  # not about the call, but about the disk
                raise
    os.fsync(descriptor)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        to_disk(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Sync everything below ``folder``, then ``folder`` itself and its parent. Raises OSError."""
    for path in folder.rglob("*"):
        if not is_litter(path):
            sync(path)
    sync(folder)
    sync(folder.parent)


def is_litter(path: Path) -> bool:
    """Return whether macOS put ``path`` there by itself, such as Finder's .DS_Store or the ._ half of another file."""
    return path.name.startswith("._") or path.name in _LITTER


def names(folder: Path) -> set[str]:
    """Return the names in ``folder`` without those that macOS puts there by itself. Raises OSError."""
    return {path.name for path in folder.iterdir() if not is_litter(path)}
