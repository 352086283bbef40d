"""GGUF files of every family and type that is read: the model computes what the file's numbers say."""

import logging
import shutil

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
import pytest
from gguf import GGMLQuantizationType as Kind
from made_gguf import HALVES, LETTERS, VOCAB, random_blocks, stored, write, write_like
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes

from textpolicy.errors import UserError
from textpolicy.generation import create_policy
from textpolicy.mlx.files.gguf import llama_3_factors
from textpolicy.mlx.models import load_model

TOKENS = mx.array([[5, 100, 7, 7, 200, 33, 90, 12, 44, 3]])
SIZES = {
    "vocab_size": VOCAB,
    "hidden_size": 256,
    "intermediate_size": 512,
    "num_hidden_layers": 4,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 64,
    "rms_norm_eps": 1e-5,
    "rope_theta": 5e4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
GEMMA = {
    "query_pre_attn_scalar": 64,
    "sliding_window": 4,
    "sliding_window_pattern": 3,
    "rope_local_base_freq": 1e4,
    "tie_word_embeddings": True,
}
FAMILIES = {
    "llama": ("llama", gguf.MODEL_ARCH.LLAMA, {}, {}),
    "llama, tied": ("llama", gguf.MODEL_ARCH.LLAMA, {"tie_word_embeddings": True}, {}),
    "llama, linear": (
        "llama",
        gguf.MODEL_ARCH.LLAMA,
        {"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 4.0}},
        {"llama.rope.scaling.factor": 4.0},
    ),
    "llama, linear as of 2023": (
        "llama",
        gguf.MODEL_ARCH.LLAMA,
        {"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 2.5}},
        {"llama.rope.scale_linear": 2.5},
    ),
    "llama, a factor that is off": (
        "llama",
        gguf.MODEL_ARCH.LLAMA,
        {},
        {"llama.rope.scaling.factor": 4.0, "llama.rope.scaling.type": "none"},
    ),
    "qwen2": ("qwen2", gguf.MODEL_ARCH.QWEN2, {"tie_word_embeddings": True}, {}),
    "qwen3": ("qwen3", gguf.MODEL_ARCH.QWEN3, {}, {"qwen3.attention.causal": True}),
    "gemma3": ("gemma3_text", gguf.MODEL_ARCH.GEMMA3, GEMMA, {}),
    "gemma3, linear": (
        "gemma3_text",
        gguf.MODEL_ARCH.GEMMA3,
        GEMMA | {"rope_scaling": {"rope_type": "linear", "type": "linear", "factor": 8.0}},
        {"gemma3.rope.scaling.type": "linear", "gemma3.rope.scaling.factor": 8.0},
    ),
}


def made(kind, changes):
    """A random model of mlx-lm's class, and its weights as NumPy's arrays."""
    config = SIZES | {"model_type": kind} | changes
    model_class, args = _get_classes(config)
    model = model_class(args.from_dict(config))
    if config["tie_word_embeddings"] and kind == "gemma3_text":
        model.tie_word_embeddings = True
        model.pop("lm_head")
    rng = np.random.default_rng(0)
    drawn = {
        name: rng.normal(0.3 if "norm" in name else 0, 0.2 if p.ndim == 1 else 1.5 / np.sqrt(p.shape[-1]), p.shape)
        for name, p in tree_flatten(model.parameters())
    }
    model.load_weights([(name, mx.array(array.astype(np.float32))) for name, array in drawn.items()])
    return model, {name: np.array(p) for name, p in tree_flatten(model.parameters())}


def filed(weights, architecture, kind):
    """The weights under llama.cpp's names and in its forms, as convert_hf_to_gguf.py writes them."""
    table, out = gguf.get_tensor_name_map(architecture, SIZES["num_hidden_layers"]), {}
    for name, array in weights.items():
        if kind == "llama" and name.split(".")[-2] in ("q_proj", "k_proj"):
            heads = SIZES["num_attention_heads" if "q_proj" in name else "num_key_value_heads"]
            array = array.reshape(heads, 2, -1, array.shape[1]).swapaxes(1, 2).reshape(array.shape)
        if kind == "gemma3_text" and "norm" in name:
            array = array + 1
        out[table.get_name(name, try_suffixes=(".weight", ".bias"))] = array
    return out


def described(architecture, kind, changes):
    s, name = SIZES | changes, gguf.MODEL_ARCH_NAMES[architecture]
    values = {
        "block_count": s["num_hidden_layers"],
        "context_length": s["max_position_embeddings"],
        "embedding_length": s["hidden_size"],
        "feed_forward_length": s["intermediate_size"],
        "attention.head_count": s["num_attention_heads"],
        "attention.head_count_kv": s["num_key_value_heads"],
        "attention.key_length": s["head_dim"],
        "attention.value_length": s["head_dim"],
        "attention.layer_norm_rms_epsilon": s["rms_norm_eps"],
        "rope.freq_base": s["rope_theta"],
    }
    if kind == "gemma3_text":
        values |= {"attention.sliding_window": s["sliding_window"], "attention.sliding_window_pattern": 3}
    return {f"{name}.{key}": value for key, value in values.items()}


@pytest.fixture(autouse=True)
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTPOLICY_CACHE", str(tmp_path / "cache"))
    yield
    shutil.rmtree(tmp_path / "cache", ignore_errors=True)


@pytest.mark.parametrize("case", FAMILIES)
def test_each_family_computes_what_the_model_that_was_filed_does(tmp_path, case):
    kind, architecture, changes, more = FAMILIES[case]
    model, weights = made(kind, changes)
    path = write_like(
        tmp_path / "m.gguf",
        gguf.MODEL_ARCH_NAMES[architecture],
        filed(weights, architecture, kind),
        metadata=described(architecture, kind, changes) | more,
    )
    loaded, _ = load_model(path)
    exact = model(TOKENS)
    np.testing.assert_allclose(np.array(loaded(TOKENS)), np.array(exact), atol=2e-4)
    assert float(mx.abs(exact - exact.mean()).max()) > 0.5


@pytest.mark.parametrize("kind", HALVES)
@pytest.mark.cpu  # a GPU keeps the file's halves and quantised layers
def test_each_type_is_read_exactly_as_the_gguf_package_reads_it(tmp_path, kind, caplog):
    _, weights = made("qwen3", {})
    arrays = filed(weights, gguf.MODEL_ARCH.QWEN3, "qwen3")
    blocks = {
        n: (random_blocks(kind, a.shape, seed), kind) for seed, (n, a) in enumerate(arrays.items()) if a.ndim == 2
    }
    path = write_like(tmp_path / "m.gguf", "qwen3", arrays, blocks, described(gguf.MODEL_ARCH.QWEN3, "qwen3", {}))
    wanted, model = stored(path), load_model(path)[0]
    found = dict(tree_flatten(model.parameters()))
    pairs = {"blk.3.ffn_down": "model.layers.3.mlp.down_proj", "blk.0.attn_k": "model.layers.0.self_attn.k_proj"}
    pairs |= {"token_embd": "model.embed_tokens", "output": "lm_head"}
    for theirs, ours in pairs.items():
        exact = wanted[f"{theirs}.weight"]
        np.testing.assert_allclose(np.array(found[f"{ours}.weight"]), exact, atol=1e-6 * np.abs(exact).max())
    with caplog.at_level(logging.WARNING):
        packed = load_model(path, dequantize=False)[0]
    assert isinstance(packed.layers[0].mlp.up_proj, nn.QuantizedLinear)
    near = np.abs(np.array(packed(TOKENS)) - np.array(model(TOKENS))).max()
    if kind in (Kind.Q4_K, Kind.Q5_K, Kind.IQ4_NL):  # these have an exact form in MLX
        assert near < 1e-3
        assert "are of types that MLX has not" not in caplog.text
    else:
        assert "are of types that MLX has not; quantised again, their weights differ by" in caplog.text
        percent = float(caplog.text.split("differ by ")[1].split("%")[0])
        assert 0 < percent < {Kind.Q6_K: 1, Kind.Q3_K: 5, Kind.Q2_K: 10, Kind.IQ4_XS: 3}[kind]


def test_rotations_of_llama_3_come_as_a_tensor(tmp_path):
    scaling = {
        "factor": 32.0,
        "low_freq_factor": 1.0,
        "high_freq_factor": 4.0,
        "original_max_position_embeddings": 8192,
    }
    changes = {"rope_scaling": {"rope_type": "llama3", **scaling}, "rope_theta": 5e5, "max_position_embeddings": 131072}
    model, weights = made("llama", changes)
    about = described(gguf.MODEL_ARCH.LLAMA, "llama", changes)
    arrays = filed(weights, gguf.MODEL_ARCH.LLAMA, "llama")
    factors = llama_3_factors(5e5, 64, scaling)
    assert factors.shape == (32,)
    assert (factors[0], factors[-1]) == (1, 32)
    loaded, _ = load_model(
        write_like(tmp_path / "a.gguf", "llama", {"rope_freqs.weight": factors, **arrays}, None, about)
    )
    far = mx.array(np.random.default_rng(0).integers(0, VOCAB, (1, 600)))
    np.testing.assert_allclose(np.array(loaded(far)), np.array(model(far)), atol=1e-3)
    for other in (np.ones(32), factors * 1.01, factors[::-1], np.full(32, np.nan), np.zeros(32)):
        path = write_like(tmp_path / "b.gguf", "llama", {"rope_freqs.weight": other, **arrays}, None, about)
        with pytest.raises(UserError, match=r"'rope_freqs\.weight' .* is not known"):
            load_model(path)


@pytest.mark.parametrize(
    ("extra", "wanted"),
    [
        ({"eot": 1}, {0, 1}),
        ({"eot": 5, "eom": 2}, {0, 2, 5}),
        ({"eot": 0, "eom": 0}, {0}),
        ({"eom": 7}, {0, 7}),
        ({"eos": 9, "eot": 0}, {0, 9}),
    ],
)
def test_the_end_of_a_turn_and_of_a_message_stop_too(tmp_path, extra, wanted):
    values = {f"tokenizer__ggml__{name}_token_id": i for name, i in extra.items()}
    path = write(tmp_path / "m.gguf", **values, tokenizer__chat_template=None)
    assert set(load_model(path)[1].eos_token_ids) == wanted


def test_a_file_of_letters_alone_needs_no_merges(tmp_path):
    names = ["<|end|>", "<|start|>", "<tool>", *LETTERS]
    more = [f"[PAD{i}]" for i in range(VOCAB - len(names))]
    letters = {
        "tokenizer__ggml__tokens": names + more,
        "tokenizer__ggml__token_type": [3, 3, 4] + [1] * len(LETTERS) + [5] * len(more),
    }
    _, tokenizer = load_model(write(tmp_path / "m.gguf", tokenizer__ggml__merges=None, **letters))
    assert tokenizer.decode(tokenizer.encode("hello, Grüße")) == "hello, Grüße"


@pytest.mark.parametrize("half", [np.nan, np.inf, -np.inf, 6e4, 0, 6e-8])
@pytest.mark.parametrize("kind", [Kind.Q4_K, Kind.Q6_K, Kind.IQ4_NL])
@pytest.mark.cpu  # a GPU keeps the file's halves and quantised layers
def test_scales_of_any_size_are_read_as_the_gguf_package_reads_them(tmp_path, kind, half):
    _, weights = made("qwen3", {})
    arrays = filed(weights, gguf.MODEL_ARCH.QWEN3, "qwen3")
    name = "blk.1.ffn_gate.weight"
    raw = random_blocks(kind, arrays[name].shape)
    blocks = raw.reshape(-1, gguf.GGML_QUANT_SIZES[kind][1])
    blocks[5, HALVES[kind][0] : HALVES[kind][0] + 2] = np.array([half], np.float16).view(np.uint8)
    path = write_like(
        tmp_path / "m.gguf", "qwen3", arrays, {name: (raw, kind)}, described(gguf.MODEL_ARCH.QWEN3, "qwen3", {})
    )
    with np.errstate(all="ignore"):
        exact = stored(path)[name]
    model, tokenizer = load_model(path)
    found = np.array(dict(tree_flatten(model.parameters()))["model.layers.1.mlp.gate_proj.weight"])
    finite = np.isfinite(exact).reshape(-1, 32).all(axis=1)  # a group is sound or it is not
    np.testing.assert_array_equal(np.isfinite(found).reshape(-1, 32).all(axis=1), finite)
    sound = np.repeat(finite, 32).reshape(exact.shape)
    np.testing.assert_allclose(found[sound], exact[sound], rtol=1e-5, atol=1e-6)
    if not finite.all():
        with pytest.raises(UserError, match="the logits of the model are not finite after"):
            create_policy(model, tokenizer, {"max_tokens": 3})([5, 6])
