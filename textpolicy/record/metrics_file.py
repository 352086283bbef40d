"""Write metrics.jsonl, one row of numbers per training step and per evaluation; it can be cut back to a checkpoint."""

from __future__ import annotations

import json
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from .._system.files import to_disk
from ..errors import UserError
from .reader import parse_row


class MetricsFile:
    """The file at ``path``, truncated to ``offset`` bytes and appended to from there."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        """Open the file. Raises OSError, and UserError for a file shorter than ``offset``, and for what is no file."""
        self.path = path
        if path.exists() and not path.is_file():  # a pipe would wait for a reader
            raise UserError(f"{path} is not a file; remove it, or choose another output")
        self.file = path.open("ab")
        if (size := self.file.tell()) < offset:
            self.file.close()
            raise UserError(
                f"{path} has {size} bytes but the checkpoint expects {offset}; restore the file, "
                "or remove the run folder to start again"
            )
        self.file.truncate(offset)
        self.file.seek(offset)

    def write(self, row: Mapping[str, Any]) -> None:
        """Append a row. Raises OSError."""
        self.file.write(json.dumps(row).encode("utf-8") + b"\n")
        self.file.flush()

    def sync(self) -> int:
        """Force the file to disk and return its size in bytes. Raises OSError."""
        to_disk(self.file.fileno())
        return self.file.tell()

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Return the rows of one kind so far, without the key "kind". Raises UserError for an invalid line."""
        advice, lines = "restore it, or start the run again", enumerate(self.path.read_bytes().splitlines(), 1)
        rows = [parse_row(line, f"line {number} of {self.path}", {}, advice) for number, line in lines]
        return [{k: v for k, v in row.items() if k != "kind"} for row in rows if row["kind"] == kind]

    def close(self) -> None:
        """Close the file."""
        self.file.close()
