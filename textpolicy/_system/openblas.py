"""OpenBLAS in the process before mlx is first imported, whoever imports it.

The CPU wheel of mlx links a reference BLAS some thirty times slower than OpenBLAS. The loader binds
``cblas_sgemm`` when ``mlx.core`` is imported, so OpenBLAS must be in the process, with global symbols,
before that; afterwards nothing helps. ``import textpolicy`` imports no mlx, and the program may import
it next, so what stands here waits for that import. Standard library only.
"""

from __future__ import annotations

import ctypes
import importlib.abc
import os
import platform
import sys
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path
from typing import Any


class BeforeMLX(importlib.abc.MetaPathFinder):
    """Finds nothing; the first time that ``mlx.core`` is looked for, it loads OpenBLAS."""

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "mlx.core":
            sys.meta_path.remove(self)
            preload()


def await_mlx() -> None:
    """Load OpenBLAS when ``mlx.core`` is about to be imported, where mlx would compute on a Linux CPU."""
    if sys.platform == "linux" and "mlx.core" not in sys.modules:
        sys.meta_path.insert(0, BeforeMLX())


def preload() -> None:
    """Load OpenBLAS for all to see, if mlx computes on a Linux CPU and the library can be had."""
    library = find_openblas() if runs_on_linux_cpu() else None
    if library is not None:
        load(library)


def find_openblas() -> Path | None:
    """The shared library of the package for this kind of machine, or None if it is not installed."""
    if platform.machine() == "x86_64":  # the one of cmeel-openblas is for CPUs with AVX-512 alone and ends others
        folder = _distribution_path("ngsolve-openblas", "ngsolve_openblas")
        return next(folder.glob("libopenblas*.so*"), None) if folder else None
    return _distribution_path("cmeel-openblas", "cmeel.prefix/lib/libopenblas.so")


def _distribution_path(package: str, inside: str) -> Path | None:
    try:
        path = Path(str(distribution(package).locate_file(inside)))
    except PackageNotFoundError:
        return None
    return path if path.exists() else None


def load(library: Path) -> bool:
    """Load OpenBLAS for all to see; False when its Fortran runtime cannot be had."""
    # many small systems have no libgfortran.so.5, and the wheel of mlx-cpu carries one
    return _loads(str(library)) or (_load_fortran() and _loads(str(library)))


def _load_fortran() -> bool:
    """Load mlx-cpu's libgfortran under its usual name, which its wheel has replaced by a unique one.

    The loader finds a library that is in the process already by the name written inside it, so a copy
    in memory with that name restored satisfies OpenBLAS; nothing is written to disk.
    """
    folder = _distribution_path("mlx-cpu", "mlx_cpu.libs")
    for library in folder.glob("libgfortran-*.so.5*") if folder else ():
        unique = library.name.encode() + b"\0"
        image = library.read_bytes().replace(unique, b"libgfortran.so.5".ljust(len(unique), b"\0"))
        with open(os.memfd_create("libgfortran.so.5"), "wb") as memory:
            memory.write(image)
            memory.flush()
            needed = [str(path) for path in library.parent.glob("libquadmath-*")]
            return all(map(_loads, [*needed, f"/proc/self/fd/{memory.fileno()}"]))
    return False


def _loads(library: str) -> bool:
    try:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def runs_on_linux_cpu() -> bool:
    """Whether the mlx that is installed computes with a BLAS on this machine."""
    return sys.platform == "linux" and not any(_distribution_path(f"mlx-cuda-{v}", "mlx") for v in (12, 13))
