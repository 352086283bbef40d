"""The entropy bonus: the gradients of a loss that has one, and the coefficient step by step under a target."""

from __future__ import annotations

from dataclasses import replace

import mlx.core as mx
import numpy as np
from objective import rows, weights_of
from vectors import Answer, Case

from textpolicy.algorithms.entropy_bonus import EntropyControl
from textpolicy.losses import Surrogate
from textpolicy.mlx.engine import PolicyObjective
from textpolicy.types import Batch, Episode

NOT_TARGETS = {"trl_applied": "TRL weighs a step's bonus by the entropy of the step before"}


def check(case: Case) -> list[Answer]:
    p, mask = case.params, case.array("mask") != 0
    if "target" in p:
        control, coefficients = EntropyControl(p["coefficient"], p["target"], p["step"]), []
        for entropies in case.array("entropies"):
            control.advance(episodes(mask, entropies))
            coefficients.append(control.coefficient)
        return [Answer("coefficients", coefficients)]
    made = episodes(mask, case.array("entropies"))
    bonus = Batch.pack(made, [np.zeros(len(e.tokens)) for e in made], bonus=p["coefficient"]).bonus
    batch = rows(case.array("old_logprobs"), case.array("advantages"), weights_of(mask, p["aggregation"]))
    inside = replace(batch, bonus=bonus).map(lambda array: mx.array(array.astype(np.float32)))

    def loss(l, h):
        return PolicyObjective(Surrogate())(l, replace(inside, bonus=inside.bonus * h))[0]

    given = [mx.array(case.array(name).astype(np.float32)) for name in ("logprobs", "entropies")]
    value, (by_logprobs, by_entropies) = mx.value_and_grad(loss, argnums=(0, 1))(*given)
    return [
        Answer("loss", value.item(), "float32"),
        Answer("grad", np.array(by_logprobs), "float32"),
        Answer("grad_entropy", np.array(by_entropies), "float32"),
    ]


def episodes(mask: np.ndarray, entropies: np.ndarray) -> list[Episode]:
    """One token of prompt, then a row."""
    zeros = np.zeros(mask.shape[1] + 1, np.float32)
    return [
        Episode(np.ones(len(zeros), np.int32), np.append(False, m), zeros, np.append(0, h), reward=0.0, group=0)
        for m, h in zip(mask, entropies, strict=True)
    ]
