"""Turn quantised layers into floating-point ones and back, in every mode of MLX.

The scales of the modes mxfp4, mxfp8 and nvfp4 are bytes: the type that a model computes in is not theirs.
"""

from __future__ import annotations

from copy import copy
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.mla import MultiLinear, QuantizedMultiLinear
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear

_IN_FLOATS: dict[type, Any] = {  # makes a layer of any size, to be given weights
    nn.QuantizedLinear: lambda: nn.Linear(1, 1, bias=False),
    nn.QuantizedEmbedding: lambda: nn.Embedding(1, 1),
    QuantizedSwitchLinear: lambda: SwitchLinear(1, 1, 1, bias=False),
    QuantizedMultiLinear: lambda: MultiLinear(1, 1, 1),
}


def is_floating(value: Any) -> bool:
    """Return whether ``value`` is an array of floats, and so neither packed weights, nor indices, nor no array."""
    return isinstance(value, mx.array) and mx.issubdtype(value.dtype, mx.floating)


def stored_dtype(layer: nn.Module, common: mx.Dtype) -> mx.Dtype:
    """Return the type of the weight of ``layer``, or of the scales if quantised; ``common`` where those are bytes."""
    floats = layer.get("scales", layer.weight)
    return floats.dtype if is_floating(floats) else common


def dense_weight(layer: nn.Module, dtype: mx.Dtype | None = None) -> mx.array:
    """Return the weight (..., out, in) of ``layer``, dequantised if it is quantised, in ``dtype``.

    None is its ``stored_dtype``, and float32 where the scales are bytes.
    """
    dtype = dtype or stored_dtype(layer, mx.float32)
    if "scales" not in layer:
        return layer.weight.astype(dtype)
    settings = {"group_size": layer.group_size, "bits": layer.bits, "mode": layer.mode}
    shared: mx.array | None = getattr(layer, "global_scale", None)  # (experts,), of nvfp4
    if shared is None:
        return mx.dequantize(layer.weight, layer.scales, layer.get("biases"), dtype=dtype, **settings)
    experts = zip(layer.weight, layer.scales, shared, strict=True)
    return mx.stack([mx.dequantize(w, s, None, global_scale=g, dtype=dtype, **settings) for w, s, g in experts])


def in_floats(layer: nn.Module, dtype: mx.Dtype) -> nn.Module:
    """Return ``layer`` with a dense weight in ``dtype``; a bias stays as it is."""
    dense = _IN_FLOATS[type(layer)]() if type(layer) in _IN_FLOATS else copy(layer)
    dense.weight = dense_weight(layer, dtype)
    if "bias" in layer:
        dense.bias = layer.bias
    return dense


def quantised_as(layer: nn.Module, dense: nn.Module) -> nn.Module:
    """Return the float32 weights of ``dense`` in the form of the quantised ``layer``: mode, group, bits and types."""
    like = copy(layer)
    if getattr(layer, "global_scale", None) is not None:
        like._quantize(dense.weight, True)
        return like
    weight = dense.weight.astype(stored_dtype(layer, mx.float32))
    like.weight, like.scales, *biases = mx.quantize(weight, layer.group_size, layer.bits, layer.mode)
    like.biases = biases[0] if biases else None
    return like


def dequantise(model: nn.Module) -> nn.Module:
    """Turn the quantised layers of ``model`` into floating-point ones, in place, each in its ``stored_dtype``.

    Layers of a kind that is not known, such as those with rotated inputs, stay quantised.
    """
    common = compute_dtype(model)
    for name, module in model.named_modules():
        if type(module) in _IN_FLOATS:
            floats = in_floats(module, stored_dtype(module, common))
            model.update_modules(tree_unflatten([(name, floats)]))
    return model


def compute_dtype(model: nn.Module) -> mx.Dtype:
    """Return the type of most floating arrays of a model without adapters; float32 where there are none."""
    arrays: Any = tree_flatten(model.parameters())
    types = [value.dtype for _, value in arrays if is_floating(value)]
    return max(types, key=types.count, default=mx.float32)
