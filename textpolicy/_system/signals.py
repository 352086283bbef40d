"""Handle Ctrl-C and SIGTERM: the first stops a run after its step, the second ends the process at once."""

from __future__ import annotations

import os
import signal
import threading
from collections.abc import Callable
from contextlib import suppress
from types import FrameType, TracebackType
from typing import Any, Self

_STOPPING = b"textpolicy: finishing this step, then stopping at the end of it; press Ctrl-C again to stop now\n"


class StopSignal:
    """The first SIGINT or SIGTERM within a ``with``, whose ``number`` it keeps; the next has its default effect.

    Outside the main thread, where Python receives no signals, and for an ignored signal it does nothing.
    """

    def __init__(self, clear: Callable[[], object] | None = None) -> None:
        """Call ``clear`` before the note that the run is stopping, where a live view would wipe it off the screen."""
        self.number: int | None = None
        self._clear, self._clearing = clear, threading.Thread(target=self._say)
        self._before: dict[signal.Signals, Any] = {}

    def __enter__(self) -> Self:
        if threading.current_thread() is threading.main_thread():
            for number in (signal.SIGINT, signal.SIGTERM):
                if signal.getsignal(number) is not signal.SIG_IGN:
                    self._before[number] = signal.signal(number, self._receive)
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        for number, before in self._before.items():
            signal.signal(number, before)
        if self._clearing.ident is not None:
            self._clearing.join()

    def _receive(self, number: int, frame: FrameType | None) -> None:
        again, self.number = self.number is not None, number  # a second may come while the note is written
        if not again and self._clear is None:
            self._say()
        for handled in self._before:
            signal.signal(handled, signal.SIG_DFL)
        if again:
            os.kill(os.getpid(), number)
        elif self._clear is not None:
            self._clearing.start()  # a print may be in the middle of its line, and hold what ``clear`` needs

    def _say(self) -> None:
        if self._clear is not None:
            self._clear()
        with suppress(OSError):  # nobody may read it
            os.write(2, _STOPPING)
