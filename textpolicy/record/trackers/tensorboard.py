"""TensorBoard: event files in the run's folder, for ``tensorboard --logdir runs``."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

from ..._system.extras import extra
from ...loop.metrics import Row
from ...types import Episode
from .figures import INSTALL, of_look, of_step


class TensorBoard:
    """Writes RUN/tensorboard; the package is installed without TensorFlow, and needs none."""

    def __init__(self, folder: Path) -> None:
        """Raises MissingDependencyError."""
        self._event = extra("tensorboard.compat.proto.event_pb2", INSTALL)
        self._summary = extra("tensorboard.compat.proto.summary_pb2", INSTALL)
        writer = extra("tensorboard.summary.writer.event_file_writer", INSTALL)
        self._writer = writer.EventFileWriter(str(folder / "tensorboard"))

    def step(self, step: int, row: Row, episodes: Sequence[Episode]) -> None:
        self._write(step, of_step(row))

    def evaluated(self, step: int, split: str, row: Mapping[str, Any], episodes: Sequence[Episode]) -> None:
        self._write(step, of_look(split, row))
        self._writer.flush()

    def close(self) -> None:
        self._writer.close()

    def _write(self, step: int, figures: Mapping[str, float]) -> None:
        values = [self._summary.Summary.Value(tag=name, simple_value=value) for name, value in figures.items()]
        summary = self._summary.Summary(value=values)
        self._writer.add_event(self._event.Event(wall_time=time.time(), step=step, summary=summary))
