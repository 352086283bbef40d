"""textpolicy export: what it writes computes the same as the adapted model, and is written atomically."""

import contextlib
import io
import json
import shutil
from functools import partial
from pathlib import Path

import numpy as np
import pytest

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from conftest import files_of_at_most
from families import tiny_config
from gguf import GGMLQuantizationType as Kind
from made_gguf import TOKENS, plain_llama, stored, write
from mlx.utils import tree_flatten, tree_map
from mlx_lm.models import deepseek_v3
from mlx_lm.tuner.utils import linear_to_lora_layers
from mlx_lm.utils import load_model as load_model_of_mlx_lm
from mlx_lm.utils import quantize_model, save_config, save_model
from transformers import AutoConfig, AutoTokenizer

from textpolicy.cli.main import main
from textpolicy.config.adapters import DoRA, Full, LoRA, LoRAXS, QLoRA, TinyLoRA
from textpolicy.config.settings import Config
from textpolicy.engine import Sampling
from textpolicy.environment.single_turn import TextGenerationEnv
from textpolicy.errors import UserError
from textpolicy.mlx.adapters.attach import detach
from textpolicy.mlx.adapters.merging import attach, attach_lora, save_adapter, trainable
from textpolicy.mlx.engine import MLXEngine
from textpolicy.mlx.export import export_peft, merge
from textpolicy.mlx.export.gguf_file import permute
from textpolicy.mlx.files.gguf import convert, read_gguf, unpermute
from textpolicy.mlx.models import find_model, load_model
from textpolicy.run.inference import Source, load

TOKENS_READ = [5, 100, 7, 7, 200, 33]
QUESTIONS = [
    r["question"]
    for r in json.loads((Path(__file__).parents[2] / "data" / "smollm2_greedy.json").read_text())["continuations"][:3]
]
KINDS = {
    "lora": LoRA(rank=4, alpha=10.0),
    "lora on the last layer": LoRA(rank=3, layers=1, rank_stabilised=True),
    "dora on some": DoRA(rank=3, alpha=7.5, modules=("q_proj", "down_proj")),
    "qlora": QLoRA(rank=4, bits=4, group_size=32),
    "full": Full(),
    "lora_xs": LoRAXS(rank=20, sigma="loraxs_code"),
    "tinylora": TinyLoRA(rank=3, u=5, tie=3, sigma="peft"),
}
MERGED_ONLY = ("full",)  # there is no adapter for peft


def run_folder(tmp_path, kind="lora", weights=Kind.Q8_0, **gguf):
    """A run on a small random GGUF model, with an adapter that changes its outputs."""
    model_file = write(tmp_path / "small.gguf", weights, **gguf)
    model, _ = load_model(model_file)
    train(model, kind)
    run = tmp_path / "run"
    run.mkdir()
    (run / "config.json").write_text(Config(model=str(model_file)).model_dump_json())
    save_adapter(model, run / "adapter")
    return run


def train(model, kind, size=0.2):
    """Give ``model`` an adapter of that kind with random numbers."""
    attach(model, KINDS[kind])
    mx.random.seed(3)
    size = 0.05 if kind == "full" else size
    moved = [(name, value + size * mx.random.normal(value.shape)) for name, value in trainable(model).items()]
    model.load_weights(moved, strict=False)


def adapted(run):
    """The run's model with its adapter, and the tokenizer."""
    loaded = load(Source(run=run))
    return loaded.engine.model, loaded.tokenizer


def logits(model, tokens=TOKENS_READ):
    return np.array(model(mx.array([tokens]))[0].astype(mx.float32))


@pytest.fixture(autouse=True)
def cache(tmp_path_factory, monkeypatch):
    monkeypatch.setenv("TEXTPOLICY_CACHE", str(tmp_path_factory.mktemp("cache")))


def export(run, *arguments):
    assert main(["export", str(run), *arguments]) == 0


# Merging


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.cpu  # a GPU keeps the file's halves and quantised layers
def test_a_merged_model_computes_what_the_adapted_one_does(tmp_path, kind):
    model, _ = adapted(run_folder(tmp_path, kind))
    before = logits(model)
    assert np.abs(before - logits(load_model(tmp_path / "small.gguf")[0])).max() > 0.1
    merge(model)
    np.testing.assert_allclose(logits(model), before, atol=1e-4)
    assert {type(m) for _, m in model.leaf_modules()["model"]["layers"][0]["self_attn"].items()} >= {nn.Linear}
    assert not any("lora" in name for name, _ in tree_flatten(model.parameters()))


def latent(tmp_path, quantised):
    """The folder of a tiny DeepSeek V3, whose attention has a kind of layer of its own."""
    folder = tmp_path / "base"
    folder.mkdir()
    config = tiny_config("deepseek_v3", kv_lora_rank=32, qk_nope_head_dim=32, v_head_dim=32, q_lora_rank=32)
    model = deepseek_v3.Model(deepseek_v3.ModelArgs.from_dict(config))
    with contextlib.redirect_stdout(io.StringIO()):
        model, config = quantize_model(model, config, **quantised)
    save_model(folder, model, donate_model=False)
    save_config(config, folder / "config.json")
    for file in find_model(write(tmp_path / "small.gguf", Kind.Q8_0)).glob("*token*"):
        shutil.copyfile(file, folder / file.name)
    return folder


@pytest.mark.parametrize("mode", [{"group_size": 32, "bits": 8}, {"group_size": 32, "bits": 4, "mode": "mxfp4"}])
def test_a_quantised_base_with_latent_attention_is_exported_in_floats_alone(tmp_path, mode):
    folder = latent(tmp_path, mode)
    with mx.stream(mx.cpu):  # MLX on CUDA has no products with so few quantised numbers
        expected = logits(mlx_lm.load(str(folder))[0], [5, 6, 7])
    assert main(["export", "--model", str(folder), "--to", "mlx", "--out", str(tmp_path / "out")]) == 0
    model, config = load_model_of_mlx_lm(tmp_path / "out")
    np.testing.assert_allclose(logits(model, [5, 6, 7]), expected, atol=2e-2)
    assert "quantization" not in config
    assert {a.dtype for _, a in tree_flatten(model.parameters())} <= {mx.float32, mx.bfloat16}


def test_a_layer_that_stays_quantised_is_not_exported(tmp_path):
    class Rotated(nn.QuantizedLinear):
        """A quantised layer of a kind that nobody knows how to dequantise."""

    model, _ = adapted(run_folder(tmp_path))
    merge(model)
    model.layers[0].mlp.up_proj = Rotated(32, 64, bias=False, group_size=32)
    with pytest.raises(UserError, match=r"the layer 'model.layers.0.mlp.up_proj' is a Rotated, which cannot be turned"):
        merge(model)


@pytest.mark.parametrize("value", [70000.0, -1e30])
@pytest.mark.parametrize("to", ["hf", "mlx", "peft"])
def test_a_weight_that_float16_cannot_hold_is_named(tmp_path, to, value, capsys):
    run = run_folder(tmp_path)
    file = run / "adapter" / "adapters.safetensors"
    values = {name: mx.full(a.shape, 1e-2) if name.endswith("_b") else a for name, a in mx.load(str(file)).items()}
    name = "model.layers.1.mlp.down_proj"
    values[f"{name}.lora_a"] = values[f"{name}.lora_a"] * 0 + (value if to == "peft" else value * 1e2)
    mx.save_safetensors(str(file), values)
    base = ["--base", "someone/else"] if to == "peft" else []
    arguments = ["export", str(run), "--to", to, "--out", str(tmp_path / "out"), "--dtype", "float16", *base]
    assert main(arguments) == 2
    assert f"{name}." in (said := capsys.readouterr().err)
    assert "float16 cannot hold; export with --dtype bfloat16 or float32" in said
    assert not (tmp_path / "out").exists()
    if abs(value) < 1e20:
        arguments[arguments.index("float16")] = "bfloat16"
        assert main(arguments) == 0


def test_a_change_smaller_than_a_halfs_rounding_is_kept_in_a_quantised_half_model(tmp_path):
    write(tmp_path / "small.gguf", Kind.Q8_0)
    model, _ = mlx_lm.load(str(find_model(tmp_path / "small.gguf")))  # quantised, with scales in float16
    attach_lora(model, rank=4)
    for module in model.modules():
        if "lora_b" in module:
            module.lora_b = 1e-5 * mx.random.normal(module.lora_b.shape)
    layer = model.layers[0].mlp.up_proj
    change = layer.scale * (np.array(layer.lora_a) @ np.array(layer.lora_b)).T
    triple = [a.astype(mx.float32) for a in (layer.linear.scales, layer.linear.biases)]
    bare = np.array(mx.dequantize(layer.linear.weight, *triple, group_size=32, bits=8))
    merge(model)
    np.testing.assert_allclose(np.array(model.layers[0].mlp.up_proj.weight) - bare, change, atol=1e-7)


# mlx and hf


@pytest.mark.parametrize("layout", ["mlx", "hf"])
@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.cpu  # a GPU keeps the file's halves and quantised layers
def test_mlx_lm_loads_the_folder_and_computes_the_same(tmp_path, kind, layout):
    run = run_folder(tmp_path, kind)
    export(run, f"--to={layout}", "--dtype=float32")
    model, tokenizer = mlx_lm.load(str(run / "export" / layout))
    np.testing.assert_allclose(logits(model), logits(adapted(run)[0]), atol=1e-4)
    assert {a.dtype for _, a in tree_flatten(model.parameters())} == {mx.float32}
    assert tokenizer.eos_token_ids == {0}
    assert [p.name for p in (run / "export").iterdir()] == [layout]  # nothing temporary is left


def test_without_dtype_every_weight_is_stored_as_the_base_stores_it(tmp_path):
    run = run_folder(tmp_path, weights=Kind.Q8_0)  # scales float16; these norms need float32
    export(run, "--to=hf")
    weights = mx.load(str(run / "export" / "hf" / "model.safetensors"))
    assert weights["model.layers.0.self_attn.q_proj.weight"].dtype == mx.float16
    assert weights["model.norm.weight"].dtype == mx.float32
    assert json.loads((run / "export" / "hf" / "config.json").read_text())["torch_dtype"] == "float16"


def test_an_mlx_folder_can_be_quantised(tmp_path):
    run = run_folder(tmp_path)
    export(run, "--to=mlx", "--quant=q8", "--dtype=float32")
    model, _ = mlx_lm.load(str(run / "export" / "mlx-q8"))
    layer = model.layers[0].mlp.gate_proj
    assert (type(layer), layer.bits, layer.group_size) == (nn.QuantizedLinear, 8, 64)
    exact = np.array(merge(adapted(run)[0]).layers[0].mlp.gate_proj.weight)
    found = np.array(mx.dequantize(layer.weight, layer.scales, layer.biases, group_size=64, bits=8))
    step = (exact.max(axis=1) - exact.min(axis=1)) / 255  # rows of 64 numbers are one group each
    assert (np.abs(found - exact) <= 1.01 * step[:, None]).all()


@pytest.mark.cpu  # a GPU keeps the file's halves and quantised layers
def test_large_models_are_split_and_have_an_index(tmp_path, monkeypatch):
    run = run_folder(tmp_path)
    monkeypatch.setattr(mlx_lm.utils, "make_shards", partial(mlx_lm.utils.make_shards, max_file_size_gb=0))
    export(run, "--to=hf", "--dtype=float32")
    folder = run / "export" / "hf"
    index = json.loads((folder / "model.safetensors.index.json").read_text())
    files = sorted(p.name for p in folder.glob("model-*.safetensors"))
    assert sorted(set(index["weight_map"].values())) == files
    assert len(files) == len(index["weight_map"]) == 20
    assert files[0] == "model-00001-of-00020.safetensors"
    np.testing.assert_allclose(logits(mlx_lm.load(str(folder))[0]), logits(adapted(run)[0]), atol=1e-4)


def test_the_folder_of_a_gguf_base_has_the_config_and_tokenizer_that_transformers_wants(tmp_path):
    run = run_folder(tmp_path, llama__rope__freq_base=100000.0)
    export(run, "--to=hf")
    folder = str(run / "export" / "hf")
    config = AutoConfig.from_pretrained(folder)
    assert (config.model_type, config.hidden_act, config.rope_parameters["rope_theta"]) == ("llama", "silu", 100000.0)
    assert json.loads((run / "export" / "hf" / "tokenizer_config.json").read_text())["tokenizer_class"] == (
        "PreTrainedTokenizerFast"
    )
    generation = json.loads((run / "export" / "hf" / "generation_config.json").read_text())
    assert generation == {"bos_token_id": 1, "eos_token_id": 0}
    tokenizer = AutoTokenizer.from_pretrained(folder)
    assert tokenizer("hello hello<|end|>").input_ids == [TOKENS.index("hello"), TOKENS.index("Ġhello"), 0]
    assert tokenizer.apply_chat_template([{"role": "user", "content": "he"}], tokenize=False) == "<|start|>he<|end|>"


def test_tie_word_embeddings_is_written_even_if_the_base_leaves_it_to_mlx_lm(tmp_path):
    base = edited_base(tmp_path, tie_word_embeddings=None)
    assert main(["export", f"--model={base}", "--to=hf", f"--out={tmp_path / 'out'}"]) == 0
    assert json.loads((tmp_path / "out" / "config.json").read_text())["tie_word_embeddings"] is True


def test_a_mistral_is_a_llama_to_gguf(tmp_path):
    base, out = edited_base(tmp_path, model_type="mistral"), tmp_path / "out.gguf"
    assert main(["export", f"--model={base}", "--to=gguf", f"--out={out}"]) == 0
    assert read_gguf(out).config["model_type"] == "llama"


def test_files_beside_the_weights_are_copied(tmp_path):
    convert(write(tmp_path / "small.gguf"), tmp_path / "base")
    (tmp_path / "base" / "generation_config.json").write_text('{"eos_token_id": [0, 2]}')
    (tmp_path / "base" / "LICENSE").write_text("as you like")
    (tmp_path / "base" / "training.bin").write_bytes(b"large")
    assert main(["export", f"--model={tmp_path / 'base'}", "--to=hf", f"--out={tmp_path / 'out'}"]) == 0
    assert json.loads((tmp_path / "out" / "generation_config.json").read_text()) == {"eos_token_id": [0, 2]}
    assert (tmp_path / "out" / "LICENSE").read_text() == "as you like"
    assert not (tmp_path / "out" / "training.bin").exists()


# peft


def peft_weights(folder, bare):
    """Every adapted weight, by peft's formula in NumPy, from the files alone."""
    config = json.loads((folder / "adapter_config.json").read_text())
    arrays = {name: np.array(a, np.float64) for name, a in mx.load(str(folder / "adapter_model.safetensors")).items()}
    out = {}
    for name in [n.removesuffix(".lora_A.weight") for n in arrays if n.endswith("lora_A.weight")]:
        a, b = arrays[f"{name}.lora_A.weight"], arrays[f"{name}.lora_B.weight"]
        assert a.shape[0] == b.shape[1] == config["r"]
        module = name.removeprefix("base_model.model.")
        w = np.array(bare[f"{module}.weight"], np.float64) + config["lora_alpha"] / config["r"] * b @ a
        if config["use_dora"]:
            w *= (arrays[f"{name}.lora_magnitude_vector"] / np.sqrt((w**2).sum(axis=1)))[:, None]
        out[f"{module}.weight"] = w
    return out


@pytest.mark.parametrize("kind", [kind for kind in KINDS if kind not in MERGED_ONLY])
@pytest.mark.cpu  # a GPU keeps the file's halves and quantised layers
def test_the_peft_adapter_changes_every_weight_as_the_adapter_does(tmp_path, kind):
    run = run_folder(tmp_path, kind)
    export(run, "--to=peft", "--base=some/model")
    bare, _ = adapted(run)
    detach(bare)
    bare = dict(tree_flatten(merge(bare).parameters()))
    merged = dict(tree_flatten(merge(adapted(run)[0]).parameters()))
    found = peft_weights(run / "export" / "peft", bare)
    assert set(found) == {name for name in bare if not mx.array_equal(bare[name], merged[name])}
    for name, weight in found.items():
        np.testing.assert_allclose(weight, np.array(merged[name]), atol=1e-5)


def test_modules_are_named_by_their_last_name_where_that_is_enough(tmp_path):
    for kind, targets in {
        "lora": ["down_proj", "gate_proj", "k_proj", "o_proj", "q_proj", "up_proj", "v_proj"],
        "dora on some": ["down_proj", "q_proj"],
        "lora on the last layer": [
            *(f"model.layers.1.mlp.{name}_proj" for name in ("down", "gate", "up")),
            *(f"model.layers.1.self_attn.{name}_proj" for name in "koqv"),
        ],
    }.items():
        (tmp_path / kind).mkdir()
        run = run_folder(tmp_path / kind, kind)
        export(run, "--to=peft", "--base=some/model")
        config = json.loads((run / "export" / "peft" / "adapter_config.json").read_text())
        assert config["target_modules"] == targets
        assert config["base_model_name_or_path"] == "some/model"


def test_alpha_is_the_one_that_was_trained_with(tmp_path):
    run = run_folder(tmp_path)
    export(run, "--to=peft", "--base=some/model", "--dtype=bfloat16")
    config = json.loads((run / "export" / "peft" / "adapter_config.json").read_text())
    assert (config["r"], config["lora_alpha"]) == (4, 10)
    arrays = mx.load(str(run / "export" / "peft" / "adapter_model.safetensors"))
    assert {a.dtype for a in arrays.values()} == {mx.bfloat16}


def test_exporting_a_quantised_base_prints_a_remark(capsys, tmp_path):
    export(run_folder(tmp_path, "qlora", Kind.F16), "--to=peft", "--base=some/model")
    assert "it was trained on a base quantised to 4 bits; on a base in floats" in capsys.readouterr().out


# gguf


def test_rows_reach_llama_cpps_order_by_hand():
    # two heads of dimension 4: row 0 is paired with 2 and 1 with 3, and pairs stand side by side in the file
    rows = mx.array([0, 1, 2, 3, 10, 11, 12, 13])[:, None]
    assert permute(rows, heads=2)[:, 0].tolist() == [0, 2, 1, 3, 10, 12, 11, 13]
    assert mx.array_equal(unpermute(permute(rows, 2), 2), rows)


@pytest.mark.parametrize("kind", KINDS)
@pytest.mark.parametrize("tied", [True, False])
@pytest.mark.cpu  # a GPU keeps the file's halves and quantised layers
def test_a_plain_llama_on_the_files_own_rows_computes_what_the_rounded_model_does(tmp_path, kind, tied):
    run = run_folder(tmp_path, kind, tied=tied)
    export(run, "--to=gguf")
    model = merge(adapted(run)[0])
    model.update(tree_map(lambda w: w if w.ndim == 1 else mx.array(half(np.array(w))), model.parameters()))
    found = plain_llama(stored(run / "export" / "run-f16.gguf"), TOKENS_READ)
    np.testing.assert_allclose(found, logits(model), atol=2e-4, rtol=2e-4)


@pytest.mark.parametrize("quant", ["f16", "q8_0"])
@pytest.mark.cpu  # a GPU keeps the file's halves and quantised layers
def test_our_loader_reads_back_exactly_the_rounded_weights(tmp_path, quant):
    run = run_folder(tmp_path)
    export(run, "--to=gguf", f"--quant={quant}", f"--out={tmp_path / 'out.gguf'}")
    back = dict(tree_flatten(load_model(tmp_path / "out.gguf", dequantize=True)[0].parameters()))
    merged = dict(tree_flatten(merge(adapted(run)[0]).parameters()))
    assert set(back) == set(merged)
    rounded = {"f16": half, "q8_0": q8_0}[quant]
    for name, weight in merged.items():
        weight = np.array(weight)
        expected = weight if weight.ndim == 1 else rounded(weight)
        np.testing.assert_allclose(np.array(back[name].astype(mx.float32)), expected, rtol=1e-6, atol=1e-7)


def half(weight):
    return weight.astype(np.float16).astype(np.float32)


def q8_0(weight):
    """d q, for each 32 numbers x of a row: d = max |x| / 127, q = x / d to the nearest whole, d kept as a half."""
    blocks = weight.reshape(-1, 32)
    d = np.abs(blocks).max(axis=1, keepdims=True) / 127
    q = np.round(np.divide(blocks, d, out=np.zeros_like(blocks), where=d > 0))
    return (half(d) * q).reshape(weight.shape)


def test_the_numbers_of_the_config_survive_the_trip(tmp_path):
    numbers = {"rope__freq_base": 50000.0, "attention__layer_norm_rms_epsilon": 1e-6, "context_length": 77}
    run = run_folder(tmp_path, **{f"llama__{name}": value for name, value in numbers.items()})
    export(run, "--to=gguf")
    original, back = (read_gguf(path).config for path in (tmp_path / "small.gguf", run / "export" / "run-f16.gguf"))
    assert original == back
    assert (back["rope_theta"], back["rms_norm_eps"], back["max_position_embeddings"]) == (50000.0, 1e-6, 77)


@pytest.mark.parametrize("name", ["smollm", "gpt-2", "llama-bpe", "qwen2"])
def test_the_tokenizer_survives_the_trip(tmp_path, name):
    run = run_folder(tmp_path, tokenizer__ggml__pre=name, tokenizer__ggml__add_bos_token=True)
    export(run, "--to=gguf")
    out, back = (read_gguf(path).tokenizer for path in (tmp_path / "small.gguf", run / "export" / "run-f16.gguf"))
    assert out == back
    assert back.pre_tokenizer == name
    assert back.chat_template.startswith("{% for m in messages %}")


def other_base(tmp_path, change, **config):
    """The small model in full precision as a folder of its own, its weights and config changed."""
    base, folder = find_model(write(tmp_path / "small.gguf")), tmp_path / "other"
    shutil.copytree(base, folder)
    weights = {name: change(name, array) for name, array in mx.load(str(base / "model.safetensors")).items()}
    mx.save_safetensors(str(folder / "model.safetensors"), weights)
    (folder / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | config))
    return folder


def test_rows_that_fill_no_block_of_q8_0_are_halves(tmp_path):
    def narrow(name, array):
        return array[:, :72] if "down" in name else array[:72] if "mlp" in name else array

    base, out = other_base(tmp_path, narrow, intermediate_size=72), tmp_path / "out.gguf"
    assert main(["export", f"--model={base}", "--to=gguf", "--quant=q8_0", f"--out={out}"]) == 0
    exact, found = mx.load(str(base / "model.safetensors")), stored(out)
    down, up = (np.array(exact[f"model.layers.0.mlp.{name}_proj.weight"]) for name in ("down", "up"))
    np.testing.assert_array_equal(found["blk.0.ffn_down.weight"], half(down))
    np.testing.assert_allclose(found["blk.0.ffn_up.weight"], q8_0(up), atol=1e-7)


def test_tokens_that_the_model_has_beyond_its_tokenizer_are_unused(tmp_path):
    def longer(name, array):
        return mx.pad(array, [(0, 3), (0, 0)]) if "embed" in name else array

    base, out = other_base(tmp_path, longer, vocab_size=len(TOKENS) + 3), tmp_path / "out.gguf"
    assert main(["export", f"--model={base}", "--to=gguf", f"--out={out}"]) == 0
    data = read_gguf(out).tokenizer
    assert data.tokens[-4:] == (TOKENS[-1], *(f"[PAD{len(TOKENS) + i}]" for i in range(3)))
    assert data.token_types[-4:] == (1, 5, 5, 5)


def test_tokens_that_the_tokenizer_has_beyond_the_model_are_refused(capsys, tmp_path):
    base = other_base(
        tmp_path, lambda name, array: array[:-2] if "embed" in name else array, vocab_size=len(TOKENS) - 2
    )
    message = refused(capsys, f"--model={base}", "--to=gguf", f"--out={tmp_path / 'out.gguf'}")
    assert f"has the token {len(TOKENS) - 1} and the model only {len(TOKENS) - 2}" in message


def greedy(model, tokenizer, prompts):
    """The likeliest completions, as lists of tokens."""
    engine = MLXEngine(model, stop=tokenizer.eos_token_ids)
    return [c.tokens.tolist() for [c] in engine.sample(prompts, 1, Sampling(8, temperature=0.0))]


@pytest.mark.usefixtures("small_built_in")
def test_the_built_in_with_an_adapter_writes_the_same_text_from_its_gguf_files(tmp_path, monkeypatch):
    bare = load_model("smollm2-135m")
    model, tokenizer = load_model("smollm2-135m")
    train(model, "lora", size=0.5)
    save_adapter(model, tmp_path / "adapter")
    source = ["export", "--model=smollm2-135m", f"--adapter={tmp_path / 'adapter'}", "--to=gguf"]
    files = {quant: tmp_path / f"{quant}.gguf" for quant in ("f16", "q8_0")}
    assert [main([*source, f"--quant={quant}", f"--out={path}"]) for quant, path in files.items()] == [0, 0]
    prompts = question_prompts(tokenizer)
    ours = {"f16": greedy(model, tokenizer, prompts)}
    merge(model)
    model.update(tree_map(lambda w: w if w.ndim == 1 else mx.array(q8_0(np.array(w))), model.parameters()))
    ours["q8_0"] = greedy(model, tokenizer, prompts)
    monkeypatch.setenv("TEXTPOLICY_CACHE", str(tmp_path / "cache"))
    for quant, path in files.items():
        back, back_tokenizer = load_model(path)
        assert question_prompts(back_tokenizer) == prompts
        assert nats_short(back, prompts, ours[quant]) < 0.02  # on any device, whose rounding may turn a tie over
        assert nats_short(bare[0], prompts, ours[quant]) > 0.5


def nats_short(model, prompts, completions):
    """By how much at most a written token is less likely than the likeliest, in nats."""
    short = []
    for prompt, tokens in zip(prompts, completions, strict=True):
        logits = model(mx.array([[*prompt, *tokens]]))[0, len(prompt) - 1 : -1].astype(mx.float32)
        logprobs = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))
        short.append((logprobs.max(axis=-1) - logprobs[np.arange(len(tokens)), tokens]).max())
    return max(short)


def question_prompts(tokenizer):
    """The questions as prompts, in the tokenizer's chat template."""
    env = TextGenerationEnv(QUESTIONS, lambda prompt, completion, example: 0.0, tokenizer=tokenizer)
    return [env.prompt_ids(i).tolist() for i in range(len(env))]


# Refusals, and nothing half-written


def refused(capsys, *arguments):
    assert main(["export", *map(str, arguments)]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("textpolicy: ")
    assert err.count("\n") == 1
    return err


@pytest.mark.parametrize(
    ("arguments", "message"),
    [
        (["--to=mlx"], "give either a RUN or --model NAME"),
        (["run", "--model=x", "--to=mlx"], "give either a RUN or --model NAME"),
        (["run"], "to"),
        (["run", "--to=onnx"], "onnx"),
        (["run", "--to=hf", "--quant=q4"], "--quant q4 does not apply to --to hf; use it with mlx (q4, q8), gguf"),
        (["run", "--to=mlx", "--quant=q8_0"], "--quant q8_0 does not apply to --to mlx"),
        (["run", "--to=gguf", "--dtype=float16"], "--dtype float16 does not apply to --to gguf"),
        (["run", "--to=hf", "--base=x/y"], "--base x/y applies to --to peft alone"),
        (["--model=smollm2-135m", "--to=hf"], "name the output with --out"),
        (["nowhere", "--to=hf"], "nowhere is not a run folder"),
    ],
)
def test_invalid_arguments_are_refused_in_one_line(capsys, tmp_path, monkeypatch, arguments, message):
    monkeypatch.chdir(tmp_path)
    assert message in refused(capsys, *arguments)
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("to", ["mlx", "hf", "peft", "gguf"])
def test_an_existing_output_is_left_alone(capsys, tmp_path, to):
    (tmp_path / "out").mkdir()
    (tmp_path / "out" / "keep").write_text("mine")
    message = refused(capsys, "--model=nowhere", f"--to={to}", f"--out={tmp_path / 'out'}")
    assert "exists; choose another --out" in message
    assert (tmp_path / "out" / "keep").read_text() == "mine"


def test_peft_needs_an_adapter_and_a_base_that_it_can_load(capsys, tmp_path):
    run = run_folder(tmp_path)
    message = refused(capsys, run, "--to=peft")
    assert (
        "small.gguf', which is made from a GGUF file; write one it can load with 'textpolicy export --model" in message
    )
    quantised = find_model(tmp_path / "small.gguf")
    assert "quantised in a format that only MLX reads" in refused(capsys, run, "--to=peft", f"--base={quantised}")
    assert "'nowhere' is neither a folder nor a hub id" in refused(capsys, run, "--to=peft", "--base=nowhere")
    bare = [f"--model={tmp_path / 'small.gguf'}", "--to=peft", "--base=a/b", f"--out={tmp_path / 'out'}"]
    assert "has no adapter for --to peft" in refused(capsys, *bare)
    assert not (run / "export").exists()
    assert not (tmp_path / "out").exists()


@pytest.mark.cpu  # a GPU keeps the file's halves and quantised layers
def test_a_full_fine_tune_has_no_adapter_for_peft(capsys, tmp_path):
    run = run_folder(tmp_path, "full")
    assert "has no adapter for --to peft" in refused(capsys, run, "--to=peft", "--base=a/b")


def edited_base(tmp_path, **changes):
    """The small model as a folder of its own, its config changed."""
    convert(write(tmp_path / "small.gguf"), tmp_path / "base")
    path = tmp_path / "base" / "config.json"
    config = json.loads(path.read_text()) | changes
    path.write_text(json.dumps({key: value for key, value in config.items() if value is not None}))
    return tmp_path / "base"


@pytest.mark.parametrize(
    ("to", "changes", "message"),
    [
        ("hf", {"model_type": "mixtral"}, "of type 'mixtral', whose weights mlx-lm may store in its own layout"),
        ("gguf", {"model_type": "qwen2"}, "--to gguf writes llama and mistral models and this is a 'qwen2'"),
        ("gguf", {"rope_scaling": {"type": "linear", "factor": 2.0}}, "supports only the default rope_scaling"),
        ("gguf", {"sliding_window": 16}, "does not support attention with a sliding window"),
        ("gguf", {"max_position_embeddings": None}, "no max_position_embeddings"),
    ],
)
def test_models_that_a_format_cannot_describe_are_refused(capsys, tmp_path, monkeypatch, to, changes, message):
    base = edited_base(tmp_path, **(changes if "model_type" not in changes else {}))
    loaded = load_model(base)
    (base / "config.json").write_text(json.dumps(json.loads((base / "config.json").read_text()) | changes))
    monkeypatch.setattr("textpolicy.mlx.models.load_model", lambda *_: loaded)
    assert message in refused(capsys, f"--model={base}", f"--to={to}", f"--out={tmp_path / 'out'}")
    assert not (tmp_path / "out").exists()


@pytest.mark.parametrize(
    ("change", "message"),
    [
        (lambda t: t["model"].update(byte_fallback=True), "is not a byte-level BPE"),
        (lambda t: t.update(pre_tokenizer={"type": "Whitespace"}), "splits text like none of GGUF's"),
        (lambda t: t.update(pre_tokenizer=None), "splits text like none of GGUF's"),
        (lambda t: t.update(normalizer={"type": "Lowercase"}), "splits text like none of GGUF's"),
    ],
)
def test_tokenizers_that_gguf_cannot_name_are_refused(capsys, tmp_path, change, message):
    base = edited_base(tmp_path)
    values = json.loads((base / "tokenizer.json").read_text())
    change(values)
    (base / "tokenizer.json").write_text(json.dumps(values))
    assert message in refused(capsys, f"--model={base}", "--to=gguf", f"--out={tmp_path / 'out.gguf'}")


def test_a_tokenizer_without_tokenizer_json_is_refused(capsys, tmp_path, monkeypatch):
    base = edited_base(tmp_path)
    loaded = load_model(base)
    (base / "tokenizer.json").unlink()
    monkeypatch.setattr("textpolicy.mlx.models.load_model", lambda *_: loaded)
    message = refused(capsys, f"--model={base}", "--to=gguf", f"--out={tmp_path / 'out.gguf'}")
    assert "has no tokenizer.json, which --to gguf reads; use --to mlx or hf" in message


def test_a_number_beyond_float16_is_refused(capsys, tmp_path):
    def huge(weights):
        weights["blk.0.ffn_up.weight"][3, 3] = 1e6

    write(tmp_path / "small.gguf", edit=huge)
    out = tmp_path / "out.gguf"
    message = refused(capsys, f"--model={tmp_path / 'small.gguf'}", "--to=gguf", f"--out={out}")
    assert "'model.layers.0.mlp.up_proj.weight' has NaN or values beyond float16's range" in message
    assert [p.name for p in tmp_path.iterdir()] == ["small.gguf"]


@pytest.mark.parametrize("to", ["mlx", "hf", "peft", "gguf"])
@pytest.mark.parametrize(("error", "code"), [(OSError(28, "No space left on device"), 2), (KeyboardInterrupt(), 130)])
def test_an_export_that_stops_half_way_leaves_nothing(capsys, tmp_path, monkeypatch, to, error, code):
    run = run_folder(tmp_path)
    written = []

    def stops(path, *_, **__):
        written.append(path)
        raise error

    monkeypatch.setattr(mx, "save_safetensors", stops)
    monkeypatch.setattr("gguf.GGUFWriter.write_tensor_data", stops)
    base = ["--base=a/b"] if to == "peft" else []
    assert main(["export", str(run), f"--to={to}", *base, f"--out={tmp_path / 'out'}"]) == code
    assert len(written) == 1
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "small.gguf"]
    if code == 2:
        assert "cannot write" in capsys.readouterr().err


@pytest.mark.parametrize("to", ["mlx", "hf", "peft", "gguf"])
def test_a_full_disk_is_refused_in_one_line(capsys, tmp_path, to):
    run = run_folder(tmp_path)
    find_model(tmp_path / "small.gguf")  # in the cache before the disk is full
    base = ["--base=a/b"] if to == "peft" else []
    with files_of_at_most(4096):
        message = refused(capsys, run, f"--to={to}", *base, f"--out={tmp_path / 'out'}")
    assert f"cannot write {tmp_path / 'out'} (" in message
    assert sorted(p.name for p in tmp_path.iterdir()) == ["run", "small.gguf"]


def test_the_last_line_names_the_file_and_how_to_load_it(capsys, tmp_path):
    run = run_folder(tmp_path)
    export(run, "--to=gguf", "--quant=q8_0")
    path = run / "export" / "run-q8_0.gguf"
    assert capsys.readouterr().out == (
        f"wrote {path} ({path.stat().st_size / 1e6:.1f} MB); load it with: textpolicy generate --model {path} PROMPT\n"
    )
    assert main(["generate", f"--model={path}", "--max-tokens=2", "hello"]) == 0


def test_unknown_layers_are_refused_by_peft(tmp_path):
    source = find_model(write(tmp_path / "small.gguf"))
    model, _ = load_model(tmp_path / "small.gguf")
    linear_to_lora_layers(model, 1, {"rank": 2, "scale": 1.0, "dropout": 0.0, "keys": {"model.embed_tokens"}})
    with pytest.raises(UserError, match=r"'model\.embed_tokens' has a LoRAEmbedding, for which peft has no layout"):
        export_peft(model, source, tmp_path / "out", "a/b")
