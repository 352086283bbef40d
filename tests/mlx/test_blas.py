"""The fast matrix multiply below MLX, and the messages when it, or mlx itself, is missing."""

import ctypes
import importlib
import os
import platform
import subprocess
import sys
import time
import warnings
from pathlib import Path
from types import SimpleNamespace
from unittest.mock import Mock

import pytest

from textpolicy._system import openblas as _openblas
from textpolicy.errors import MissingDependencyError, UserError
from textpolicy.mlx import blas
from textpolicy.mlx.models import load_model

linux_cpu = pytest.mark.skipif(not _openblas.runs_on_linux_cpu(), reason="mlx brings its own fast BLAS here")


def python(code):
    root = Path(__file__).parents[2]
    return subprocess.run([sys.executable, "-c", code], cwd=root, capture_output=True, text=True, timeout=100)


@pytest.fixture
def threads():
    """OpenBLAS's own count of its threads, put back afterwards."""
    count = ctypes.CDLL(None).openblas_get_num_threads
    before = count()
    yield count
    blas.set_blas_threads(before)


@linux_cpu
def test_products_are_fast_when_textpolicy_comes_first():
    ran = python("import textpolicy.mlx.blas as b; print(b.matmul_gflops())")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert float(ran.stdout) > blas.SLOW_GFLOPS


@linux_cpu
def test_products_are_fast_when_mlx_comes_after_a_bare_import_of_textpolicy():
    ran = python("import textpolicy, mlx.optimizers, textpolicy.mlx.blas as b; print(b.matmul_gflops())")
    assert (ran.returncode, ran.stderr) == (0, "")
    assert float(ran.stdout) > blas.SLOW_GFLOPS


@linux_cpu
def test_importing_textpolicy_alone_loads_neither_openblas_nor_mlx():
    code = "import textpolicy, ctypes, sys; print(hasattr(ctypes.CDLL(None), 'cblas_sgemm'), 'mlx.core' in sys.modules)"
    assert python(code).stdout.split() == ["False", "False"]


@linux_cpu
def test_one_warning_with_the_fix_when_mlx_comes_first():
    ran = python("import mlx.core, textpolicy.mlx, textpolicy.mlx.blas")
    assert ran.returncode == 0
    assert ran.stderr.count("RuntimeWarning") == 1
    assert "import textpolicy before mlx" in ran.stderr


@linux_cpu
def test_no_warning_when_mlx_comes_first_but_a_fast_blas_came_before_it():
    ran = python("import textpolicy.mlx.blas as b; b.import_mlx()")
    assert (ran.returncode, ran.stderr) == (0, "")


@linux_cpu
def test_openblas_has_kernels_for_every_processor_of_its_kind():
    """One for AVX-512 alone ends the program on a CPU without it."""
    config = ctypes.CDLL(None).openblas_get_config
    config.restype = ctypes.c_char_p
    assert b"DYNAMIC_ARCH" in config() or platform.machine() != "x86_64"


@pytest.mark.parametrize(("core", "expected"), [(b"SkylakeX", True), (b"Haswell", False), (b"Zen", False)])
def test_small_products_need_avx_512(core, expected, monkeypatch):
    library = SimpleNamespace(openblas_get_corename=Mock(return_value=core))
    monkeypatch.setattr(ctypes, "CDLL", lambda name: library)
    assert blas.has_small_products() is expected
    assert blas.wants_large_turned() is not expected


def test_another_blas_has_no_small_products(monkeypatch):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    assert blas.has_small_products() is False
    assert blas.wants_large_turned() is False


@linux_cpu
def test_openblas_finds_the_fortran_runtime_of_mlxs_wheel():
    ran = python(
        "import textpolicy._system.openblas as b, ctypes; print(b._load_fortran()); ctypes.CDLL('libgfortran.so.5')"
    )
    assert (ran.returncode, ran.stdout.strip()) == (0, "True"), ran.stderr


@linux_cpu
def test_threads_can_be_set_and_the_environment_is_honoured(threads):
    blas.set_blas_threads(1)
    assert threads() == 1
    code = "import os; os.environ['OPENBLAS_NUM_THREADS'] = '1'; import textpolicy.mlx, ctypes; "
    assert python(code + "print(ctypes.CDLL(None).openblas_get_num_threads())").stdout.strip() == "1"


@linux_cpu
@pytest.mark.skipif(os.cpu_count() == 1, reason="one core has one thread, which never waits")
@pytest.mark.parametrize("asked", [None, "30"])  # cycles, as a power of 2: a third of a second
def test_threads_without_work_sleep_at_once_unless_the_environment_says_otherwise(asked):
    code = f"""
import os, time
os.environ |= {{"OPENBLAS_NUM_THREADS": "2"{f", 'OPENBLAS_THREAD_TIMEOUT': '{asked}'" if asked else ""}}}
import textpolicy.mlx, mlx.core as mx
a = mx.ones((1024, 1024))
mx.eval(a @ a)
before = time.process_time()
time.sleep(0.5)
print(time.process_time() - before)
"""
    ran = python(code)
    spun = float(ran.stdout)
    assert spun < 0.02 if asked is None else spun > 0.04, ran.stderr


def test_no_threads_are_refused():
    with pytest.raises(UserError, match="is 0; set it to 1 or more"):
        blas.set_blas_threads(0)


def test_threads_without_openblas_have_no_effect_which_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(ctypes, "CDLL", lambda name: object())
    blas._say_without_effect.cache_clear()
    for n in (2, 1, 64):
        blas.set_blas_threads(n)
    assert [record.getMessage().split(":")[0] for record in caplog.records] == [
        "the number of BLAS threads has no effect here"
    ]
    with pytest.raises(UserError, match="is 0; set it to 1 or more"):
        blas.set_blas_threads(0)


@pytest.fixture
def unimported(monkeypatch):
    """As if mlx.core had not been imported yet, and importing it did nothing."""
    monkeypatch.delitem(sys.modules, "mlx.core")
    monkeypatch.setattr(importlib, "import_module", lambda name: None)


def test_a_missing_openblas_is_a_warning_only_when_products_are_slow(monkeypatch, unimported):
    monkeypatch.setattr(blas, "runs_on_linux_cpu", lambda: True)
    monkeypatch.setattr(blas, "blas_threads", lambda: 0)
    monkeypatch.setattr(blas, "matmul_gflops", lambda repeats: 6.0)
    with pytest.warns(RuntimeWarning, match=rf"OpenBLAS was not found.* at 6 GFLOP/s .*pip install {blas._PACKAGE}"):
        blas.import_mlx()
    monkeypatch.setattr(blas, "matmul_gflops", lambda repeats: 200.0)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        blas.import_mlx()


def test_nothing_is_preloaded_on_a_gpu_or_metal(monkeypatch):
    monkeypatch.setattr(_openblas, "runs_on_linux_cpu", lambda: False)
    monkeypatch.setattr(ctypes, "CDLL", lambda *_, **__: pytest.fail("preloaded"))
    _openblas.preload()


def test_a_missing_mlx_is_one_sentence_with_the_install_line(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    with pytest.raises(MissingDependencyError, match=r"mlx is not installed; .* pip install 'textpolicy\[mlx\]'"):
        blas.import_mlx()


def test_an_mlx_without_its_native_library_is_one_sentence(monkeypatch):
    def fails(name):
        raise ImportError("libmlx.so: cannot open shared object file")

    monkeypatch.setattr(importlib, "import_module", fails)
    with pytest.raises(MissingDependencyError, match=r"native library does not load here \(libmlx\.so"):
        blas.import_mlx()


def test_the_install_line_names_the_gpu_build_where_there_is_an_nvidia_gpu(monkeypatch):
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    for gpu in (True, False):
        monkeypatch.setattr(Path, "exists", lambda path, gpu=gpu: gpu)
        with pytest.raises(MissingDependencyError) as raised:
            blas.import_mlx()
        line = str(raised.value).split("install it with: ")[1]
        assert ("textpolicy[cuda13]" in line) is gpu
        assert gpu or line == "pip install 'textpolicy[mlx]'"


@pytest.mark.parametrize(
    ("cores", "threads", "load", "used"),
    [(2, 2, 0.3, 2), (2, 2, 0.7, 1), (2, 2, 14.0, 1), (2, 1, 14.0, 1), (2, 0, 14.0, 0), (8, 8, 3.2, 5), (8, 4, 3.2, 4)],
)
def test_no_more_threads_are_used_than_other_programs_leave_cores_free(monkeypatch, caplog, cores, threads, load, used):
    counts = [threads]
    monkeypatch.setattr(blas, "_chosen", False)
    monkeypatch.setattr(blas, "blas_threads", lambda: counts[-1])
    monkeypatch.setattr(blas, "set_blas_threads", counts.append)
    monkeypatch.setattr(blas.os, "cpu_count", lambda: cores)
    clock = iter([0.0, 2.0])
    busy = iter([50.0, 50.0 + 2 * load])
    monkeypatch.setattr(blas, "_busy_seconds", lambda: next(busy))
    monkeypatch.setattr(blas.time, "perf_counter", lambda: next(clock))
    monkeypatch.setattr(blas.time, "process_time", lambda: 7.0)
    monkeypatch.setattr(blas.time, "sleep", lambda seconds: None)
    for _ in range(2):  # the clock has no more times: the first call decides
        blas.leave_busy_cores()
    assert counts[-1] == used
    assert [f"{used} of {threads} BLAS threads" in said for said in caplog.messages] == [True] * (used < threads)


def test_the_first_model_that_a_script_loads_settles_the_threads(monkeypatch, small_model):
    used = []
    monkeypatch.setattr(blas, "_chosen", False)
    monkeypatch.setattr(blas, "blas_threads", lambda: 2)
    monkeypatch.setattr(blas.os, "cpu_count", lambda: 2)
    monkeypatch.setattr(blas, "_busy_seconds", lambda: 3.0 * time.perf_counter())
    monkeypatch.setattr(blas, "set_blas_threads", used.append)
    for _ in range(2):
        load_model(small_model)
    assert used == [1]


@linux_cpu
def test_threads_that_were_asked_for_stay(monkeypatch):
    monkeypatch.setattr(blas, "_chosen", False)
    monkeypatch.setattr(blas, "_busy_seconds", lambda: pytest.fail("the cores are watched"))
    blas.set_blas_threads(blas.blas_threads())
    monkeypatch.setattr(blas, "blas_threads", lambda: 2)
    blas.leave_busy_cores()
    script = "import textpolicy.mlx.blas as blas; print(blas._chosen)"
    unset = {name: value for name, value in os.environ.items() if name != "OPENBLAS_NUM_THREADS"}
    for given in ({}, {"OPENBLAS_NUM_THREADS": "2"}):
        said = subprocess.check_output([sys.executable, "-c", script], env=unset | given, text=True)
        assert said.strip() == str(bool(given))


@linux_cpu
def test_the_seconds_that_cores_work_are_counted():
    before, own = blas._busy_seconds(), time.process_time()
    while time.process_time() - own < 0.2:
        pass
    assert blas._busy_seconds() - before >= 0.15  # in hundredths


@pytest.mark.parametrize(
    ("threads", "engine", "cpu", "said"),
    [(2, 41.0, 12.0, True), (8, 10.0, 8.9, True), (2, 10.0, 9.1, False), (2, 10.0, 19.0, False), (1, 41.0, 3.0, False),
     (0, 41.0, 3.0, False)],
)  # fmt: skip
def test_steps_that_got_less_than_their_time_of_the_cpu_are_said_to_be_slow(monkeypatch, threads, engine, cpu, said):
    monkeypatch.setattr(blas, "blas_threads", lambda: threads)
    note = blas.starved(engine, cpu)
    assert (note is not None) == said
    assert not said or f"its {threads} BLAS threads wait for each other" in note
