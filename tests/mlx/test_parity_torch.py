"""The log-probs of folders that transformers writes are the same here and there, or the folder is refused by name."""

import json

import numpy as np
import pytest

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx
from torch_peer import needs_torch
from toy_run import make_tokenizer

from textpolicy.errors import UserError
from textpolicy.mlx.models import load_model

pytestmark = needs_torch

TOLERANCE = 1e-3  # nats, float32
TEXTS = [[5, 6, 7, 100, 200, 31, 9, 12, 77, 3, 45, 201, 8, 8, 90, 14, 15, 60, 61, 62, 63], [9, 8, 7]]
COMMON = {
    "vocab_size": 272,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "max_position_embeddings": 512,
    "bos_token_id": 1,
    "eos_token_id": 256,
    "pad_token_id": 256,
}
HEAD = {"head_dim": 8}
GEMMA = HEAD | {"query_pre_attn_scalar": 8, "sliding_window": 5}
EXPERTS = HEAD | {"num_experts_per_tok": 2}
TYPES = {
    "gemma": HEAD,
    "gemma2": GEMMA,
    "gemma3_text": GEMMA | {"num_hidden_layers": 6},
    "glm": HEAD,
    "gpt_neox": {"intermediate_size": 128},
    "gpt_oss": EXPERTS | {"num_local_experts": 4, "sliding_window": 5},
    "llama": {},
    "mistral": {"sliding_window": 5},
    "mixtral": {"num_experts_per_tok": 2, "num_local_experts": 4},
    "ministral3": HEAD | {"sliding_window": 5},
    "olmo2": {},
    "olmo3": {"num_hidden_layers": 4, "sliding_window": 5},
    "phi3": {},
    "phimoe": {"num_local_experts": 4, "attention_bias": True, "lm_head_bias": True},
    "qwen2": {},
    "qwen3": HEAD,
    "qwen3_moe": EXPERTS | {"num_experts": 4, "moe_intermediate_size": 16},
    "starcoder2": {"sliding_window": 5},
}


def rope(**settings):
    return {"rope_parameters": {"rope_theta": 20000.0, "rope_type": "default", **settings}}


YARN = {"rope_type": "yarn", "factor": 8.0, "original_max_position_embeddings": 64}
LONG = {"short_factor": [1.0, 1.1, 1.3, 2.0], "long_factor": [1.0, 2.0, 4.0, 9.0], "rope_type": "longrope"}
NESTED = {
    "sliding_attention": {"rope_type": "default", "rope_theta": 70.0},
    "full_attention": {"rope_type": "linear", "rope_theta": 900.0, "factor": 4.0},
}
CHANGES = {
    "as it is": {},
    "rope_theta": rope(rope_theta=333.0),
    "linear": rope(rope_type="linear", factor=4.0),
    "dynamic": rope(rope_type="dynamic", factor=4.0),
    "llama3": rope(
        rope_type="llama3",
        factor=8.0,
        low_freq_factor=1.0,
        high_freq_factor=4.0,
        original_max_position_embeddings=64,
    ),
    "yarn": rope(**YARN),
    "yarn, not rounded": rope(**YARN, truncate=False),
    "yarn with its own scale": rope(**YARN, attention_factor=1.4),
    "yarn with mscale": rope(**YARN, mscale=0.7, mscale_all_dim=0.3),
    "longrope": rope(**LONG, original_max_position_embeddings=64),
    "part of a head": rope(partial_rotary_factor=0.25),
    "tied": {"tie_word_embeddings": True},
    "untied": {"tie_word_embeddings": False},
    "relu": {"hidden_act": "relu", "hidden_activation": "relu"},
    "gelu": {"hidden_act": "gelu", "hidden_activation": "gelu"},
    "a window": {"sliding_window": 3, "use_sliding_window": True, "max_window_layers": 1},
    "caps": {"final_logit_softcapping": 2.0, "attn_logit_softcapping": 1.5},
    "biases": {"attention_bias": True, "mlp_bias": True},
    "another epsilon": {"rms_norm_eps": 0.2},
    "another scale": {"query_pre_attn_scalar": 3},
}
PLAIN = "gemma gemma2 glm gpt_neox mixtral qwen3_moe starcoder2"  # mlx-lm's classes rotate in the default way alone
FIXED = "glm gpt_oss mixtral phi3 phimoe qwen3_moe"  # whose activation stands inside a larger function
# The types that are refused for a change, and what is named; transformers refuses a few itself
REFUSED = {
    "linear": (PLAIN, "rope_type 'linear'"),
    "llama3": (PLAIN, "rope_type 'llama3'"),
    "yarn": (PLAIN, "rope_type 'yarn'"),
    "yarn, not rounded": (PLAIN, "rope_type 'yarn'"),
    "yarn with its own scale": (PLAIN, "rope_type 'yarn'"),
    "yarn with mscale": (PLAIN, "rope_type 'yarn'"),
    "longrope": (PLAIN + " gpt_oss", "rope_type 'longrope'"),
    "part of a head": (
        "gemma gemma2 glm gpt_oss llama mistral mixtral olmo2 phimoe qwen2 qwen3_moe starcoder2",
        "partial_rotary_factor 0.25",
    ),
    "tied": ("gpt_neox gpt_oss phimoe", r"Missing \d+ parameters: (model.embed_out|lm_head)"),
    "untied": ("gemma gemma2", "not in model: lm_head"),
    "relu": (FIXED, "hidden_act 'relu'"),
    "gelu": (FIXED, "hidden_act 'gelu'"),
    "a window": ("gemma glm gpt_neox olmo2", "sliding_window 3"),
    "caps": (" ".join(TYPES.keys() - {"gemma2"}), "attn_logit_softcapping 1.5|final_logit_softcapping 2.0"),
    "biases": (
        "gemma gemma2 gemma3_text mistral mixtral ministral3 olmo2 phi3 qwen3 qwen3_moe",
        "attention_bias True|(Received|Missing) .*bias",
    ),
}


def folder_of(torch, path, kind, changes):
    """Write the folder; return the log-probs of its texts, or None where transformers refuses the settings."""
    settings = COMMON | {"model_type": kind} | TYPES[kind] | changes
    path.mkdir()
    make_tokenizer().save_pretrained(path)
    return torch(folder=str(path), settings=settings, tokens=TEXTS)


def logprobs(model):
    out = []
    for row in TEXTS:
        logits = model(mx.array([row]))[0, :-1].astype(mx.float32)
        exact = logits - mx.logsumexp(logits, axis=-1, keepdims=True)
        out.append(np.array(exact)[np.arange(len(row) - 1), row[1:]])
    return out


@pytest.mark.parametrize("change", CHANGES)
def test_a_changed_entry_has_the_effect_it_has_in_transformers_or_is_refused_by_name(torch, tmp_path, change):
    refused, named = REFUSED.get(change, ("", ""))
    taken = 0
    for kind in TYPES:
        theirs = folder_of(torch, tmp_path / kind, kind, CHANGES[change])
        if "refused" in theirs:
            continue
        if kind in refused.split():
            with pytest.raises(UserError, match=named):
                load_model(tmp_path / kind)
            continue
        taken += 1
        ours = logprobs(load_model(tmp_path / kind)[0])
        worst = max(np.abs(np.array(a) - b).max() for a, b in zip(theirs["logprobs"], ours, strict=True))
        assert worst < TOLERANCE, (kind, worst)
    assert taken


def test_gemma_3_takes_other_rotations_for_layers_with_a_window(torch, tmp_path):
    theirs = folder_of(torch, tmp_path / "model", "gemma3_text", {"rope_parameters": NESTED})
    assert "sliding_attention" in json.loads((tmp_path / "model" / "config.json").read_text())["rope_parameters"]
    for a, b in zip(theirs["logprobs"], logprobs(load_model(tmp_path / "model")[0]), strict=True):
        np.testing.assert_allclose(a, b, atol=TOLERANCE)
