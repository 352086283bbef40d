"""metrics.jsonl: a row of numbers per step and per look at held-out problems, which can be cut back to a checkpoint."""

from __future__ import annotations

import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from ..errors import UserError


class MetricsFile:
    """The file at ``path``, kept up to ``offset`` bytes and written on from there."""

    def __init__(self, path: Path, offset: int = 0) -> None:
        """Raises OSError, and UserError for a file that is shorter than ``offset``."""
        self.path = path
        self.file = path.open("ab")
        if (size := self.file.tell()) < offset:
            self.file.close()
            raise UserError(
                f"{path} has {size} bytes and the checkpoint counts on {offset}; put the file back, "
                "or remove the run folder to begin again"
            )
        self.file.truncate(offset)
        self.file.seek(offset)

    def write(self, row: Mapping[str, Any]) -> None:
        """Add a row. Raises OSError."""
        self.file.write(json.dumps(row).encode("utf-8") + b"\n")
        self.file.flush()

    def sync(self) -> int:
        """The size of the file, all of which is on the disk. Raises OSError."""
        os.fsync(self.file.fileno())
        return self.file.tell()

    def rows(self, kind: str) -> list[dict[str, Any]]:
        """Those of one kind so far, without the key that says which. Raises UserError for a line that is no row."""
        try:
            lines = [dict(json.loads(line)) for line in self.path.read_text(encoding="utf-8").splitlines()]
            return [{k: v for k, v in row.items() if k != "kind"} for row in lines if row["kind"] == kind]
        except (ValueError, TypeError, KeyError) as error:
            raise UserError(f"{self.path} is damaged ({error}); put it back, or begin the run again") from error

    def close(self) -> None:
        self.file.close()
