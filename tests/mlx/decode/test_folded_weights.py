"""Copies of weights with the LoRA in them: the same products, made when they pay and gone with the rollout."""

import gc

import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from adapter_kinds import ADAPTERS
from adapter_kinds import adapted as adapter_of_kind
from architectures import ARCHITECTURES, adapted, decoding_error
from conftest import tiny_llama
from mlx_lm.tuner.lora import LoRALinear

from textpolicy.config.adapters import LoRA
from textpolicy.engine import Sampling
from textpolicy.mlx.adapters.attach import LowRankLinear
from textpolicy.mlx.adapters.merging import attach
from textpolicy.mlx.decode import folded_weights as module
from textpolicy.mlx.decode.folded_weights import Product, copies, folded
from textpolicy.mlx.engine import MLXEngine
from textpolicy.mlx.kernels.patching import StandIn

pytestmark = pytest.mark.cpu

FEW, MANY = 4, 100  # rows, of which the first get small products


@pytest.fixture(autouse=True)
def two_cores(monkeypatch):
    monkeypatch.setattr(module, "blas_threads", lambda: 2)
    monkeypatch.setattr(module, "has_small_products", lambda: True)
    monkeypatch.setattr(module, "wants_large_turned", lambda: False)


@pytest.fixture
def turned(monkeypatch):
    """OpenBLAS has no small products, and wants every frozen layer turned, in parts of 40 outputs."""
    monkeypatch.setattr(module, "has_small_products", lambda: False)
    monkeypatch.setattr(module, "wants_large_turned", lambda: True)
    monkeypatch.setattr(module, "_LARGE", 1)
    monkeypatch.setattr(module, "_TURNED", 40)


@pytest.fixture
def at_once(monkeypatch):
    """Copies are made for the first product."""
    monkeypatch.setattr(module, "_PAYS", 0)


def lora_layer(outputs=96, inputs=24, bias=False):
    mx.random.seed(1)
    layer = LowRankLinear.of(LoRALinear.from_base(nn.Linear(inputs, outputs, bias=bias), r=3, scale=1.7))
    layer.lora_b = mx.random.normal(layer.lora_b.shape)
    return layer


@pytest.mark.parametrize("few", [False, True])
@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("outputs", [96, 20])  # 20 is no multiple of a small product's outputs
def test_products_are_those_of_the_layer(few, bias, outputs, at_once):
    layer = lora_layer(outputs, bias=bias)
    product = Product(layer, few)
    assert bool(product.width) == (few and outputs == 96)
    for shape in ((FEW, 24), (2, 1, 24), (1, 3, 24)):
        x = mx.random.normal(shape)
        np.testing.assert_allclose(np.array(product(x)), np.array(layer(x)), atol=1e-5)


def test_the_head_and_a_frozen_layer_are_copied_for_few_rows(at_once):
    model, x = nn.Module(), mx.random.normal((FEW, 24))
    model.embedding, model.frozen, model.lora = nn.Embedding(64, 24), nn.Linear(24, 32), lora_layer()
    view = folded(model, FEW)
    assert isinstance(view.embedding.as_linear, Product)
    np.testing.assert_allclose(np.array(view.embedding.as_linear(x)), np.array(model.embedding.as_linear(x)), atol=1e-5)
    assert mx.array_equal(view.embedding(mx.array([3])), model.embedding(mx.array([3])))
    assert isinstance(view.frozen.call, Product)
    np.testing.assert_allclose(np.array(view.frozen(x)), np.array(model.frozen(x)), atol=1e-5)


@pytest.mark.parametrize("bias", [False, True])
def test_large_frozen_layers_are_turned_where_there_are_no_small_products(bias, at_once, turned):
    model, x = nn.Module(), mx.random.normal((2, FEW // 2, 24))
    model.embedding, model.frozen, model.lora = nn.Embedding(64, 24), nn.Linear(24, 100, bias=bias), lora_layer()
    view = folded(model, FEW)
    for ours, theirs in ((view.embedding.as_linear, model.embedding.as_linear), (view.frozen, model.frozen)):
        np.testing.assert_allclose(np.array(ours(x)), np.array(theirs(x)), atol=1e-5)
    assert [part.shape for part in view.frozen.call.parts] == [(24, 40), (24, 40), (24, 20)]
    assert [part.shape for part in view.embedding.as_linear.parts] == [(24, 40), (24, 24)]
    assert view.lora.call.turned is False
    assert folded(model, module.FEW + 1).frozen is model.frozen
    view = folded(model, FEW)
    view.frozen(mx.random.normal((module.FEW + 1, 24)))  # a prompt, say
    assert not view.frozen.call.parts


def test_a_turned_head_is_for_one_or_two_cores_and_large_matrices(turned, monkeypatch):
    model = adapted("llama")
    head = lambda rows: folded(model, rows).model.embed_tokens  # noqa: E731
    assert isinstance(head(FEW), StandIn)
    assert not isinstance(head(MANY), StandIn)
    monkeypatch.setattr(module, "blas_threads", lambda: 3)
    assert not isinstance(head(FEW), StandIn)
    monkeypatch.setattr(module, "blas_threads", lambda: 1)
    monkeypatch.setattr(module, "_LARGE", 10**6)
    assert not isinstance(head(FEW), StandIn)


def test_a_model_decodes_the_same_with_a_turned_head(at_once, turned, monkeypatch):
    engine, said = MLXEngine(adapted("llama"), stop=[0]), []
    for turns in (True, False):
        monkeypatch.setattr(module, "wants_large_turned", lambda turns=turns: turns)
        [group] = engine.sample([[5, 6, 7]], FEW, Sampling(max_tokens=20, seed=2))
        said.append(group)
    for a, b in zip(*said, strict=True):
        np.testing.assert_array_equal(a.tokens, b.tokens)
        np.testing.assert_allclose(a.logprobs, b.logprobs, atol=1e-5)


def test_a_copy_is_made_once_it_pays_and_not_before():
    product, x = Product(lora_layer(), few=True), mx.random.normal((1, 24))
    for _ in range(module._PAYS):
        product(x)
        assert not product.parts
    product(x)
    [part] = product.parts
    assert part.shape == (3, 24, 32)


@pytest.mark.parametrize("outputs", [96, 64, 32])
def test_two_cores_that_share_a_product_compute_what_one_does(outputs, at_once, monkeypatch):
    layer, x = lora_layer(outputs, bias=True), mx.random.normal((FEW, 24))
    expected = Product(layer, few=True)(x)
    for _ in range(20):
        assert mx.array_equal(Product(layer, few=True, cores=2, beside=True)(x), expected)
    monkeypatch.setattr(module, "_LARGE", 1)
    for beside in (False, True):
        halved = Product(layer, few=True, cores=2, beside=beside)
        assert mx.array_equal(halved(x), expected)
    assert halved.first == 0
    assert sum(len(part) for part in halved.parts) == outputs // halved.width


def test_a_model_decodes_the_same_with_one_core_and_two(at_once, monkeypatch):
    monkeypatch.setattr(module, "_LARGE", 1)
    engine, said = MLXEngine(adapted("llama"), stop=[0]), []
    for cores in (1, 2):
        monkeypatch.setattr(module, "blas_threads", lambda cores=cores: cores)
        [group] = engine.sample([[5, 6, 7]], FEW, Sampling(max_tokens=20, seed=2))
        said.append([(c.tokens.tolist(), c.logprobs.tolist()) for c in group])
    assert said[0] == said[1]


def test_many_rows_are_left_to_the_layer_where_small_products_are_made(at_once):
    product = Product(lora_layer(), few=True)
    product(mx.random.normal((module.FEW + 1, 24)))
    assert not product.parts


def test_small_products_are_for_one_or_two_cores_whose_blas_has_them(monkeypatch):
    model = adapted("llama")
    cases = ((1, FEW, True, True), (2, FEW, True, True), (2, MANY, True, False), (3, FEW, True, False))
    for threads, rows, has_them, expected in (*cases, (2, FEW, False, False)):
        monkeypatch.setattr(module, "blas_threads", lambda threads=threads: threads)
        monkeypatch.setattr(module, "has_small_products", lambda has_them=has_them: has_them)
        down = folded(model, rows).model.layers[0].mlp.down_proj
        assert isinstance(down, StandIn)
        assert bool(down.call.width) is expected


@pytest.mark.parametrize("rows", [FEW, MANY])
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_decoding_has_the_logprobs_of_the_trained_model(name, rows, at_once):
    model = adapted(name)
    view = folded(model, rows)
    assert view is not model
    assert decoding_error(model, rows, view=view) < 1e-4
    assert not any(isinstance(part, StandIn) for part in model.modules())


@pytest.mark.parametrize("kind", ADAPTERS)
def test_every_kind_of_adapter_has_the_same_logits_with_copies(kind, at_once, tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTPOLICY_CACHE", str(tmp_path))  # for TinyLoRA's SVDs
    model = adapter_of_kind(kind)
    tokens = mx.array([[3, 4, 5, 6]])
    np.testing.assert_allclose(np.array(folded(model, FEW)(tokens)), np.array(model(tokens)), atol=1e-4)


def test_a_rollout_sees_the_lora_as_it_is_now(at_once):
    model = adapted("llama")
    engine, sampling = MLXEngine(model, stop=[0]), Sampling(max_tokens=3, seed=1)
    before = engine.sample([[5, 6]], 1, sampling)[0][0].logprobs
    for layer in model.modules():
        if "lora_b" in layer:
            layer.lora_b = 3 * layer.lora_b
    after = engine.sample([[5, 6]], 1, sampling)[0][0].logprobs
    assert np.abs(before - after).max() > 1e-3


def test_nothing_is_kept_after_a_rollout(at_once):
    model = adapted("llama")
    engine = MLXEngine(model, stop=[0])
    engine.sample([[5, 6]], 2, Sampling(max_tokens=3, seed=1))
    gc.collect()
    before = mx.get_active_memory()
    engine.sample([[5, 6]], 2, Sampling(max_tokens=3, seed=1))
    gc.collect()
    assert mx.get_active_memory() == before


def test_copies_are_counted_and_made_only_within_their_share(monkeypatch):
    model = adapted("llama", tie_word_embeddings=False)
    linear = [m.linear if isinstance(m, LoRALinear) else m for m in model.modules()]
    size = sum({id(m.weight): m.weight.nbytes for m in linear if type(m) in (nn.Linear, nn.Embedding)}.values())
    assert copies(model) == size > 0
    monkeypatch.setattr(module, "_MOST_BYTES", size - 1)
    assert copies(model) == 0
    assert folded(model, FEW) is model


def test_a_model_without_loras_or_in_half_precision_is_left_as_it_is():
    plain, half = tiny_llama(16), adapted("llama")
    half.set_dtype(mx.bfloat16)
    assert folded(plain, FEW) is plain
    assert folded(half, FEW) is half


def test_a_lora_with_dropout_is_left_as_it_is(at_once):
    model = tiny_llama(16)
    attach(model, LoRA(rank=2))
    for layer in model.modules():
        if isinstance(layer, LoRALinear):
            layer.dropout = nn.Dropout(0.5)
    assert copies(model) == 0
