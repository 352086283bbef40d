"""Track a run in MLflow, as a run of an experiment, in files beside the run or on a tracking server."""

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


def start(settings: TrackingSettings, folder: Path, config: Mapping[str, Any]) -> Tracker:
    """Start a run in RUN/mlflow, or in the server or store of ``settings.uri``. Raises MissingDependencyError."""
    tracking, entities = extra("mlflow.tracking", INSTALL), extra("mlflow.entities", INSTALL)
    refusal: type[Exception] = extra("mlflow.exceptions", INSTALL).MlflowException
    if settings.uri is None:  # files need no database, but MLflow wants explicit permission
        os.environ.setdefault("MLFLOW_ALLOW_FILE_STORE", "true")
    client = tracking.MlflowClient(settings.uri or (folder / "mlflow").absolute().as_uri())
    known = client.get_experiment_by_name(settings.project)
    experiment = known.experiment_id if known else client.create_experiment(settings.project)
    run = client.create_run(experiment, run_name=settings.name or folder.name).info.run_id
    client.log_batch(run, params=[entities.Param(k, str(v)[:_LONGEST]) for k, v in flat(config).items()])
    lost = False

    def send(call: Callable[..., object], **arguments: Any) -> None:
        """Call the server; after its first failure warn once and stop, for the run folder has every metric."""
        nonlocal lost
        if lost:
            return
        try:
            call(run, **arguments)
        except refusal as error:
            lost = True
            logger.warning("MLflow gets no more metrics of this run, which are in its folder: %s", error)

    def log(step: int, metrics: dict[str, float]) -> None:
        """Log ``metrics``, in whose names MLflow allows letters, digits and a few signs, and only one "/"."""
        now, batch = int(1000 * time.time()), []  # ms
        for name, value in metrics.items():
            split, _, metric = name.partition("/")
            allowed = split + "/" + re.sub(r"[^\w. :-]", "_", metric.replace("/", "."))
            batch.append(entities.Metric(allowed, value, now, step))
        send(client.log_batch, metrics=batch)

    return Tracker(log, lambda: send(client.set_terminated))
