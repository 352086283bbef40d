"""Track a run in Weights & Biases, sent while it runs or kept in the run's folder for ``wandb sync``."""

from __future__ import annotations

import itertools
import os
import struct
import uuid
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import TYPE_CHECKING, Any

from ..._system.extras import extra
from .tracker import INSTALL, Opened

if TYPE_CHECKING:
    from ...config.settings import TrackingSettings

_BLOCK = 32768  # bytes


def check(settings: TrackingSettings) -> None:
    """Raise wandb's error where nobody is logged in, or the server does not answer."""
    if not settings.offline and os.environ.get("WANDB_MODE", "online") == "online":
        extra("wandb", INSTALL).login(verify=True)


def start(settings: TrackingSettings, folder: Path, config: Mapping[str, Any], mark: str | None = None) -> Opened:
    """Start a wandb run with its files in RUN/wandb, or the one with the id ``mark`` again.

    Account and server are wandb's own (`wandb login`). Raises MissingDependencyError, and wandb's errors.
    """
    wandb, name = extra("wandb", INSTALL), mark or uuid.uuid4().hex[:8]
    about = {"project": settings.project, "name": settings.name or folder.name, "config": dict(config)}
    mode = "offline" if settings.offline else None
    held = kept_offline(folder, name) if mark else 0
    run = wandb.init(dir=str(folder), mode=mode, id=name, resume="allow", **about)
    run.define_metric("step")
    run.define_metric("*", step_metric="step")  # the last evaluation, of the kept adapter, has an earlier step
    held = max(held, run.starting_step)
    counts = itertools.count(held)  # wandb's own step, by which what it has from before is known
    return Opened(
        name, held, lambda step, metrics: run.log({"step": step, **metrics}, step=next(counts)), lambda c: run.finish(c)
    )


def kept_offline(folder: Path, name: str) -> int:
    """Return how many rows of the run called ``name`` are in wandb's offline files in ``folder``."""
    record, steps = extra("wandb.proto.wandb_internal_pb2", INSTALL).Record, [-1]
    for path in folder.glob(f"wandb/offline-run-*-{name}/[!.]*.wandb"):
        for data in _records(path.read_bytes()):
            found = record.FromString(data).history.item
            steps += [int(item.value_json) for item in found if "_step" in (item.key, *item.nested_key)]
    return max(steps) + 1


def _records(data: bytes) -> Iterator[bytes]:
    """Yield the records of a .wandb file, up to where it was cut off: a log in LevelDB's format after 7 bytes.

    Blocks hold fragments: checksum (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4: last).
    """
    place, record = 7, b""
    while place + 7 <= len(data):
        if (left := _BLOCK - place % _BLOCK) < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        if kind == 0 or place + 7 + length > len(data):
            return
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            yield record
            record = b""
