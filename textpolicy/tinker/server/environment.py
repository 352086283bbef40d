"""The environment that the local Tinker server runs in: a Python of its own in the user's cache, made once."""

from __future__ import annotations

import hashlib
import os
import shutil
import subprocess
import sys
import tempfile
from collections.abc import Callable
from pathlib import Path

from ..._system.cache import cache_folder
from ...errors import UserError
from .pins import PINS

OLDEST, NEWEST = (3, 12), (3, 13)  # Pythons that SkyRL 0.4.0 takes, and that all pins have wheels for
SIZE = "800 MB"  # of the environment, all of it to download
_NAMES = [f"python{OLDEST[0]}.{minor}" for minor in range(OLDEST[1], NEWEST[1] + 1)]
_TEST = f"import sys, venv, ensurepip; sys.exit(not {OLDEST} <= sys.version_info[:2] <= {NEWEST})"


def server_python(say: Callable[[str], None] = lambda line: None) -> Path:
    """The Python of the server's environment, made first if it is not there; ``say`` hears what takes long.

    Several processes may ask at once, and one makes it. Raises UserError without a Python of 3.12 or 3.13,
    or for an installation that fails.
    """
    from filelock import FileLock

    folder = environment_folder()
    if not folder.exists():
        base = base_python()
        if base is None:
            raise UserError(
                f"the Tinker server needs Python 3.{OLDEST[1]} or 3.{NEWEST[1]} and none was found; install one, "
                "or put it on the PATH"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        with FileLock(folder.with_name(folder.name + ".lock")):
            if not folder.exists():
                say(f"making the server's environment, once, in {folder} ({SIZE} to download)")
                _make(base, folder)
    return folder / "bin" / "python"


def environment_folder() -> Path:
    """Where it is, or would be; other pins have another one."""
    digest = hashlib.sha256("\n".join(PINS).encode()).hexdigest()[:12]
    return cache_folder() / "tinker" / f"server-{digest}"


def base_python() -> str | None:
    """A Python that is right for it: this one, else one on the PATH, of pyenv's or of uv's; None without any."""
    pyenvs = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    pyenv = sorted((pyenvs / "versions").glob("3.1[23].*/bin/python"))
    found = [sys.executable, *filter(None, map(shutil.which, _NAMES)), *map(str, pyenv), *_of_uv()]
    return next((python for python in found if _works(python)), None)


def _of_uv() -> list[str]:
    uv = shutil.which("uv")
    if uv is None:
        return []
    asked = [uv, "python", "find", "--no-python-downloads", f">={OLDEST[0]}.{OLDEST[1]},<={NEWEST[0]}.{NEWEST[1]}.99"]
    return subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split()


def _works(python: str) -> bool:
    return subprocess.run([python, "-c", _TEST], capture_output=True, check=False).returncode == 0


def _make(base: str, folder: Path) -> None:
    """Beside ``folder``, then renamed, so that it is there whole or not at all."""
    for stale in folder.parent.glob(f"{folder.name}.tmp-*"):  # of a process that was killed
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.tmp-", dir=folder.parent) as workspace:
        new, pins = Path(workspace) / "venv", Path(workspace) / "pins.txt"
        pins.write_text("\n".join(PINS) + "\n")
        python = new / "bin" / "python"
        if uv := shutil.which("uv"):
            _run(uv, "venv", "--python", base, str(new))
            # complete as pinned: what SkyRL asks for beyond these pins is gigabytes that it can do without
            _run(uv, "pip", "install", "--python", str(python), "--no-deps", "-r", str(pins))
        else:
            _run(base, "-m", "venv", str(new))
            _run(
                str(python),
                "-m",
                "pip",
                "install",
                "--quiet",
                "--no-compile",
                "--only-binary",
                ":all:",
                "--no-deps",
                "-r",
                str(pins),
            )
        new.rename(folder)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        said = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["without a word"]
        raise UserError(
            f"the server's environment could not be made ({said[0]}); check the network and the space on the disk, "
            "and try again"
        )
