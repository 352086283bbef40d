"""Describe the machine and the commit of a benchmark row."""

from __future__ import annotations

import os
import platform
import shutil
import subprocess
import time
from importlib.metadata import PackageNotFoundError, version


def describe() -> dict:
    """Machine, versions, commit and load, for a row. BENCHMARK_COMMIT says the commit where there is no repository."""
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {_processor()}{_gpu()}",
        "load_average": os.getloadavg()[0],
        "versions": {name: _version(name) for name in ("textpolicy", "mlx", "mlx-lm", "numpy")},
        "settings": {k: value for k, value in os.environ.items() if k.startswith(("MLX_", "TEXTPOLICY_GENERIC"))},
        "commit": os.environ.get("BENCHMARK_COMMIT") or _commit(),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _processor() -> str:
    if platform.system() == "Linux":
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        return names[0] if names else "unknown processor"
    named = ["sysctl", "-n", "machdep.cpu.brand_string"]  # "Apple M4 Max"; platform knows only "arm"
    asked = subprocess.run(named, capture_output=True, text=True, check=False) if shutil.which(named[0]) else None
    return asked.stdout.strip() if asked else platform.processor()


def _gpu() -> str:
    if shutil.which("nvidia-smi") is None:
        return ""
    asked = ["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"]
    names = subprocess.run(asked, capture_output=True, text=True, check=False).stdout.split("\n")
    return f", {names[0]}" if names[0] else ""


def _version(package: str) -> str:
    try:
        return version(package)
    except PackageNotFoundError:
        return "not installed"


def _commit() -> str:
    return _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else "")


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()
