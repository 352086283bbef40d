"""Pretend that MLX runs on Metal: the branches are a Mac's, the numbers a CPU's, and every kernel gives zeros.

The tests here use it where there is no Mac. As a plugin it serves any test, from the first import on:
``PYTHONPATH=tests/metal python -m pytest -p pretended_metal tests/mlx``.
"""

from __future__ import annotations

import importlib.util
from collections.abc import Iterator
from contextlib import contextmanager, nullcontext
from pathlib import Path

import pytest

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx
import mlx_lm

from textpolicy.mlx.kernels import metal as ours

GIB = 2**30
# what Metal says of Macs with 8, 16, 64 and 128 GB: (memory_size, max_recommended_working_set_size, max_buffer_length)
MACS = {
    8: (8 * GIB, 5_726_633_984, 4_294_967_296),
    16: (16 * GIB, 11_453_251_584, 8_589_934_592),
    64: (64 * GIB, 51_539_607_552, 38_654_705_664),
    128: (128 * GIB, 115_448_725_504, 86_586_540_032),
}
called: list[str] = []  # the kernels, in the order of their calls


@pytest.fixture(autouse=True)
def metal() -> Iterator[list[str]]:
    """Run the test on Metal, a Mac's or a pretended one; yield the kernels that were called, [] on a Mac."""
    called.clear()
    with nullcontext() if mx.metal.is_available() else pretended_metal():
        yield called


def pytest_configure(config: pytest.Config) -> None:
    """Pretend for as long as pytest runs, loaded as a plugin."""
    pretending = pretended_metal()
    pretending.__enter__()
    config.add_cleanup(lambda: pretending.__exit__(None, None, None))


@contextmanager
def pretended_metal(size: int = 16) -> Iterator[None]:
    """Make MLX answer as on a Mac with ``size`` GB, within the context."""
    models = [
        importlib.import_module(f"mlx_lm.{path.parent.name}.{path.stem}")
        for path in sorted(Path(mlx_lm.__file__).parent.glob("*/*.py"))
        if path.parent.name in ("models", "kernels") and "metal_kernel(" in path.read_text()
    ]
    names = ("memory_size", "max_recommended_working_set_size", "max_buffer_length")
    info = {"device_name": "Apple M1", "architecture": "applegpu_g13g", "resource_limit": 499_000}
    info |= dict(zip(names, MACS[size], strict=True))
    gpu, stream, streams = mx.Device(mx.gpu), mx.default_stream(mx.cpu), mx.new_thread_local_stream

    def set_wired_limit(limit: int) -> int:
        if limit > info["max_recommended_working_set_size"]:
            raise ValueError("[metal::set_wired_limit] Setting a wired limit larger than the maximum working set size")
        return 0

    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(mx, "default_device", lambda: gpu)
        patch.setattr(mx, "default_stream", lambda device: stream)
        patch.setattr(mx, "new_thread_local_stream", lambda device: streams(mx.cpu))
        patch.setattr(mx, "device_info", lambda device=gpu: dict(info))
        patch.setattr(mx, "set_wired_limit", set_wired_limit)
        patch.setattr(mx.metal, "is_available", lambda: True)
        patch.setattr(mx.fast, "metal_kernel", Kernel)
        for module in models:  # which looked for Metal when they were imported
            spec = importlib.util.spec_from_file_location(module.__name__, module.__file__)
            again = importlib.util.module_from_spec(spec)
            spec.loader.exec_module(again)
            for name, value in vars(again).items():
                if isinstance(value, Kernel):
                    patch.setattr(module, name, value)
        forget_our_kernels()
        yield
    forget_our_kernels()


def forget_our_kernels() -> None:
    """Let textpolicy make its kernels anew, pretended or real."""
    for made in vars(ours).values():
        if hasattr(made, "cache_clear"):
            made.cache_clear()


class Kernel:
    """A Metal kernel: it gives zeros, and MLX has no gradient for it."""

    def __init__(self, name: str, *_: object, **__: object):
        self.name = name

    def __call__(self, *, inputs, output_shapes, output_dtypes, **_: object) -> list[mx.array]:
        called.append(self.name)

        @mx.custom_function
        def kernel(*arrays):
            return [mx.zeros(shape, dtype) for shape, dtype in zip(output_shapes, output_dtypes, strict=True)]

        @kernel.vjp
        def backward(arrays, slopes, outputs):
            raise ValueError("[Primitive::vjp] Not implemented for CustomKernel.")

        return kernel(*(a for a in inputs if isinstance(a, mx.array)))
