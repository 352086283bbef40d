"""Write files atomically, sync them to the disk so that they survive a power cut, and list what a folder holds."""

from __future__ import annotations

import errno
import fcntl
import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO

# What Finder, Spotlight and the trash leave in folders and at the top of volumes.
_LITTER = {
    ".DS_Store",
    ".localized",
    "Icon\r",
    ".apdisk",
    ".fseventsd",
    ".Spotlight-V100",
    ".TemporaryItems",
    ".Trashes",
}


def write_whole(path: Path, text: str) -> None:
    """Replace the file ``path`` by ``text`` in UTF-8, atomically. Raises OSError."""
    fill_whole(path, lambda file: file.write(text.encode("utf-8")))


def fill_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it to ``path``. Raises OSError."""
    new = path.with_name(f".{path.name}.new")
    with new.open("wb") as file:
        write(file)
        file.flush()
        to_disk(file.fileno())
    os.replace(new, path)
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
    """Return whether macOS put ``path`` there by itself: Finder's .DS_Store and kin, the ._ half of another file."""
    return path.name.startswith("._") or path.name in _LITTER


def names(folder: Path) -> set[str]:
    """Return the names in ``folder`` without those that macOS puts there by itself. Raises OSError."""
    return {path.name for path in folder.iterdir() if not is_litter(path)}
