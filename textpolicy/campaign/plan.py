"""From a campaign's settings to its runs, written down before any is started: manifest.json and run_commands.sh."""

from __future__ import annotations

import json
import platform
import shlex
import time
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

from ..errors import UserError
from ..record.layout import CONFIG
from .jobs import Job, read_attempts, write_whole
from .settings import CampaignSettings, check_campaign

FORMAT = 1
_PACKAGES = ("textpolicy", "mlx", "mlx-lm", "tinker", "numpy", "scipy", "statsmodels")
_MAY_CHANGE = ("prices",)  # between calls; all else was fixed before the first run


def jobs_of(settings: CampaignSettings, root: Path) -> list[Job]:
    """Every run, all arms of a seed before the next seed, so that pairs are whole early."""
    return [_job(settings, root, arm, seed) for seed in settings.seeds for arm in settings.arms]


def _job(settings: CampaignSettings, root: Path, arm: str, seed: int) -> Job:
    folder = root / "runs" / arm / f"seed{seed}"
    flags = flags_of({**settings.overrides(arm, seed), "output": str(folder)})
    return Job(arm, seed, folder, ("textpolicy", "train", *flags), finished, resume=())  # the same command goes on


def finished(folder: Path) -> bool:
    """Whether a run came to its end: summary.json is the last file that it writes, and it is whole."""
    try:
        json.loads((folder / "summary.json").read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return False
    return True


def flags_of(values: dict[str, Any], above: str = "") -> list[str]:
    """Nested settings as flags of `textpolicy train`."""
    flags: list[str] = []
    for key, value in values.items():
        name = above + key.replace("_", "-")
        if isinstance(value, dict):
            flags += flags_of(value, f"{name}.")
        elif isinstance(value, list | tuple):
            flags.append(f"--{name}={','.join(map(str, value))}")
        elif isinstance(value, bool):
            flags.append(f"--{name}" if value else f"--no-{name}")
        else:
            flags.append(f"--{name}={value}")
    return flags


def write_plan(settings: CampaignSettings, root: Path) -> None:
    """Write the plan into ``root``, or check that it is the one that is there.

    Raises UserError where ``root`` holds another plan, or anything else.
    """
    if (root / "manifest.json").exists():
        _refuse_another(settings, root)
    elif root.exists() and any(root.iterdir()):
        raise UserError(f"{root} exists and holds no campaign; choose another folder")
    write_manifest(settings, root, "planned")
    jobs = jobs_of(settings, root)
    lines = [
        "#!/bin/sh",
        "# The runs of this campaign one by one; 'textpolicy campaign run' does the same, and resumes.",
    ]
    lines += ["set -e", *(shlex.join(["textpolicy", *job.words[1:]]) for job in jobs)]
    write_whole(root / "run_commands.sh", "\n".join(lines) + "\n")
    (root / "run_commands.sh").chmod(0o755)


def write_manifest(settings: CampaignSettings, root: Path, status: str) -> None:
    """Everything that determines the campaign, and how far it is."""
    path = root / "manifest.json"
    created = read_manifest(root)["created_at"] if path.exists() else time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime())
    manifest = {
        "format": FORMAT,
        "campaign_root": str(root),
        "created_at": created,
        "status": status,
        "settings": settings.model_dump(mode="json"),
        "baseline": settings.reference,
        "seeds": list(settings.seeds),
        "versions": versions(),
        "runs": [_run_row(settings, root, job) for job in jobs_of(settings, root)],
    }
    write_whole(path, json.dumps(manifest, indent=2) + "\n")


def _run_row(settings: CampaignSettings, root: Path, job: Job) -> dict[str, Any]:
    attempts = [a for a in read_attempts(root) if (a.arm, a.seed) == (job.arm, job.seed)]
    return {
        "arm": job.arm,
        "seed": job.seed,
        "folder": str(job.folder.relative_to(root)),
        "command": ["textpolicy", *job.words[1:]],
        "overrides": settings.arms[job.arm],
        "config": _config(settings, job),
        "finished": job.done,
        "returncode": attempts[-1].returncode if attempts else None,
        "seconds": attempts[-1].seconds if attempts else None,
    }


def _config(settings: CampaignSettings, job: Job) -> dict[str, Any]:
    """All settings of a run; once it has begun those that it wrote down, which have what its task decides."""
    try:
        own: dict[str, Any] = json.loads((job.folder / CONFIG).read_text(encoding="utf-8"))
    except (OSError, ValueError):
        return settings.config(job.arm, job.seed).model_dump(mode="json")
    return own


def read_manifest(root: Path) -> dict[str, Any]:
    """What ``root/manifest.json`` holds. Raises UserError where there is none."""
    path = root / "manifest.json"
    if not path.exists():
        raise UserError(f"{root} has no manifest.json; give the folder of a campaign, or plan one first")
    return json.loads(path.read_text(encoding="utf-8"))


def planned(root: Path) -> CampaignSettings:
    """The settings of the campaign in ``root``. Raises UserError."""
    return check_campaign(read_manifest(root)["settings"], str(root / "manifest.json"))


def versions() -> dict[str, str]:
    """Of Python, the platform and the packages that matter; those that are not installed are left out."""
    found = {"python": platform.python_version(), "platform": platform.platform()}
    for name in _PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found


def _refuse_another(settings: CampaignSettings, root: Path) -> None:
    before, now = read_manifest(root)["settings"], settings.model_dump(mode="json")
    changed = sorted(k for k in now if now[k] != before[k] and k not in _MAY_CHANGE)
    if (
        changed == ["seeds"]
        and now["stopping"] == "anytime"
        and now["seeds"][: len(before["seeds"])] == before["seeds"]
    ):
        return
    if changed:
        seeds = "; seeds can only be added where stopping is 'anytime'" if changed == ["seeds"] else ""
        raise UserError(
            f"{root} holds a campaign whose {', '.join(changed)} differ{seeds}: choose another folder, for what is "
            "changed after a look at results is not what was tested"
        )
