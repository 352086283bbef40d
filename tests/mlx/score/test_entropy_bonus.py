"""The entropy bonus in the engine's update: against sequences read at once, and what it does to a policy."""

from dataclasses import replace

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from mlx.utils import tree_flatten
from test_kl_and_corrections import made_engine, trained, with_holes

from textpolicy.algorithms import ALGORITHMS
from textpolicy.algorithms.entropy_bonus import EntropyControl
from textpolicy.errors import UserError
from textpolicy.losses import Surrogate
from textpolicy.mlx.engine import MLXEngine, PolicyObjective
from textpolicy.types import Batch


def mean_entropy(model, episodes):
    """The mean over the masks' tokens of -sum_v p_v log p_v at the episode's temperature, one sequence at a time."""
    total, count = mx.zeros(()), 0
    for e in episodes:
        logits = model(mx.array([e.tokens.tolist()]))[0, :-1].astype(mx.float32) / e.temperature
        logprobs = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        total = total - ((mx.exp(logprobs) * logprobs).sum(axis=-1) * mx.array(e.mask[1:])).sum()
        count += int(e.mask.sum())
    return total / count


def packed(bonus, seed=0):
    """A batch with holes in which all advantages are 0, so that the bonus alone is its loss."""
    episodes = with_holes(np.random.default_rng(seed), temperature=0.8)[::4]
    return episodes, Batch.pack(episodes, [np.zeros(len(e.tokens), np.float32) for e in episodes], bonus=bonus)


@pytest.mark.parametrize(("kind", "compile"), [("adapter", False), ("trained head", False), ("adapter", True)])
def test_the_gradient_is_that_of_the_mean_entropy_over_all_sequences_read_at_once(kind, compile):
    model = made_engine().model
    if kind == "trained head":
        model.model.embed_tokens.unfreeze()
    engine = MLXEngine(model, stop=[0], compile=compile, micro_batch_tokens=10_000 if compile else 40)
    episodes, batch = packed(0.5)
    value, expected = nn.value_and_grad(model, lambda model: -0.5 * mean_entropy(model, episodes))(model)
    rows = batch.take(np.flatnonzero(batch.scored.any(axis=1)))
    for _ in range(3):  # a shape is compiled when it occurs for the second time
        stats, ours = engine.gradients(rows, PolicyObjective(Surrogate()))
    assert stats["loss"] == pytest.approx(value.item(), rel=1e-5)
    for (name, a), (_, b) in zip(tree_flatten(ours), tree_flatten(expected), strict=True):
        np.testing.assert_allclose(np.array(a), np.array(b), atol=1e-5, err_msg=name)


def test_a_step_whose_groups_agree_raises_the_entropy_by_the_bonus_alone():
    episodes = [replace(e, reward=1.0) for e in with_holes(np.random.default_rng(1))]
    recipe, engine = ALGORITHMS["grpo"], made_engine()
    before = mean_entropy(engine.model, episodes).item()
    [plain] = recipe.pack(episodes, recipe.tokens(episodes))
    assert engine.update(plain, recipe.surrogate, 1e-3)["updated"] == 0
    [batch] = recipe.pack(episodes, recipe.tokens(episodes), bonus=0.1)
    assert engine.update(batch, recipe.surrogate, 1e-3)["updated"] == 1
    assert mean_entropy(engine.model, episodes).item() > before


@pytest.mark.parametrize(("target", "given", "updated"), [(100.0, [0.5, 0.7, 0.9], 1), (0.0, [0, 0, 0], 0)])
def test_the_coefficient_of_a_run_adapts_to_the_target(target, given, updated):
    recipe = replace(ALGORITHMS["grpo"], entropy_bonus=0.5, entropy_target=target, entropy_step=0.2)
    _, rows = trained(recipe, steps=3, reward=lambda prompt, completion, example: 1.0)
    assert [row["entropy_bonus"] for row, _ in rows] == pytest.approx(given)
    assert [row["updated"] for row, _ in rows] == [updated] * 3


def test_an_engine_without_entropies_cannot_meet_a_target():
    episodes = [replace(e, entropy=None) for e in with_holes(np.random.default_rng(1))]
    assert EntropyControl(0.3).advance(episodes) == 0.3
    with pytest.raises(UserError, match="entropy_target needs exact entropy"):
        EntropyControl(0.3, 1.0).advance(episodes)


def test_without_a_weight_or_a_sampled_token_a_batch_has_no_bonus():
    assert packed(0.0)[1].bonus is None
    silent = [replace(e, mask=np.zeros_like(e.mask)) for e in with_holes(np.random.default_rng(2))]
    assert Batch.pack(silent, [np.zeros(len(e.tokens), np.float32) for e in silent], bonus=1.0).bonus is None
