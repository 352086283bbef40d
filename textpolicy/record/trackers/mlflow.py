"""MLflow: a run of an experiment, in files beside the run or on a tracking server."""

from __future__ import annotations

import logging
import os
import re
import time
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._system.extras import extra
from ..reader import flat
from .tracker import INSTALL, Tracker

if TYPE_CHECKING:
    from ...config.settings import TrackingSettings

logger = logging.getLogger(__name__)
_LONGEST = 500  # characters of a parameter that every store takes


class MLflow(Tracker):
    """A run in RUN/mlflow, unless ``settings.uri`` names a server or another store."""

    def __init__(self, settings: TrackingSettings, folder: Path, config: Mapping[str, Any]) -> None:
        """Create an MLflow run and log its parameters. Raises MissingDependencyError."""
        tracking, self._entities = extra("mlflow.tracking", INSTALL), extra("mlflow.entities", INSTALL)
        self._refusal: type[Exception] = extra("mlflow.exceptions", INSTALL).MlflowException
        self._lost = False
        if settings.uri is None:  # files need no database, but MLflow wants explicit permission
            os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
        self._client = tracking.MlflowClient(settings.uri or (folder / "mlflow").absolute().as_uri())
        known = self._client.get_experiment_by_name(settings.project)
        experiment = known.experiment_id if known else self._client.create_experiment(settings.project)
        self._run = self._client.create_run(experiment, run_name=settings.name or folder.name).info.run_id
        parameters = [self._entities.Param(k, str(v)[:_LONGEST]) for k, v in flat(config).items()]
        self._client.log_batch(self._run, params=parameters)

    def log(self, step: int, metrics: Mapping[str, float]) -> None:
        """Log ``metrics`` at ``step``.

        MLflow allows letters, digits and a few signs in a name, and no metric inside another: other signs become "_"
        and a second "/" becomes ".".
        """
        now, batch = int(1000 * time.time()), []  # ms
        for name, value in metrics.items():
            split, _, metric = name.partition("/")
            allowed = split + "/" + re.sub(r"[^\w. :-]", "_", metric.replace("/", "."))
            batch.append(self._entities.Metric(allowed, value, now, step))
        self._send(self._client.log_batch, metrics=batch)

    def close(self) -> None:
        """Mark the MLflow run as finished."""
        self._send(self._client.set_terminated)

    def _send(self, call: Callable[..., object], **arguments: Any) -> None:
        """Call the server; after its first failure warn once and stop, for the run folder has every metric."""
        if self._lost:
            return
        try:
            call(self._run, **arguments)
        except self._refusal as error:
            self._lost = True
            logger.warning("MLflow gets no more metrics of this run, which are in its folder: %s", error)
