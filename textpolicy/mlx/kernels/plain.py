"""The passes that are differentiated without Metal kernels, for which MLX has no gradient.

mlx-lm's models call kernels of their own where the default device is Metal's, most of them whether they are in training
or not. All but two have the same in MLX's operations beside the kernel, for every other device.
"""

from __future__ import annotations

import sys
from collections.abc import Iterator
from contextlib import contextmanager
from types import SimpleNamespace

import mlx.core as mx
import mlx.nn as nn

from ...errors import UserError

_FAMILIES = "mlx_lm.models."
# the Python modules of layers that exist as kernels alone, and what these layers are
_KERNELS_ALONE = {"bitlinear_layers": "the packed weights of BitNet", "muse_spark": "the layers of Muse Spark"}


@contextmanager
def plain_operations(*families: str) -> Iterator[None]:
    """Let mlx-lm's models, or ``families`` of them, compute with MLX's operations alone, within the context.

    They decide by what their ``mx`` says of the device, so they get one that says CPU. MLX's operations still run on
    the default device, as fast as they can one token after another.
    """
    cpu = {"default_device": lambda: mx.Device(mx.cpu), "metal": SimpleNamespace(is_available=lambda: False)}
    before = {
        name: vars(module)["mx"]  # or what kernels/gathers.py has put in its place
        for name, module in sys.modules.copy().items()
        if name.startswith(_FAMILIES)
        and "mx" in vars(module)
        and (not families or name.removeprefix(_FAMILIES) in families)
        and mx.metal.is_available()
    }
    for name, library in before.items():
        vars(sys.modules[name])["mx"] = SimpleNamespace(**{**vars(library), **cpu})
    try:
        yield
    finally:
        for name, library in before.items():
            vars(sys.modules[name])["mx"] = library


def refuse_kernels_alone(model: nn.Module) -> None:
    """Raise UserError on Metal if ``model`` has layers that only kernels compute, so that it cannot be trained."""
    for part in model.modules() if mx.metal.is_available() else ():
        kind = type(part).__module__
        if what := _KERNELS_ALONE.get(kind.removeprefix(_FAMILIES)):
            raise UserError(
                f"{what} are computed by a Metal kernel of mlx-lm, which has no gradient, so this model cannot be "
                "trained on a Mac, only sampled from; choose another model to train"
            )
