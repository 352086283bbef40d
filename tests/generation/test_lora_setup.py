"""The documented functions around LoRA, QLoRA, saving and reloading: what they change, count, write and read."""

import inspect
import logging

import numpy as np
import pytest

import textpolicy as tp

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import mlx_lm
from conftest import VOCABULARY, tiny_llama
from gguf import GGMLQuantizationType as Kind
from made_gguf import write
from mlx.utils import tree_flatten

from textpolicy.algorithms import grpo
from textpolicy.buffer import Buffer
from textpolicy.errors import UserError
from textpolicy.mlx.adapters.merging import trainable

LORA = {"lora_layers": 1, "lora_rank": 2, "lora_scale": 4.0, "lora_dropout": 0.0}
TOKENS = mx.array([[5, 6, 7]])


@pytest.fixture
def base(tmp_path, monkeypatch):
    """The path of a small model."""
    monkeypatch.setenv("TEXTPOLICY_CACHE", str(tmp_path / "cache"))
    monkeypatch.chdir(tmp_path)
    return write(tmp_path / "small.gguf", Kind.F32)


def moved(model, seed=0):
    """``model`` with its adapter away from where it starts."""
    mx.random.seed(seed)
    values = [(name, 0.3 * mx.random.normal(v.shape)) for name, v in trainable(model).items()]
    return model.load_weights(values, strict=False)


def buffer_of_two():
    buffer = Buffer()
    for reward, answer in ((1.0, [7, 8]), (0.0, [9])):
        logprob = mx.full((len(answer),), -5.0)
        buffer.add(mx.array([5, 6]), answer, reward, mx.array([]), True, logprob=logprob, group=0)
    return buffer


def trainer(model, **how):
    return tp.Trainer(model, lambda rewards: rewards - 0.4, grpo.policy_loss, optim.Adam(learning_rate=0.01), **how)


# ---- putting LoRAs on


@pytest.mark.parametrize(
    ("function", "signature"),
    [
        (tp.apply_lora, "(model, lora_layers=8, lora_rank=8, lora_scale=20.0, lora_dropout=0.0, lora_keys=None)"),
        (tp.freeze_base, "(model)"),
        (tp.extract_params, "(model)"),
        (
            tp.create_lora_setup,
            "(model, lora_config, auto_reload=True, adapter_save_path='./lora_adapters.safetensors')",
        ),
        (tp.create_qlora_setup, "(model, lora_config, quantization_config)"),
        (tp.save_adapters, "(model, adapter_path)"),
        (tp.reload_model, "(base_model_path, adapter_path, tokenizer_config=None)"),
    ],
)
def test_the_documented_signatures(function, signature):
    parameters = inspect.signature(function).parameters.values()
    bare = [p.replace(annotation=inspect.Parameter.empty) for p in parameters]
    assert str(inspect.Signature(bare)) == signature


def test_apply_lora_adapts_the_last_blocks_by_a_plain_factor():
    model = moved(tp.apply_lora(tiny_llama(VOCABULARY), 1, 2, 3.0, lora_keys=["up_proj"]))
    assert set(trainable(model)) == {f"model.layers.1.mlp.up_proj.lora_{x}" for x in "ab"}
    layer, x = model.layers[1].mlp.up_proj, mx.random.normal((4, 32))
    wanted = np.array(x) @ (np.array(layer.linear.weight).T + 3.0 * np.array(layer.lora_a) @ np.array(layer.lora_b))
    np.testing.assert_allclose(np.array(layer(x)), wanted, rtol=1e-4, atol=1e-4)


def test_more_blocks_than_there_are_is_all_of_them():
    assert len(trainable(tp.apply_lora(tiny_llama(VOCABULARY)))) == 2 * 7 * 2


def test_dropout_logs_a_warning_because_evaluation_mode_ignores_it(caplog):
    model = moved(tp.apply_lora(tiny_llama(VOCABULARY), lora_dropout=0.5))
    assert "lora_dropout is 0.5 and acts in model.train() only" in caplog.text
    assert mx.array_equal(model(TOKENS), model(TOKENS))
    model.train()
    assert not mx.array_equal(model(TOKENS), model(TOKENS))


def test_freeze_base_leaves_the_adapters_parameters_trainable():
    model = tp.apply_lora(tiny_llama(VOCABULARY), lora_layers=1)
    own = set(trainable(model))
    model.unfreeze()
    assert len(trainable(model)) > len(own)
    assert tp.freeze_base(model) is model
    assert set(trainable(model)) == own == set(tp.extract_params(model))
    with pytest.raises(UserError, match="has no adapter"):
        tp.freeze_base(tiny_llama(VOCABULARY))


def test_a_model_without_adapters_has_no_parameters_of_theirs():
    assert tp.extract_params(tiny_llama(VOCABULARY)) == {}


@pytest.mark.parametrize("requantize", [False, True])
def test_merged_weights_give_the_logits_of_the_adapted_model(requantize):
    model = tiny_llama(VOCABULARY)
    model, _ = tp.create_qlora_setup(model, LORA, {"bits": 8, "group_size": 32})
    output = np.array(moved(model)(TOKENS))
    assert tp.merge_weights(model, requantize=requantize) is model
    assert isinstance(model.layers[1].mlp.up_proj, nn.QuantizedLinear) == requantize
    np.testing.assert_allclose(np.array(model(TOKENS)), output, atol=0.1 if requantize else 1e-4)


# ---- figures


def nbytes(model):
    return sum(np.array(a).nbytes for _, a in tree_flatten(model.parameters()))


def test_the_figures_of_a_lora_are_those_of_its_arrays():
    plain = tiny_llama(VOCABULARY)
    size, taken = sum(a.size for _, a in tree_flatten(plain.parameters())), nbytes(plain)
    model, stats = tp.create_lora_setup(plain, LORA)
    trained = 2 * (64 + 48 + 48 + 64 + 96 + 96 + 96)  # rank (in + out) of q k v o gate up down
    assert stats == {
        "total_parameters": size,
        "estimated_lora_parameters": trained,
        "trainable_parameters": trained,
        "memory_ratio": trained / size,
        "memory_savings_percent": pytest.approx(100 - 100 * trained / size),
        "bytes_before": taken,
        "bytes_after": taken + 4 * trained,
        "trainable_bytes": 4 * trained,
    }
    assert nbytes(model) == stats["bytes_after"]


def test_the_figures_of_a_qlora_are_counted_before_and_after_and_save_less_than_everything():
    plain = tiny_llama(VOCABULARY)
    taken = nbytes(plain)
    model, stats = tp.create_qlora_setup(plain, LORA, {"bits": 4, "group_size": 32})
    base = nbytes(model) - stats["trainable_bytes"]
    assert (stats["bytes_before"], stats["bytes_after"]) == (taken, nbytes(model))
    assert stats["quantization_factor"] == pytest.approx(taken / base)
    assert 4 < stats["quantization_factor"] < 8  # of 32 bits, 4 remain and a scale and a bias per 32
    assert stats["total_memory_savings"] == pytest.approx(100 * (1 - nbytes(model) / taken))
    assert 0 < stats["total_memory_savings"] < 100


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda m: tp.create_lora_setup(m, {"lora_rnak": 4}), "no key of lora_config 'lora_rnak'; did you mean"),
        (lambda m: tp.create_qlora_setup(m, LORA, {"bit": 4}), "no key of quantization_config 'bit'"),
        (lambda m: tp.create_qlora_setup(m, LORA, {"bits": 7, "group_size": 32}), "cannot be quantised to 7 bits"),
        (lambda m: tp.save_adapters(m, "somewhere"), "no adapter to save"),
        (lambda m: tp.merge_weights(m), "no adapter to merge"),
    ],
)
def test_impossible_arguments_are_refused_in_one_sentence(call, message, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    with pytest.raises(UserError, match=message):
        call(tiny_llama(VOCABULARY))
    assert not list(tmp_path.iterdir())


# ---- saving and reloading


@pytest.mark.parametrize("place", ["adapter", "lora_adapters.safetensors"])
def test_a_saved_adapter_is_reloaded_from_a_folder_and_from_a_file(base, place):
    model, _ = tp.load_model(base)
    moved(tp.apply_lora(model, lora_rank=2))
    tp.save_adapters(model, place)
    loaded, tokenizer = tp.reload_model(base, place, {"model_max_length": 77})
    assert mx.array_equal(loaded(TOKENS), model(TOKENS))
    assert tokenizer.model_max_length == 77
    assert not loaded.layers[0].mlp.up_proj.training


def test_a_policy_follows_the_adapter_that_is_there(base):
    policy, reload = tp.create_reloadable_policy(base, None, {"max_tokens": 6})
    prompt = [5, 6, 7]
    before = policy(prompt, deterministic=True)
    with pytest.raises(UserError, match="no adapter to reload yet"):
        reload()
    model, _ = tp.load_model(base)
    tp.save_adapters(moved(tp.apply_lora(model)), "adapter")
    reload("adapter")
    expected = tp.create_policy(model, tp.load_model(base)[1], {"max_tokens": 6})(prompt, deterministic=True)
    after = policy(prompt, deterministic=True)
    assert mx.array_equal(after[0], expected[0])
    np.testing.assert_allclose(np.array(after[1]["logprob"]), np.array(expected[1]["logprob"]), atol=1e-5)
    assert not np.allclose(np.array(before[1]["logprob"])[0], np.array(after[1]["logprob"])[0])
    tp.save_adapters(moved(model, seed=4), "adapter")
    reload()
    assert not np.allclose(np.array(policy(prompt, deterministic=True)[1]["logprob"])[0], after[1]["logprob"][0])


def test_an_adapter_of_another_rank_is_not_reloaded(base):
    model, _ = tp.load_model(base)
    tp.save_adapters(tp.apply_lora(model, lora_rank=2), "of_rank_2")
    _, reload, _, _ = tp.create_auto_reload_setup(base, "mine.safetensors", lora_rank=4)
    with pytest.raises(UserError, match="rank 2 where the model has 4"):
        reload("of_rank_2")


def test_the_auto_reload_policy_is_the_model_that_trains(base, tmp_path):
    policy, reload, model, tokenizer = tp.create_auto_reload_setup(
        base, "auto.safetensors", lora_layers=1, lora_rank=2, max_tokens=4, temperature=0.5
    )
    assert (policy.sampling.max_tokens, policy.sampling.temperature) == (4, 0.5)
    assert policy.engine.model is model
    assert tokenizer.decode([5]) != ""
    fresh = {name: np.array(v) for name, v in trainable(model).items()}
    trainer(model, auto_save_lora=True).train(buffer_of_two())
    trained = {name: np.array(v) for name, v in trainable(model).items()}
    model.load_weights([(name, mx.array(v)) for name, v in fresh.items()], strict=False)
    reload()
    for name, value in trainable(model).items():
        assert np.array_equal(np.array(value), trained[name])
    assert any(not np.array_equal(trained[name], fresh[name]) for name in fresh)


# ---- writing only when asked


@pytest.mark.parametrize("auto_reload", [True, False])
def test_training_writes_no_adapter_by_default(auto_reload, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, _ = tp.create_lora_setup(tiny_llama(VOCABULARY), LORA, auto_reload)
    result = trainer(model).train(buffer_of_two())
    assert result["grad_norm"] > 0
    assert not list(tmp_path.iterdir())


@pytest.mark.parametrize(("setting", "there"), [(True, "here.safetensors"), ("folder", "folder")])
def test_with_auto_save_the_trainer_writes_the_adapter_after_every_step(setting, there, tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    model, _ = tp.create_lora_setup(tiny_llama(VOCABULARY), LORA, adapter_save_path="here.safetensors")
    train = trainer(model, auto_save_lora=setting)
    assert not list(tmp_path.iterdir())
    for _ in range(2):
        train.train(buffer_of_two())
        assert [p.name for p in tmp_path.iterdir()] == [there]
        from textpolicy.mlx.adapters.merging import load_adapter

        loaded = load_adapter(tiny_llama(VOCABULARY), there)
        for name, value in trainable(model).items():
            assert mx.array_equal(trainable(loaded)[name], value)


def test_auto_save_without_an_adapter_or_a_path_is_refused_at_the_start():
    bare = tiny_llama(VOCABULARY)
    with pytest.raises(UserError, match="auto_save_lora is True and the model has no adapter"):
        trainer(bare, auto_save_lora=True)
    model, _ = tp.create_lora_setup(tiny_llama(VOCABULARY), LORA, auto_reload=False)
    with pytest.raises(UserError, match="has no path for it"):
        trainer(model, auto_save_lora=True)


# ---- quantised files


@pytest.mark.parametrize(("kind", "bits"), [(Kind.Q4_0, 4), (Kind.Q8_0, 8)])
def test_a_gguf_file_trains_without_being_dequantised(base, tmp_path, kind, bits, caplog):
    caplog.set_level(logging.WARNING)
    path = write(tmp_path / "quantised.gguf", kind, Kind.Q8_0)
    model, _ = tp.load_model(path, dequantize=False)
    packed = np.array(model.layers[0].mlp.up_proj.weight)
    model, stats = tp.create_qlora_setup(model, {**LORA, "lora_layers": 2}, {})
    assert stats["quantization_factor"] == 1.0
    trainer(model).train(buffer_of_two())
    layer = model.layers[0].mlp.up_proj
    assert (type(layer.linear), layer.linear.bits) == (nn.QuantizedLinear, bits)
    assert np.array_equal(np.array(layer.linear.weight), packed)
    tp.save_adapters(model, "adapter")
    for dequantize in (False, True):
        loaded, _ = tp.load_model(path, "adapter", dequantize=dequantize)
        np.testing.assert_allclose(np.array(loaded(TOKENS)), np.array(model(TOKENS)), atol=1e-3)
    assert caplog.text == ""
    assert mlx_lm.utils.get_total_parameters(model) > 0
