"""The BLAS below MLX: import MLX with a fast one, set its threads, and measure matrix products."""

from __future__ import annotations

import ctypes
import importlib
import logging
import os
import platform
import sys
import time
import warnings
from functools import cache
from pathlib import Path

from .._system.machine import how_to_install, installer
from .._system.openblas import runs_on_linux_cpu
from .._system.terminal import counted
from ..errors import MissingDependencyError, UserError

logger = logging.getLogger(__name__)

_LOOK = 0.4  # seconds for which the cores are watched
_chosen = "OPENBLAS_NUM_THREADS" in os.environ  # whether the number of threads is settled in this process
_PACKAGE = "ngsolve-openblas" if platform.machine() == "x86_64" else "cmeel-openblas"
SLOW_GFLOPS = 20.0  # the reference BLAS reaches about 6, OpenBLAS 80 or more per core
SLOW_ADVICE = (
    f"import textpolicy before mlx, with OpenBLAS ({installer()} {_PACKAGE}) "
    "and its Fortran runtime (Debian: apt-get install libgfortran5) installed"
)
BUSY_ADVICE = "OpenBLAS is in place, so check again when no other program uses this machine's cores"
WAITING_ADVICE = f"{BUSY_ADVICE}; while one does, its threads wait for each other and OPENBLAS_NUM_THREADS=1 is faster"


def import_mlx() -> None:
    """Import ``mlx.core``, after ``textpolicy/_system/openblas.py`` has loaded OpenBLAS; warn if products are slow."""
    late = "mlx.core" in sys.modules
    line = how_to_install("textpolicy[mlx]")
    if Path("/proc/driver/nvidia/version").exists():
        line += " (or 'textpolicy[cuda13]' to use the NVIDIA GPU of this machine)"
    try:
        importlib.import_module("mlx.core")
    except ModuleNotFoundError as error:
        if error.name not in ("mlx", "mlx.core"):
            raise
        raise MissingDependencyError(f"mlx is not installed; {line}") from error
    except ImportError as error:
        raise MissingDependencyError(
            f"mlx is installed but its native library does not load here ({error}); for its build for here, {line}"
        ) from error
    if not runs_on_linux_cpu() or blas_threads():
        return
    rate = 0.0
    for _ in range(5):  # a busy machine can make a fast product look slow, but hardly five times
        rate = max(rate, matmul_gflops(repeats=1))
        if rate >= SLOW_GFLOPS:
            return  # some other fast BLAS is in place
    cause = "mlx was imported before textpolicy" if late else "OpenBLAS was not found or did not load"
    warnings.warn(
        f"{cause}, so matrix products run at {rate:.0f} GFLOP/s instead of 100 or more; {SLOW_ADVICE}",
        RuntimeWarning,
        stacklevel=1,
    )


def set_blas_threads(n: int) -> None:
    """Set the number of OpenBLAS threads to ``n``; where there is no OpenBLAS, say once that this has no effect.

    Two threads wait for each other on a busy machine.
    """
    global _chosen
    if n < 1:
        raise UserError(f"the number of BLAS threads is {n}; set it to 1 or more")
    _chosen = True
    try:
        set_threads = ctypes.CDLL(None).openblas_set_num_threads
    except AttributeError:
        _say_without_effect()
    else:
        set_threads(ctypes.c_int(n))


@cache
def _say_without_effect() -> None:
    logger.warning("the number of BLAS threads has no effect here: OpenBLAS, whose it is, serves a Linux CPU alone")


def blas_threads() -> int:
    """Return the number of OpenBLAS threads; 0 where it is not loaded."""
    try:
        return int(ctypes.CDLL(None).openblas_get_num_threads())
    except AttributeError:
        return 0


def starved(engine_seconds: float, cpu_seconds: float) -> str | None:
    """Return what to say where steps took longer than the CPU time of all threads together, or None.

    Several BLAS threads that wait for each other use the CPU meanwhile, so on a quiet machine they have more.
    """
    if blas_threads() < 2 or cpu_seconds >= 0.9 * engine_seconds:
        return None
    return (
        f"note: the last step took {engine_seconds:.0f} s and got {cpu_seconds:.0f} s of CPU time, because other "
        f"programs use this machine; its {blas_threads()} BLAS threads wait for each other, and --machine.threads 1 is "
        "faster"
    )


def _busy_seconds() -> float:
    """Return the seconds that all cores of a Linux machine have worked since it started."""
    user, nice, system, _, _, *interrupts = map(int, Path("/proc/stat").read_text().split("\n", 1)[0].split()[1:8])
    return (user + nice + system + sum(interrupts)) / os.sysconf("SC_CLK_TCK")


def leave_busy_cores() -> None:
    """Use no more BLAS threads than other programs leave cores free, and log it where those are fewer.

    The first call in a process decides, unless OPENBLAS_NUM_THREADS or ``set_blas_threads`` has.
    """
    global _chosen
    most, cores = blas_threads(), os.cpu_count() or 1
    if _chosen or most < 2:
        return
    _chosen = True
    started, busy, own = time.perf_counter(), _busy_seconds(), time.process_time()
    time.sleep(_LOOK)  # what is busy now: the load average holds the minutes before, such as an installation's
    used = _busy_seconds() - busy - (time.process_time() - own)
    load = max(0.0, used / (time.perf_counter() - started))
    free = max(1, round(cores - load))
    if most > free:
        set_blas_threads(free)
        logger.warning(
            "other programs keep %.1f of this machine's %s busy, so %d of %d BLAS threads %s used",
            *(load, counted(cores, "core"), free, most, "is" if free == 1 else "are"),
        )


def has_small_products() -> bool:
    """Return whether OpenBLAS multiplies small matrices in place here, which it does with AVX-512."""
    return _core() in ("skylakex", "cooperlake", "sapphirerapids")


def wants_large_turned() -> bool:
    """Return whether OpenBLAS multiplies few rows by a large matrix in less time here if that is laid out turned.

    Measured on Zen, where it takes 0.5 to 0.6 of the time; Haswell's kernels gave equal gradients on that machine.
    """
    return _core() in ("haswell", "zen")


def _core() -> str:
    """Return OpenBLAS's name of the processors that it computes for here; "" without OpenBLAS."""
    try:
        core = ctypes.CDLL(None).openblas_get_corename
    except AttributeError:
        return ""
    core.restype = ctypes.c_char_p
    return str(core().decode().lower())


def matmul_gflops(n: int = 512, repeats: int = 5) -> float:
    """Return the best rate of an (n, 576) x (576, 1536) float32 product, in GFLOP/s."""
    import mlx.core as mx

    a, b = mx.ones((n, 576)), mx.ones((576, 1536))
    mx.eval(a, b)
    seconds = float("inf")
    for _ in range(repeats):
        start = time.perf_counter()
        mx.eval(a @ b)
        seconds = min(seconds, time.perf_counter() - start)
    return 2 * n * 576 * 1536 / seconds / 1e9
