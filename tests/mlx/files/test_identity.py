"""The digests by which a run knows its base: every part shows its changes, and nothing else does."""

import json
import shutil

import numpy as np
import pytest
from safetensors.numpy import load_file, save_file
from toy_run import make_model

from textpolicy.mlx.files import identity as identity_module
from textpolicy.mlx.files.identity import identity


@pytest.fixture
def folder(tmp_path):
    made = make_model(tmp_path / "model")
    (made / "additional_chat_templates").mkdir()
    (made / "additional_chat_templates" / "tools.jinja").write_text("{{ tools }}")
    return made


def test_what_macos_puts_there_is_no_part_of_a_model(folder):
    before = identity(folder)
    for name in (".DS_Store", "._tokenizer.json", "._tokenizer.model", "._chat_template.jinja", "._config.json"):
        (folder / name).write_bytes(b"\0\5\26\7")
    (folder / "additional_chat_templates" / "._tools.jinja").write_bytes(b"\0\5\26\7")
    assert identity(folder) == before


def edited(name, **changes):
    def edit(folder):
        path = folder / name
        values = json.loads(path.read_text()) if path.is_file() else {}
        path.write_text(json.dumps({**values, **changes}, indent=3))

    return edit


def written(name, text):
    return lambda folder: (folder / name).write_text(text)


def one_number(folder):
    weights = load_file(folder / "model.safetensors")
    name = "model.layers.1.mlp.up_proj.weight"
    weights[name][3, 5] = np.nextafter(weights[name][3, 5], 1, dtype=np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "mlx"})


def one_merge(folder):
    path = folder / "tokenizer.json"
    values = json.loads(path.read_text())
    values["model"]["merges"].append(["a", "b"])
    path.write_text(json.dumps(values))


@pytest.mark.parametrize(
    ("edit", "part"),
    [
        (edited("config.json", rope_theta=5e5), "config"),
        (edited("generation_config.json", eos_token_id=[1, 2]), "config"),
        (edited("tokenizer_config.json", eos_token="a"), "tokenizer"),
        (one_merge, "tokenizer"),
        (edited("special_tokens_map.json", pad_token="x"), "tokenizer"),
        (edited("added_tokens.json", x=7), "tokenizer"),
        (written("tokenizer.model", "pieces"), "tokenizer"),
        (written("chat_template.jinja", "Q: {{ messages }}"), "chat template"),
        (edited("tokenizer_config.json", chat_template="Q: {{ messages }}"), "chat template"),
        (edited("chat_template.json", chat_template="Q: {{ messages }}"), "chat template"),
        (written("additional_chat_templates/tools.jinja", "{{ tools | length }}"), "chat template"),
        (one_number, "weights"),
        (edited("config.json", transformers_version="9.9", _name_or_path="elsewhere"), None),
        (written("README.md", "a model"), None),
    ],
)
def test_each_part_of_a_model_has_a_digest_of_its_own(folder, edit, part):
    before = identity(folder)
    assert list(before) == ["config", "tokenizer", "chat template", "weights"]
    edit(folder)
    after = identity(folder)
    assert {name for name in after if after[name] != before[name]} == ({part} if part else set())


def test_a_copy_elsewhere_is_the_same_model(folder, tmp_path):
    shutil.copytree(folder, tmp_path / "copy")
    assert identity(tmp_path / "copy") == identity(folder)


def test_of_large_weights_a_share_of_every_tensor_is_read(tmp_path, monkeypatch):
    monkeypatch.setattr(identity_module, "WHOLE", 2**16)
    monkeypatch.setattr(identity_module, "_BLOCK", 2**10)
    rng, blocks = np.random.default_rng(0), []
    weights = {f"layer{i}": rng.standard_normal((64, 2**i)).astype(np.float32) for i in range(12)}

    def digest(changes):
        identity_module._identity.cache_clear()
        save_file({**weights, **changes}, tmp_path / "model.safetensors")
        return identity(tmp_path)["weights"]

    original, before = identity_module._blocks, digest({})
    assert digest({}) == before
    for name, weight in weights.items():
        assert digest({name: weight + 1e-3}) != before
    assert digest({"layer0": weights["layer0"].astype(np.float64)}) != before  # in the header

    monkeypatch.setattr(identity_module, "_blocks", lambda *a: (blocks.append(b) or b for b in original(*a)))
    digest({})
    size = (tmp_path / "model.safetensors").stat().st_size
    assert sum(map(len, blocks)) < 2.5 * 2**16 < size / 2
