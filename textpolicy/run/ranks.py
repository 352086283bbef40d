"""Start or join the ranks of a run: all of them run it alike, and rank 0 alone has its folder."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Iterator, Mapping
from contextlib import ExitStack, contextmanager
from dataclasses import replace
from pathlib import Path
from typing import TYPE_CHECKING, Any

from .._system.machine import RUNS, runs_at_a_time
from ..config.settings import Config, TrackingSettings
from ..devices.launch import launched, start
from ..devices.team import ALONE, Team
from ..errors import UserError
from ..record import layout
from .resume import Resumed, leaves

if TYPE_CHECKING:
    from .assembly import Parts

_OWN = {"platform", "python", "device", "blas_threads", "copies", "not_bit_for_bit"}  # versions that may differ
_APART = ("output", "quiet", "machine.", "tracking.")  # beginnings of settings that may differ


@contextmanager
def joined(config: Config) -> Iterator[Team]:
    """Hold the ranks that the run of ``config`` has, started or found, or one alone if that is all. Raises UserError.

    A rank that fails ends the others at the end of the context, which raises RankError where another has failed.
    """
    devices = config.machine.devices
    if config.engine != "mlx" and devices > 1:
        raise UserError(
            f"machine.devices is {devices} and engine {config.engine}, which trains elsewhere; leave it at 1"
        )
    if config.engine != "mlx" or (devices == 1 and not launched()):
        yield ALONE
        return
    from ..mlx.collectives import backend, meet

    others, before = start(devices, backend), os.environ.get(RUNS)
    try:
        with meet(config.machine.deadline, others) as team:
            os.environ[RUNS] = str(runs_at_a_time() * team.sharing)  # which share the memory of this machine
            yield team
    finally:
        os.environ.pop(RUNS, None)
        os.environ |= {} if before is None else {RUNS: before}
        if others is not None:
            others.end()


def lead(team: Team, config: Config, resumed: Resumed | None) -> None:
    """Send the other ranks, from rank 0, the settings, and the files that a run resumes from.

    Raises UserError where a rank was given other settings.
    """
    if team.size == 1:
        return
    files: dict[str, bytes] | None = None
    if resumed is not None and resumed.checkpoint is not None:
        names = [layout.CONFIG, layout.VERSIONS, layout.METRICS, layout.TASK]
        paths = [path for name in names if (path := resumed.folder / name).is_file()]
        paths += sorted(path for path in resumed.checkpoint.path.rglob("*") if path.is_file())
        files = {path.relative_to(resumed.folder).as_posix(): path.read_bytes() for path in paths}
    team.first((config.model_dump_json(exclude_unset=True), files))
    if files is None:
        _refuse_unlike(team, _settings(config), "was given", "start all ranks with the same command")


def follow(team: Team, config: Config, held: ExitStack) -> tuple[Config, bool]:
    """Return the settings of a rank that follows rank 0, in a folder that ``held`` removes, and whether to resume.

    Raises UserError where this rank was given other settings.
    """
    given, files = team.first(None)
    told = Config.model_validate_json(given)
    folder = Path(held.enter_context(tempfile.TemporaryDirectory(prefix="textpolicy-rank-")), "run")
    if files is None:
        _refuse_unlike(team, _settings(config), "was given", "start all ranks with the same command")
    for name, content in (files or {}).items():
        path = folder / name
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(content)
    own = {"output": folder, "quiet": True, "tracking": TrackingSettings()}
    return told.model_copy(update=own), files is not None


def together(parts: Parts, team: Team) -> Parts:
    """Return the parts of a run on the ranks of ``team``, with rank 0's weights.

    Raises UserError where a rank has other versions, another model, tokenizer or task.
    """
    if team.size == 1:
        return parts
    engine: Any = parts.engine
    own = {name: value for name, value in parts.versions.items() if name not in _OWN}
    _refuse_unlike(team, own, "has", "give all ranks the same versions and files, and start them again")
    if len({*team.exchange(engine.digest())}) > 1:
        with tempfile.TemporaryDirectory() as folder:
            if team.rank == 0:
                engine.write_state(Path(folder))
            for name, content in team.first({path.name: path.read_bytes() for path in Path(folder).iterdir()}).items():
                Path(folder, name).write_bytes(content)
            engine.read_state(Path(folder))
    stages = [replace(stage, team=team) for stage in (parts, *parts.following)]
    for stage in stages:
        engines: list[Any] = [stage.engine, *([stage.teacher.scorer] if stage.teacher else [])]
        for local in filter(None, engines):
            local.team = team
    return replace(stages[0], following=tuple(stages[1:]))


def _settings(config: Config) -> dict[str, Any]:
    found = leaves(json.loads(config.model_dump_json()))
    return {name: value for name, value in found if not name.startswith(_APART)}


def _refuse_unlike(team: Team, own: Mapping[str, Any], has: str, remedy: str) -> None:
    """Raise UserError on all ranks unless all have the same values. Raises RankError."""
    first, *others = team.exchange(dict(own))
    for rank, other in enumerate(others, 1):
        for name in sorted({*first, *other}):
            if other.get(name) != first.get(name):
                raise UserError(
                    f"rank {rank} on {team.members[rank]} {has} {name} {other.get(name)} and rank 0 on "
                    f"{team.members[0]} {first.get(name)}; {remedy}"
                )
