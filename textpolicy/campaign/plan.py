"""Plan the runs of a campaign, and write them down before the first: manifest.json and run_commands.sh."""

from __future__ import annotations

import json
import platform
import shlex
import time
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from datetime import date
from datetime import time as clock
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from .._system.files import names, read_object, write_whole
from ..errors import UserError
from ..record.layout import CONFIG
from ..record.reader import ended
from .jobs import Job, read_attempts
from .settings import CampaignSettings, check_campaign

FORMAT = 1
_PACKAGES = ("textpolicy", "mlx", "mlx-lm", "tinker", "numpy", "scipy", "statsmodels")
_RESTORE = "restore it, or plan the campaign again in another folder"
_MAY_CHANGE = ("prices",)  # between calls; everything else was fixed before the first run


def jobs_of(settings: CampaignSettings, root: Path) -> list[Job]:
    """Return every run, all arms of a seed before the next seed, so that pairs are complete early."""
    jobs = []
    for seed in settings.seeds:
        for arm in settings.arms:
            folder = root / "runs" / arm / f"seed{seed}"
            config = str(root / "configs" / f"{arm}-seed{seed}.toml")
            jobs.append(Job(arm, seed, folder, ("textpolicy", "train", config), ended, resumes=True))
    return jobs


def as_toml(values: Mapping[str, Any]) -> str:
    """Return nested settings as TOML, a line for each at the top; None, which TOML lacks, is left out."""

    def written(value: Any) -> str:
        if isinstance(value, Mapping):
            inside = ", ".join(f"{written(k)} = {written(v)}" for k, v in value.items() if v is not None)
            return f"{{ {inside} }}" if inside else "{}"
        if isinstance(value, list | tuple):
            return f"[{', '.join(map(written, value))}]"
        if isinstance(value, bool):
            return str(value).lower()
        if isinstance(value, int | float):
            return repr(value)
        if isinstance(value, date | clock):
            return value.isoformat()
        return json.dumps(str(value), ensure_ascii=False).replace("\x7f", "\\u007f")

    return "".join(f"{written(key)} = {written(value)}\n" for key, value in values.items() if value is not None)


def write_plan(settings: CampaignSettings, root: Path) -> None:
    """Write the plan into ``root``, or check that it is the one in there.

    Raises UserError where ``root`` contains another plan, or anything else.
    """
    if (root / "manifest.json").exists():
        before, now = planned(root).model_dump(mode="json"), settings.model_dump(mode="json")
        changed = sorted(k for k in now if now[k] != before[k] and k not in _MAY_CHANGE)
        added = now["seeds"][: len(before["seeds"])] == before["seeds"]
        if changed and not (changed == ["seeds"] and now["stopping"] == "anytime" and added):
            seeds = "; seeds can only be added where stopping is 'anytime'" if changed == ["seeds"] else ""
            raise UserError(
                f"{root} holds a campaign whose {', '.join(changed)} differ{seeds}: choose another folder, because a "
                "plan may not change once results have been seen"
            )
    elif root.exists() and names(root):
        raise UserError(f"{root} exists and is not a campaign; choose another folder")
    write_manifest(settings, root, "planned")
    (root / "configs").mkdir(exist_ok=True)
    for job in jobs_of(settings, root):
        values = {**settings.overrides(job.arm, job.seed), "output": str(job.folder)}
        write_whole(Path(job.words[-1]), as_toml(values))
    lines = [
        "#!/bin/sh",
        "# The runs of this campaign one by one; 'textpolicy campaign run' does the same, and resumes.",
        "set -e",
        *(shlex.join(["textpolicy", *job.words[1:]]) for job in jobs_of(settings, root)),
    ]
    write_whole(root / "run_commands.sh", "\n".join(lines) + "\n")
    (root / "run_commands.sh").chmod(0o755)


def write_manifest(settings: CampaignSettings, root: Path, status: str) -> None:
    """Write everything that determines the campaign, and its progress."""
    path = root / "manifest.json"
    now = time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    created = read_manifest(root).get("created_at", now) if path.exists() else now
    last = {(a.arm, a.seed): a for a in read_attempts(root)}
    runs = []
    for job in jobs_of(settings, root):
        attempt = last.get((job.arm, job.seed))
        # A run that has begun wrote its settings down, with those that its task decides.
        config = read_object(job.folder / CONFIG, _RESTORE) or settings.config(job.arm, job.seed).model_dump(
            mode="json"
        )
        runs.append(
            {
                "arm": job.arm,
                "seed": job.seed,
                "folder": str(job.folder.relative_to(root)),
                "command": ["textpolicy", *job.words[1:]],
                "overrides": settings.arms[job.arm],
                "config": config,
                "finished": job.done,
                "returncode": None if attempt is None else attempt.returncode,
                "seconds": None if attempt is None else attempt.seconds,
            }
        )
    manifest = {
        "format": FORMAT,
        "campaign_root": str(root),
        "created_at": created,
        "status": status,
        "settings": settings.model_dump(mode="json"),
        "baseline": settings.reference,
        "seeds": list(settings.seeds),
        "versions": versions(),
        "runs": runs,
    }
    root.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(manifest, indent=2) + "\n")


def read_manifest(root: Path) -> dict[str, Any]:
    """Read ``root/manifest.json``. Raises UserError if there is none, or it is damaged."""
    path = root / "manifest.json"
    values = read_object(path, _RESTORE)
    if values is None:
        raise UserError(f"{root} has no manifest.json; give the folder of a campaign, or plan one first")
    return values


def planned(root: Path) -> CampaignSettings:
    """Read the settings of the campaign in ``root``. Raises UserError."""
    path, settings = root / "manifest.json", read_manifest(root).get("settings")
    if not isinstance(settings, dict):
        raise UserError(f"{path} has no settings of a campaign; {_RESTORE}")
    return check_campaign(settings, str(path))


@contextmanager
def in_words() -> Iterator[None]:
    """Turn an error of a campaign's files or folders into a UserError; a reader of the output may go away."""
    try:
        yield
    except BrokenPipeError:
        raise
    except OSError as error:
        where = error.filename or "the campaign's folder"
        raise UserError(f"{where} cannot be used ({error.strerror}); make room or choose another folder") from error


def versions() -> dict[str, str]:
    """Return the versions of Python, the platform and the packages that matter, if installed."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
