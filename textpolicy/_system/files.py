"""Write files atomically, and sync them to the disk so that they survive a power cut."""

from __future__ import annotations

import os
from collections.abc import Callable
from pathlib import Path
from typing import BinaryIO


def write_whole(path: Path, text: str) -> None:
    """Replace the file ``path`` by ``text`` in UTF-8, atomically. Raises OSError."""
    fill_whole(path, lambda file: file.write(text.encode("utf-8")))


def fill_whole(path: Path, write: Callable[[BinaryIO], object]) -> None:
    """Let ``write`` fill a file beside ``path``, then rename it to ``path``. Raises OSError."""
    new = path.with_name(f".{path.name}.new")
    with new.open("wb") as file:
        write(file)
        file.flush()
        os.fsync(file.fileno())
    os.replace(new, path)
    sync(path.parent)


def sync(path: Path) -> None:
    """Wait until a file's content, or a folder's list of names, is on the disk. Raises OSError."""
    descriptor = os.open(path, os.O_RDONLY)
    try:
        os.fsync(descriptor)
    finally:
        os.close(descriptor)


def sync_tree(folder: Path) -> None:
    """Sync everything below ``folder``, then ``folder`` itself and its parent. Raises OSError."""
    for path in folder.rglob("*"):
        sync(path)
    sync(folder)
    sync(folder.parent)
