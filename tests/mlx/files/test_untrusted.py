"""Untrusted files: cut off, too long, lying about shapes, or bringing code; each raises an error, never a crash."""

import json
import re
import shutil
import struct
from contextlib import suppress
from pathlib import Path

import pytest

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx
from conftest import tiny_llama
from toy_run import make_model

from textpolicy.config.adapters import LoRA, TinyLoRA
from textpolicy.errors import UserError
from textpolicy.mlx.adapters.attach import attach
from textpolicy.mlx.adapters.saving import load_adapter, read_adapter, save_adapter
from textpolicy.mlx.files.safetensors import load_arrays
from textpolicy.mlx.models import load_model

SOURCES = Path(__file__).parents[3] / "textpolicy"


def header(entries, body=b"\0" * 16, length=None):
    text = json.dumps(entries).encode()
    return struct.pack("<Q", len(text) if length is None else length) + text + body


def floats(shape, start, end):
    return {"dtype": "F32", "shape": shape, "data_offsets": [start, end]}


LIES = {
    "empty": b"",
    "cut in the length": b"\x01\0\0",
    "cut in the header": header({"a": floats([4], 0, 16)})[:20],
    "cut in the body": header({"a": floats([4], 0, 16)})[:-1],
    "bytes left over": header({"a": floats([4], 0, 16)}) + b"\0",
    "a header of exabytes": header({"a": floats([4], 0, 16)}, length=2**60),
    "a header of 200 MB": header({"a": floats([4], 0, 16)}, length=2 * 10**8),
    "offsets beyond the end": header({"a": floats([400], 0, 1600)}),
    "more shape than bytes": header({"a": floats([2**40], 0, 16)}),
    "a shape that overflows": header({"a": floats([2**62, 4, 2], 0, 16)}),
    "a negative shape": header({"a": floats([-4], 0, 16)}),
    "offsets that overlap": header({"a": floats([4], 0, 16), "b": floats([4], 0, 16)}),
    "offsets backwards": header({"a": floats([4], 16, 0)}),
    "an unknown type": header({"a": {"dtype": "F99", "shape": [4], "data_offsets": [0, 16]}}),
    "no JSON": struct.pack("<Q", 4) + b"nope" + b"\0" * 16,
    "a list": struct.pack("<Q", 2) + b"[]",
    "a pickle": b"\x80\x04\x95\x0b\0\0\0\0\0\0\0}\x94\x8c\x01a\x94K\x01s.",
}


@pytest.mark.parametrize("lie", LIES)
def test_a_safetensors_file_that_lies_is_refused(tmp_path, lie):
    path = tmp_path / "a.safetensors"
    path.write_bytes(LIES[lie])
    with pytest.raises(UserError, match="is not a valid safetensors file") as error:
        load_arrays(path, "save it again")
    assert "\n" not in str(error.value)


@pytest.mark.parametrize("lie", LIES)
def test_weights_of_an_adapter_or_a_model_that_lie_are_refused(tmp_path, lie):
    save_adapter(attach(tiny_llama(40), LoRA(rank=2)), tmp_path / "adapter")
    (tmp_path / "adapter" / "adapters.safetensors").write_bytes(LIES[lie])
    with pytest.raises(UserError, match="is not a valid safetensors file"):
        read_adapter(tmp_path / "adapter")
    folder = make_model(tmp_path / "model")
    (folder / "model.safetensors").write_bytes(LIES[lie])
    with pytest.raises(UserError, match="is not a valid safetensors file"):
        load_model(folder)


@pytest.fixture(scope="module")
def valid(tmp_path_factory):
    """Adapter folders by kind."""
    folder = tmp_path_factory.mktemp("adapters")
    save_adapter(attach(tiny_llama(40), LoRA(rank=2)), folder / "lora")
    save_adapter(attach(tiny_llama(40), TinyLoRA(u=3)), folder / "tinylora")
    return folder


def edited(valid, kind, tmp_path, edit):
    """A copy of an adapter folder with its config changed."""
    path = tmp_path / kind
    shutil.copytree(valid / kind, path)
    file = path / "adapter_config.json"
    config = json.loads(file.read_text())
    file.write_text(json.dumps(edit(config) or config))
    return path


CONFIGS = {
    "a rank of billions": ("lora", lambda c: c["textpolicy"]["settings"].update(rank=10**9), "has rank 1000000000"),
    "a rank for mlx-lm of billions": (
        "lora",
        lambda c: c["lora_parameters"].update(rank=10**9),
        "has rank 1000000000",
    ),
    "a vector of billions": ("tinylora", lambda c: c["textpolicy"]["settings"].update(u=10**9), "has u 1000000000"),
    "a rank of text": ("lora", lambda c: c["textpolicy"]["settings"].update(rank="many"), "cannot be read"),
    "an alpha of a table": ("lora", lambda c: c["textpolicy"]["settings"].update(alpha={}), "cannot be read"),
    "modules of numbers": ("lora", lambda c: c["textpolicy"]["settings"].update(modules=[1]), "cannot be read"),
    "a rank below 1": ("lora", lambda c: c["textpolicy"]["settings"].update(rank=0), "rank is 0"),
    "another rank": ("lora", lambda c: c["textpolicy"]["settings"].update(rank=3), "has rank 3, and"),
    "an unknown kind": ("lora", lambda c: c["textpolicy"].update(kind="loro"), "no kind of adapter 'loro'"),
    "a kind of list": ("lora", lambda c: c["textpolicy"].update(kind=["lora"]), "cannot be read"),
    "no base": ("lora", lambda c: c["textpolicy"].pop("base") and None, "cannot be read"),
    "a base of tables": ("lora", lambda c: c["textpolicy"]["base"].update(weights=[{}]), "cannot be read"),
    "a base that is no number": (
        "lora",
        lambda c: c["textpolicy"]["base"].update(weights=[float("nan")] * 64),
        "other weights",
    ),
    "a base of few weights": ("lora", lambda c: c["textpolicy"]["base"].update(weights=[1.0]), "other weights"),
    "a base of text": ("lora", lambda c: c["textpolicy"].update(base="x"), "cannot be read"),
    "a list": ("lora", lambda c: [1, 2], "cannot be read"),
    "a number": ("lora", lambda c: 7, "cannot be read"),
    "unknown settings": ("lora", lambda c: c["textpolicy"]["settings"].update(zeal=1), "does not use zeal"),
}


@pytest.mark.parametrize("fault", CONFIGS)
def test_an_adapter_config_that_lies_is_refused(valid, tmp_path, fault):
    kind, edit, message = CONFIGS[fault]
    with pytest.raises(UserError, match=re.escape(message)) as error:
        load_adapter(tiny_llama(40), edited(valid, kind, tmp_path, edit))
    assert "\n" not in str(error.value)


@pytest.mark.parametrize(
    "content", [b"", b"{", b"\xff\xfe", b"[" * 100_000, b'{"textpolicy": ' + b"9" * 5000 + b"}", b"null"]
)
def test_an_adapter_config_that_is_no_json_is_refused(valid, tmp_path, content):
    shutil.copytree(valid / "lora", tmp_path / "a")
    (tmp_path / "a" / "adapter_config.json").write_bytes(content)
    with pytest.raises(UserError, match="cannot be read"):
        read_adapter(tmp_path / "a")


def spoil_config(**entries):
    def spoil(folder):
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**config, **entries}))

    return spoil


def write(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def cut(name, share):
    def spoil(folder):
        data = (folder / name).read_bytes()
        (folder / name).write_bytes(data[: int(len(data) * share)])

    return spoil


MODELS = {
    "billions of layers": (spoil_config(num_hidden_layers=10**9), "promises 1000000000 layers with"),
    "layers of text": (spoil_config(num_hidden_layers="two"), "promises 'two' layers"),
    "another width": (spoil_config(hidden_size=64), "cannot load"),
    "a width of exabytes": (spoil_config(hidden_size=2**60), "cannot load"),
    "a negative width": (spoil_config(hidden_size=-4), "cannot load"),
    "no heads": (spoil_config(num_attention_heads=0), "cannot load"),
    "a vocabulary of billions": (spoil_config(vocab_size=10**12), "cannot load"),
    "an unknown type": (spoil_config(model_type="nonesuch"), "cannot load"),
    "a type with a path": (spoil_config(model_type="../../x"), "cannot load"),
    "a type that is a list": (spoil_config(model_type=["llama"]), "cannot load"),
    "code of its own": (spoil_config(model_file="evil.py"), "cannot load"),
    "a config that is a list": (write("config.json", b"[1]"), "contains a list, not a table of settings"),
    "a config without end": (write("config.json", b"[" * 100_000), "is not JSON"),
    "a config that is no text": (write("config.json", b"\xff\xfe{}"), "is not JSON"),
    "half a tokenizer": (cut("tokenizer.json", 0.5), "cannot load"),
    "a tokenizer of nothing": (write("tokenizer.json", b"{}"), "cannot load"),
    "a tokenizer that is no JSON": (write("tokenizer.json", b"\0" * 100), "cannot load"),
    "a tokenizer's settings that are a list": (write("tokenizer_config.json", b"[]"), "cannot load"),
}


@pytest.mark.parametrize("fault", MODELS)
def test_a_model_folder_that_lies_is_refused(tmp_path, fault):
    folder = make_model(tmp_path / "model")
    (folder / "evil.py").write_text("raise SystemExit('code of the model ran')")
    spoil, message = MODELS[fault]
    spoil(folder)
    with pytest.raises(UserError, match=message) as error:
        load_model(folder)
    assert "\n" not in str(error.value)


def test_code_that_a_model_brings_is_never_run(tmp_path):
    folder = make_model(tmp_path / "model")
    (folder / "evil.py").write_text(f"open({str(tmp_path / 'ran')!r}, 'w')\nclass Evil: pass")
    settings = json.loads((folder / "tokenizer_config.json").read_text())
    auto = {"auto_map": {"AutoTokenizer": ["evil.Evil", "evil.Evil"]}, "tokenizer_class": "Evil"}
    (folder / "tokenizer_config.json").write_text(json.dumps({**settings, **auto}))
    spoil_config(auto_map={"AutoModelForCausalLM": "evil.Evil"})(folder)
    with suppress(UserError):
        load_model(folder)
    assert not (tmp_path / "ran").exists()


def test_pickle_is_used_between_our_processes_and_for_no_file():
    users = {str(p.relative_to(SOURCES)) for p in SOURCES.rglob("*.py") if "import pickle" in p.read_text()}
    assert users == {"rewards/workers.py", "environment/libraries/reasoning_gym.py"}
    loads = [found for p in SOURCES.rglob("*.py") for found in re.findall(r"pickle\.load\(([^()]*)\)", p.read_text())]
    assert {*loads} == {"sys.stdin.buffer", "child.stdout"}  # pipes
    assert not [
        p for p in SOURCES.rglob("*.py") if re.search(r"allow_pickle=True|torch\.load|marshal\.load", p.read_text())
    ]


def test_valid_files_still_load(valid, tmp_path):
    model, _ = load_model(make_model(tmp_path / "model"))
    assert model(mx.zeros((1, 3), mx.int32)).shape == (1, 3, 257)
    for kind in ("lora", "tinylora"):
        load_adapter(tiny_llama(40), valid / kind)
