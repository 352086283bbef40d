"""Runs the vectors of tinker_datum.json: the arrays of a Tinker datum, and what a known model gives for them."""

from __future__ import annotations

import numpy as np
from vectors import Answer, Case, UnknownCase, raised

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn

from textpolicy.mlx.engine import MLXEngine
from textpolicy.mlx.score.logprobs import Split, token_logprobs
from textpolicy.tinker.datum import DatumArrays, datum_arrays
from textpolicy.types import Batch, Completion, Episode

NOT_TARGETS = {"cookbook_target_tokens": "the cookbook's 0 for prompt targets, which may be any value"}
FIELDS = ("model_input", "target_tokens", "logprobs", "advantages", "mask")


def check(case: Case) -> list[Answer]:
    """The datum itself, that there is none, the error, or the log-probs of a table-lookup model."""
    if not {"prompt", "completion"} <= set(case.inputs):
        raise UnknownCase(case.id)
    if "raises" in case.expected:
        return [Answer("raises", raised(lambda: _batch(case)))]
    batch = _batch(case)
    data = datum_arrays(batch)
    if "skip" in case.expected:
        return [Answer("skip", not data)]
    if "logits_next_given_current" in case.inputs:
        return _scored(case, batch, data[0])
    values = {name: getattr(data[0], name) for name in FIELDS} | {"length": len(data[0].model_input)}
    return [Answer(key, value, "float32") for key, value in values.items() if key in case.expected]


def _batch(case: Case) -> Batch:
    prompt, tokens = case.inputs["prompt"], np.array(case.inputs["completion"], np.int32)
    given = {name: case.array(name) if name in case.inputs else np.zeros(len(tokens)) for name in FIELDS[2:4]}
    completion = Completion(tokens, given["logprobs"].astype(np.float32))
    episode = Episode.from_completion(prompt, completion, reward=0.0, group=0)
    return Batch.pack([episode], [np.concatenate([np.zeros(len(prompt)), given["advantages"]])])


class Lookup(nn.Module):
    """A model whose logits depend on the token just read and on nothing else."""

    def __init__(self, table: np.ndarray):
        super().__init__()
        self.model_type = "lookup"
        self.table = mx.array(table.astype(np.float32))  # (V, V): next given current
        self.layers = [nn.Identity()]  # one, which never reads anything

    def __call__(self, tokens: mx.array, cache: object = None) -> mx.array:
        return self.table[tokens]


def _scored(case: Case, batch: Batch, datum: DatumArrays) -> list[Answer]:
    """Once from what Tinker would be sent, once from what the local engine reads."""
    model = Lookup(case.array("logits_next_given_current"))
    logits, targets = model(mx.array(datum.model_input)), mx.array(datum.target_tokens)
    remote = token_logprobs(Split(model, ()), logits, targets, mx.ones(len(targets)), gradient=False).logprobs
    local = MLXEngine(model, stop=[]).score(batch)
    return [
        Answer("correct", np.array(remote)[datum.mask != 0], "float32"),
        Answer("correct", local[0][batch.weights[0] != 0], "float32"),
    ]
