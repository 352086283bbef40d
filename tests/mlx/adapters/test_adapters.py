"""Adapters of every kind on a tiny model: what trains, the way to disk and back, merging and switching off."""

import json
import logging
import os
from dataclasses import replace
from functools import partial

import mlx_lm.tuner.utils
import numpy as np
import pytest

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn
from adapter_kinds import ADAPTERS, adapted
from conftest import VOCABULARY, files_of_at_most, random_episodes, recipe, tiny_llama
from families import tiny_family
from mlx.utils import tree_flatten
from mlx_lm.models import llama, qwen3_moe
from mlx_lm.models.switch_layers import SwitchLinear

from textpolicy.config.adapters import KINDS, DoRA, Full, LoRA, LoRAXS, QLoRA, TinyLoRA, make_adapter
from textpolicy.errors import UserError
from textpolicy.losses import Surrogate
from textpolicy.mlx.adapters.attach import attach, attached, wrapped
from textpolicy.mlx.adapters.merging import adapters_off, load_adapter, merge_adapters, save_adapter, trainable
from textpolicy.mlx.adapters.quantised import dense_weight, in_floats, quantised_as
from textpolicy.mlx.adapters.saving import reread_adapter
from textpolicy.mlx.adapters.svd import factorise
from textpolicy.mlx.engine import MLXEngine, PolicyObjective
from textpolicy.mlx.kernels import cuda

OWN = ("lora_a", "lora_b", ".m", ".core.r", "adapter_vectors.v")  # endings of trainable names, except for full
TOKENS = mx.array([[5, 6, 7, 9, 11]])


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTPOLICY_CACHE", str(tmp_path / "cache"))


def arrays(model):
    return {name: np.array(value) for name, value in tree_flatten(model.parameters())}


def logprobs(model):
    logits = model(TOKENS)
    return np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))


def untied(dtype=mx.float32, **changes):
    """A tiny Llama with a head of its own."""
    model = tiny_family("llama", vocab_size=VOCABULARY, num_hidden_layers=2, **changes)
    model.set_dtype(dtype)
    return model


# ---- what trains


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_step_moves_every_parameter_of_the_adapter_and_nothing_else(name):
    model = adapted(name)
    before, own = arrays(model), set(trainable(model))
    batch = recipe("grpo").credit(random_episodes(np.random.default_rng(0)))
    MLXEngine(model, stop=[0]).update(batch, Surrogate(), 1e-2)
    after = arrays(model)
    moved = {key for key in before if not np.array_equal(before[key], after[key])}
    assert moved == own
    assert own
    if ADAPTERS[name].kind != "full":
        assert all(key.endswith(OWN) for key in own)


@pytest.mark.parametrize("half", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("adapter", [Full(), Full(layers=1), Full(modules=("up_proj", "lm_head"))])
def test_full_training_of_a_half_precision_model_is_that_of_its_weights_in_float32(adapter, half):
    """Steps of 2e-5, the default, mostly vanish in a bfloat16 weight of 0.02."""
    moved, batch = {}, recipe("grpo").credit(random_episodes(np.random.default_rng(0)))
    for name in ("half", "exact"):
        model = untied(half)
        if name == "exact":
            model.set_dtype(mx.float32)
        attach(model, adapter)
        before, engine = arrays(model), MLXEngine(model, stop=[0])
        for _ in range(5):
            assert engine.update(batch, Surrogate(), Full.learning_rate)["updated"] == 1
        moved[name] = {key: value - before[key] for key, value in arrays(model).items()}
    near = 0 if mx.default_device() == mx.cpu else 0.05 * Full.learning_rate  # a GPU adds up in another order each time
    for key, change in moved["exact"].items():
        np.testing.assert_allclose(moved["half"][key], change, rtol=0, atol=near, err_msg=key)
    changes = [change for name, change in moved["half"].items() if "embed" not in name]  # of tokens that occur
    matrices = [change for change in changes if change.ndim == 2 and change.any()]
    assert matrices
    assert all((change != 0).mean() > 0.9 for change in matrices)


def test_weights_in_half_precision_are_not_trained_in_place():
    model = untied(mx.float16)
    before, batch = arrays(model), recipe("grpo").credit(random_episodes(np.random.default_rng(0)))
    with pytest.raises(UserError, match="is trained in float16, which rounds most steps away; attach an adapter"):
        MLXEngine(model, stop=[0]).update(batch, Surrogate(), 1e-2)
    assert all(np.array_equal(value, before[name]) for name, value in arrays(model).items())


@pytest.mark.parametrize("name", ADAPTERS)
def test_a_fresh_adapter_leaves_the_model_as_it_was(name):
    model = tiny_llama(VOCABULARY)
    if ADAPTERS[name].kind == "qlora":
        nn.quantize(model, 32, 4)
    plain = logprobs(model)
    nearly = 1e-3 if ADAPTERS[name].kind == "lora_xs" else 0  # its R starts at about 1e-5
    np.testing.assert_allclose(logprobs(attach(model, ADAPTERS[name])), plain, atol=nearly or 1e-5)


def test_a_default_tinylora_has_thirteen_trainable_parameters():
    model = attach(tiny_llama(VOCABULARY), TinyLoRA())
    assert {name: value.shape for name, value in trainable(model).items()} == {"adapter_vectors.v": (1, 13)}


def test_sizes_are_those_counted_by_hand():
    ins_outs = [(32, 32), (32, 16), (32, 16), (32, 32), (32, 64), (32, 64), (64, 32)]  # q k v o gate up down
    lora = 2 * sum(4 * (i + o) for i, o in ins_outs)
    counted = {name: sum(v.size for v in trainable(adapted(name)).values()) for name in ADAPTERS}
    assert counted["lora"] == counted["qlora"] == counted["lora, rank-stabilised"] == lora
    assert counted["dora"] == lora + 2 * sum(o for _, o in ins_outs)
    assert counted["lora on some"] == 4 * (32 + 32) + 4 * (64 + 32)
    assert counted["lora_xs"] == 2 * 7 * 4 * 4
    assert counted["tinylora in groups"] == 5 * 2  # 14 modules in groups of at most 3
    assert counted["tinylora by kind"] == 7 * 2
    assert counted["full on some"] == 32 * 32


def test_the_scale_is_alpha_over_rank_or_over_its_root():
    layers = [attach(tiny_llama(VOCABULARY), LoRA(rank=4, alpha=8, rank_stabilised=s)).layers[0] for s in (False, True)]
    assert [layer.mlp.up_proj.scale for layer in layers] == [2.0, 4.0]


def test_a_qlora_trains_floats_on_a_base_that_stays_quantised():
    model = adapted("qlora")
    MLXEngine(model, stop=[0]).update(
        recipe("grpo").credit(random_episodes(np.random.default_rng(0))), Surrogate(), 1e-2
    )
    linear = model.layers[0].mlp.up_proj
    assert isinstance(linear.linear, nn.QuantizedLinear)
    assert linear.linear.weight.dtype == mx.uint32
    assert isinstance(model.model.embed_tokens, nn.QuantizedEmbedding)
    assert {value.dtype for value in trainable(model).values()} == {mx.float32}


def test_a_base_that_is_quantised_stays_as_it_is():
    model = tiny_llama(VOCABULARY)
    nn.quantize(model, 32, 8)
    packed = np.array(model.layers[0].mlp.up_proj.weight)
    attach(model, QLoRA(rank=2))
    assert np.array_equal(np.array(model.layers[0].mlp.up_proj.linear.weight), packed)
    assert attached(model).quantised is None


@pytest.mark.parametrize("name", ["lora", "dora", "lora_xs", "tinylora", "tinylora in groups"])
@pytest.mark.parametrize("every", [1, 2])
def test_recomputed_activations_change_no_gradient(name, every):
    batch, objective = recipe("grpo").credit(random_episodes(np.random.default_rng(0))), PolicyObjective(Surrogate())
    model = adapted(name)
    _, kept = MLXEngine(model, stop=[0]).gradients(batch, objective)
    _, again = MLXEngine(model, stop=[0], checkpoint_every=every).gradients(batch, objective)
    again = dict(tree_flatten(again))
    for key, value in tree_flatten(kept):
        assert float(mx.abs(value).max()) > 0
        np.testing.assert_allclose(np.array(again[key]), np.array(value), rtol=1e-3, atol=1e-6, err_msg=key)


@pytest.mark.parametrize("name", ["lora", "tinylora", "lora_xs"])
def test_a_compiled_step_moves_what_an_eager_one_moves(name):
    batch = recipe("grpo").credit(random_episodes(np.random.default_rng(0)))
    ends = []
    for compiled in (False, True):
        engine = MLXEngine(adapted(name), stop=[0], compile=compiled)
        for _ in range(3):
            engine.update(batch, Surrogate(), 1e-2)
        ends.append({key: np.array(value) for key, value in trainable(engine.model).items()})
    for key, value in ends[0].items():
        np.testing.assert_allclose(ends[1][key], value, atol=2e-3, err_msg=key)


# ---- to disk and back


@pytest.mark.parametrize("place", ["adapter", "adapter.safetensors"])
@pytest.mark.parametrize("name", ADAPTERS)
def test_a_saved_adapter_makes_the_same_model_of_a_fresh_base(name, place, tmp_path):
    model = adapted(name)
    save_adapter(model, tmp_path / place)
    loaded = load_adapter(tiny_llama(VOCABULARY), tmp_path / place)
    assert np.array_equal(logprobs(loaded), logprobs(model))
    assert set(trainable(loaded)) == set(trainable(model))
    assert attached(loaded).adapter == ADAPTERS[name]
    save_adapter(loaded, tmp_path / "again")
    assert np.array_equal(logprobs(load_adapter(tiny_llama(VOCABULARY), tmp_path / "again")), logprobs(model))


@pytest.mark.parametrize("name", ["lora", "lora on some", "dora", "full"])
def test_mlx_lm_reads_the_folder(name, tmp_path):
    model = adapted(name)
    save_adapter(model, tmp_path / "adapter")
    loaded = mlx_lm.tuner.utils.load_adapters(tiny_llama(VOCABULARY), str(tmp_path / "adapter"))
    np.testing.assert_allclose(logprobs(loaded), logprobs(model), atol=1e-5)


@pytest.mark.parametrize("kind", ["lora", "dora"])
def test_a_folder_of_mlx_lm_is_read_and_can_be_saved_again(kind, tmp_path):
    theirs = tiny_llama(VOCABULARY)
    theirs.freeze()
    settings = {"rank": 3, "scale": 5.0, "dropout": 0.0, "keys": ["self_attn.q_proj", "mlp.up_proj"]}
    mlx_lm.tuner.utils.linear_to_lora_layers(theirs, 1, settings, use_dora=kind == "dora")
    theirs.layers[1].mlp.up_proj.lora_b = mx.random.normal((3, 64))
    (tmp_path / "theirs").mkdir()
    mx.save_safetensors(str(tmp_path / "theirs" / "adapters.safetensors"), trainable(theirs))
    config = {"fine_tune_type": kind, "num_layers": 1, "lora_parameters": settings, "batch_size": 4}
    (tmp_path / "theirs" / "adapter_config.json").write_text(json.dumps(config))
    loaded = load_adapter(tiny_llama(VOCABULARY), tmp_path / "theirs")
    np.testing.assert_allclose(logprobs(loaded), logprobs(theirs), atol=2e-6)  # ours scales B, theirs the product
    assert set(trainable(loaded)) == set(trainable(theirs))
    save_adapter(loaded, tmp_path / "ours")
    again = load_adapter(tiny_llama(VOCABULARY), tmp_path / "ours")
    np.testing.assert_array_equal(logprobs(again), logprobs(loaded))


@pytest.mark.parametrize("kind", ["lora", "dora"])
@pytest.mark.parametrize(
    "keys",
    [
        ["lm_head"],
        ["model.embed_tokens"],
        ["model.embed_tokens", "self_attn.v_proj", "lm_head"],
        ["model.layers.0.mlp.down_proj", "self_attn.q_proj"],  # one layer by its full name, one kind in the last block
        ["model.layers.1.self_attn.k_proj"],
    ],
    ids=" ".join,
)
@pytest.mark.parametrize("half", [False, True])
def test_layers_that_mlx_lm_adapted_anywhere_come_back_twice(keys, kind, half, tmp_path):
    base = partial(untied, mx.bfloat16 if half else mx.float32)
    theirs, settings = base(), {"rank": 3, "scale": 5.0, "dropout": 0.0, "keys": keys}
    theirs.freeze()
    mlx_lm.tuner.utils.linear_to_lora_layers(theirs, 1, settings, use_dora=kind == "dora")
    moved = [(name, value + 0.1 * mx.random.normal(value.shape)) for name, value in trainable(theirs).items()]
    theirs.load_weights(moved, strict=False)
    config = {"fine_tune_type": kind, "num_layers": 1, "lora_parameters": settings}
    loaded = load_adapter(base(), written_by_mlx_lm(tmp_path / "theirs", trainable(theirs), **config))
    assert {value.dtype for value in trainable(loaded).values()} == {mx.float32}
    same = partial(np.testing.assert_allclose, atol=0.1 if half else 1e-5)
    same(loaded(TOKENS).astype(mx.float32), theirs(TOKENS).astype(mx.float32))
    save_adapter(loaded, tmp_path / "ours")
    again = load_adapter(base(), tmp_path / "ours")
    assert set(trainable(again)) == set(trainable(theirs))
    assert mx.array_equal(again(TOKENS), loaded(TOKENS))


def test_the_older_name_of_mlx_lms_number_of_layers_is_read(tmp_path):
    theirs, settings = tiny_llama(VOCABULARY), {"rank": 3, "scale": 5.0, "dropout": 0.0}
    theirs.freeze()
    mlx_lm.tuner.utils.linear_to_lora_layers(theirs, 1, settings)
    folder = written_by_mlx_lm(tmp_path / "theirs", trainable(theirs), lora_layers=1, lora_parameters=settings)
    assert set(trainable(load_adapter(tiny_llama(VOCABULARY), folder))) == set(trainable(theirs))


def test_the_head_and_the_embedding_are_adapted_when_named(tmp_path):
    model = attach(untied(), LoRA(rank=2, modules=("lm_head", "model.embed_tokens", "q_proj")))
    assert sum(name.endswith("lora_a") for name in trainable(model)) == 2 + len(model.layers)
    with pytest.raises(UserError, match="there is no linear module 'embed_tokens'"):
        attach(tiny_llama(VOCABULARY), LoRA(modules=("embed_tokens",)))


def written_by_mlx_lm(path, arrays, **config):
    path.mkdir()
    mx.save_safetensors(str(path / "adapters.safetensors"), arrays)
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def test_weights_that_mlx_lm_trained_in_full_are_read(tmp_path):
    theirs = tiny_llama(VOCABULARY)
    moved = {"model.layers.1.mlp.up_proj.weight": mx.random.normal((64, 32))}
    theirs.load_weights(list(moved.items()), strict=False)
    folder = written_by_mlx_lm(tmp_path / "theirs", moved, fine_tune_type="full", num_layers=1)
    loaded = load_adapter(tiny_llama(VOCABULARY), folder)
    np.testing.assert_array_equal(logprobs(loaded), logprobs(theirs))
    assert attached(loaded).adapter == Full()


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"rank": 3, "scale": 5.0, "dropout": 0.0, "keys": ["input_layernorm"]}, "RMSNorm"),
        ({"rank": 3, "scale": 5.0, "keys": ["self_attn.q_proj"]}, r"KeyError\('dropout'\)"),
        (
            {"rank": 0, "scale": 5.0, "dropout": 0.0, "keys": ["self_attn.q_proj"]},
            "the LoRA rank is 0; set it to 1 or more",
        ),
    ],
)
def test_a_folder_of_mlx_lm_that_cannot_be_put_on_the_model_leaves_the_base_as_it_was(settings, message, tmp_path):
    config = {"fine_tune_type": "lora", "num_layers": 1, "lora_parameters": settings}
    folder = written_by_mlx_lm(tmp_path / "theirs", {"a": mx.zeros((3, 3))}, **config)
    base = tiny_llama(VOCABULARY)
    before = arrays(base)
    with pytest.raises(UserError, match=message):
        load_adapter(base, folder)
    assert arrays(base).keys() == before.keys()
    assert attached(base) is None


def test_values_are_read_again_neither_from_mlx_lm_nor_from_another_base(tmp_path):
    model = adapted("lora")
    theirs = written_by_mlx_lm(
        tmp_path / "theirs", trainable(model), fine_tune_type="lora", lora_parameters={"rank": 4, "scale": 2.0}
    )
    save_adapter(attach(tiny_llama(VOCABULARY, seed=1), LoRA(rank=4)), tmp_path / "other")
    before = logprobs(model)
    with pytest.raises(UserError, match="was not written by textpolicy; load it on a fresh base"):
        reread_adapter(model, theirs)
    with pytest.raises(UserError, match="is a llama of this size with other weights, the base of the adapter"):
        reread_adapter(model, tmp_path / "other")
    assert np.array_equal(logprobs(model), before)


def test_an_adapter_on_a_quantised_base_is_read_onto_the_same_one(tmp_path):
    base = tiny_llama(VOCABULARY)
    nn.quantize(base, 32, 4)
    model = attach(base, TinyLoRA())
    model.load_weights([(n, v + 0.5) for n, v in trainable(model).items()], strict=False)
    save_adapter(model, tmp_path / "adapter")
    again = tiny_llama(VOCABULARY)
    nn.quantize(again, 32, 4)
    assert np.array_equal(logprobs(load_adapter(again, tmp_path / "adapter")), logprobs(model))


def test_the_same_base_quantised_takes_the_adapter_with_a_warning(tmp_path, caplog):
    save_adapter(adapted("lora"), tmp_path / "adapter")
    base = tiny_llama(VOCABULARY)
    nn.quantize(base, 32, 4)
    load_adapter(base, tmp_path / "adapter")
    assert "off those the adapter was trained on" in caplog.text
    caplog.clear()
    load_adapter(tiny_llama(VOCABULARY), tmp_path / "adapter")
    assert caplog.text == ""


def rewritten(path, edit):
    """The adapter at ``path`` with its arrays changed by ``edit``."""
    file = str(path / "adapters.safetensors")
    mx.save_safetensors(file, edit({name: mx.array(value) for name, value in mx.load(file).items()}))


def other_rank(arrays):
    return {name: mx.concatenate([a, a], axis=-1 if name.endswith("a") else 0) for name, a in arrays.items()}


def without_one(arrays):
    return {name: a for name, a in arrays.items() if name != "model.layers.0.mlp.up_proj.lora_a"}


def with_one_more(arrays):
    return {**arrays, "model.layers.7.mlp.up_proj.lora_a": mx.zeros((32, 4))}


def wider(arrays):
    return {**arrays, "model.layers.0.mlp.up_proj.lora_a": mx.zeros((48, 4))}


@pytest.mark.parametrize(
    ("edit", "message"),
    [
        (other_rank, r"its config has rank 4, and \S+ has rank 8"),
        (without_one, r"the adapter lacks model\.layers\.0\.mlp\.up_proj\.lora_a"),
        (with_one_more, r"no place for model\.layers\.7\.mlp\.up_proj\.lora_a"),
        (wider, r"up_proj\.lora_a has the shape \(48, 4\) instead of \(32, 4\)"),
    ],
)
def test_arrays_that_do_not_fit_are_named_and_the_base_is_left_as_it_was(edit, message, tmp_path):
    save_adapter(adapted("lora"), tmp_path / "adapter")
    rewritten(tmp_path / "adapter", edit)
    base = tiny_llama(VOCABULARY)
    plain = logprobs(base)
    with pytest.raises(UserError, match=message):
        load_adapter(base, tmp_path / "adapter")
    assert np.array_equal(logprobs(base), plain)
    assert attached(base) is None


@pytest.mark.parametrize("name", ["lora", "tinylora", "full"])
def test_a_base_of_the_same_form_with_other_weights_is_refused(name, tmp_path):
    save_adapter(adapted(name), tmp_path / "adapter")
    with pytest.raises(UserError, match="has another base: this model is a llama of this size with other weights"):
        load_adapter(tiny_llama(VOCABULARY, seed=1), tmp_path / "adapter")


def test_a_base_of_another_form_is_refused(tmp_path):
    save_adapter(adapted("lora"), tmp_path / "adapter")
    base = tiny_llama(VOCABULARY)
    base.model.layers = base.model.layers[:1]
    with pytest.raises(UserError, match="this model is a llama of 1 blocks and not a llama of 2"):
        load_adapter(base, tmp_path / "adapter")


def test_a_base_of_other_sizes_is_refused(tmp_path):
    save_adapter(adapted("lora"), tmp_path / "adapter")
    wider = replace(tiny_llama(VOCABULARY).args, intermediate_size=96)
    with pytest.raises(UserError, match=r"weights of the shapes \(\(32, 32\), \(96, 32\)\) and not .*\(64, 32\)\)"):
        load_adapter(llama.Model(wider), tmp_path / "adapter")


@pytest.mark.parametrize(
    ("other", "message"),
    [
        ("dora", "is a dora and the model's a lora"),
        ("lora on some", r"has layers 1 where the model has 0, modules \['q_proj', 'mlp.down_proj'\] where"),
        ("lora, rank-stabilised", "has rank_stabilised True where the model has False"),
    ],
)
def test_values_are_read_again_only_into_the_same_adapter(other, message, tmp_path):
    model = adapted("lora")
    save_adapter(adapted(other), tmp_path / "adapter")
    with pytest.raises(UserError, match=message):
        reread_adapter(model, tmp_path / "adapter")
    newer = adapted("lora", seed=5)
    save_adapter(newer, tmp_path / "newer")
    assert not np.allclose(logprobs(model), logprobs(newer))
    assert np.array_equal(logprobs(reread_adapter(model, tmp_path / "newer")), logprobs(newer))


def test_a_folder_with_anything_else_in_it_is_not_replaced(tmp_path):
    (tmp_path / "results.txt").write_text("a year's work")
    with pytest.raises(UserError, match="contains something other than an adapter"):
        save_adapter(adapted("lora"), tmp_path)
    assert [p.name for p in tmp_path.iterdir() if p.name != "cache"] == ["results.txt"]


@pytest.mark.parametrize("saved_before", [False, True])
def test_what_finder_leaves_in_a_folder_is_nothing_else(saved_before, tmp_path):
    if saved_before:
        save_adapter(adapted("lora", seed=3), tmp_path / "a")
    (tmp_path / "a").mkdir(exist_ok=True)
    for name in (".DS_Store", "._adapters.safetensors", "._.DS_Store"):
        (tmp_path / "a" / name).write_text("x")
    model = adapted("lora")
    save_adapter(model, tmp_path / "a")
    assert np.array_equal(logprobs(reread_adapter(adapted("lora", seed=5), tmp_path / "a")), logprobs(model))


def test_an_interrupted_save_leaves_the_older_adapter(tmp_path, monkeypatch):
    model = adapted("lora")
    for place in ("adapter", "adapter.safetensors"):
        save_adapter(model, tmp_path / place)

    def interrupted(path, *arguments, **keywords):
        with open(path, "w") as file:
            file.write("half")
        raise KeyboardInterrupt

    monkeypatch.setattr(mx, "save_safetensors", interrupted)
    for place in ("adapter", "adapter.safetensors"):
        with pytest.raises(KeyboardInterrupt):
            save_adapter(adapted("lora", seed=5), tmp_path / place)
    monkeypatch.undo()
    assert {p.name for p in tmp_path.iterdir()} <= {"adapter", "adapter.safetensors", "cache"}
    for place in ("adapter", "adapter.safetensors"):
        assert np.array_equal(logprobs(load_adapter(tiny_llama(VOCABULARY), tmp_path / place)), logprobs(model))


@pytest.mark.parametrize("error", [OSError(5, "Input/output error"), KeyboardInterrupt()])
def test_a_rename_that_fails_brings_the_older_adapter_back(error, tmp_path, monkeypatch):
    model, rename = adapted("lora"), os.replace
    save_adapter(model, tmp_path / "adapter")

    def failing(source, target):
        if source.name == "adapter" and source.parent != tmp_path:  # the new one, into its place
            raise error
        rename(source, target)

    monkeypatch.setattr(os, "replace", failing)
    for name in ("adapter", "first"):
        with pytest.raises(UserError if isinstance(error, OSError) else KeyboardInterrupt) as raised:
            save_adapter(adapted("lora", seed=5), tmp_path / name)
        if isinstance(error, OSError):
            assert f"cannot write the adapter to {tmp_path / name} (Input/output error);" in str(raised.value)
    monkeypatch.undo()
    assert {p.name for p in tmp_path.iterdir()} <= {"adapter", "cache"}
    assert np.array_equal(logprobs(load_adapter(tiny_llama(VOCABULARY), tmp_path / "adapter")), logprobs(model))


@pytest.mark.parametrize("place", ["adapter", "adapter.safetensors"])
def test_a_full_disk_raises_one_error_and_leaves_the_older_adapter(place, tmp_path):
    model = adapted("lora")
    save_adapter(model, tmp_path / place)
    with (
        files_of_at_most(1000),
        pytest.raises(UserError, match=r"cannot write the adapter to .*; choose another"),
    ):
        save_adapter(adapted("lora", seed=5), tmp_path / place)
    assert {p.name for p in tmp_path.iterdir()} <= {place, "cache"}
    assert np.array_equal(logprobs(load_adapter(tiny_llama(VOCABULARY), tmp_path / place)), logprobs(model))


def test_an_adapter_below_a_file_cannot_be_written(tmp_path):
    (tmp_path / "results.txt").write_text("a year's work")
    with pytest.raises(UserError, match=r"cannot write the adapter to .*adapter .*; choose another place"):
        save_adapter(adapted("lora"), tmp_path / "results.txt" / "adapter")
    assert (tmp_path / "results.txt").read_text() == "a year's work"


def test_the_file_in_a_folder_stands_for_the_folder(tmp_path):
    model = adapted("lora")
    save_adapter(model, tmp_path / "adapter")
    again = load_adapter(tiny_llama(VOCABULARY), tmp_path / "adapter" / "adapters.safetensors")
    assert np.array_equal(logprobs(again), logprobs(model))


@pytest.mark.parametrize(
    ("spoil", "message"),
    [
        (lambda path: (path / "adapter_config.json").unlink(), r"has no adapter_config\.json"),
        (lambda path: (path / "adapter_config.json").write_text("{"), r"adapter_config\.json of .* cannot be read"),
        (lambda path: (path / "adapter_config.json").write_text('{"textpolicy": {}}'), "cannot be read"),
        (lambda path: (path / "adapters.safetensors").write_bytes(b"no"), "not a valid safetensors file"),
        (lambda path: (path / "adapters.safetensors").unlink(), r"has no adapters\.safetensors"),
    ],
)
def test_a_damaged_folder_is_refused(spoil, message, tmp_path):
    save_adapter(adapted("lora"), tmp_path / "adapter")
    spoil(tmp_path / "adapter")
    with pytest.raises(UserError, match=message):
        load_adapter(tiny_llama(VOCABULARY), tmp_path / "adapter")


@pytest.mark.parametrize("weights", ["adapter_model.safetensors", "adapter_model.bin"])
def test_an_adapter_of_peft_is_refused_as_what_it_is(weights, tmp_path):
    (tmp_path / weights).write_bytes(b"")
    (tmp_path / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "r": 2}))
    for path in (tmp_path, tmp_path / weights):
        with pytest.raises(UserError, match="is an adapter of PEFT, in a layout of its own; give a folder of"):
            load_adapter(tiny_llama(VOCABULARY), path)


def test_a_file_without_a_config_is_refused(tmp_path):
    mx.save_safetensors(str(tmp_path / "bare.safetensors"), trainable(adapted("lora")))
    with pytest.raises(UserError, match="has no adapter_config"):
        load_adapter(tiny_llama(VOCABULARY), tmp_path / "bare.safetensors")
    with pytest.raises(UserError, match="there is no adapter at"):
        load_adapter(tiny_llama(VOCABULARY), tmp_path / "absent.safetensors")


# ---- merged, and switched off


@pytest.mark.parametrize("name", ADAPTERS)
def test_the_merged_model_is_plain_and_has_the_log_probs_of_the_adapted_one(name):
    model = adapted(name)
    expected = logprobs(model)
    merged = merge_adapters(model, dequantize=True)
    np.testing.assert_allclose(logprobs(merged), expected, atol=2e-4)
    assert {type(m) for m in merged.layers[1].mlp.leaf_modules().values()} == {nn.Linear}
    assert set(arrays(merged)) == set(arrays(tiny_llama(VOCABULARY)))
    assert trainable(merged) == {}
    assert attached(merged) is None


def test_a_merged_model_takes_another_adapter():
    model = merge_adapters(adapted("tinylora"))
    attach(model, TinyLoRA(u=2))
    assert {value.shape for value in trainable(model).values()} == {(1, 2)}


def test_a_quantised_model_keeps_its_bits_when_it_is_merged():
    model = adapted("qlora")
    expected = logprobs(model)
    merged = merge_adapters(model)
    layer = merged.layers[0].mlp.up_proj
    assert isinstance(layer, nn.QuantizedLinear)
    assert (layer.bits, layer.group_size) == (4, 32)
    assert 0 < np.abs(logprobs(merged) - expected).max() < 3  # rounded, and not something else altogether


@pytest.mark.parametrize(
    ("mode", "bits", "group_size"),
    [("affine", 3, 64), ("affine", 8, 32), ("mxfp4", 4, 32), ("mxfp8", 8, 32), ("nvfp4", 4, 16)],
)
@pytest.mark.parametrize("dtype", [mx.float32, mx.bfloat16])
def test_merging_quantises_in_the_base_s_own_format(mode, bits, group_size, dtype):
    def quantised():
        model = untied(dtype, hidden_size=64, head_dim=16)
        nn.quantize(model, group_size, bits, mode=mode)
        return model

    model = attach(quantised(), LoRA(rank=4))
    mx.random.seed(1)
    moved = [(name, value + 0.05 * mx.random.normal(value.shape)) for name, value in trainable(model).items()]
    model.load_weights(moved, strict=False)
    exact = {}
    for name, layer in wrapped(model):
        change = layer.scale * (layer.lora_a @ layer.lora_b).T
        exact[name] = dense_weight(layer.linear, mx.float32) + change
    merged = dict(merge_adapters(model).named_modules())
    for name, layer in dict(quantised().named_modules()).items():
        if name not in exact:
            continue
        ours = merged[name]
        assert (type(ours), ours.mode, ours.bits, ours.group_size) == (type(layer), mode, bits, group_size)
        assert {key: a.dtype for key, a in ours.parameters().items()} == {
            k: a.dtype for k, a in layer.parameters().items()
        }
        floats = exact[name].astype(dtype if mode == "affine" else mx.float32)
        weight, scales, *biases = mx.quantize(floats, group_size, bits, mode)
        rounded = mx.dequantize(weight, scales, *(biases or [None]), group_size, bits, mode).astype(mx.float32)
        off = mx.abs(dense_weight(ours, mx.float32) - exact[name]).mean()
        assert off <= 1.001 * mx.abs(rounded - exact[name]).mean()


def test_experts_of_nvfp4_with_a_scale_of_their_own_are_merged_with_one():
    base = SwitchLinear(32, 16, 4, bias=True)
    base.bias = mx.random.normal((4, 16))
    quantised = base.to_quantized(16, 4, "nvfp4", global_scale=True)
    exact = in_floats(quantised, mx.float32)
    assert mx.abs(exact.weight - base.weight).max() < 0.05
    exact.weight = 3 * exact.weight
    tripled = quantised_as(quantised, exact)
    np.testing.assert_allclose(tripled.global_scale, 3 * quantised.global_scale, rtol=1e-3)
    np.testing.assert_allclose(dense_weight(tripled), exact.weight, atol=1e-5)
    assert np.array_equal(tripled.bias, base.bias)


def test_a_change_and_a_half_are_added_before_they_are_rounded():
    model = tiny_llama(VOCABULARY)
    model.set_dtype(mx.bfloat16)
    attach(model, LoRA(rank=2))
    moved = [(name, value + 0.1 * mx.random.normal(value.shape)) for name, value in trainable(model).items()]
    model.load_weights(moved, strict=False)
    layer = model.layers[0].mlp.up_proj
    exact = layer.linear.weight.astype(mx.float32) + layer.scale * (layer.lora_a @ layer.lora_b).T
    merge_adapters(model)
    assert np.array_equal(mx_bits(model.layers[0].mlp.up_proj.weight), mx_bits(exact.astype(mx.bfloat16)))


def mx_bits(array):
    return np.array(array.view(mx.uint16))


@pytest.mark.parametrize("dtype", [mx.bfloat16, mx.float16])
@pytest.mark.parametrize("name", ["lora", "dora", "lora_xs", "tinylora"])
def test_merging_keeps_the_precision_of_the_base(name, dtype):
    model = tiny_llama(VOCABULARY)
    model.set_dtype(dtype)
    attach(model, ADAPTERS[name])
    assert {value.dtype for value in trainable(model).values()} == {mx.float32}
    assert model(TOKENS).dtype == dtype
    merged = merge_adapters(model)
    assert {value.dtype for _, value in tree_flatten(merged.parameters())} == {dtype}


def test_a_model_without_an_adapter_can_be_neither_merged_nor_saved(tmp_path):
    with pytest.raises(UserError, match="no adapter to merge"):
        merge_adapters(tiny_llama(VOCABULARY))
    with pytest.raises(UserError, match="no adapter to save"):
        save_adapter(tiny_llama(VOCABULARY), tmp_path / "adapter")
    with pytest.raises(UserError, match="has an adapter already"):
        attach(adapted("lora"), LoRA())
    save_adapter(adapted("lora"), tmp_path / "adapter")
    with pytest.raises(UserError, match="has an adapter already"):
        load_adapter(adapted("lora"), tmp_path / "adapter")


@pytest.mark.parametrize("name", [name for name in ADAPTERS if ADAPTERS[name].kind != "full"])
def test_switched_off_the_model_is_its_base_and_an_exception_brings_the_adapter_back(name):
    model = adapted(name)
    base = tiny_llama(VOCABULARY)
    if ADAPTERS[name].kind == "qlora":
        nn.quantize(base, 32, 4)
    expected, before = logprobs(model), arrays(model)

    def fail_with_adapters_off():
        with adapters_off(model):
            assert np.array_equal(logprobs(model), logprobs(base))
            raise RuntimeError("in the middle")

    with pytest.raises(RuntimeError, match="in the middle"):
        fail_with_adapters_off()
    assert np.array_equal(logprobs(model), expected)
    assert arrays(model).keys() == before.keys()
    assert not np.array_equal(expected, logprobs(base))


def test_weights_trained_in_full_have_no_reference():
    with (
        pytest.raises(UserError, match="no adapter to switch off for the KL reference"),
        adapters_off(adapted("full")),
    ):
        pass


def mixture():
    """A tiny mixture of four experts."""
    mx.random.seed(0)
    sizes = {"hidden_size": 32, "num_hidden_layers": 2, "intermediate_size": 64, "moe_intermediate_size": 16}
    heads = {"num_attention_heads": 4, "num_key_value_heads": 2, "head_dim": 8, "max_position_embeddings": 64}
    experts = {"num_experts": 4, "num_experts_per_tok": 2, "decoder_sparse_step": 1, "mlp_only_layers": []}
    rest = {"rms_norm_eps": 1e-5, "vocab_size": VOCABULARY, "rope_theta": 1e4, "tie_word_embeddings": False}
    settings = {"model_type": "qwen3_moe", "norm_topk_prob": True, **sizes, **heads, **experts, **rest}
    return qwen3_moe.Model(qwen3_moe.ModelArgs.from_dict(settings))


@pytest.mark.parametrize("adapter", [LoRA(rank=4), TinyLoRA()], ids=["lora", "tinylora"])
def test_the_experts_of_a_mixture_are_adapted_saved_merged_and_left_by_those_that_cannot(adapter, tmp_path):
    base = mixture()
    plain = logprobs(base)
    model = attach(base, adapter)
    on_experts = {name for name in trainable(model) if "switch_mlp" in name}
    assert len(on_experts) == (2 * 3 * 2 if adapter.kind == "lora" else 0)
    moved = [(name, value + 0.2 * mx.random.normal(value.shape)) for name, value in trainable(model).items()]
    model.load_weights(moved, strict=False)
    expected = logprobs(model)
    assert not np.allclose(expected, plain, atol=1e-3)
    with adapters_off(model):
        assert np.array_equal(logprobs(model), plain)
    save_adapter(model, tmp_path / "adapter")
    assert np.array_equal(logprobs(load_adapter(mixture(), tmp_path / "adapter")), expected)
    np.testing.assert_allclose(logprobs(merge_adapters(model)), expected, atol=2e-4)


# ---- settings, factors and what cannot work


def test_every_kind_is_known_by_its_name():
    assert list(KINDS) == ["lora", "dora", "qlora", "full", "lora_xs", "tinylora"]
    assert make_adapter("tinylora", {"u": 3, "modules": ["q_proj"]}) == TinyLoRA(u=3, modules=("q_proj",))


@pytest.mark.parametrize(
    ("call", "message"),
    [
        (lambda: make_adapter("tinylor", {}), "did you mean 'tinylora'"),
        (lambda: make_adapter("full", {"rank": 4}), "full does not use rank"),
        (lambda: make_adapter("lora", {"u": 4, "tie": 1}), "lora does not use tie, u"),
        (lambda: LoRA(rank=0), "LoRA rank is 0"),
        (lambda: LoRA(dropout=1.0), "dropout of a LoRA is 1.0"),
        (lambda: LoRA(layers=-1), "layers is -1"),
        (lambda: LoRAXS(rank=0), "rank of a LoRA-XS is 0"),
        (lambda: TinyLoRA(u=0), "u, the length of a TinyLoRA's vector, is 0"),
        (lambda: TinyLoRA(tie=-1), "tie is -1"),
        (lambda: attach(tiny_llama(9), LoRA(modules=("q_prj",))), "no linear module 'q_prj'; did you mean 'q_proj'"),
        (
            lambda: attach(tiny_llama(9), QLoRA(group_size=128)),
            "no layer of the base has a width that is a multiple of 128",
        ),
        (lambda: attach(tiny_llama(9), QLoRA(bits=7, group_size=32)), "cannot be quantised to 7 bits"),
        (lambda: attach(quantised(8), QLoRA(bits=4)), "quantised to 8 bits and bits is 4"),
        (lambda: attach(quantised(8), Full()), "cannot be trained in full"),
        (
            lambda: attach(of_norms_alone(), LoRA()),
            "blocks of this RMSNorm have no linear modules; set adapter.kind to full",
        ),
        (lambda: attach(quantised(6), DoRA()), "DoRA does not support weights of 6 bits"),
    ],
)
def test_invalid_settings_are_refused(call, message):
    with pytest.raises(UserError, match=message):
        call()


def of_norms_alone():
    model = tiny_llama(9)
    model.model.layers = [nn.RMSNorm(32), nn.RMSNorm(32)]
    return model


def quantised(bits):
    model = tiny_llama(9)
    nn.quantize(model, 32, bits)
    return model


def test_factors_are_computed_once_and_come_from_the_cache_then(tmp_path, monkeypatch, caplog):
    caplog.set_level(logging.INFO)
    modules = {"up": tiny_llama(9).layers[0].mlp.up_proj}
    first = factorise(modules, 3)
    assert "factorised 1 weights" in caplog.text
    caplog.clear()
    again = factorise(modules, 3)
    assert caplog.text == ""
    for part in ("u", "s", "vt"):
        assert mx.array_equal(getattr(first["up"], part), getattr(again["up"], part))
    factorise(modules, 2)
    assert "factorised 1 weights" in caplog.text
    caplog.clear()
    modules["up"].weight = modules["up"].weight + 0.01 * mx.eye(64, 32)
    changed = factorise(modules, 3)
    assert "factorised 1 weights" in caplog.text
    assert not mx.array_equal(changed["up"].s, first["up"].s)


def test_factors_of_a_quantised_weight_are_those_of_its_dequantised_values():
    layer = nn.QuantizedLinear.from_linear(tiny_llama(9).layers[0].mlp.up_proj, 32, 4)
    dense = np.array(mx.dequantize(layer.weight, layer.scales, layer.biases, 32, 4))
    expected = np.linalg.svd(dense, compute_uv=False)[:3]
    np.testing.assert_allclose(np.array(factorise({"up": layer}, 3)["up"].s), expected, rtol=1e-4)


def test_a_cache_that_cannot_be_written_is_refused(tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TEXTPOLICY_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set TEXTPOLICY_CACHE to a folder"):
        attach(tiny_llama(9), TinyLoRA())
    monkeypatch.setenv("TEXTPOLICY_CACHE", str(tmp_path / "small"))
    with files_of_at_most(1000), pytest.raises(UserError, match="set TEXTPOLICY_CACHE to a folder with room"):
        attach(tiny_llama(9), TinyLoRA())
    assert [p for p in (tmp_path / "small").rglob("*") if p.is_file()] == []


def test_an_adapter_depends_on_its_seed_alone():
    for adapter in (LoRA(rank=2), LoRAXS(rank=2), TinyLoRA(rank=2)):
        first, same, other = (arrays(attach(tiny_llama(9), adapter, seed)) for seed in (1, 1, 2))
        assert all(np.array_equal(first[key], same[key]) for key in first)
        assert any(not np.array_equal(first[key], other[key]) for key in first)
    for adapter in (LoRAXS(rank=2), TinyLoRA(rank=2)):
        mx.random.seed(3)
        before = mx.random.normal((2,))
        mx.random.seed(3)
        attach(tiny_llama(9, seed=3), adapter)
        mx.random.seed(3)
        assert mx.array_equal(before, mx.random.normal((2,)))
    assert replace(LoRA(), rank=3).scale == pytest.approx(32 / 3)


def test_a_rank_that_mlx_computes_wrongly_on_experts_is_refused_on_an_nvidia_gpu(monkeypatch):
    monkeypatch.setattr(cuda, "is_nvidia", lambda: True)
    for modules in ((), ("up_proj",)):
        with pytest.raises(UserError, match="a LoRA of rank 6 on experts on an NVIDIA GPU; choose a multiple of 4"):
            attach(tiny_family("mixtral"), LoRA(rank=6, modules=modules))
    assert attach(tiny_family("mixtral"), LoRA(rank=8))
    assert attach(tiny_family("mixtral"), LoRA(rank=6, modules=("q_proj",)))
