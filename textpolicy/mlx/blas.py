"""A fast matrix multiply for MLX on a Linux CPU, put in place before mlx is first imported.

The CPU wheel of mlx links a reference BLAS some thirty times slower than OpenBLAS. The loader binds
``cblas_sgemm`` when ``mlx.core`` is imported, so OpenBLAS must be in the process, with global symbols,
before that; afterwards nothing helps. ``OPENBLAS_NUM_THREADS`` is read by OpenBLAS as it loads.
"""

from __future__ import annotations

import ctypes
import importlib
import os
import sys
import time
import warnings
from collections.abc import Callable
from importlib.metadata import PackageNotFoundError, distribution
from pathlib import Path

from ..errors import MissingDependencyError, UserError

SLOW_GFLOPS = 20.0  # the reference BLAS reaches about 6, OpenBLAS 80 or more per core
SLOW_ADVICE = (
    "import textpolicy before mlx, with OpenBLAS (pip install cmeel-openblas) "
    "and its Fortran runtime (Debian: apt-get install libgfortran5) installed"
)


def import_mlx() -> None:
    """Import ``mlx.core``, with OpenBLAS below it where mlx computes on a Linux CPU."""
    late = "mlx.core" in sys.modules
    wants_blas = _runs_on_linux_cpu()
    library = find_openblas() if wants_blas else None
    loaded = library is not None and not late and _preload(library)
    _import_core()
    if wants_blas and not loaded:
        _warn_if_slow("mlx was imported before textpolicy" if late else "OpenBLAS was not found or did not load")


def find_openblas() -> Path | None:
    """The shared library of the ``cmeel-openblas`` package, or None if it is not installed."""
    return _distribution_path("cmeel-openblas", "cmeel.prefix/lib/libopenblas.so")


def _distribution_path(package: str, inside: str) -> Path | None:
    try:
        path = Path(str(distribution(package).locate_file(inside)))
    except PackageNotFoundError:
        return None
    return path if path.exists() else None


def _preload(library: Path) -> bool:
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


def set_blas_threads(n: int) -> None:
    """Use ``n`` OpenBLAS threads from now on; two threads spin badly on a machine that is busy."""
    if n < 1:
        raise UserError(f"the number of BLAS threads is {n}; set it to 1 or more")
    try:
        set_threads = ctypes.CDLL(None).openblas_set_num_threads
    except AttributeError:
        raise UserError(
            f"cannot use {n} BLAS threads because OpenBLAS is not loaded (it is used on a Linux CPU only); "
            "leave the number of threads unset"
        ) from None
    set_threads(ctypes.c_int(n))


def matmul_gflops(n: int = 512, repeats: int = 5) -> float:
    """Best rate of an (n, 576) x (576, 1536) float32 product, in GFLOP/s."""
    import mlx.core as mx

    a, b = mx.ones((n, 576)), mx.ones((576, 1536))
    mx.eval(a, b)
    seconds = min(_seconds(lambda: mx.eval(a @ b)) for _ in range(repeats))
    return 2 * n * 576 * 1536 / seconds / 1e9


def _seconds(run: Callable[[], object]) -> float:
    start = time.perf_counter()
    run()
    return time.perf_counter() - start


def _runs_on_linux_cpu() -> bool:
    return sys.platform == "linux" and not any(_distribution_path(f"mlx-cuda-{v}", "mlx") for v in (12, 13))


def _import_core() -> None:
    try:
        importlib.import_module("mlx.core")
    except ModuleNotFoundError as error:
        if error.name not in ("mlx", "mlx.core"):
            raise
        raise MissingDependencyError(f"mlx is not installed; install it with: {_install_line()}") from error
    except ImportError as error:
        raise MissingDependencyError(
            f"mlx is installed but its native library does not load here ({error}); "
            f"install the build for this machine with: {_install_line()}"
        ) from error


def _install_line() -> str:
    line = "pip install 'textpolicy[mlx]'"
    if Path("/proc/driver/nvidia/version").exists():
        line += " (or 'textpolicy[cuda13]' to use the NVIDIA GPU of this machine)"
    return line


def _warn_if_slow(cause: str) -> None:
    rate = 0.0
    for _ in range(5):  # a busy machine can make a fast product look slow, but hardly five times
        rate = max(rate, matmul_gflops(repeats=1))
        if rate >= SLOW_GFLOPS:
            return  # some other fast BLAS is in place
    sentence = f"{cause}, so matrix products run at {rate:.0f} GFLOP/s instead of 100 or more; {SLOW_ADVICE}"
    warnings.warn(sentence, RuntimeWarning, stacklevel=2)
