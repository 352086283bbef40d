"""Prepare the process for mlx before any module imports it: OpenBLAS on a Linux CPU, variables on a Mac or NVIDIA GPU.

The CPU wheel of mlx links a reference BLAS about thirty times slower than OpenBLAS. The loader binds
``cblas_sgemm`` when ``mlx.core`` is imported, so OpenBLAS must be in the process, with global symbols,
before that; afterwards nothing helps. ``import textpolicy`` imports no mlx, and the program may import
it next, so this module waits for that import. The variables are read later, when MLX first computes.
Standard library only.
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

ON_A_MAC = {  # unless the environment says otherwise
    "AGX_RELAX_CDM_CTXSTORE_TIMEOUT": "1",  # macOS then waits for long GPU work, though the display is on (mlx 3267)
    "MLX_ENABLE_TF32": "0",  # an M5 would round the operands of float32 products to 11 bits
}
ON_NVIDIA = {
    "MLX_ENABLE_CACHE_THRASHING_CHECK": "0",  # which ends a process at its 801st CUDA graph, however long that took
}
_SPIN = "18"  # a thread without work sleeps after 2^18 cycles, 0.1 ms; by default it spins for 0.1 s


class BeforeMLX(importlib.abc.MetaPathFinder):
    """The import hook that finds nothing, but loads OpenBLAS when ``mlx.core`` is looked for.

    It stays in ``sys.meta_path``: Python walks that list while it is called, and would pass over the next finder.
    """

    def find_spec(self, name: str, path: Any = None, target: Any = None) -> None:
        if name == "mlx.core":
            preload()


def await_mlx() -> None:
    """Load OpenBLAS when ``mlx.core`` is about to be imported, on a Linux CPU; set ``ON_A_MAC`` or ``ON_NVIDIA``."""
    cuda = sys.platform == "linux" and not runs_on_linux_cpu()
    for name, value in (ON_A_MAC if sys.platform == "darwin" else ON_NVIDIA if cuda else {}).items():
        os.environ.setdefault(name, value)
    if sys.platform == "linux" and "mlx.core" not in sys.modules:
        sys.meta_path.insert(0, BeforeMLX())


def preload() -> None:
    """Load OpenBLAS with global symbols, if mlx computes on a Linux CPU and the library is installed."""
    if not runs_on_linux_cpu():
        return
    os.environ.setdefault("OPENBLAS_THREAD_TIMEOUT", _SPIN)
    if platform.machine() == "x86_64":  # cmeel-openblas needs AVX-512 here, and ends the program without it
        folder = _distribution_path("ngsolve-openblas", "ngsolve_openblas")
        library = next(folder.glob("libopenblas*.so*"), None) if folder else None
    else:
        library = _distribution_path("cmeel-openblas", "cmeel.prefix/lib/libopenblas.so")
    # many small systems have no libgfortran.so.5, and the wheel of mlx-cpu has one
    if library is not None and not _loads(str(library)) and _load_fortran():
        _loads(str(library))


def _distribution_path(package: str, inside: str) -> Path | None:
    try:
        path = Path(str(distribution(package).locate_file(inside)))
    except PackageNotFoundError:
        return None
    return path if path.exists() else None


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
    """Load ``library`` with global symbols; return False if it, or a library it needs, cannot be loaded."""
    try:
        ctypes.CDLL(library, mode=ctypes.RTLD_GLOBAL)
    except OSError:
        return False
    return True


def runs_on_linux_cpu() -> bool:
    """Return whether the installed mlx computes on a Linux CPU, with a BLAS."""
    return sys.platform == "linux" and not any(_distribution_path(f"mlx-cuda-{v}", "mlx") for v in (12, 13))
