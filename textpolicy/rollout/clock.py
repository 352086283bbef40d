"""Sum the seconds of each named part of some work."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager


class Clock:
    """The seconds spent in each part since the clock was made."""

    def __init__(self, *parts: str) -> None:
        """Start the clock; ``parts`` are listed with 0 seconds before they are first measured."""
        self.started = time.perf_counter()
        self.seconds = dict.fromkeys(parts, 0.0)

    @contextmanager
    def __call__(self, part: str) -> Iterator[None]:
        """Add the seconds of a ``with`` block to ``part``."""
        started = time.perf_counter()
        yield
        self.seconds[part] = self.seconds.get(part, 0.0) + time.perf_counter() - started
