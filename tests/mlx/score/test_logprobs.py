"""Log-probs without an array of [tokens, vocabulary], against logits everywhere and one plain log-softmax."""

import dataclasses
import logging

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from conftest import VOCABULARY, random_episodes, recipe, tiny_llama
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models import cohere, gemma2, gemma3, granite, qwen3
from mlx_lm.models.base import create_attention_mask
from mlx_lm.tuner.lora import LoRALinear
from scipy.special import log_softmax

from textpolicy.mlx.adapters.merging import attach_lora, trainable
from textpolicy.mlx.score.logprobs import Split, token_logprobs
from textpolicy.mlx.score.micro_batches import Layout, score

COMMON = {
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "vocab_size": VOCABULARY,
}
SCALES = dict.fromkeys(("attention_multiplier", "embedding_multiplier", "residual_multiplier"), 1.0)
BIAS = {"attention_bias": False, "mlp_bias": False}
QWEN = {"model_type": "qwen3", "head_dim": 8, "max_position_embeddings": 99, "rope_theta": 1e4}


def qwen(tied):
    return qwen3.Model(qwen3.ModelArgs(**QWEN, tie_word_embeddings=tied, **COMMON))


def quantised(model):
    nn.quantize(model, group_size=32, bits=4)
    return model


def image_reader():
    text = {"model_type": "gemma3_text", "head_dim": 8, "sliding_window_pattern": 2, **COMMON}
    return gemma3.Model(gemma3.ModelArgs(model_type="gemma3", text_config=text, vocab_size=VOCABULARY))


MODELS = {
    "a tied head": lambda: qwen(tied=True),
    "a head of its own": lambda: qwen(tied=False),
    "a quantised tied head": lambda: quantised(qwen(tied=True)),
    "a quantised head of its own": lambda: quantised(qwen(tied=False)),
    "capped logits": lambda: gemma2.Model(
        gemma2.ModelArgs(model_type="gemma2", head_dim=8, query_pre_attn_scalar=8, final_logit_softcapping=2, **COMMON)
    ),
    "multiplied logits": lambda: cohere.Model(
        cohere.ModelArgs(
            model_type="cohere", layer_norm_eps=1e-5, **{k: v for k, v in COMMON.items() if k != "rms_norm_eps"}
        )
    ),
    "divided logits": lambda: granite.Model(
        granite.ModelArgs(
            model_type="granite",
            logits_scaling=3.0,
            max_position_embeddings=99,
            rope_theta=1e4,
            **SCALES,
            **BIAS,
            **COMMON,
        )
    ),
    "a model within the model": image_reader,
}


class Flat(nn.Module):
    """A model that is one module: embedding, blocks and head, with nothing around the blocks to take apart."""

    model_type = "flat"

    def __init__(self):
        super().__init__()
        inner = tiny_llama(VOCABULARY).model
        self.embed_tokens, self.layers = inner.embed_tokens, inner.layers

    def __call__(self, tokens, cache=None):
        h = self.embed_tokens(tokens)
        cache = cache or [None] * len(self.layers)
        mask = create_attention_mask(h, cache[0])
        for layer, c in zip(self.layers, cache, strict=True):
            h = layer(h, mask, cache=c)
        return self.embed_tokens.as_linear(h)


def adapted(model):
    """With LoRA matrices that are not zero, so that every one of them has a gradient."""
    attach_lora(model, rank=2)
    return randomised(model)


def randomised(model):
    pairs = [(n, 0.3 * mx.random.normal(v.shape)) for n, v in trainable(model).items() if n.endswith("lora_b")]
    return model.update(tree_unflatten(pairs))


@pytest.fixture
def batch():
    """Completions sampled at temperatures of their own."""
    rng = np.random.default_rng(1)
    batch = recipe("dr_grpo").credit(random_episodes(rng))
    return dataclasses.replace(batch, temperatures=rng.uniform(0.5, 1.5, (len(batch), 1)).astype(np.float32))


def naive(model, batch):
    """(B, T) from logits at every position, 0 where nothing was sampled."""
    logits = model(mx.array(batch.inputs)).astype(mx.float32) / mx.array(batch.temperatures)[..., None]
    everything = nn.log_softmax(logits, axis=-1)
    picked = mx.take_along_axis(everything, mx.array(batch.targets)[..., None], axis=-1)[..., 0]
    return mx.where(mx.array(batch.weights) != 0, picked, 0)


def aligned(values, batch):
    """(B, T) values at the rows' own positions, moved to each row's first sampled target as in a layout."""
    out = np.zeros_like(values)
    for i, (start, stop) in enumerate(zip(batch.starts, batch.lengths, strict=True)):
        out[i, : stop - start] = values[i, start:stop]
    return out


def assert_same_values_and_gradients(model, batch):
    layout = Layout.build(batch)
    width = layout.place.shape[1]
    slopes = np.random.default_rng(3).normal(size=batch.weights.shape).astype(np.float32)
    there = aligned(np.where(batch.weights != 0, slopes, 0), batch)[:, :width]
    ours, gradients = nn.value_and_grad(model, lambda m: (mx.array(there) * score(m, layout)).sum())(model)
    plain, oracle = nn.value_and_grad(model, lambda m: (mx.array(slopes) * naive(m, batch)).sum())(model)
    np.testing.assert_allclose(
        np.array(score(model, layout, gradient=False)),
        aligned(np.array(naive(model, batch)), batch)[:, :width],
        rtol=1e-5,
        atol=2e-5,
    )
    assert ours.item() == pytest.approx(plain.item(), rel=1e-4)
    for (name, a), (_, b) in zip(tree_flatten(gradients), tree_flatten(oracle), strict=True):
        scale = np.abs(np.array(b)).max()
        assert scale > 0, name
        np.testing.assert_allclose(np.array(a) / scale, np.array(b) / scale, atol=5e-4, err_msg=name)


@pytest.mark.parametrize("name", MODELS)
def test_values_and_adapter_gradients_are_those_of_logits_everywhere(name, batch):
    mx.random.seed(0)
    model = adapted(MODELS[name]())
    assert Split.of(model).path
    assert_same_values_and_gradients(model, batch)


@pytest.mark.parametrize("name", ["a tied head", "a head of its own", "capped logits"])
def test_a_head_that_is_trained_itself_gets_its_gradient(name, batch):
    mx.random.seed(0)
    model = MODELS[name]()
    model.unfreeze()
    assert_same_values_and_gradients(model, batch)


def test_an_adapter_on_the_head_gets_its_gradient(batch):
    mx.random.seed(0)
    model = adapted(qwen(tied=False))
    model.lm_head = LoRALinear.from_base(model.lm_head, r=2)
    assert_same_values_and_gradients(randomised(model), batch)


def test_a_model_without_a_head_of_its_own_is_scored_by_all_its_logits_with_a_warning(batch, caplog):
    mx.random.seed(0)
    model = adapted(Flat())
    with caplog.at_level(logging.WARNING):
        assert Split.of(model).path == Split.of(model).path == ()
    assert len([r for r in caplog.records if "logits of all positions" in r.message]) == 1
    assert_same_values_and_gradients(model, batch)


@pytest.mark.parametrize("trained", [False, True])
@pytest.mark.parametrize("at_once", [1, 3, 7, 100])
def test_values_entropies_and_gradients_do_not_depend_on_the_chunks(at_once, trained):
    mx.random.seed(0)
    model = qwen(tied=False)
    if not trained:
        model.freeze()
    hidden, targets = mx.random.normal((7, 32)), mx.random.randint(0, VOCABULARY, (7,))
    temperatures, weights = mx.random.uniform(0.5, 2, (7,)), mx.random.normal((7,))
    others = mx.random.normal((7,))

    def ours(hidden):
        scored = token_logprobs(Split.of(model), hidden, targets, temperatures, entropy=True, at_once=at_once)
        return (weights * scored.logprobs + others * scored.entropy).sum(), scored

    (_, scored), slopes = mx.value_and_grad(ours)(hidden)
    logits = np.array(hidden) @ np.array(model.lm_head.weight).T / np.array(temperatures)[:, None]
    p = np.exp(logits.astype(np.float64))
    p /= p.sum(axis=1, keepdims=True)
    onehot = np.eye(VOCABULARY)[np.array(targets)]
    np.testing.assert_allclose(np.array(scored.logprobs), np.log(p[onehot > 0]), atol=1e-5)
    entropy = -(p * np.log(p)).sum(axis=1)
    np.testing.assert_allclose(np.array(scored.entropy), entropy, atol=1e-5)
    by_logits = (onehot - p) * np.array(weights)[:, None]
    by_logits -= p * (np.log(p) + entropy[:, None]) * np.array(others)[:, None]
    by_states = by_logits / np.array(temperatures)[:, None] @ np.array(model.lm_head.weight)
    np.testing.assert_allclose(np.array(slopes), by_states, atol=1e-6)


@pytest.mark.parametrize("gradient", [False, True])
def test_scoring_is_float32_and_at_each_tokens_temperature(gradient):
    half = mx.array(np.random.default_rng(0).normal(0, 2, (6, 50))).astype(mx.bfloat16)
    targets, temperatures = np.arange(1, 7), np.array([1.0, 1.0, 1.0, 0.5, 0.5, 0.5], np.float32)
    no_head = Split(qwen(tied=True), ())  # hidden states are logits
    scored = token_logprobs(no_head, half, mx.array(targets), mx.array(temperatures), gradient=gradient).logprobs
    exact = log_softmax(np.array(half.astype(mx.float32)).astype(np.float64) / temperatures[:, None], -1)
    assert scored.dtype == mx.float32
    np.testing.assert_allclose(np.array(scored), exact[np.arange(6), targets], atol=1e-5)


def test_logits_of_many_tokens_are_never_alive_together():
    mx.random.seed(0)
    # on CUDA a product takes 32 MB of its own beside its arrays
    vocabulary, tokens = 20_000, 512 if mx.default_device() == mx.Device(mx.cpu) else 4096
    head = mx.random.normal((16, vocabulary))
    hidden, targets = mx.random.normal((tokens, 16)), mx.random.randint(0, vocabulary, (tokens,))
    mx.eval(head, hidden, targets)

    class Linear:
        head = staticmethod(lambda h: h @ head)
        trained = staticmethod(dict)

    def loss(hidden):
        scored = token_logprobs(Linear, hidden, targets, mx.ones(tokens), at_once=8)
        return scored.logprobs.sum()

    mx.reset_peak_memory()
    before = mx.get_active_memory()
    mx.eval(mx.value_and_grad(loss)(hidden))
    assert mx.get_peak_memory() - before < tokens * vocabulary * 4 / 2
