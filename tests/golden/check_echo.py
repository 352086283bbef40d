"""ECHO: the gradient of both losses, and the cross-entropy on observed tokens alone."""

from __future__ import annotations

import mlx.core as mx
import numpy as np
from objective import rows, weights_of
from vectors import Answer, Case

from textpolicy.losses import Surrogate, WithinDivergence, echo_loss, policy_objective
from textpolicy.types import Batch, Episode


def check(case: Case) -> list[Answer]:
    p, mask, observed = case.params, case.array("mask"), case.array("observed") != 0
    logprobs, old = case.array("logprobs"), case.array("old_logprobs")
    batch = rows(old, case.array("advantages"), weights_of(mask, "token-mean"))
    packed = pack(mask != 0, observed, p["echo"])
    echo = np.zeros(mask.shape) if packed.echo is None else packed.echo
    both = Batch(**{f: getattr(batch, f) for f in Batch.__dataclass_fields__} | {"echo": echo.astype(np.float32)})
    how = Surrogate(WithinDivergence("tv", p["low"], p["high"], weight_high=None))
    inside = both.map(lambda array: mx.array(array.astype(np.float32)))
    grad = mx.grad(lambda l: policy_objective(l, inside, mx, how) + echo_loss(l, inside, mx))(mx.array(logprobs))
    return [
        Answer("grad", np.array(grad), "float32"),
        Answer("cross_entropy", echo_loss(logprobs, both, np), "float32"),
    ]


def pack(mask: np.ndarray, observed: np.ndarray, echo: float) -> Batch:
    """Episodes with one token of prompt, cut after the last token that someone wrote."""
    episodes = []
    for sampled, said in zip(mask, observed, strict=True):
        length = np.flatnonzero(sampled | said).max() + 2
        tokens, zeros = np.ones(length, np.int32), np.zeros(length, np.float32)
        episodes.append(Episode(tokens, np.append(False, sampled)[:length], zeros, None, reward=0.0, group=0))
    batch = Batch.pack(episodes, [np.zeros(len(e.tokens), np.float32) for e in episodes], echo=echo)
    missing = mask.shape[1] - batch.weights.shape[1]
    return batch.map(lambda a: np.pad(a, [(0, 0), (0, missing)]), skip=("temperatures",))
