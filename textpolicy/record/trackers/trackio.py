"""trackio: a run of a project in its local database, for ``trackio show``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._system.extras import extra
from ..reader import flat
from .tracker import INSTALL, Tracker

if TYPE_CHECKING:
    from ...config.settings import TrackingSettings


class Trackio(Tracker):
    """A run in trackio's own database (TRACKIO_DIR)."""

    def __init__(self, settings: TrackingSettings, folder: Path, config: Mapping[str, Any]) -> None:
        """Start a trackio run. Raises MissingDependencyError."""
        self._run = extra("trackio", INSTALL).init(
            project=settings.project,
            name=settings.name or folder.name,
            config=flat(config),
            embed=False,
            auto_log_gpu=False,  # of the machine; a step's row has what the run used
            auto_log_cpu=False,
        )

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log ``metrics`` at ``step``."""
        self._run.log(metrics, step=step)

    def close(self) -> None:
        """End the trackio run."""
        self._run.finish()
