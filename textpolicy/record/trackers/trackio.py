"""Track a run in trackio's local database, for ``trackio show``."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._system.extras import extra
from ..reader import flat
from .tracker import INSTALL, Tracker

if TYPE_CHECKING:
    from ...config.settings import TrackingSettings


def start(settings: TrackingSettings, folder: Path, config: Mapping[str, Any]) -> Tracker:
    """Start a run in trackio's own database (TRACKIO_DIR). Raises MissingDependencyError."""
    run = extra("trackio", INSTALL).init(
        project=settings.project,
        name=settings.name or folder.name,
        config=flat(config),
        embed=False,
        auto_log_gpu=False,  # of the machine; a step's row has what the run used
        auto_log_cpu=False,
    )
    return Tracker(lambda step, metrics: run.log(metrics, step=step), run.finish)
