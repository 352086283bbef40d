"""Every family of models that mlx-lm has, at a tiny size with random weights."""

import contextlib
import importlib
import io
import pkgutil
import re
from dataclasses import replace

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx
import mlx_lm.models

from textpolicy.errors import UserError
from textpolicy.mlx.adapters.merging import attach, trainable
from textpolicy.mlx.files.entries import family

VOCABULARY = 60
_BY_LAYER = {kind: {"rope_theta": 1e4, "rope_type": "default"} for kind in ("sliding_attention", "full_attention")}
_YARN = {"type": "yarn", "factor": 2.0, "original_max_position_embeddings": 64}
_LLAMA4 = {"rope_theta": 1e4, "rope_type": "default", "llama_4_scaling_beta": 0.1}
_LLAMA4 |= {"original_max_position_embeddings": 64}
_LONGROPE = {"type": "longrope", "short_factor": [1.0] * 4, "long_factor": [1.0] * 4}
_LONGROPE |= {"original_max_position_embeddings": 64}
_KDA = {"kda_layers": [1, 3], "full_attn_layers": [2, 4], "num_heads": 4, "head_dim": 8, "short_conv_kernel_size": 3}
_MLP = {"ffn_mult": 2.0}

# fmt: off
TINY = {  # entries of config.json; each family reads those it has
    "vocab_size": VOCABULARY,
    "hidden_size": 32, "num_hidden_layers": 4, "intermediate_size": 64, "num_attention_heads": 4,
    "num_key_value_heads": 2, "rms_norm_eps": 1e-05, "rope_theta": 10000.0, "max_position_embeddings": 512,
    "tie_word_embeddings": False, "head_dim": 8, "rope_scaling": None, "num_experts_per_tok": 2,
    "moe_intermediate_size": 16, "num_experts": 4, "num_local_experts": 4, "n_routed_experts": 4,
    "n_shared_experts": 1, "num_shared_experts": 1, "n_group": 1, "topk_group": 1, "first_k_dense_replace": 1,
    "kv_lora_rank": 16, "q_lora_rank": 16, "qk_rope_head_dim": 8, "qk_nope_head_dim": 8, "v_head_dim": 8,
    "routed_scaling_factor": 1.0, "norm_topk_prob": True, "moe_layer_freq": 1, "layer_norm_eps": 1e-05,
    "layer_norm_epsilon": 1e-05, "norm_eps": 1e-05, "num_layers": 4, "n_embd": 32, "n_head": 4, "n_layer": 4,
    "n_positions": 512, "n_ctx": 512, "sliding_window": 4, "sliding_window_pattern": 2, "mlp_only_layers": [],
    "decoder_sparse_step": 1, "shared_expert_intermediate_size": 16, "moe_shared_expert_intermediate_size": 16,
    "num_heads": 4, "num_kv_heads": 2, "d_model": 32, "n_layers": 4, "n_heads": 4, "state_size": 8, "conv_kernel": 3,
    "use_bias": False, "use_conv_bias": True, "time_step_rank": 4, "attention_bias": False, "mlp_bias": False,
    "conv_L_cache": 3, "conv_bias": False, "full_attn_idxs": [1, 3], "block_dim": 32, "block_ff_dim": 64,
    "block_multiple_of": 8, "block_ffn_dim_multiplier": 1.0, "block_auto_adjust_ff_dim": True, "mamba_d_conv": 3,
    "mamba_d_head": 8, "mamba_d_ssm": 32, "mamba_d_state": 8, "mamba_expand": 1, "mamba_n_groups": 1,
    "mamba_n_heads": 4, "mamba_num_heads": 4, "mamba_head_dim": 8, "linear_num_value_heads": 4,
    "linear_num_key_heads": 2, "linear_key_head_dim": 8, "linear_value_head_dim": 8, "linear_conv_kernel_dim": 3,
    "full_attention_interval": 2, "partial_rotary_factor": 0.5, "n_groups": 1, "ssm_state_size": 8, "model_dim": 32,
    "index_head_dim": 8, "index_n_heads": 2, "index_topk": 4, "hidden_dim": 64,
    "layer_types": ["sliding_attention", "full_attention", "sliding_attention", "full_attention"],
    "num_kv_reuse_layers": 2, "hidden_dim_scale_factor": 1.0, "post_norm": True, "qk_norm": True,
    "sliding_window_layers": [0, 2], "conv_window": 2, "layer_group_size": 2, "group_norm_size": 2,
    "is_moe_layer": [False, True, False, True], "use_qk_norm": True, "topk_method": "noaux_tc",
    "scoring_func": "sigmoid", "n_inner": 64, "rotary_emb_base": 10000, "rotary_pct": 0.5, "rotary_dim": 8,
    "logits_scaling": 2.0, "attention_multiplier": 0.3, "embedding_multiplier": 2.0, "residual_multiplier": 0.5,
    "num_shared_expert": 1, "use_mixed_mlp_moe": True, "use_cla": True, "cla_share_factor": 2,
    "attn_layer_offset": 1, "attn_layer_period": 2, "expert_layer_offset": 1, "expert_layer_period": 2,
    "model_max_length": 512, "num_experts_per_token": 2, "use_expert_bias": True, "num_dense_layers": 1,
    "block_size": 512, "n_kv_heads": 2, "intermediate_size_mlp": 64, "no_rope_layers": [1, 0, 1, 0],
    "attention_method": "MLA", "mla_scale_q_lora": True, "mla_scale_kv_lora": True,
    "time_step_limit": [0.001, 100.0], "hybrid_layer_pattern": [0, 1, 0, 1], "add_swa_attention_sink_bias": True,
    "add_full_attention_sink_bias": False, "dim_model_base": 16, "scale_depth": 1.4, "scale_emb": 2.0,
    "shared_intermediate_size": 64, "hidden_act": "silu", "mamba_proj_bias": False, "linear_allow_neg_eigval": True,
    "num_transformer_layers": 4, "ffn_dim_divisor": 8, "num_query_heads": [4, 4, 4, 4],
    "ffn_multipliers": [2.0, 2.0, 2.0, 2.0], "dense_attention_every_n_layers": 2, "ff_intermediate_size": 64,
    "gegelu_limit": 20.0, "sliding_window_size": 4, "layernorm_epsilon": 1e-05, "swa_rope_theta": 10000.0,
    "swa_num_attention_heads": 4, "swa_num_key_value_heads": 2, "swa_head_dim": 8, "swa_v_head_dim": 8,
    "mamba_dt_rank": 4, "layers_block_type": ["mamba", "attention", "mamba", "attention"],
    "final_logit_softcapping": 30.0, "query_pre_attn_scalar": 8,
    "rope_parameters": {"rope_theta": 10000.0, "rope_type": "default", "type": "default"}, "num_attention_groups": 2,
    "moe_top_k": 2, "share_expert_dim": 16, "attention_window_size": 4, "moe_hidden_size": 16,
    "post_norm_eps": 1e-05, "layer_rope_theta": [10000.0, 0, 10000.0, 0], "output_multiplier": 0.5,
    "dense_intermediate_size": 64, "num_kv_shared_layers": 2, "global_head_dim": 16, "window_size": 4,
    "kv_channels": 8, "no_bias": True, "seq_length": 512, "logits_soft_cap": 30.0, "conv1d_width": 3,
    "block_types": ["recurrent", "attention"], "n_shared_head": 2, "hidden_size_per_head": 8,
    "rope_local_base_freq": 10000.0, "activation_sparsity_pattern": [0.5, 0.5, 0.0, 0.0], "altup_num_inputs": 2,
    "altup_coef_clip": 120.0, "altup_correct_scale": True, "altup_active_idx": 0, "laurel_rank": 4,
    "attention_chunk_size": 4, "interleave_moe_layer_step": 2, "hybrid_override_pattern": ["M", "*", "-", "E"],
    "global_attn_every_n_layers": 2, "score_func": "sigmoid", "engram_layer_ids": [], "ffn_hidden_size": 64,
    "expert_ffn_hidden_size": 16, "moe_topk": 2, "zero_expert_num": 1, "zero_expert_type": "identity",
    "moe_num_experts": 4, "moe_k": 2, "hidden_size_per_layer_input": 8, "vocab_size_per_layer_input": 60,
}

CHANGES = {  # where one value does not do for all
    "dbrx": {
        "ffn_config": {"ffn_hidden_size": 64, "moe_num_experts": 4, "moe_top_k": 2},
        "attn_config": {"kv_n_heads": 2, "clip_qkv": 8.0, "rope_theta": 1e4},
    },
    "deepseek_v2": {"rope_scaling": _YARN},
    "deepseek_v41": {"num_hidden_layers": 2},
    "exaone4": {"sliding_window_pattern": "LG"},
    "granitemoehybrid": {"layer_types": ["mamba", "attention"] * 2},
    "hunyuan": {"rope_scaling": {"type": "dynamic", "factor": 1.0, "alpha": 1.0}},
    "kimi_k3": {
        "linear_attn_config": _KDA, "hidden_act": "situ", "activation_situ_beta": 1.0, "attn_res_block_size": 2,
    },
    "kimi_linear": {"linear_attn_config": _KDA},
    "lille-130m": {"n_embd": 96, "n_head": 12, "n_kv_heads": 4},
    "llama4": {"num_experts_per_tok": 1},
    "mellum": {"rope_parameters": _BY_LAYER},
    "mimo_v2_flash": {"moe_layer_freq": [0, 1, 0, 1]},
    "minicpm3": {"rope_scaling": _LONGROPE},
    "minimax_m3_vl": {"moe_layer_freq": [0, 1, 0, 1]},
    "ministral3": {"rope_parameters": _LLAMA4},
    "mistral3": {"rope_parameters": _LLAMA4},
    "mistral4": {"rope_parameters": _LLAMA4},
    "nemotron": {"hidden_act": "relu2"},
    "nemotron-nas": {"block_configs": [
        {"attention": {"n_heads_in_group": 2}, "ffn": _MLP},
        {"attention": {"no_op": True}, "ffn": _MLP},
        {"attention": {"replace_with_linear": True}, "ffn": {"replace_with_linear": True}},
        {"attention": {"n_heads_in_group": 2}, "ffn": {"no_op": True}},
    ]},
    "olmo_hybrid": {"layer_types": ["linear_attention", "full_attention"] * 2},
    "openelm": {"num_kv_heads": [2] * 4},
    "phixtral": {"n_inner": 64},
    "rwkv7": {"a_low_rank_dim": 8, "v_low_rank_dim": 8, "gate_low_rank_dim": 8, "decay_low_rank_dim": 8},
    "spark2_5": {"rope_parameters": _BY_LAYER, "hidden_act": "gelu"},
    "stablelm": {"use_qkv_bias": True},
}
# fmt: on
ABSENT = {
    "bitnet": "needs Metal",
    "muse_spark": "needs Metal",
    "olmo": "needs the package ai2-olmo",
    "phi3small": "has dummy tokens beyond a tiny vocabulary",
    "prism_hadamard_qwen35": "reads one file alone",
}


def _with_a_model(name):
    with contextlib.redirect_stdout(io.StringIO()):  # olmo prints, and exits
        return hasattr(importlib.import_module(f"mlx_lm.models.{name}"), "ModelArgs")


FAMILIES = [m.name for m in pkgutil.iter_modules(mlx_lm.models.__path__) if m.name not in ABSENT]
FAMILIES = [name for name in FAMILIES if _with_a_model(name)]


def tiny_config(name, **changes):
    """The config.json of a tiny model of the family, with the entries that mlx-lm's module of it names."""
    named = family({"model_type": name}).named
    config = {key: value for key, value in TINY.items() if key in named}
    config |= {"model_type": name, **CHANGES.get(name, {}), **changes}
    config = {key: value for key, value in config.items() if value is not ...}
    inner = {"mistral3": "ministral3", "pixtral": "mistral"}.get(name, name)  # the model in a model for images
    module = importlib.import_module(f"mlx_lm.models.{name}")
    nested = "text_config" in module.ModelArgs.__dataclass_fields__
    return {**config, "text_config": {**config, "model_type": inner}} if nested else config


def tiny_family(name, seed=3, **changes):
    """A tiny model of the family, every parameter drawn: mlx-lm leaves some at 0 or 1, where faults would not show."""
    module = importlib.import_module(f"mlx_lm.models.{name}")
    mx.random.seed(seed)
    model = module.Model(module.ModelArgs.from_dict(tiny_config(name, **changes)))
    for part in model.modules():
        drawn = {k: v for k, v in part.items() if isinstance(v, mx.array) and mx.issubdtype(v.dtype, mx.floating)}
        part.update({k: v + 0.1 * mx.random.normal(v.shape) for k, v in drawn.items()})
    mx.eval(model.parameters())
    return model.eval()


def adapted(name, adapter, **changes):
    """A tiny model of the family with a random adapter on all the layers that can have one."""
    try:
        model = attach(tiny_family(name, **changes), adapter)
    except UserError as error:
        modules = re.search(r"by setting adapter.modules to (\S+)$", str(error))
        model = attach(tiny_family(name, **changes), replace(adapter, modules=tuple(modules[1].split(","))))
    mx.random.seed(4)
    moved = [(key, value + 0.1 * mx.random.normal(value.shape)) for key, value in trainable(model).items()]
    model.load_weights(moved, strict=False)
    return model
