"""Trackers: sinks that hand a run's figures to TensorBoard, Weights & Biases, trackio or MLflow."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._system.extras import extra
from .figures import INSTALL

if TYPE_CHECKING:
    from ...config.settings import Config, TrackingSettings
    from ..sinks import Sink


def require(settings: TrackingSettings) -> None:
    """Raises MissingDependencyError for a tracker that is not installed, before a run has begun."""
    for name in settings.to:
        extra(name, INSTALL)


def open_trackers(config: Config, folder: Path) -> list[Sink]:
    """A sink for each tracker that ``config`` names, for the run in ``folder``. Raises MissingDependencyError."""
    resolved = config.model_dump(mode="json")
    return [_open(name, config.tracking, folder, resolved) for name in config.tracking.to]


def _open(name: str, settings: TrackingSettings, folder: Path, config: Mapping[str, Any]) -> Sink:
    match name:
        case "tensorboard":
            from .tensorboard import TensorBoard

            return TensorBoard(folder)
        case "wandb":
            from .weights_and_biases import WeightsAndBiases

            return WeightsAndBiases(settings, folder, config)
        case "trackio":
            from .trackio import Trackio

            return Trackio(settings, folder, config)
        case _:
            from .mlflow import MLflow

            return MLflow(settings, folder, config)
