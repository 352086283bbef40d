"""The noise on the norms of a quantised model: sampler and learner have the same, and nothing is left of it."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import VOCABULARY, tiny_llama
from mlx.utils import tree_flatten

from textpolicy.engine import Sampling
from textpolicy.errors import UserError
from textpolicy.loop.train import annealed
from textpolicy.mlx.adapters.merging import attach_lora
from textpolicy.mlx.engine import MLXEngine
from textpolicy.types import Batch, Episode

PROMPTS = [[3, 7, 11], [5, 2]]


@pytest.fixture(scope="module")
def engine():
    """A model of 4 bits with an adapter."""
    model = tiny_llama(VOCABULARY)
    nn.quantize(model, group_size=32, bits=4)
    return MLXEngine(attach_lora(model, rank=4), stop=[0])


def norms(engine):
    return {name: np.array(v) for name, v in tree_flatten(engine.model.parameters()) if "norm" in name}


def scored(engine):
    """Log-probs of completions by the sampler and by the learner."""
    drawn = engine.sample(PROMPTS, 2, Sampling(8, seed=1))
    episodes = [
        Episode.from_completion(p, c, reward=0.0, group=g)
        for g, (p, some) in enumerate(zip(PROMPTS, drawn, strict=True))
        for c in some
    ]
    batch = Batch.pack(episodes, [np.zeros(len(e.tokens), np.float32) for e in episodes])
    return batch.logprobs[batch.weights != 0], engine.score(batch)[batch.weights != 0]


def test_sampler_and_learner_have_the_same_noise_and_nothing_is_left_of_it(engine):
    before, (plain, _) = norms(engine), scored(engine)
    with engine.noisy(0.3, seed=4):
        (sampled, learned), during = scored(engine), norms(engine)
    np.testing.assert_allclose(sampled, learned, atol=1e-4)
    assert len(sampled) != len(plain) or np.abs(sampled - plain).max() > 1e-3
    after = norms(engine)
    assert all(after[name].tobytes() == value.tobytes() for name, value in before.items())
    assert np.array_equal(scored(engine)[0], plain)
    in_blocks = [name for name in before if "layers." in name]
    noise = np.concatenate([during[name] - before[name] for name in in_blocks])
    assert len(noise) > 100
    assert noise.std() == pytest.approx(0.3, rel=0.25)
    assert all(np.array_equal(during[name], before[name]) for name in {*before} - {*in_blocks})
    with engine.noisy(0.3, seed=4):
        again = norms(engine)
    assert all(np.array_equal(again[name], during[name]) for name in before)


def test_no_noise_is_the_model_itself_bit_for_bit(engine):
    plain = scored(engine)
    with engine.noisy(0.0, seed=4):
        assert [a.tobytes() for a in scored(engine)] == [a.tobytes() for a in plain]


def test_it_falls_as_in_qerl_and_a_model_without_norms_is_refused():
    assert [annealed(0.01, share) for share in (0, 0.5, 1)] == pytest.approx([0.01, (0.01 * 0.0005) ** 0.5, 0.0005])
    model = tiny_llama(VOCABULARY)
    for block in model.layers:
        block.input_layernorm = block.post_attention_layernorm = nn.Identity()
    mx.eval(model.parameters())
    with pytest.raises(UserError, match="have no norms"), MLXEngine(model, stop=[0]).noisy(0.1, seed=0):
        pass
