"""Measure the memory of the machine and of processes, and say whether mlx can be installed on it."""

from __future__ import annotations

import ctypes
import os
import platform
import struct
import sys
from importlib.machinery import PathFinder
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup/memory.max")  # a container's share of the machine, on Linux


RUNS = "TEXTPOLICY_RUNS_AT_A_TIME"  # in the environment of a run: how many share the memory of this machine


def runs_at_a_time() -> int:
    """Return how many runs share the memory of this machine, this one included; a campaign says so to its runs."""
    return max(1, int(os.environ.get(RUNS, "1")))


def cores_of_each(processes: int) -> int:
    """Return the cores of this machine that each of so many processes has for itself, at least one."""
    return max(1, (os.cpu_count() or 1) // processes)


def memory() -> int:
    """Return the bytes of memory of this machine, or of this container's share of it."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP.read_text().strip() if _CGROUP.is_file() else "max"
    return installed if limit == "max" else min(installed, int(limit))


def resident(process: int) -> int:
    """Return the bytes of memory that the process with this id holds; 0 for none, or where that cannot be asked."""
    try:
        ask = ctypes.CDLL(None).proc_pid_rusage  # of macOS
    except AttributeError:
        statm = Path(f"/proc/{process}/statm")
        return int(statm.read_text().split()[1]) * os.sysconf("SC_PAGE_SIZE") if statm.exists() else 0
    usage = ctypes.create_string_buffer(96)  # rusage_info_v0 of <sys/resource.h>: 16 bytes, then ten numbers
    if ask(process, 0, usage):
        return 0
    return int(struct.unpack("=16x10Q", usage.raw)[7])  # ri_phys_footprint, which counts compressed pages, too


def why_no_mlx() -> str | None:
    """Return why mlx has no build for this Python on this Mac, and what to do; None where it has, and elsewhere."""
    if sys.platform != "darwin":
        return None
    if platform.machine() != "arm64":
        return (
            f"this Python is built for {platform.machine()} and mlx needs Apple silicon; on an M1 or later use one "
            "built for arm64 (not one that runs under Rosetta), for example: uv python install 3.12"
        )
    version = platform.mac_ver()[0]
    if version.split(".")[0] in map(str, range(11, 14)):  # a Python built long ago says 10.16 on every later macOS
        return f"mlx needs macOS 14 and this is macOS {version}; update macOS"
    return None


def how_to_install(package: str) -> str:
    """Return the words that install ``package``, an mlx or what needs one, or those that say why that cannot be."""
    return why_no_mlx() or f"install it with: {installer()} '{package}'"


def installer() -> str:
    """Return "pip install", or "uv pip install" in an environment of uv, which has no pip."""
    # not find_spec, at whose question for pip setuptools takes its distutils away
    return "pip install" if PathFinder.find_spec("pip") else "uv pip install"
