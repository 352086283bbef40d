"""Every entry that changes a function has its effect, or is refused, or has no meaning: in every family of mlx-lm."""

import dataclasses
import json
from pathlib import Path

import pytest

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx
from families import FAMILIES, tiny_config, tiny_family
from mlx.utils import tree_flatten
from mlx_lm.utils import _get_classes
from transformers.models.auto.configuration_auto import CONFIG_MAPPING

from textpolicy.errors import UserError
from textpolicy.mlx.files.entries import settle
from textpolicy.mlx.loading import complete

IDS = mx.array([[5, 40, 7, 9, 20, 31, 12, 51, 3, 45, 46, 2]])
ENTRIES = [
    ("rope_theta", 37.0),
    ("rope_parameters", {"rope_type": "default", "rope_theta": 37.0}),
    ("rope_scaling", {"rope_type": "linear", "type": "linear", "factor": 3.0}),
    (
        "rope_parameters",
        {"rope_type": "yarn", "factor": 8.0, "rope_theta": 1e4, "original_max_position_embeddings": 32},
    ),
    ("partial_rotary_factor", 0.25),
    ("sliding_window", 3),
    ("hidden_act", "tanh"),
    ("hidden_activation", "tanh"),
    ("rms_norm_eps", 0.3),
    ("layer_norm_eps", 0.3),
    ("attn_logit_softcapping", 0.3),
    ("final_logit_softcapping", 0.3),
    ("query_pre_attn_scalar", 3),
    ("logit_scale", 0.3),
    ("logits_scaling", 3.0),
    ("embedding_multiplier", 3.0),
    ("attention_multiplier", 3.0),
    ("residual_multiplier", 3.0),
    ("clip_qkv", 0.01),
    ("use_qk_norm", "the other"),
    ("qk_layernorm", True),
    ("norm_topk_prob", "the other"),
    ("routed_scaling_factor", 3.0),
    ("num_experts_per_tok", 3),
    ("scoring_func", "softmax"),
    ("attention_chunk_size", 3),
]


def logits(config, weights):
    """Return what a model of ``config`` with these weights computes."""
    head = any("lm_head" in name for name in weights)
    settled = settle(config, weights, head, "FOLDER/config.json")
    model_class, args_class = _get_classes(config)
    model = model_class(args_class.from_dict(config | settled.changes))
    model.load_weights(list(weights.items()))
    complete(model, settled, "FOLDER/config.json")
    return model.eval()(IDS)


def declared(config):
    """Return the entries of transformers' class of the type, or None if there is no such class."""
    text = config.get("text_config", config)
    try:
        kind = CONFIG_MAPPING[text["model_type"]]
        kind = kind.sub_configs.get("text_config", kind)
        return {f.name for f in dataclasses.fields(kind)}
    except (KeyError, TypeError):
        return None


def with_entry(config, entry, value):
    """Return ``config`` with another value of ``entry``, and of its other names none."""
    if "text_config" in config:
        return config | {"text_config": with_entry(config["text_config"], entry, value)}
    value = not config.get(entry, False) if value == "the other" else value
    drop = {"rope_theta", "rope_scaling", "rope_parameters"} if entry.startswith("rope") else set()
    return {k: v for k, v in config.items() if k not in drop} | {entry: value}


PLAIN = {"layer_types": ..., "sliding_window": ...}  # without windows of some layers, which transformers does not know
BASES = {
    **dict.fromkeys(("llama", "ministral3", "mistral3", "mistral4", "pixtral"), PLAIN),
    "glm4_moe_lite": {"partial_rotary_factor": ...},
    "gpt2": {"rope_scaling": ...},
    "minicpm3": {"original_max_position_embeddings": 64},
    "olmo3": {"rope_theta": 5e5, "rope_parameters": ...},
}
# Entries of a type that transformers does not know that have no meaning in most, or show in the names of tensors
FOREIGN = "layer_norm_eps rms_norm_eps query_pre_attn_scalar norm_topk_prob routed_scaling_factor num_experts_per_tok "
FOREIGN += "attention_chunk_size use_qk_norm qk_layernorm"
SILENT = {  # what has no effect here, and why
    "bailing_moe": "partial_rotary_factor",  # rotary_dim has precedence
    "deepseek_v41": "rope_parameters",
    "falcon_h1": "embedding_multiplier",  # is folded into the weights when they are read
    "gear": "hidden_act",  # hidden_activation has precedence
    "granitemoehybrid": "rope_parameters",  # without positions
    "kimi_linear": "norm_topk_prob",  # is the default
    "kimi_k3": "rope_theta rope_parameters",  # without positions
    "lfm2-vl": "partial_rotary_factor",
    # which transformers' class of the type sets itself; before it had that class, another name is not told from a typo
    "minimax_m3_vl": "hidden_act hidden_activation partial_rotary_factor",
    "nemotron-nas": "hidden_activation",  # hidden_act has precedence
    "olmo3": "rope_parameters",  # transformers reads them for each type of layer alone
    "olmo_hybrid": "rope_parameters",  # without positions
    "phixtral": "hidden_act hidden_activation scoring_func",
    **dict.fromkeys(("deepseek", "hunyuan", "longcat_flash_ngram"), "scoring_func"),  # which is softmax there
    "spark2_5": "partial_rotary_factor",
    "step3p5": "rope_parameters hidden_act",  # which transformers' class of the type sets itself
    **dict.fromkeys(("dots1", "qwen2", "qwen2_moe", "qwen2_vl", "qwen3", "qwen3_moe"), "sliding_window"),
    **dict.fromkeys(("mimo_v2_flash", "minimax"), "sliding_window"),  # no layer_types says where
}


@pytest.mark.parametrize("name", FAMILIES)
def test_a_changed_entry_has_an_effect_or_is_refused_or_has_no_meaning(name):
    config = tiny_config(name, **BASES.get(name, {}))
    weights = dict(tree_flatten(tiny_family(name, **BASES.get(name, {})).parameters()))
    usual = logits(config, weights)
    known, silent = declared(config), set(SILENT.get(name, "").split())
    refused = 0
    for entry, value in ENTRIES:
        try:
            changed = logits(with_entry(config, entry, value), weights)
        except (UserError, ValueError, TypeError, KeyError, AttributeError, AssertionError, IndexError, RuntimeError):
            refused += 1  # load_model makes a UserError of the others
            continue
        meant = entry in known if known is not None else entry not in FOREIGN.split()
        if meant and entry not in silent:
            assert mx.abs(changed - usual).max().item() > 1e-6, entry
    assert refused < len(ENTRIES)


PUBLISHED = json.loads((Path(__file__).parents[2] / "data" / "published_configs.json").read_text())


@pytest.mark.parametrize("name", PUBLISHED)
def test_the_config_of_a_published_model_is_taken(name):
    """The entries of models that people load, with what their authors left in: refusing one would be a fault, too."""
    config, biased = PUBLISHED[name], ["model.layers.0.self_attn.q_proj.bias", "model.layers.0.self_attn.q_norm.weight"]
    settled = settle(config, biased, not config.get("tie_word_embeddings", False), "FOLDER/config.json")
    if "rope_theta" in config:
        assert settled.changes["rope_theta"] == config["rope_theta"]
    windowed = {"gemma-2-2b", "Phi-3-mini-4k", "Mistral-7B-v0.1", "starcoder2-3b"}  # in the file, and not in mlx-lm
    assert (settled.windows is not None) == (name in windowed)


@pytest.mark.parametrize(("kind", "scored"), [("deepseek_v2", "softmax"), ("glm4_moe", "sigmoid")])
def test_a_way_of_scoring_experts_is_taken_where_it_is_the_familys_own(kind, scored):
    other = {"softmax": "sigmoid", "sigmoid": "softmax"}[scored]
    settle(tiny_config(kind) | {"scoring_func": scored}, [], True, "FOLDER/config.json")
    with pytest.raises(UserError, match=f"scoring_func '{other}'"):
        settle(tiny_config(kind) | {"scoring_func": other}, [], True, "FOLDER/config.json")
