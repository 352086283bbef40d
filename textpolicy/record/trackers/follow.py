"""Follow a metrics file while it grows and log its rows to Weights & Biases: scripts/tinker_wandb_follow.py."""

from __future__ import annotations

import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from ..._system.files import parse_json

_LARGEST = 1e300  # NaN, infinities and whole numbers of hundreds of digits are none that a tracker takes
Log = Callable[[dict[str, float]], object]


@dataclass
class Follower:
    """The reader of a growing metrics file, which remembers what it has read and which steps were logged."""

    path: Path
    read: int = 0  # bytes, to the end of the last complete line
    steps: set[int] = field(default_factory=set)

    def new(self) -> list[dict[str, float]]:
        """Return the finite numbers of each new training step, under "tinker/".

        A missing file has none. Lines that are not JSON objects or have no integer step are skipped, and each step
        counts once. A file that has become shorter is read from its start.
        """
        if not self.path.is_file():
            return []
        with self.path.open("rb") as file:
            if file.seek(0, 2) < self.read:
                self.read = 0
            file.seek(self.read)
            lines = file.read()
        complete = lines[: lines.rfind(b"\n") + 1]
        self.read += len(complete)
        found: list[dict[str, float]] = []
        for line in complete.splitlines():
            try:
                row = parse_json(line)
            except ValueError:  # a partial line left by a killed run, or bytes that are not text
                continue
            if not isinstance(row, dict) or row.get("kind", "train") != "train":
                continue
            step = row.get("step")
            if type(step) is not int or step in self.steps:
                continue
            self.steps.add(step)
            numbers = {k: v for k, v in row.items() if isinstance(v, int | float) and not isinstance(v, bool)}
            found.append({f"tinker/{name}": value for name, value in numbers.items() if abs(value) < _LARGEST})
        return found


def log_new(follower: Follower, log: Log) -> int:
    """Log the new rows and return how many there were."""
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
    """Log rows until none has come for ``idle_timeout_seconds``; return the number of rows."""
    count, last = 0, clock()
    while True:
        if new := log_new(follower, log):
            count, last = count + new, clock()
        elif clock() - last >= idle_timeout_seconds:
            return count
        sleep(poll_seconds)
