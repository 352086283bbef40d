"""Ctrl-C and SIGTERM: the first asks a run to stop where nothing is lost, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
from types import FrameType, TracebackType
from typing import Any, Self

_HEARD = b"textpolicy: stopping at the end of what is being computed; once more, and it stops at once\n"


class StopSignal:
    """Within it the first SIGINT or SIGTERM is remembered; after that they do what they always do to a process.

    Nothing is remembered outside the main thread, where Python hears no signals, and of a signal that is ignored.
    """

    def __init__(self) -> None:
        self.number: int | None = None
        self._before: dict[signal.Signals, Any] = {}

    @property
    def heard(self) -> bool:
        """Whether one has come."""
        return self.number is not None

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._hear)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)

    def _hear(self, number: int, frame: FrameType | None) -> None:
        self.number = number
        for listened in self._before:
            signal.signal(listened, signal.SIG_DFL)
        os.write(2, _HEARD)  # print may be in the middle of a line
