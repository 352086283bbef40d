"""The Python environment of the local Tinker server, in the user's cache, made once."""

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
from ..._system.extras import extra
from ...errors import UserError
from .pins import PINS

OLDEST, NEWEST = (3, 12), (3, 13)  # Pythons that SkyRL 0.4.0 takes, and that all pins have wheels for
SIZE = "800 MB"  # of the environment, all of it to download
_NAMES = [f"python{OLDEST[0]}.{minor}" for minor in range(OLDEST[1], NEWEST[1] + 1)]
_TEST = f"import sys, venv, ensurepip; sys.exit(not {OLDEST} <= sys.version_info[:2] <= {NEWEST})"


def server_python(say: Callable[[str], None] = lambda line: None) -> Path:
    """Return the Python of the server's environment, which is made first if it is missing; ``say`` gets progress.

    Of several processes one makes it and the others wait. Raises UserError without a Python of 3.12 or 3.13,
    or for an installation that fails.
    """
    lock = extra("filelock", "textpolicy[tinker]").FileLock
    folder = environment_folder()
    if not folder.exists():
        base = base_python()
        if base is None:
            raise UserError(
                f"the Tinker server needs Python 3.{OLDEST[1]} or 3.{NEWEST[1]} and none was found; install one, "
                "or put it on the PATH"
            )
        folder.parent.mkdir(parents=True, exist_ok=True)
        with lock(folder.with_name(folder.name + ".lock")):
            if not folder.exists():
                say(f"making the server's environment, once, in {folder} ({SIZE} to download)")
                _make(base, folder)
    return folder / "bin" / "python"


def environment_folder() -> Path:
    """Return the environment's folder, made or not; its name depends on the pins."""
    digest = hashlib.sha256("\n".join(PINS).encode()).hexdigest()[:12]
    return cache_folder() / "tinker" / f"server-{digest}"


def base_python() -> str | None:
    """Return a suitable Python: this one, or one on the PATH, of pyenv or of uv; None without any."""
    pyenvs = Path(os.environ.get("PYENV_ROOT") or Path.home() / ".pyenv")
    pyenv = sorted((pyenvs / "versions").glob("3.1[23].*/bin/python"))
    found = [sys.executable, *filter(None, map(shutil.which, _NAMES)), *map(str, pyenv)]
    if uv := shutil.which("uv"):
        wanted = f">={OLDEST[0]}.{OLDEST[1]},<={NEWEST[0]}.{NEWEST[1]}.99"
        command = [uv, "python", "find", "--no-python-downloads", wanted]
        found += subprocess.run(command, capture_output=True, text=True, check=False).stdout.split()
    for python in found:
        if subprocess.run([python, "-c", _TEST], capture_output=True, check=False).returncode == 0:
            return python
    return None


def _make(base: str, folder: Path) -> None:
    """Make the environment beside ``folder`` and rename it, so that it appears complete or not at all."""
    for stale in folder.parent.glob(f"{folder.name}.tmp-*"):  # of a process that was killed
        shutil.rmtree(stale)
    with tempfile.TemporaryDirectory(prefix=f"{folder.name}.tmp-", dir=folder.parent) as workspace:
        new, pins = Path(workspace) / "venv", Path(workspace) / "pins.txt"
        pins.write_text("\n".join(PINS) + "\n")
        python = new / "bin" / "python"
        if uv := shutil.which("uv"):
            _run(uv, "venv", "--python", base, str(new))
            # the pins are complete: what SkyRL requires beyond them is gigabytes that it never uses here
            _run(uv, "pip", "install", "--python", str(python), "--no-deps", "-r", str(pins))
        else:
            _run(base, "-m", "venv", str(new))
            install = ["pip", "install", "--quiet", "--no-compile", "--only-binary", ":all:", "--no-deps"]
            _run(str(python), "-m", *install, "-r", str(pins))
        new.rename(folder)


def _run(*command: str) -> None:
    done = subprocess.run(command, capture_output=True, text=True, check=False)
    if done.returncode:
        last = (done.stderr or done.stdout).strip().splitlines()[-1:] or ["no message"]
        raise UserError(
            f"the server's environment could not be made ({last[0]}); check the network and the disk space, "
            "and try again"
        )
