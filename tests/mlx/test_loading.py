"""The entries of config.json and the tensors of a folder are used, translated or refused."""

import gc
import json
import re
import shutil
from pathlib import Path

import numpy as np
import pytest

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx
import mlx.nn as nn
import mlx_lm
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes
from toy_run import make_tokenizer

from textpolicy.cli.main import main
from textpolicy.engine import Sampling
from textpolicy.errors import UserError
from textpolicy.mlx.engine import MLXEngine
from textpolicy.mlx.models import context_length, load_model

COMMON = {
    "vocab_size": 272,
    "hidden_size": 32,
    "num_hidden_layers": 4,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 8,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
    "eos_token_id": 256,
}
IDS = mx.array([[5, 100, 7, 9, 200, 31, 12, 77, 3, 45]])


def folder_of(path, kind, said=None, extra=None, drop=(), **settings):
    """Write a random model of mlx-lm's class; config.json also has ``said``, and the file ``extra`` tensors."""
    config = COMMON | {"model_type": kind} | settings
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config))
    mx.random.seed(3)
    drawn = [
        (name, (0.7 + 0.6 * mx.random.uniform(shape=a.shape)) if a.ndim == 1 else 0.3 * mx.random.normal(a.shape))
        for name, a in tree_flatten(model.parameters())
    ]
    path.mkdir(parents=True)
    make_tokenizer().save_pretrained(path)
    mx.save_safetensors(str(path / "model.safetensors"), dict(drawn) | (extra or {}))
    stated = {key: value for key, value in (config | (said or {})).items() if key not in drop}
    (path / "config.json").write_text(json.dumps(stated))
    model.load_weights(drawn)
    return model.eval()


def logits(model):
    return np.array(model(IDS))


# Tensors


@pytest.mark.parametrize(
    "kind", ["llama", "mistral", "qwen2", "qwen3", "granite", "olmo2", "phi3", "mixtral", "smollm3"]
)
@pytest.mark.parametrize("said", [{"tie_word_embeddings": True}, None], ids=["tied", "not said"])
def test_a_head_in_the_file_is_used_whatever_the_config_says(tmp_path, kind, said):
    more = {"num_local_experts": 2, "num_experts_per_tok": 1, "logits_scaling": 1.0, "attention_multiplier": 1.0}
    more |= {"embedding_multiplier": 1.0, "residual_multiplier": 1.0, "attention_bias": False, "mlp_bias": False}
    more = {k: v for k, v in more.items() if kind in ("granite", "mixtral") and (kind == "mixtral") == ("num" in k)}
    drop = () if said else ("tie_word_embeddings",)
    made = folder_of(tmp_path / "m", kind, said, drop=drop, sliding_window=None, **more)
    np.testing.assert_allclose(logits(load_model(tmp_path / "m")[0]), logits(made), atol=1e-5)


@pytest.mark.parametrize("said", [{"tie_word_embeddings": True}, {"tie_word_embeddings": False}, None])
def test_a_head_equal_to_the_embedding_is_the_same_model_tied_or_not(tmp_path, said):
    made = folder_of(tmp_path / "m", "llama", said, tie_word_embeddings=True)
    tensors = mx.load(str(tmp_path / "m" / "model.safetensors"))
    tensors["lm_head.weight"] = tensors["model.embed_tokens.weight"]
    mx.save_safetensors(str(tmp_path / "m" / "model.safetensors"), tensors)
    np.testing.assert_allclose(logits(load_model(tmp_path / "m")[0]), logits(made), atol=1e-5)


@pytest.mark.parametrize(
    ("kind", "name"),
    [
        ("llama", "lm_head.bias"),
        ("llama", "model.layers.1.self_attn.q_norm.weight"),
        ("llama", "model.layers.1.mlp.gate_proj.lora_a"),
        ("qwen2", "score.weight"),
        ("gemma2", "lm_head.weight"),
        ("gemma3_text", "model.layers.0.self_attn.sinks"),
    ],
)
def test_a_tensor_without_a_place_is_refused_by_name(tmp_path, kind, name):
    more = {"query_pre_attn_scalar": 8} if "gemma" in kind else {}
    if kind == "gemma3_text":
        more |= {"sliding_window_pattern": 2, "rope_local_base_freq": 1e4, "sliding_window": 5}
    folder_of(tmp_path / "m", kind, extra={name: mx.ones((272, 32))}, **more)
    with pytest.raises(UserError, match=re.escape(name)):
        load_model(tmp_path / "m")


ERNIE = {"moe_num_experts": 2, "moe_k": 1, "moe_intermediate_size": 16, "moe_layer_start_index": 0, "use_bias": False}


def test_tensors_that_a_class_drops_are_refused_by_name(tmp_path):
    bias = "model.layers.3.mlp.moe_statics.e_score_correction_bias"
    folder_of(tmp_path / "m", "ernie4_5_moe", extra={bias: mx.ones((1, 2))}, **ERNIE)
    with pytest.raises(UserError, match=re.escape(f"has {bias!r}, which mlx-lm's ernie4_5_moe leaves out")):
        load_model(tmp_path / "m")


@pytest.mark.parametrize("name", ["model.layers.1.self_attn.rotary_emb.inv_freq", "model.layers.4.mlp.up_proj.weight"])
def test_tables_of_rotary_embeddings_and_further_layers_may_be_left_out(tmp_path, name):
    settings = {"rope_theta": 1e4} if "inv_freq" in name else DEEPSEEK
    kind = "llama" if "inv_freq" in name else "glm4_moe"
    made = folder_of(tmp_path / "m", kind, extra={name: mx.ones((4,))}, **settings)
    np.testing.assert_allclose(logits(load_model(tmp_path / "m")[0]), logits(made), atol=1e-5)


DEEPSEEK = {
    "moe_intermediate_size": 16,
    "n_routed_experts": 2,
    "n_shared_experts": 1,
    "num_experts_per_tok": 1,
    "n_group": 1,
    "topk_group": 1,
    "routed_scaling_factor": 1.0,
    "norm_topk_prob": True,
    "first_k_dense_replace": 1,
    "rope_scaling": None,
    "use_qk_norm": False,
    "attention_bias": False,
    "partial_rotary_factor": 0.5,
}


# Entries


def bases(model):
    return [layer.self_attn.rope.base for layer in model.layers]


@pytest.mark.parametrize("kind", ["llama", "mistral", "qwen2", "qwen3", "olmo2", "gemma2", "phi3"])
@pytest.mark.parametrize("also_old", [True, False])
def test_a_nested_rope_theta_is_the_base(tmp_path, kind, also_old):
    nested = {"rope_parameters": {"rope_theta": 7e5, "rope_type": "default"}}
    more = {"query_pre_attn_scalar": 8} if kind == "gemma2" else {}
    drop = () if also_old else ("rope_theta",)
    folder_of(tmp_path / "m", kind, nested, drop=drop, sliding_window=None, **more)
    assert bases(load_model(tmp_path / "m")[0]) == [7e5] * 4


def test_each_kind_of_layer_has_its_own_nested_rotation(tmp_path):
    nested = {
        "sliding_attention": {"rope_type": "default", "rope_theta": 123.0},
        "full_attention": {"rope_type": "linear", "factor": 8.0, "rope_theta": 4e6},
    }
    said = {"rope_parameters": nested, "layer_types": ["sliding_attention", "full_attention"] * 2}
    more = {"query_pre_attn_scalar": 8, "sliding_window": 5, "sliding_window_pattern": 2}
    folder_of(tmp_path / "m", "gemma3_text", said, drop=("rope_theta", "sliding_window_pattern"), **more)
    model, _ = load_model(tmp_path / "m")
    assert bases(model) == [123.0, 4e6, 123.0, 4e6]
    assert [layer.self_attn.rope.scale for layer in model.layers] == [1.0, 0.125, 1.0, 0.125]


def reach(model, far):
    """Return how much the first token changes the logits that many positions on."""
    a, b = [9, *range(10, 10 + far)], [77, *range(10, 10 + far)]
    return float(mx.abs(model(mx.array([a]))[0, -1] - model(mx.array([b]))[0, -1]).max())


WINDOWED = {
    "mistral": {},
    "phi3": {},
    "starcoder2": {"norm_epsilon": 1e-5, "use_bias": True},
    "mixtral": {"num_local_experts": 2, "num_experts_per_tok": 1},
    "qwen2": {"use_sliding_window": True, "max_window_layers": 0},
    "qwen3": {"use_sliding_window": True, "layer_types": ["sliding_attention"] * 4},
}


@pytest.mark.parametrize("kind", WINDOWED)
def test_a_window_of_four_hides_what_lies_before_it(tmp_path, kind):
    folder_of(tmp_path / "m", kind, WINDOWED[kind] | {"sliding_window": 4}, **WINDOWED[kind])
    model, _ = load_model(tmp_path / "m")
    assert reach(model, 12) > 1e-5  # four layers see 3 back each
    assert reach(model, 13) == 0.0
    sampled = MLXEngine(model, stop=[]).sample([[5, 6, 7, 8, 9, 10, 11], [5, 6]], 2, Sampling(12, seed=1))
    for prompt, group in zip(([5, 6, 7, 8, 9, 10, 11], [5, 6]), sampled, strict=True):
        for c in group:
            z = model(mx.array([[*prompt, *c.tokens.tolist()]]))[0, len(prompt) - 1 : -1]
            exact = np.array(z - mx.logsumexp(z, axis=-1, keepdims=True))[np.arange(12), c.tokens]
            np.testing.assert_allclose(c.logprobs, exact, atol=1e-4)


def test_a_window_of_some_layers_or_beyond_the_context_is_one_of_these_layers_or_none(tmp_path):
    some = {"use_sliding_window": True, "sliding_window": 4, "max_window_layers": 2}
    folder_of(tmp_path / "some", "qwen2", some)
    assert reach(load_model(tmp_path / "some")[0], 60) > 1e-5
    made = folder_of(tmp_path / "wide", "phi3", {"sliding_window": 512})
    loaded, _ = load_model(tmp_path / "wide")
    assert type(loaded.layers[0].self_attn) is type(made.layers[0].self_attn)


@pytest.mark.parametrize(
    ("name", "act"),
    [
        ("relu", nn.relu),
        ("gelu", nn.gelu),
        ("gelu_new", nn.gelu_approx),
        ("gelu_pytorch_tanh", nn.gelu_approx),
        ("relu2", nn.relu2),
        ("quick_gelu", lambda x: x * mx.sigmoid(1.702 * x)),
        ("swish", nn.silu),
        ("silu", nn.silu),
    ],
)
@pytest.mark.parametrize("kind", ["llama", "qwen3"])
def test_another_activation_is_computed(tmp_path, kind, name, act):
    folder_of(tmp_path / "m", kind, {"hidden_act": name})
    mlp = load_model(tmp_path / "m")[0].layers[2].mlp
    x = mx.random.normal((3, 32))
    by_hand = mlp.down_proj(act(mlp.gate_proj(x)) * mlp.up_proj(x))
    np.testing.assert_allclose(np.array(mlp(x)), np.array(by_hand), atol=1e-5)


FACTORS = {"type": "longrope", "short_factor": [1.0, 1.1, 1.2, 1.3], "long_factor": [2.0, 4.0, 8.0, 16.0]}


@pytest.mark.parametrize("kind", ["phi3", "llama", "qwen2"])
def test_longrope_takes_its_short_factors_and_no_text_for_which_they_do_not_hold(tmp_path, kind):
    both = {"max_position_embeddings": 512, "original_max_position_embeddings": 64}
    scaling = FACTORS | {"original_max_position_embeddings": 64}
    folder_of(tmp_path / "m", kind, both | {"rope_scaling": scaling})
    folder_of(tmp_path / "s", kind, both | {"rope_scaling": scaling | {"long_factor": FACTORS["short_factor"]}})
    model, _ = load_model(tmp_path / "m")
    np.testing.assert_allclose(logits(model), logits(load_model(tmp_path / "s")[0]), atol=1e-5)
    assert context_length(tmp_path / "m") == 64
    with pytest.raises(UserError, match="65 tokens and the model 64 positions"):
        MLXEngine(model, stop=[]).sample([[5] * 60], 1, Sampling(5))


REFUSED = [
    ("llama", {"hidden_act": "mish"}, "hidden_act 'mish'"),
    ("llama", {"attn_logit_softcapping": 30.0}, "attn_logit_softcapping 30.0"),
    ("llama", {"final_logit_softcapping": 30.0}, "final_logit_softcapping 30.0"),
    ("llama", {"logit_scale": 0.25}, "logit_scale 0.25"),
    ("llama", {"embedding_multiplier": 12.0}, "embedding_multiplier 12.0"),
    ("llama", {"residual_multiplier": 0.2}, "residual_multiplier 0.2"),
    ("llama", {"clip_qkv": 8.0}, "clip_qkv 8.0"),
    ("llama", {"use_qk_norm": True}, "use_qk_norm True"),
    ("llama", {"partial_rotary_factor": 0.5}, "partial_rotary_factor 0.5"),
    ("llama", {"rope_scaling": {"type": "telepathic", "factor": 2.0}}, "rope_type 'telepathic'"),
    ("qwen2", {"attention_bias": True}, ""),
    ("qwen2", {"logits_scaling": 8.0}, "logits_scaling 8.0"),
    ("gemma2", {"rope_scaling": {"rope_type": "linear", "factor": 8.0}}, "rope_type 'linear'"),
    ("gemma2", {"attn_logit_softcapping": None}, "attn_logit_softcapping None"),
    ("mixtral", {"hidden_act": "gelu"}, "hidden_act 'gelu'"),
    ("olmo2", {"sliding_window": 4}, "sliding_window 4"),
    ("phi3", {"rope_scaling": {"type": "yarn", "factor": 4.0}}, "rope"),
]


@pytest.mark.parametrize(("kind", "said", "named"), REFUSED)
def test_an_entry_that_cannot_have_its_effect_is_refused_by_name(tmp_path, kind, said, named):
    more = {"query_pre_attn_scalar": 8} if kind == "gemma2" else {}
    more |= {"num_local_experts": 2, "num_experts_per_tok": 1} if kind == "mixtral" else {}
    made = folder_of(tmp_path / "m", kind, said, sliding_window=None, **more)
    if not named:  # transformers' class does not have it, and the file has the biases that it does have
        np.testing.assert_allclose(logits(load_model(tmp_path / "m")[0]), logits(made), atol=1e-5)
        return
    with pytest.raises(UserError, match=re.escape(named)):
        load_model(tmp_path / "m")


NEUTRAL = [
    {"attn_logit_softcapping": None, "logit_scale": 1.0, "use_qk_norm": False, "clip_qkv": None},
    {"sliding_window": None, "use_sliding_window": False, "rope_scaling": None, "hidden_act": "silu"},
    {"pretraining_tp": 8, "attention_dropout": 0.5, "initializer_range": 0.5, "use_cache": False},
    {"torch_dtype": "bfloat16", "_name_or_path": "x", "auto_map": {"AutoModel": "x"}, "transformers_version": "5.9"},
    {"rope_scaling": {"rope_type": "dynamic", "factor": 4.0}},
    {"rope_scaling": {"type": "mrope", "mrope_section": [1, 1, 2]}},
]


@pytest.mark.parametrize("said", NEUTRAL)
@pytest.mark.parametrize("kind", ["llama", "qwen2", "qwen3"])
def test_entries_without_effect_are_none(tmp_path, kind, said):
    made = folder_of(tmp_path / "m", kind, said)
    np.testing.assert_allclose(logits(load_model(tmp_path / "m")[0]), logits(made), atol=1e-5)


def test_a_type_of_which_mlx_lm_has_no_class_is_a_sentence(tmp_path):
    folder_of(tmp_path / "m", "llama", {"model_type": "unheard_of"})
    with pytest.raises(UserError, match=r"mlx-lm cannot load .* \(Model type unheard_of not supported.\)"):
        load_model(tmp_path / "m")


@pytest.mark.parametrize(
    "said",
    [
        {"rope_theta": "big"},
        {"rope_theta": None},
        {"rope_theta": -1.0, "rope_scaling": 3},
        {"rope_parameters": [1, 2]},
        {"rope_parameters": {"rope_type": ["linear"]}},
        {"rope_scaling": {"rope_type": "llama3"}},
        {"layer_types": ["full_attention"]},
        {"layer_types": "all"},
        {"num_attention_heads": 0},
        {"hidden_act": 3},
        {"text_config": {}, "rope_theta": "big"},
    ],
)
def test_values_that_make_no_model_are_a_sentence(tmp_path, said):
    folder_of(tmp_path / "m", "llama", said)
    with pytest.raises(UserError) as error:
        load_model(tmp_path / "m")
    assert "\n" not in str(error.value)


def test_a_class_that_ends_the_process_is_a_sentence(tmp_path):
    folder_of(tmp_path / "m", "llama", {"model_type": "olmo"})
    with pytest.raises(UserError, match="mlx-lm cannot load"):
        load_model(tmp_path / "m")


def test_the_sentences_in_the_docs_are_those_printed(tmp_path):
    page = next((Path(__file__).parents[2] / "docs").glob("03*.md")).read_text()
    sentences = page.split("```text\n")[1].split("```")[0].splitlines()
    index = {"weight_map": {str(i): f"model-0000{i}-of-00003.safetensors" for i in (1, 2, 3)}}
    folders = [tmp_path / str(i) for i in range(len(sentences))]
    for folder in folders[:2]:
        folder_of(folder, "llama")
    for i in (1, 3):
        shutil.copy(folders[0] / "model.safetensors", folders[0] / f"model-0000{i}-of-00003.safetensors")
    (folders[0] / "model.safetensors.index.json").write_text(json.dumps(index))
    head = {"lm_head.weight": mx.load(str(folders[1] / "model.safetensors"))["lm_head.weight"]}
    mx.save_safetensors(str(folders[1] / "model-00001-of-00002.safetensors"), head)
    statics = {"model.layers.0.mlp.moe_statics.e_score_correction_bias": mx.ones((1, 2))}
    folder_of(folders[2], "ernie4_5_moe", extra=statics, **ERNIE)
    folder_of(folders[3], "llama", {"attn_logit_softcapping": 30.0})
    folder_of(folders[4], "mixtral", {"hidden_act": "relu"}, num_local_experts=2, num_experts_per_tok=1)
    for folder, sentence in zip(folders, sentences, strict=True):
        with pytest.raises(UserError) as error:
            load_model(folder)
        assert str(error.value).replace(str(folder), "FOLDER") == sentence


NEW = {"rope_parameters": {"rope_type": "llama3", "rope_theta": 7e5, "factor": 8.0, "low_freq_factor": 1.0}}
NEW["rope_parameters"] |= {"high_freq_factor": 4.0, "original_max_position_embeddings": 64}


@pytest.mark.parametrize("layout", ["mlx", "hf"])
def test_what_was_translated_is_exported_so_that_mlx_lm_reads_it(tmp_path, layout):
    folder_of(tmp_path / "m", "llama", NEW | {"tie_word_embeddings": True}, drop=("rope_theta",))
    expected = logits(load_model(tmp_path / "m")[0])
    out = tmp_path / "out"
    assert main(["export", "--model", str(tmp_path / "m"), f"--to={layout}", f"--out={out}"]) == 0
    np.testing.assert_allclose(logits(load_model(out)[0]), expected, atol=1e-4)
    if layout == "mlx":
        np.testing.assert_allclose(logits(mlx_lm.load(str(out))[0]), expected, atol=1e-4)


@pytest.mark.parametrize(
    ("said", "named"),
    [
        (NEW, "only the default rope_scaling"),
        ({"hidden_act": "relu"}, "only the activation silu and this model has relu"),
    ],
)
def test_a_gguf_file_is_not_written_for_a_function_that_it_cannot_say(tmp_path, capsys, said, named):
    folder_of(tmp_path / "m", "llama", said)
    assert main(["export", "--model", str(tmp_path / "m"), "--to=gguf", f"--out={tmp_path / 'm.gguf'}"]) == 2
    assert named in capsys.readouterr().err


@pytest.mark.parametrize("collecting", [True, False])
def test_loading_leaves_the_garbage_collector_as_it_was(tmp_path, collecting):
    folder = tmp_path / "model"
    folder_of(folder, "llama")
    usual = gc.isenabled()
    (gc.enable if collecting else gc.disable)()
    try:
        load_model(folder)
        assert gc.isenabled() == collecting
        config = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps(config | {"hidden_size": "many"}))
        with pytest.raises(UserError):
            load_model(folder)
        assert gc.isenabled() == collecting
    finally:
        (gc.enable if usual else gc.disable)()
