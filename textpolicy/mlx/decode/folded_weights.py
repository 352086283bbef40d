"""The copies of a model's weights with the LoRAs folded into them, for the decoding of one rollout on a CPU."""

from __future__ import annotations

import sys
from contextlib import nullcontext
from functools import cache
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.lora import LoRALinear

from ..._system.machine import memory
from ..adapters.attach import WRAPPERS, LowRankLinear
from ..blas import blas_threads, has_small_products, wants_large_turned
from ..kernels.patching import StandIn, with_modules

_PAYS = 8  # products before a layer's weights are copied: the copy costs about as much as so many products save
_MOST_BYTES = memory() / 16  # for all copies
FEW = 12  # rows that OpenBLAS multiplies with small matrices in place; it packs larger ones first
_CORES = 2  # with more cores, large products are divided among them and small ones are not
_SMALL = 10**6  # rows x inputs x outputs of a small product, at most
_NARROW, _WIDE = 16, 64  # outputs of a small product
_BESIDE = ("up_proj", "k_proj", "v_proj")  # layers whose product a second core takes beside that of another
_LARGE = 2**23  # weights of a layer whose product two cores share, or whose copy is turned
_TURNED = 4096  # outputs of a part of a copy that is turned


def folded(model: nn.Module, rows: int) -> nn.Module:
    """Return a view of ``model`` for decoding up to ``rows`` rows that holds the copies, or itself if none pay.

    A LoRA of rank 16 takes a sixth of a step of eight rows. Few rows on few cores get copies laid out for small
    products, which take less time, and which two cores compute side by side; without small products they get a turned
    copy of the head, which takes about half as long. Training still adds the LoRA to the product, so the log-probs of
    the two differ by float32's rounding.
    """
    if not copies(model):
        return model
    cores = blas_threads()
    few = rows <= FEW and 0 < cores <= _CORES
    small, turns = few and has_small_products(), few and wants_large_turned()

    def stand_in(where: tuple[str | int, ...], module: nn.Module) -> StandIn | nn.Module | None:
        turned = turns and _suits(module) and type(module) in (nn.Linear, nn.Embedding) and module.weight.size >= _LARGE
        if not _suits(module) or not (small or turned or isinstance(module, LoRALinear)):
            return module if isinstance(module, WRAPPERS) else None
        if not isinstance(module, nn.Embedding):
            return StandIn(module, Product(module, small, cores, where[-1] in _BESIDE, turned))
        tied: Any = StandIn(module, module)  # an embedding may be the head, too
        tied.as_linear = Product(module, small, cores, turned=turned)
        return tied

    return with_modules(model, stand_in)


def copies(model: nn.Module) -> int:
    """Return the most bytes that the copies of a rollout take; 0 where it makes none."""
    if mx.default_device() != mx.Device(mx.cpu):
        return 0
    found = [module for module in model.modules() if _suits(module)]
    loras = [module for module in found if isinstance(module, LoRALinear)]
    size = sum(weight.nbytes for weight in {id(w): w for w in (_base(m).weight for m in found)}.values())
    return size if loras and size <= _MOST_BYTES else 0


class Product:
    """The product of a linear layer, or of an embedding used as one, with a copy of the weights once that pays."""

    def __init__(self, layer: nn.Module, few: bool, cores: int = 1, beside: bool = False, turned: bool = False):
        outputs, inputs = _base(layer).weight.shape
        fitting = (n for n in (_WIDE, _WIDE // 2, _NARROW) if outputs % n == 0 and FEW * n * inputs <= _SMALL)
        self.layer = layer
        self.plain = layer.as_linear if isinstance(layer, nn.Embedding) else layer
        self.width = next(fitting, 0) if few else 0  # outputs of one small product; 0 is one large product
        self.turned = turned
        self.most = FEW if self.width or turned else sys.maxsize  # rows that the copy is good for
        self.made = 0  # products so far
        # W + scale (A B)^T (outputs, inputs), or blocks (outputs / width, inputs, width) of its transpose, in one or
        # two parts, or parts of W^T (inputs, up to _TURNED outputs); OpenBLAS divides large products among cores, and
        # small ones go to them by streams
        self.parts: list[mx.array] = []
        self.halved = cores > 1 and outputs * inputs >= _LARGE
        self.first = int(beside and cores > 1 and not self.halved)  # the stream of the first part

    def __call__(self, x: mx.array) -> mx.array:
        rows, base = x.size // x.shape[-1], _base(self.layer)
        if rows > self.most:
            return self.plain(x)
        if not self.parts:
            self.made += 1
            if self.made <= _PAYS:
                return self.plain(x)
            self.parts = self._copied(x.shape[-1])
        if self.width:
            y = mx.concatenate([self._small(x, i) for i in range(len(self.parts))], axis=-1)
        elif self.turned:
            y = mx.concatenate([x @ part for part in self.parts], axis=-1)
        else:
            y = x @ self.parts[0].T
        return y + base.bias if "bias" in base else y

    def _copied(self, inputs: int) -> list[mx.array]:
        """Return the parts of a copy of the weights."""
        weight = _base(self.layer).weight
        if self.turned:
            return [mx.contiguous(part.T) for part in mx.split(weight, [*range(_TURNED, len(weight), _TURNED)])]
        if self.width:
            weight = mx.contiguous(weight.reshape(-1, self.width, inputs).swapaxes(1, 2))
        if isinstance(self.layer, LoRALinear):
            a, b = self.layer.lora_a, self.layer.scale * self.layer.lora_b
            if self.width:
                weight = weight + a @ b.reshape(len(b), -1, self.width).swapaxes(0, 1)
            else:
                weight = mx.addmm(weight, b.T, a.T)
        if self.width and self.halved:
            return [mx.contiguous(part) for part in mx.split(weight, [(len(weight) + 1) // 2])]
        return [weight]

    def _small(self, x: mx.array, part: int) -> mx.array:
        """Return the outputs of a part of the weights, computed in a stream of its own if it is not the first."""
        with mx.stream(_second()) if self.first + part else nullcontext():
            y = x.reshape(1, -1, x.shape[-1]) @ self.parts[part]  # (outputs / width, rows, width)
            return y.swapaxes(0, 1).reshape(*x.shape[:-1], -1)


@cache
def _second() -> mx.ThreadLocalStream:
    return mx.new_thread_local_stream(mx.cpu)


def _base(layer: nn.Module) -> nn.Module:
    return layer.linear if isinstance(layer, LoRALinear) else layer


def _suits(module: nn.Module) -> bool:
    """Return whether ``module`` is a float32 layer that can be copied, with its LoRA if it has one."""
    if type(module) in (LoRALinear, LowRankLinear):
        parts = (module.linear.weight, module.lora_a, module.lora_b)
        plain = type(module.linear) is nn.Linear and module.dropout._p_1 == 1
        return plain and all(a.dtype == mx.float32 for a in parts)
    return type(module) in (nn.Linear, nn.Embedding) and module.weight.dtype == mx.float32
