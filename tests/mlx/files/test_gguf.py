"""GGUF files: reading, converting, and refusing bad files without a crash."""

import struct
import subprocess
import sys
from pathlib import Path

import numpy as np
import pytest

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import gguf
import mlx.core as mx
import mlx_lm
from gguf import GGMLQuantizationType as Kind
from made_gguf import HIDDEN, TOKENS, VOCAB, plain_llama, stored, write

from textpolicy.errors import UserError
from textpolicy.mlx.files.gguf import convert, read_gguf, unpermute
from textpolicy.mlx.files.tokenizer import PRE_TOKENIZERS

KINDS = [
    (Kind.F32, None),
    (Kind.F16, None),
    (Kind.Q8_0, None),
    (Kind.Q4_0, Kind.Q8_0),
    (Kind.Q4_1, Kind.Q8_0),
    (Kind.Q5_0, Kind.Q5_1),
    (Kind.Q5_1, Kind.F16),
    (Kind.BF16, Kind.Q4_0),
]


@pytest.mark.parametrize(("kind", "embedding"), KINDS)
@pytest.mark.parametrize("tied", [True, False])
def test_the_converted_folder_gives_the_logits_of_a_plain_llama(tmp_path, kind, embedding, tied):
    path = write(tmp_path / "m.gguf", kind, embedding, tied=tied)
    convert(path, tmp_path / "out")
    model, _ = mlx_lm.load(str(tmp_path / "out"))
    model.set_dtype(mx.float32)
    tokens = [5, 100, 7, 7, 200, 33]
    wanted = plain_llama(stored(path), tokens)
    np.testing.assert_allclose(np.array(model(mx.array([tokens]))[0]), wanted, atol=2e-4, rtol=2e-4)


def test_rows_leave_llama_cpps_order_by_hand():
    # one head of dimension 4: the file pairs row 0 with 2 and 1 with 3, two heads side by side
    filed = mx.array([0, 2, 1, 3, 10, 12, 11, 13])[:, None]
    assert unpermute(filed, heads=2)[:, 0].tolist() == [0, 1, 2, 3, 10, 11, 12, 13]


@pytest.mark.parametrize("kind", [Kind.Q4_0, Kind.Q4_1, Kind.Q5_0, Kind.Q5_1, Kind.Q8_0])
def test_dequantised_weights_equal_those_of_the_gguf_package(tmp_path, kind):
    path = write(tmp_path / "m.gguf", kind)
    model = read_gguf(path)
    name = "model.layers.1.mlp.down_proj"
    triple = [model.weights[f"{name}.{part}"].astype(mx.float32) for part in ("scales", "biases")]
    bits = model.quantization["bits"]
    ours = mx.dequantize(model.weights[f"{name}.weight"], *triple, group_size=32, bits=bits)
    np.testing.assert_allclose(np.array(ours), stored(path)["blk.1.ffn_down.weight"], atol=1e-6)


def test_layers_with_other_bits_are_listed_one_by_one(tmp_path):
    model = read_gguf(write(tmp_path / "m.gguf", Kind.Q4_0, Kind.Q8_0))
    embedding = {"group_size": 32, "bits": 8}
    assert model.quantization == {"group_size": 32, "bits": 4, "model.embed_tokens": embedding}


def test_float_files_have_no_quantization(tmp_path):
    assert read_gguf(write(tmp_path / "m.gguf", Kind.F16)).quantization == {}


def test_norms_become_float16_only_where_that_is_exact(tmp_path):
    def exact(weights):
        weights["output_norm.weight"] = np.full(HIDDEN, 0.75, np.float32)

    weights = read_gguf(write(tmp_path / "m.gguf", edit=exact)).weights
    assert weights["model.norm.weight"].dtype == mx.float16
    assert weights["model.layers.0.input_layernorm.weight"].dtype == mx.float32


def test_the_config_has_the_files_numbers(tmp_path):
    config = read_gguf(write(tmp_path / "m.gguf", llama__rope__freq_base=100000.0)).config
    assert config["rope_theta"] == 100000.0
    assert config["rms_norm_eps"] == 1e-5
    assert (config["head_dim"], config["num_key_value_heads"], config["vocab_size"]) == (16, 2, VOCAB)
    assert config["tie_word_embeddings"] is True
    assert "pad_token_id" not in config


# The tokenizer


def tokenizer_of(tmp_path, **metadata):
    convert(write(tmp_path / "m.gguf", **metadata), tmp_path / "out")
    return mlx_lm.load(str(tmp_path / "out"))[1]


def test_merges_and_special_tokens_survive_the_trip(tmp_path):
    tokenizer = tokenizer_of(tmp_path)
    assert tokenizer.encode("hello hello<|end|>") == [TOKENS.index("hello"), TOKENS.index("Ġhello"), 0]
    assert tokenizer.eos_token_ids == {0}
    assert tokenizer.bos_token == "<|start|>"
    assert tokenizer.apply_chat_template([{"role": "user", "content": "he"}]) == [1, TOKENS.index("he"), 0]


def test_skip_special_tokens_hides_control_tokens_but_not_user_defined_ones(tmp_path):
    tokenizer = tokenizer_of(tmp_path)
    ids = tokenizer.encode("<|start|><tool>he")
    assert ids == [1, 2, TOKENS.index("he")]
    assert tokenizer.decode(ids, skip_special_tokens=True) == "<tool>he"


def test_a_beginning_token_is_added_when_the_file_sets_it(tmp_path):
    tokenizer = tokenizer_of(tmp_path, tokenizer__ggml__add_bos_token=True)
    assert tokenizer.encode("he") == [1, TOKENS.index("he")]


SPLITS = {  # worked by hand from each model's published pattern; Ġ is a space
    "smollm": ["Ġyear", "Ġ", "2", "0", "2", "4", "!!", "Ġ", "Ġit", "'s"],
    "gpt-2": ["Ġyear", "Ġ2024", "!!", "Ġ", "Ġit", "'s"],
    "default": ["Ġyear", "Ġ2024", "!!", "Ġ", "Ġit", "'s"],
    "llama-bpe": ["Ġyear", "Ġ", "202", "4", "!!", "Ġ", "Ġit", "'s"],
    "qwen2": ["Ġyear", "Ġ", "2", "0", "2", "4", "!!", "Ġ", "Ġit", "'s"],
}


@pytest.mark.parametrize("name", PRE_TOKENIZERS)
def test_each_pre_tokenizer_splits_as_its_model_does(name):
    pieces = [piece for piece, _ in PRE_TOKENIZERS[name]().pre_tokenize_str(" year 2024!!  it's")]
    assert pieces == SPLITS[name]


# Files that cannot be converted


def without(name):
    return lambda weights: weights.pop(name)


def replaced(name, shape):
    return lambda weights: weights.update({name: np.zeros(shape, np.float32)})


REFUSED = {
    "other architecture": ({"architecture": "mamba"}, "'mamba' for general.architecture"),
    "an adapter": ({"general__type": "adapter"}, "'adapter' for general.type"),
    "a part": ({"split__count": 3}, "is one of 3 files of a model; merge them first"),
    "unigram": ({"tokenizer__ggml__model": "t5"}, "'t5' for tokenizer.ggml.model"),
    "sentencepiece without scores": ({"tokenizer__ggml__model": "llama"}, "lacks the metadata tokenizer.ggml.scores"),
    "no merges": ({"tokenizer__ggml__merges": None}, "lacks the metadata tokenizer.ggml.merges"),
    "another reading of nothing": (
        {"llama__rope__scaling__type": "longrope", "llama__rope__scaling__factor": 1.0},
        "'longrope' for llama.rope.scaling.type",
    ),
    "experts": ({"llama__expert_count": 8}, "8 for llama.expert_count, which textpolicy does not use"),
    "a scale of the logits": ({"llama__logit_scale": 0.25}, "0.25 for llama.logit_scale, which"),
    "a scale of attention": ({"llama__attention__scale": 0.1}, r"0.1\d* for llama.attention.scale, which"),
    "a cap": ({"llama__final_logit_softcapping": 30.0}, "30.0 for llama.final_logit_softcapping, which"),
    "a window": ({"llama__attention__sliding_window": 64}, "64 for llama.attention.sliding_window, which"),
    "what nobody knows": ({"llama__attention__of_the_future": True}, "True for llama.attention.of_the_future, which"),
    "two-way attention": ({"llama__attention__causal": False}, "False for llama.attention.causal, which"),
    "other values than keys": ({"llama__attention__value_length": 8}, "keys of 16 and values of 8 numbers"),
    "an end that is added": ({"tokenizer__ggml__add_eos_token": True}, "True for tokenizer.ggml.add_eos_token, which"),
    "a table of characters": (
        {"tokenizer__ggml__precompiled_charsmap": [1, 2, 3]},
        r"\[1, 2, 3\] for tokenizer.ggml.precompiled_charsmap, which",
    ),
    "an end of a turn too large": ({"tokenizer__ggml__eot_token_id": 9999}, "9999 for tokenizer.ggml.eot_token_id"),
    "pre-tokenizer": ({"tokenizer__ggml__pre": "klingon"}, "pre-tokenizer 'klingon'"),
    "scaled rotation": ({"llama__rope__scaling__type": "yarn"}, "'yarn' for llama.rope.scaling.type"),
    "half rotation": ({"llama__rope__dimension_count": 8}, "rotates 8 of 16"),
    "unsupported type": (
        {"edit": lambda w: w.update({"blk.0.ffn_up.weight": w["blk.0.ffn_up.weight"].astype(int)})},
        "as I64, which cannot be converted",
    ),
    "no metadata": ({"llama__block_count": None}, "lacks the metadata llama.block_count"),
    "no eos": ({"tokenizer__ggml__eos_token_id": None}, "lacks the metadata tokenizer.ggml.eos_token_id"),
    "eos too large": ({"tokenizer__ggml__eos_token_id": 9999}, "9999 for tokenizer.ggml.eos_token_id"),
    "metadata of another type": ({"llama__block_count": "two"}, "'two' for llama.block_count"),
    "no heads": ({"llama__attention__head_count": 0}, "0 for llama.attention.head_count"),
    "endless layers": ({"llama__block_count": 4_000_000_000}, "4000000000 layers"),
    "a merge of three": ({"tokenizer__ggml__merges": ["h e l"]}, "not a pair"),
    "a merge of unknowns": ({"tokenizer__ggml__merges": ["he xyzzy"]}, "do not fit"),
    "merges that are no text": (
        {"tokenizer__ggml__merges": [1, 2]},
        "values of a type other than str in tokenizer.ggml.merges",
    ),
    "a list of lists": ({"general__tags": [[1, 2], [3]]}, "'general.tags' is a nested array"),
    "the other byte order": ({"endianess": gguf.GGUFEndian.BIG}, "byte order is not that of this machine"),
    "a tensor of five dimensions": (
        {"edit": replaced("five.weight", (1, 1, 1, 1, 8))},
        r"has the shape \[8, 1, 1, 1, 1\]",
    ),
    "token types missing": ({"tokenizer__ggml__token_type": [1]}, "1 token types"),
    "a tensor missing": ({"edit": without("blk.1.ffn_up.weight")}, "lacks the tensor blk.1.ffn_up.weight"),
    "a tensor too many": ({"edit": replaced("rope_freqs.weight", 8)}, r"'rope_freqs\.weight' .* is not known"),
    "a name of two lines": ({"edit": replaced("two\nlines", 8)}, r"'two\\nlines' .* is not known"),
    "a wrong shape": ({"edit": replaced("blk.0.ffn_up.weight", (8, 32))}, r"shape \(8, 32\) instead"),
}


@pytest.mark.parametrize("fault", REFUSED)
def test_unsupported_files_are_refused_in_one_line(tmp_path, fault):
    changes, words = REFUSED[fault]
    path = write(tmp_path / "m.gguf", **changes)
    with pytest.raises(UserError, match=words) as caught:
        convert(path, tmp_path / "out")
    assert "\n" not in str(caught.value)
    assert ";" in str(caught.value)  # what is wrong; what to do


def test_a_path_without_a_file_is_refused(tmp_path):
    with pytest.raises(UserError, match="no GGUF file at"):
        read_gguf(tmp_path / "absent.gguf")


@pytest.mark.parametrize("content", [b"", b"GG", b"not a gguf file at all", b"GGUF", b"GGUF\x03\x00\x00\x00"])
def test_files_that_are_no_gguf_are_refused(tmp_path, content):
    path = tmp_path / "m.gguf"
    path.write_bytes(content)
    with pytest.raises(UserError, match=r"m\.gguf"):
        read_gguf(path)


def test_sizes_that_lie_are_refused(tmp_path):
    original = write(tmp_path / "m.gguf").read_bytes()
    key = b"tokenizer.ggml.token_type"
    length = original.index(key) + len(key) + 8  # after the array's type and its elements' type
    name = b"blk.0.ffn_up.weight"
    shape = original.index(name) + len(name) + 4
    offset = shape + 2 * 8 + 4
    for place in (8, 16, length, shape, offset):  # tensors, metadata, an array, a shape, an offset
        for lie in (2**30, 2**62, 2**64 - 32):
            path = tmp_path / "lie.gguf"
            path.write_bytes(original[:place] + struct.pack("<Q", lie) + original[place + 8 :])
            with pytest.raises(UserError, match=r"lie\.gguf"):
                read_gguf(path)


@pytest.mark.parametrize(
    ("place", "there", "instead", "message"),
    [
        (b"tokenizer.ggml.model", b"gpt2", b"gp\xff2", "has text that is not UTF-8 in tokenizer.ggml.model"),
        (b"tokenizer.ggml.tokens", b"hello", b"hell\xff", "has text that is not UTF-8 in tokenizer.ggml.tokens"),
        (b"output_norm.weight", b"\x40\0\0\0\0\0\0\0\0\0\0\0", b"\x40\0\0\0\0\0\0\0\0\0\0\0\x07", "lies at the offset"),
    ],
)
def test_bytes_that_are_wrong_within_a_value_are_named(place, there, instead, message, tmp_path):
    content = write(tmp_path / "m.gguf").read_bytes()
    at = content.index(there, content.index(place))
    path = tmp_path / "lie.gguf"
    path.write_bytes(content[:at] + instead + content[at + len(instead) :])
    with pytest.raises(UserError, match=message) as caught:
        read_gguf(path)
    assert "\n" not in str(caught.value)


TORTURE = """
import random, sys
from pathlib import Path
from textpolicy.errors import UserError
from textpolicy.mlx.files.gguf import read_gguf
good, bad = Path(sys.argv[1]), Path(sys.argv[1] + ".bad.gguf")
data, draw, refused = good.read_bytes(), random.Random(0), 0
header = data.rindex(b"output_norm.weight") + 60
copies = [data[:draw.randrange(len(data))] for _ in range(60)]
for _ in range(240):
    copy = bytearray(data)
    for _ in range(draw.choice([1, 1, 4])):
        copy[draw.randrange(header)] = draw.choice([0, 1, 255, draw.randrange(256)])
    copies.append(bytes(copy))
for copy in copies:
    bad.write_bytes(copy)
    try:
        read_gguf(bad)
    except UserError:
        refused += 1
print(refused)
"""


def test_truncated_and_mangled_files_never_crash(tmp_path):
    path = write(tmp_path / "m.gguf", Kind.Q4_0, Kind.Q8_0)
    root = Path(__file__).parents[3]
    ran = subprocess.run([sys.executable, "-c", TORTURE, path], cwd=root, capture_output=True, text=True, timeout=200)
    assert ran.returncode == 0, ran.stderr[-2000:]
    assert int(ran.stdout) >= 60  # every truncated one, and those mangled where it shows
