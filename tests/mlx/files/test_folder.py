"""The files that make a model: what the index names, or all weights; and the companions that go along with a copy."""

import json
import shutil

import numpy as np
import pytest

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx
from toy_run import make_model

from textpolicy.cli.main import main
from textpolicy.errors import UserError
from textpolicy.mlx.export import export_folder
from textpolicy.mlx.files.folder import INDEX, copy_companions, weight_files
from textpolicy.mlx.models import load_model

IDS = mx.array([[5, 100, 7, 9]])


@pytest.fixture
def sharded(tmp_path):
    """A model in three shards with an index, and the logits of IDS."""
    folder = make_model(tmp_path / "model")
    logits = np.array(load_model(folder)[0](IDS))
    tensors = mx.load(str(folder / "model.safetensors"))
    (folder / "model.safetensors").unlink()
    names = {}
    for i in range(3):
        part = {name: tensors[name] for name in sorted(tensors)[i::3]}
        file = f"model-{i + 1:05d}-of-00003.safetensors"
        mx.save_safetensors(str(folder / file), part)
        names |= dict.fromkeys(part, file)
    (folder / INDEX).write_text(json.dumps({"weight_map": names}))
    return folder, logits


def test_the_files_of_an_index_are_the_model_whatever_lies_beside_them(sharded):
    folder, logits = sharded
    one = mx.load(str(folder / "model-00001-of-00003.safetensors"))
    for name in ("model-00001-of-00002", "model-00004-of-00004", "model", "model.old", "model-copy"):
        mx.save_safetensors(str(folder / f"{name}.safetensors"), {key: 0 * value for key, value in one.items()})
    (folder / "model-broken.safetensors").write_bytes(b"not weights")
    (folder / "consolidated.safetensors").write_bytes(b"not weights")
    assert [file.name[:11] for file in weight_files(folder)] == ["model-00001", "model-00002", "model-00003"]
    np.testing.assert_array_equal(np.array(load_model(folder)[0](IDS)), logits)


def test_weights_with_other_names_are_found_by_the_index(sharded):
    folder, logits = sharded
    index = json.loads((folder / INDEX).read_text())
    (folder / "model-00002-of-00003.safetensors").rename(folder / "weights-b.safetensors")
    moved = {k: "weights-b.safetensors" if "00002" in v else v for k, v in index["weight_map"].items()}
    (folder / INDEX).write_text(json.dumps({"weight_map": moved}))
    np.testing.assert_array_equal(np.array(load_model(folder)[0](IDS)), logits)


@pytest.mark.parametrize("lost", [["00001"], ["00002"], ["00001", "00003"]])
def test_missing_files_of_an_index_are_named(sharded, lost):
    folder, _ = sharded
    for number in lost:
        (folder / f"model-{number}-of-00003.safetensors").unlink()
    names = ", ".join(f"model-{number}-of-00003.safetensors" for number in lost)
    with pytest.raises(UserError, match=f"lacks {names}, which its model.safetensors.index.json names"):
        load_model(folder)


def test_an_index_of_files_none_of_which_is_there_does_not_count(tmp_path):
    folder = make_model(tmp_path / "model")
    logits = np.array(load_model(folder)[0](IDS))
    (folder / INDEX).write_text(json.dumps({"weight_map": {"model.norm.weight": "model-00001-of-00002.safetensors"}}))
    np.testing.assert_array_equal(np.array(load_model(folder)[0](IDS)), logits)


@pytest.mark.parametrize(
    "text",
    [
        "{",
        "[]",
        "{}",
        '{"weight_map": 3}',
        '{"weight_map": {"a": 3}}',
        '{"weight_map": {"a": "../model.safetensors"}}',
        '{"weight_map": {"a": "/etc/passwd"}}',
        '{"weight_map": {"a": "pytorch_model.bin"}}',
    ],
)
def test_an_index_that_is_none_is_refused(tmp_path, text):
    folder = make_model(tmp_path / "model")
    (folder / INDEX).write_text(text)
    with pytest.raises(UserError, match=r"index.json is not an index of weights \(.*\); download it again"):
        load_model(folder)


def test_two_files_with_the_same_tensor_and_no_index_are_refused(tmp_path):
    folder = make_model(tmp_path / "model")
    shutil.copy(folder / "model.safetensors", folder / "model-00001-of-00002.safetensors")
    with pytest.raises(UserError, match=r"both .* and .* have the tensor '.*'; remove the file that is left over"):
        load_model(folder)


GO_ALONG = (
    "tokenizer.json tokenizer_config.json tokenizer.model tokenizer.model.v3 special_tokens_map.json added_tokens.json "
    "vocab.json vocab.txt merges.txt chat_template.jinja chat_template.json additional_chat_templates/tool_use.jinja "
    "chat_templates/rag.jinja generation_config.json preprocessor_config.json processor_config.json tekken.json "
    "spiece.model qwen.tiktoken modeling_own.py configuration_own.py LICENSE LICENSE.txt NOTICE"
)
STAY = (
    "adapter_config.json adapter_model.safetensors adapters.safetensors hf_quant_config.json quantize_config.json "
    "training_args.json trainer_state.json all_results.json model.safetensors.index.json pytorch_model.bin.index.json "
    "._tokenizer.json ._chat_template.jinja .DS_Store additional_chat_templates/.DS_Store vocab/._a "
    "optimizer.pt README.md notes.txt logs/events.json checkpoint-100/config.json .gitattributes config.json"
)


def test_companions_go_along_by_name(tmp_path):
    base, out = tmp_path / "base", tmp_path / "out"
    for name in (*GO_ALONG.split(), *STAY.split()):
        (base / name).parent.mkdir(parents=True, exist_ok=True)
        (base / name).write_text(name)
    out.mkdir()
    copy_companions(base, out)
    assert sorted(str(p.relative_to(out)) for p in out.rglob("*") if p.is_file()) == sorted(GO_ALONG.split())


@pytest.mark.parametrize("layout", ["mlx", "hf"])
def test_an_export_has_the_bases_companions_and_not_its_leftovers(tmp_path, layout):
    base = make_model(tmp_path / "base")
    (base / "adapter_config.json").write_text(json.dumps({"peft_type": "LORA", "base_model_name_or_path": "another"}))
    (base / "trainer_state.json").write_text("{}")
    (base / "additional_chat_templates").mkdir()
    (base / "additional_chat_templates" / "tool_use.jinja").write_text("{{ tools }}")
    logits = np.array(load_model(base)[0](IDS))
    assert main(["export", "--model", str(base), f"--to={layout}", f"--out={tmp_path / 'out'}"]) == 0
    found = {str(p.relative_to(tmp_path / "out")) for p in (tmp_path / "out").rglob("*") if p.is_file()}
    assert "additional_chat_templates/tool_use.jinja" in found
    assert not found & {"adapter_config.json", "trainer_state.json"}
    np.testing.assert_allclose(np.array(load_model(tmp_path / "out")[0](IDS)), logits, atol=1e-5)


def test_an_export_without_a_dtype_keeps_that_of_the_files_of_the_index(sharded, tmp_path):
    folder, _ = sharded
    halves = {"model.norm.weight": mx.zeros((1,), mx.float16)}
    mx.save_safetensors(str(folder / "model-stale.safetensors"), halves)
    export_folder(load_model(folder)[0], folder, tmp_path / "out")
    written = mx.load(str(tmp_path / "out" / "model.safetensors"))
    assert {array.dtype for array in written.values()} == {mx.float32}
