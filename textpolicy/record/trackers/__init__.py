"""The trackers, sinks that send a run's metrics to TensorBoard, Weights & Biases, trackio or MLflow."""

from __future__ import annotations

from pathlib import Path
from typing import TYPE_CHECKING

from ..._system.extras import extra
from .tracker import INSTALL

if TYPE_CHECKING:
    from ...config.settings import Config, TrackingSettings
    from ..sinks import Sink


def require(settings: TrackingSettings) -> None:
    """Check that every tracker is installed before a run begins. Raises MissingDependencyError."""
    for name in settings.to:
        extra(name, INSTALL)


def open_trackers(config: Config, folder: Path) -> list[Sink]:
    """Open a sink for each tracker that ``config`` names, for the run in ``folder``. Raises MissingDependencyError."""
    from . import mlflow, tensorboard, trackio, weights_and_biases

    settings, resolved = config.tracking, config.model_dump(mode="json")
    sinks: list[Sink] = []
    for name in settings.to:
        match name:
            case "tensorboard":
                sinks.append(tensorboard.start(folder))
            case "wandb":
                sinks.append(weights_and_biases.start(settings, folder, resolved))
            case "trackio":
                sinks.append(trackio.start(settings, folder, resolved))
            case _:
                sinks.append(mlflow.start(settings, folder, resolved))
    return sinks
