"""Measure the memory of the machine."""

from __future__ import annotations

import os
from pathlib import Path

_CGROUP = Path("/sys/fs/cgroup/memory.max")  # a container's share of the machine, on Linux


def memory() -> int:
    """Return the bytes of memory of this machine, or of this container's share of it."""
    installed = os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES")
    limit = _CGROUP.read_text().strip() if _CGROUP.is_file() else "max"
    return installed if limit == "max" else min(installed, int(limit))
