"""Token ids and positions are held against a model's tables before MLX reads beyond them."""

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from architectures import ARCHITECTURES, VOCABULARY, adapted
from mlx_lm.models import gpt2

from textpolicy.engine import Sampling
from textpolicy.errors import UserError
from textpolicy.losses import Surrogate
from textpolicy.mlx.engine import MLXEngine
from textpolicy.mlx.read.bounds import Bounds
from textpolicy.types import Batch, Completion, Episode

POSITIONS = 16


def learned(quantised=False):
    """A GPT-2 with a table of 16 positions."""
    mx.random.seed(1)
    sizes = {"n_ctx": POSITIONS, "n_positions": POSITIONS, "n_embd": 32, "n_head": 4, "n_layer": 2}
    args = {"model_type": "gpt2", "layer_norm_epsilon": 1e-5, "vocab_size": VOCABULARY, "num_key_value_heads": 4}
    model = gpt2.Model(gpt2.ModelArgs.from_dict(args | sizes))
    if quantised:
        nn.quantize(model, group_size=32, bits=8)
    mx.eval(model.parameters())
    return model


def batch(prompt, tokens):
    completion = Completion(np.array(tokens, np.int32), np.full(len(tokens), -2.0, np.float32))
    episode = Episode.from_completion(prompt, completion, reward=1.0, group=0)
    return Batch.pack([episode], [np.ones(len(episode.tokens), np.float32)])


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_the_vocabulary_of_every_family_is_found_and_none_has_a_table_of_positions(name):
    assert Bounds.of(adapted(name)) == Bounds(VOCABULARY, None)


@pytest.mark.parametrize("quantised", [False, True])
def test_a_table_of_positions_is_found_by_what_it_is_asked_for(quantised):
    model = learned(quantised)
    assert Bounds.of(model) == Bounds.of(model) == Bounds(VOCABULARY, POSITIONS)
    assert isinstance(model.model.wpe, nn.QuantizedEmbedding if quantised else nn.Embedding)


OUTSIDE = [
    ([5, VOCABULARY], f"there is no token {VOCABULARY}, since the model has the ids 0 to {VOCABULARY - 1}"),
    (np.array([2**31 - 1, 3]), "there is no token 2147483647"),
    ([5, 2**40], "there is no token 1099511627776"),
    (mx.array([7, -1]), "there is no token -1"),
    (np.array([-(2**63)]), "there is no token -9223372036854775808"),
    ([1.5, 2.0], "is not a flat array of token ids"),
    ([[1, 2]], "is not a flat array of token ids"),
    (np.array([True]), "is not a flat array of token ids"),
    (["5"], "is not a flat array of token ids"),
    ([10**30], "is not a flat array of token ids"),
]


@pytest.mark.parametrize(("prompt", "sentence"), OUTSIDE)
def test_a_prompt_with_an_id_that_the_model_lacks_is_refused(tiny_engine, prompt, sentence):
    vocabulary = tiny_engine.bounds.vocabulary
    if vocabulary != VOCABULARY:
        sentence = sentence.replace(str(VOCABULARY - 1), str(vocabulary - 1)).replace(str(VOCABULARY), str(vocabulary))
        prompt = [5, vocabulary] if sentence.startswith(f"there is no token {vocabulary}") else prompt
    with pytest.raises(UserError) as caught:
        tiny_engine.sample([[1, 2], prompt], 2, Sampling(2))
    assert sentence in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize("place", ["prompt", "completion", "last"])
def test_an_episode_with_an_id_that_the_model_lacks_is_neither_scored_nor_trained_on(tiny_engine, place):
    wrong = tiny_engine.bounds.vocabulary + 3
    rows = batch(
        [4, wrong] if place == "prompt" else [4, 5],
        [wrong, 7, 8] if place == "completion" else [6, 7, wrong] if place == "last" else [6, 7, 8],
    )
    for act in (tiny_engine.score, lambda b: tiny_engine.update(b, Surrogate(), 1e-3)):
        with pytest.raises(UserError, match=f"there is no token {wrong}"):
            act(rows)


def test_negative_ids_never_reach_a_batch():
    with pytest.raises(UserError, match="there is no token -3, since ids start at 0"):
        batch([4, 5], [6, -3])
    with pytest.raises(UserError, match="there is no token -1"):
        MLXEngine(learned(), stop=[-1])


@pytest.mark.parametrize("n", [0, -1, 2.0, True, "3", float("nan")])
def test_the_number_of_completions_is_a_whole_number_from_1_on(tiny_engine, n):
    with pytest.raises(UserError, match=r"n is .*; set it to 1 or more"):
        tiny_engine.sample([[1, 2]], n, Sampling(2))


def test_what_is_no_model_is_refused():
    with pytest.raises(UserError, match="the model is a dict and no model of mlx"):
        MLXEngine({"weights": 1}, stop=[0])


def test_texts_longer_than_the_table_of_positions_are_refused():
    engine = MLXEngine(learned(), stop=[0])
    with pytest.raises(UserError, match="a prompt with its completion has up to 24 tokens and the model 16"):
        engine.sample([[5] * 3, [5] * 20], 1, Sampling(4))
    with pytest.raises(UserError, match="an episode has up to 17 tokens and the model 16 positions"):
        engine.score(batch([5] * 10, [6] * 8))
    assert np.isfinite(engine.score(batch([5] * 10, [6] * 7))).all()


@pytest.mark.parametrize("rows", [2, 100])
def test_padding_beyond_the_table_of_positions_changes_no_logprob(rows):
    model, rng = learned(), np.random.default_rng(0)
    engine = MLXEngine(model, stop=list(range(0, VOCABULARY, 4)), decode_rows=rows, compile=True)
    prompts = [rng.integers(1, VOCABULARY, n).tolist() for n in (12, 2, 5, 12, 1)]
    completions = engine.sample(prompts, 3, Sampling(4, seed=5))
    episodes = [
        Episode.from_completion(p, c, reward=0.0, group=0) for p, g in zip(prompts, completions, strict=True) for c in g
    ]
    packed = Batch.pack(episodes, [np.ones(len(e.tokens), np.float32) for e in episodes])
    np.testing.assert_allclose(engine.score(packed), packed.logprobs * (packed.weights != 0), atol=1e-4)
    for e in episodes:
        logits = model(mx.array(e.tokens)[None])[0, :-1]
        exact = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))[
            np.arange(len(e.tokens) - 1), e.tokens[1:]
        ]
        np.testing.assert_allclose(e.logprobs[1:], exact * e.mask[1:], atol=1e-4)
    for _ in range(3):  # the third is compiled, for padded shapes
        stats = engine.update(packed, Surrogate(), 0.0)
    assert np.isfinite(list(stats.values())).all()


@pytest.mark.parametrize("value", [float("nan"), float("inf")])
@pytest.mark.parametrize("how", [{}, {"temperature": 0.0}, {"top_k": 3}, {"top_p": 0.5}, {"repetition_penalty": 1.5}])
def test_logits_that_are_no_numbers_end_sampling_with_a_sentence(value, how):
    model = adapted("llama")
    model.model.norm.weight = mx.full(model.model.norm.weight.shape, value)
    for settings in ({"compile": False}, {"compile": True}):
        engine = MLXEngine(model, stop=[0], **settings)
        with pytest.raises(UserError, match="the logits of the model are not finite after 3 tokens"):
            engine.sample([[5, 6, 7]], 2, Sampling(6, **how))
