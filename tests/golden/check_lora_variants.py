"""Runs the vectors of lora_variants.json through mlx-lm's own layers, which ``attach_lora`` puts into a model."""

from __future__ import annotations

import numpy as np
from vectors import Answer, Case, UnknownCase

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn
from mlx_lm.tuner.dora import DoRALinear
from mlx_lm.tuner.lora import LoRALinear


def check(case: Case) -> list[Answer]:
    """The layer's output, what it fuses to and DoRA's magnitudes at the start; rsLoRA differs in its scale alone."""
    if not {"W", "lora_a", "lora_b", "x"} <= set(case.inputs):
        raise UnknownCase(case.id)
    kind = DoRALinear if "m" in case.inputs else LoRALinear
    layer = kind.from_base(_linear(case), r=case.params["r"], scale=case.params["scale"])
    at_init = layer.m if "m" in case.inputs else None
    for name in {"lora_a", "lora_b", "m"} & set(case.inputs):
        layer[name] = _array(case, name)
    values = {"y": layer(_array(case, "x")), "fused_W": layer.fuse().weight, "m_at_init": at_init}
    if unknown := [key for key in case.expected if values.get(key) is None]:
        raise UnknownCase(f"{case.id}: {', '.join(unknown)}")
    return [Answer(key, np.array(values[key]), "float32") for key in case.expected]


def _linear(case: Case) -> nn.Linear:
    outputs, inputs = case.array("W").shape
    linear = nn.Linear(inputs, outputs, bias="bias" in case.inputs)
    linear.weight = _array(case, "W")
    if "bias" in case.inputs:
        linear.bias = _array(case, "bias")
    return linear


def _array(case: Case, name: str) -> mx.array:
    return mx.array(case.array(name).astype(np.float32))
