"""Copies of a model's weights for the decoding of one rollout on a CPU, with the LoRAs folded into them."""

from __future__ import annotations

import sys

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from ..._system.machine import memory
from ..adapters.attach import WRAPPERS, LowRankLinear
from ..blas import blas_threads, has_small_products
from ..kernels.patching import StandIn, with_modules

_PAYS = 8  # products that a layer makes before a copy is made for more: it costs about as much as so many save
_SHARE = 1 / 16  # of the machine's memory that all copies may take
_FEW = 12  # rows that OpenBLAS multiplies with small matrices as they lie in memory; it packs larger ones first
_CORES = 2  # with more, large products are shared out among them, and small ones are not
_SMALL = 10**6  # rows x inputs x outputs of a small product, at most
_NARROW, _WIDE = 16, 64  # outputs of one


def folded(model: nn.Module, rows: int) -> nn.Module:
    """``model``, to decode up to ``rows`` rows with: a view of it, which holds the copies, or itself if none pay.

    A LoRA of rank 16 takes a sixth of a step of eight rows. Few rows on few cores get copies laid out for small
    products, which take less time. What trains goes on adding the LoRA to the product, so the log-probs of the two
    differ by float32's rounding.
    """
    if not copies(model):
        return model
    few = rows <= _FEW and 0 < blas_threads() <= _CORES and has_small_products()

    def stand_in(where: tuple[str | int, ...], module: nn.Module) -> StandIn | nn.Module | None:
        if _suits(module) and (few or isinstance(module, LoRALinear)):
            return Tied(module, few) if isinstance(module, nn.Embedding) else StandIn(module, Product(module, few))
        return module if isinstance(module, WRAPPERS) else None

    return with_modules(model, stand_in)


def copies(model: nn.Module) -> int:
    """Bytes of the copies that a rollout makes, at most; 0 where it makes none."""
    if mx.default_device() != mx.Device(mx.cpu):
        return 0
    found = [module for module in model.modules() if _suits(module)]
    loras = [module for module in found if isinstance(module, LoRALinear)]
    size = sum(weight.nbytes for weight in {id(w): w for w in (_base(m).weight for m in found)}.values())
    return size if loras and size <= _SHARE * memory() else 0


class Product:
    """What a linear layer, or an embedding's use as one, makes of its input."""

    def __init__(self, layer: nn.Module, few: bool):
        outputs, inputs = _base(layer).weight.shape
        fitting = (n for n in (_WIDE, _WIDE // 2, _NARROW) if outputs % n == 0 and _FEW * n * inputs <= _SMALL)
        self.layer = layer
        self.plain = layer.as_linear if isinstance(layer, nn.Embedding) else layer
        self.width = next(fitting, 0) if few else 0  # outputs of one small product; 0 is one large product
        self.most = _FEW if self.width else sys.maxsize  # rows that it is good for
        self.made = 0  # products so far
        self.weight: mx.array | None = None

    def __call__(self, x: mx.array) -> mx.array:
        rows = x.size // x.shape[-1]
        if rows > self.most:
            return self.plain(x)
        if self.weight is None:
            self.made += 1
            if self.made <= _PAYS:
                return self.plain(x)
            self.weight = self._folded()
        if self.width:
            y = x.reshape(1, rows, -1) @ self.weight  # (outputs / width, rows, width)
            y = y.swapaxes(0, 1).reshape(*x.shape[:-1], -1)
        else:
            y = x @ self.weight.T
        base = _base(self.layer)
        return y + base.bias if "bias" in base else y

    def _folded(self) -> mx.array:
        """W + scale (A B)^T (outputs, inputs), or blocks (outputs / width, inputs, width) of its transpose."""
        weight = _base(self.layer).weight
        if self.width:
            weight = mx.contiguous(weight.reshape(-1, self.width, weight.shape[1]).swapaxes(1, 2))
        if not isinstance(self.layer, LoRALinear):
            return weight
        a, b = self.layer.lora_a, self.layer.scale * self.layer.lora_b
        if self.width:
            return weight + a @ b.reshape(len(b), -1, self.width).swapaxes(0, 1)
        return mx.addmm(weight, b.T, a.T)


class Tied(StandIn):
    """What stands in for an embedding that may be the head, too."""

    def __init__(self, module: nn.Embedding, few: bool):
        super().__init__(module, module)
        self.as_linear = Product(module, few)


def _base(layer: nn.Module) -> nn.Module:
    return layer.linear if isinstance(layer, LoRALinear) else layer


def _suits(module: nn.Module) -> bool:
    if type(module) in (LoRALinear, LowRankLinear):
        parts = (module.linear.weight, module.lora_a, module.lora_b)
        return type(module.linear) is nn.Linear and module.dropout._p_1 == 1 and _are_float32(*parts)
    return type(module) in (nn.Linear, nn.Embedding) and _are_float32(module.weight)


def _are_float32(*arrays: mx.array) -> bool:
    return all(array.dtype == mx.float32 for array in arrays)
