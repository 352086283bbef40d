"""Where and from which commit a benchmark row comes."""

from __future__ import annotations

import os
import platform
import subprocess
import time
from importlib.metadata import version


def describe() -> dict:
    """Machine, versions, commit and load, for a row."""
    return {
        "machine": f"{platform.system()} {platform.machine()}, {os.cpu_count()} cores, {_processor()}",
        "load_average": os.getloadavg()[0],
        "versions": {name: version(name) for name in ("textpolicy", "mlx", "mlx-lm", "numpy")},
        "commit": _git("rev-parse", "--short", "HEAD") + ("+" if _git("status", "--porcelain", "-uno") else ""),
        "time": time.strftime("%Y-%m-%dT%H:%M:%SZ", time.gmtime()),
    }


def _processor() -> str:
    if platform.system() == "Linux":
        with open("/proc/cpuinfo", encoding="utf-8") as file:
            names = [line.split(":")[1].strip() for line in file if line.startswith("model name")]
        return names[0] if names else "unknown processor"
    return platform.processor()


def _git(*arguments: str) -> str:
    return subprocess.run(["git", *arguments], capture_output=True, text=True, check=False).stdout.strip()
