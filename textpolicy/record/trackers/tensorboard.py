"""Track a run in TensorBoard's event files in its folder, for ``tensorboard --logdir runs``."""

from __future__ import annotations

import time
from pathlib import Path

from ..._system.extras import extra
from .tracker import INSTALL, Opened


def start(folder: Path) -> Opened:
    """Open an event file in RUN/tensorboard, which does not need TensorFlow. Raises MissingDependencyError."""
    events = extra("tensorboard.compat.proto.event_pb2", INSTALL)
    summaries = extra("tensorboard.compat.proto.summary_pb2", INSTALL)
    writers = extra("tensorboard.summary.writer.event_file_writer", INSTALL)
    held = None if any(folder.glob("tensorboard/[!.]*tfevents*")) else 0
    writer = writers.EventFileWriter(str(folder / "tensorboard"))

    def log(step: int, metrics: dict[str, float]) -> None:
        values = [summaries.Summary.Value(tag=name, simple_value=value) for name, value in metrics.items()]
        summary = summaries.Summary(value=values)
        writer.add_event(events.Event(wall_time=time.time(), step=step, summary=summary))
        writer.flush()  # or a killed run would have sent what is not there

    return Opened("tensorboard", held, log, lambda code: writer.close())
