"""Compiled passes are eager ones: for every recipe, objective and user's own, and every size of micro-batch."""

from dataclasses import replace
from typing import get_args

import mlx.core as mx
import numpy as np
import pytest
from conftest import VOCABULARY, make_tiny_engine, recipe
from mlx.utils import tree_flatten
from pretended_metal import metal  # noqa: F401 (a fixture)

from textpolicy import losses
from textpolicy.algorithms import ALGORITHMS
from textpolicy.losses import KL, Clip, Correction, Surrogate
from textpolicy.mlx.engine import MLXEngine, PolicyObjective
from textpolicy.mlx.score import micro_batches
from textpolicy.types import Completion, Episode

KINDS = {kind.__name__: Surrogate(kind()) for kind in losses.Objective.__subclasses__()}
GATE, FREE = losses.SoftGate(), losses.ImportanceSampling()
# every objective, ratio, penalty and correction that a Surrogate can have
SURROGATES = {
    **{name: recipe(name).surrogate for name in ALGORITHMS},
    **KINDS,
    **{level: Surrogate(FREE, ratio=level) for level in get_args(losses.RatioLevel)},
    "dual clip": Surrogate(Clip(0.2, 0.2, 3.0, 3.0), off_policy_limit=0.1),
    "KL": Surrogate(GATE, kl=KL(0.1)),
    "truncated": Surrogate(FREE, kl=KL(0.1, "k1"), correction=Correction("token", "truncate")),
    "geometric": Surrogate(GATE, correction=Correction("geometric")),
}
DIFFERENT = {surrogate: name for name, surrogate in reversed(SURROGATES.items())}  # equal ones share a function


def twice(logprobs, rows):
    """Report the loss under two names, a constant under two, and what has no gradient."""
    loss = -(logprobs * rows.advantages).sum()
    count = (rows.weights != 0).sum()
    return loss, {"a": loss, "b": loss, "c": mx.array(1.0), "d": mx.array(1.0), "tokens": count, "more": count, "e": 2}


def silent(logprobs, rows):
    return -(logprobs * rows.advantages * rows.weights).sum(), {}


def still(logprobs, rows):
    """A loss that no parameter changes, so that all gradients are the same zeros."""
    return mx.stop_gradient(logprobs).sum(), {"a": mx.stop_gradient(logprobs.sum()), "b": logprobs.sum()}


OWN = {fn.__name__: fn for fn in (twice, silent, still)}
NAMES = [*reversed(DIFFERENT.values()), *OWN]


def batch(name):
    """Completions of 1, 1, 3 and 3 tokens after two prompts of 3, with log-probs of a reference."""
    rng, episodes = np.random.default_rng(5), []
    for i, length in enumerate((1, 1, 3, 3)):
        tokens = rng.integers(1, VOCABULARY, length).astype(np.int32)
        completion = Completion(tokens, rng.uniform(-6, -5, length).astype(np.float32), np.ones(length, np.float32))
        told = {"reward": float(i % 2), "group": i // 2, "pieces": (" so",) * length}
        episodes.append(Episode.from_completion([5, 6, 7 + i // 2], completion, **told))
    rows = recipe(name if name in ALGORITHMS else "reinforce++").credit(episodes)
    return replace(rows, reference=rows.logprobs + np.float32(0.1))


def unigram(model, layout, **_):
    """Score each target by a number of its own among the parameters, since compiling a whole model takes a minute."""
    table = model.layers[0].self_attn.q_proj.lora_b.reshape(-1)
    return table[mx.array(layout.rows.targets) % table.size] - 5.5


@pytest.mark.parametrize(
    ("name", "budget"),
    [*((n, 1) for n in NAMES if n in {*ALGORITHMS, *KINDS, *OWN}), *((n, 10_000) for n in NAMES)],
)
def test_compiled_passes_are_eager_ones_the_third_time_too(name, budget, monkeypatch):
    monkeypatch.setattr(micro_batches, "score", unigram)
    compare(batch(name), OWN.get(name) or PolicyObjective(SURROGATES[name]), budget)


@pytest.mark.parametrize("budget", [1, 10_000])
def test_so_are_those_of_a_whole_model(budget):
    compare(batch("sapo"), PolicyObjective(SURROGATES["sapo"]), budget)


def compare(rows, objective, budget):
    """Take three compiled passes over ``rows`` and an eager one, of equal figures and gradients."""
    model = make_tiny_engine(VOCABULARY).model
    rows = rows.take(np.arange(2), 4) if budget == 1 else rows  # one token each: passes of 1 x 1
    eager, compiled = (MLXEngine(model, stop=[0], micro_batch_tokens=budget, compile=how) for how in (False, True))
    stats, gradients = eager.gradients(rows, objective)
    for _ in range(3):  # a shape is compiled when it comes for the second time
        again, others = compiled.gradients(rows, objective)
        assert again == pytest.approx(stats, rel=1e-4, abs=1e-5)
        for (key, value), (_, other) in zip(tree_flatten(gradients), tree_flatten(others), strict=True):
            np.testing.assert_allclose(np.array(other), np.array(value), atol=2e-5, err_msg=key)
    assert all(step is not None for step in compiled._gradients.known.values())
