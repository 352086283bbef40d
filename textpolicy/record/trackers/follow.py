"""A metrics file followed as it grows, its rows logged to Weights & Biases: scripts/tinker_wandb_follow.py."""

from __future__ import annotations

import json
import math
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

Log = Callable[[dict[str, float]], object]


@dataclass
class Follower:
    """What of a metrics file has been read, and which steps were logged."""

    path: Path
    read: int = 0  # bytes, to the end of the last whole line
    steps: set[int] = field(default_factory=set)

    def new(self) -> list[dict[str, float]]:
        """The figures of training steps that were not there before, one dict each.

        A file that is not there yet has none; a line that is no JSON object, or has no integer step, is passed
        over; a step that comes again counts once. A file that has become shorter is read from its start.
        """
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            if file.seek(0, 2) < self.read:
                self.read = 0
            file.seek(self.read)
            lines = file.read()
        whole = lines[: lines.rfind(b"\n") + 1]
        self.read += len(whole)
        rows = [_row(line) for line in whole.splitlines()]
        return [_figures(row) for row in rows if row is not None and self._is_new(row)]

    def _is_new(self, row: dict[str, Any]) -> bool:
        step = row.get("step")
        if type(step) is not int or step in self.steps or row.get("kind", "train") != "train":
            return False
        self.steps.add(step)
        return True


def log_new(follower: Follower, log: Log) -> int:
    """Log what is new; the number of rows."""
    rows = follower.new()
    for row in rows:
        log(row)
    return len(rows)


def follow(
    follower: Follower,
    log: Log,
    poll_seconds: float,
    idle_timeout_seconds: float,
    sleep: Callable[[float], object] = time.sleep,
    clock: Callable[[], float] = time.monotonic,
) -> int:
    """Log rows as they come, until none has come for ``idle_timeout_seconds``; the number of rows."""
    count, last = 0, clock()
    while True:
        if new := log_new(follower, log):
            count, last = count + new, clock()
        elif clock() - last >= idle_timeout_seconds:
            return count
        sleep(poll_seconds)


def _row(line: bytes) -> dict[str, Any] | None:
    try:
        row = json.loads(line)
    except ValueError:  # half a line that a killed run left, or bytes that are no text
        return None
    return row if isinstance(row, dict) else None


def _figures(row: dict[str, Any]) -> dict[str, float]:
    """Its finite numbers under "tinker/"."""
    numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
    return {f"tinker/{name}": value for name, value in numbers.items() if math.isfinite(value)}
