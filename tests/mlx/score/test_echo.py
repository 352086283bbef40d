"""The engine's cross-entropy on what environments said: against one sequence read at once, and a step that agrees."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_kl_and_corrections import made_engine, read_at_once, with_holes

from textpolicy.algorithms import ALGORITHMS
from textpolicy.losses import Surrogate
from textpolicy.mlx.engine import MLXEngine, PolicyObjective
from textpolicy.types import Batch


def said_by_others(episode):
    """The positions of tokens that follow the policy's first and are not its own, one by one."""
    own = np.flatnonzero(episode.mask)
    return [i for i in range(len(episode.tokens)) if len(own) and i > own[0] and not episode.mask[i]]


def packed(echo, seed=0):
    """A batch with holes in which all advantages are 0, so that the echo alone is its loss."""
    episodes = with_holes(np.random.default_rng(seed))
    return episodes, Batch.pack(episodes, [np.zeros(len(e.tokens), np.float32) for e in episodes], echo=echo)


def test_the_loss_is_the_mean_cross_entropy_on_the_tokens_of_others_times_its_weight():
    engine = made_engine()
    episodes, batch = packed(0.3)
    scores = [read_at_once(engine.model, e.tokens)[i - 1] for e in episodes for i in said_by_others(e)]
    assert len(scores) > 10
    stats, _ = engine.gradients(batch.take(np.flatnonzero(batch.scored.any(axis=1))), PolicyObjective(Surrogate()))
    assert stats["loss"] == pytest.approx(-0.3 * np.mean(scores), rel=1e-4)


@pytest.mark.parametrize("compile", [False, True])
def test_the_gradient_is_that_of_every_sequence_read_at_once(compile):
    engine = MLXEngine(made_engine().model, stop=[0], compile=compile, micro_batch_tokens=40)
    episodes, batch = packed(0.5)
    count = sum(len(said_by_others(e)) for e in episodes)

    def loss(model):
        total = mx.zeros(())
        for e in episodes:
            logits = model(mx.array([e.tokens.tolist()]))[0, :-1].astype(mx.float32)
            logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
            for i in said_by_others(e):
                total = total - 0.5 / count * logprobs[i - 1, int(e.tokens[i])]
        return total

    _, expected = nn.value_and_grad(engine.model, loss)(engine.model)
    rows = batch.take(np.flatnonzero(batch.scored.any(axis=1)))
    for _ in range(3):  # a shape is compiled when it occurs for the second time
        _, ours = engine.gradients(rows, PolicyObjective(Surrogate()))
    assert compile == any(step is not None for step in engine._gradients.known.values())
    for (name, a), (_, b) in zip(tree_flatten(ours), tree_flatten(expected), strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=2e-5, err_msg=name)


def test_a_step_whose_groups_agree_learns_from_the_answers_alone():
    episodes = [replace(e, reward=1.0) for e in with_holes(np.random.default_rng(1))]
    for name, updated in (("grpo", 0.0), ("echo", 1.0)):
        recipe = ALGORITHMS[name]
        assert made_engine().update(recipe.credit(episodes), recipe.surrogate, 1e-3)["updated"] == updated


def test_without_answers_or_without_a_weight_a_batch_has_no_echo():
    assert packed(0.0)[1].echo is None
    whole = [replace(e, mask=np.arange(len(e.tokens)) > 0) for e in with_holes(np.random.default_rng(2))[:3]]
    assert Batch.pack(whole, [np.zeros(len(e.tokens), np.float32) for e in whole], echo=1.0).echo is None
