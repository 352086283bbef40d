"""Runs the vectors of tinylora.json: the adapter's forward pass and gradients, tying, sizes."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any

import numpy as np
from vectors import Answer, Case, UnknownCase

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn

from textpolicy.errors import UserError
from textpolicy.mlx.adapters.tinylora import (
    Factors,
    ProjectedCore,
    SharedVectors,
    SVDLinear,
    TrainedCore,
    delta_weight,
    group_count,
    lora_size,
    lora_xs_size,
    mixture,
    structured_groups,
    tiled_groups,
    tinylora_size,
    tying_groups,
)


def check(case: Case) -> list[Answer]:
    """Every expected output of the case, float32 where MLX computes it."""
    if "U" in case.inputs:
        return _forward(case)
    if "modules" in case.inputs:
        return _tied_names(case)
    if "in_out" in case.inputs:
        shapes, rank = case.inputs["in_out"], case.params["r"]
        return [Answer("lora", lora_size(shapes, rank)), Answer("lora_xs", lora_xs_size(len(shapes), rank))]
    if "n_tie" in case.params:
        return _size(case)
    if "table" in case.expected:
        return [Answer("table", {key: _tied(key, case.params["u"]) for key in case.expected["table"]})]
    raise UnknownCase(case.id)


def _forward(case: Case) -> list[Answer]:
    x, c, v, p = (_array(case, name) for name in ("x", "C", "v", "P"))
    factors = Factors(_array(case, "U"), _array(case, "S"), _array(case, "Vt"))
    vectors, xs = SharedVectors(1, len(v)), TrainedCore(len(factors.s), seed=0)

    def layer(core: ProjectedCore | TrainedCore) -> SVDLinear:
        linear = nn.Linear(x.shape[1], c.shape[1], bias=False)
        linear.weight = _array(case, "W")
        return SVDLinear(linear, factors, core, case.params["sigma_placement"], case.params.get("scale", 1.0))

    tiny = layer(ProjectedCore(vectors, 0, p))
    at_start = tiny(x)
    vectors.v = v[None]
    xs.r = mixture(v, p)
    values = {
        "R": xs.r,
        "delta_W": delta_weight(factors, xs.r, case.params["sigma_placement"], case.params.get("scale", 1.0)),
        "y": tiny(x),
        "grad_v": _gradient(vectors, lambda: (c * tiny(x)).sum())["v"][0],
        "grad_R": _gradient(xs, lambda: (c * layer(xs)(x)).sum())["r"],
        "y_at_v0": at_start,
    }
    if unknown := set(case.expected) - set(values):
        raise UnknownCase(f"{case.id}: {', '.join(sorted(unknown))}")
    return [Answer(key, np.array(values[key]), "float32") for key in case.expected]


def _gradient(module: nn.Module, loss: Callable[[], mx.array]) -> dict[str, Any]:
    return nn.value_and_grad(module, loss)()[1]


def _tied_names(case: Case) -> list[Answer]:
    names, ties = case.inputs["modules"], case.params["n_tie"]
    tiled = {str(n): tiled_groups(len(names), n) for n in ties}
    structured = {}
    for n in ties:
        try:
            structured[str(n)] = structured_groups(names, n)
        except UserError:
            continue  # fewer modules of one kind than are to be tied
    counts = {n: tinylora_size(groups, 1) for n, groups in tiled.items()}
    return [Answer("tiled", tiled), Answer("structured", structured), Answer("n_groups_tiled", counts)]


def _tied(key: str, u: int) -> dict[str, Any]:
    """The table's entry for "modules,tying"."""
    modules, tying = int(key.split(",")[0]), float(key.split(",")[1])
    groups = group_count(modules, tying)
    balanced = tying_groups(modules, groups)
    return {
        "peft_groups": tying_groups(modules, groups, "peft"),
        "balanced_groups": balanced,
        "n_groups": groups,
        "trainable": tinylora_size(balanced, u),
    }


def _size(case: Case) -> list[Answer]:
    modules = case.params["n_layers"] * case.params["modules_per_layer"]
    trainable = tinylora_size(tiled_groups(modules, case.params["n_tie"]), case.params["u"])
    return [
        Answer("trainable", trainable),
        Answer("bytes_fp32", trainable * mx.float32.size),
        Answer("bytes_bf16", trainable * mx.bfloat16.size),
    ]


def _array(case: Case, name: str) -> mx.array:
    return mx.array(case.array(name).astype(np.float32))
