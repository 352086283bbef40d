"""Where the time of a rollout goes."""

from __future__ import annotations

import time
from collections.abc import Iterator
from contextlib import contextmanager

PHASES = ("total", "env_reset", "generation", "env_step", "buffer_store")


class Clock:
    """Seconds by phase; one that is not ``on`` counts nothing."""

    def __init__(self, on: bool = True) -> None:
        self.on = on
        self.reset()

    def reset(self) -> None:
        """Begin to count anew."""
        self._seconds = dict.fromkeys(PHASES, 0.0)

    def seconds(self) -> dict[str, float]:
        """By phase; {} if nothing is counted."""
        return dict(self._seconds) if self.on else {}

    @contextmanager
    def of(self, phase: str) -> Iterator[None]:
        """Count what happens inside as ``phase``."""
        started = time.perf_counter()
        yield
        self._seconds[phase] += time.perf_counter() - started
