"""A tiny model of every architecture, and how far decoding is from reading each sequence at once."""

import mlx.core as mx
import numpy as np
from mlx_lm.models import (
    deepseek_v32,
    falcon_h1,
    gemma2,
    gemma3_text,
    gpt_oss,
    lfm2,
    llama,
    longcat_flash_ngram,
    mamba,
    plamo3,
    qwen3,
    qwen3_next,
)

from textpolicy.engine import Sampling
from textpolicy.mlx.adapters.merging import attach_lora
from textpolicy.mlx.decode.decoder import decode

VOCABULARY = 60
WINDOW = 4  # shorter than the prompts and than the completions

COMMON = {
    "vocab_size": VOCABULARY,
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "rope_theta": 1e4,
    "max_position_embeddings": 512,
    "tie_word_embeddings": False,
}
SLIDING = {"sliding_window": WINDOW, "layer_types": ["sliding_attention", "full_attention"]}
EXPERTS = {"num_experts_per_tok": 2, "moe_intermediate_size": 16}

ARCHITECTURES = {
    "llama": (llama, {}),
    "llama with a sliding window": (llama, SLIDING),
    "qwen3": (qwen3, {"head_dim": 8}),
    "gemma2": (gemma2, {"head_dim": 8}),
    "gemma3": (
        gemma3_text,
        {"head_dim": 8, "num_hidden_layers": 4, "sliding_window": WINDOW, "sliding_window_pattern": 3},
    ),
    "gpt_oss": (gpt_oss, {"head_dim": 8, "num_local_experts": 4, "num_experts_per_tok": 2, **SLIDING}),
    "plamo3": (plamo3, {"head_dim": 8, "window_size": WINDOW, "sliding_window_pattern": 2}),
    "lfm2": (
        lfm2,
        {
            "norm_eps": 1e-5,
            "conv_bias": False,
            "conv_L_cache": 3,
            "block_dim": 32,
            "block_ff_dim": 64,
            "block_multiple_of": 8,
            "block_ffn_dim_multiplier": 1.0,
            "block_auto_adjust_ff_dim": True,
            "num_hidden_layers": 3,
            "full_attn_idxs": [1],
        },
    ),
    "falcon_h1": (
        falcon_h1,
        {
            "head_dim": 8,
            "mamba_d_conv": 3,
            "mamba_d_head": 8,
            "mamba_d_ssm": 32,
            "mamba_d_state": 8,
            "mamba_expand": 1,
            "mamba_n_groups": 1,
            "mamba_n_heads": 4,
        },
    ),
    "qwen3_next": (
        qwen3_next,
        {
            "head_dim": 8,
            "full_attention_interval": 2,
            "linear_num_value_heads": 4,
            "linear_num_key_heads": 2,
            "linear_key_head_dim": 8,
            "linear_value_head_dim": 8,
            "linear_conv_kernel_dim": 3,
            "num_experts": 4,
            "decoder_sparse_step": 1,
            "shared_expert_intermediate_size": 16,
            "mlp_only_layers": [],
            "partial_rotary_factor": 0.5,
            **EXPERTS,
        },
    ),
    "deepseek_v32": (  # it reads and replaces the keys of its caches
        deepseek_v32,
        {
            "num_key_value_heads": 4,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "index_head_dim": 16,
            "index_n_heads": 2,
            "index_topk": 64,
            "n_routed_experts": 2,
            "n_shared_experts": 1,
            "num_experts_per_tok": 1,
            "moe_intermediate_size": 16,
            "first_k_dense_replace": 1,
        },
    ),
    "mamba": (
        mamba,
        {"state_size": 8, "conv_kernel": 3, "use_bias": False, "use_conv_bias": True, "time_step_rank": 4},
    ),
    "longcat_flash_ngram": (
        longcat_flash_ngram,
        {
            "num_layers": 2,
            "ffn_hidden_size": 64,
            "expert_ffn_hidden_size": 16,
            "moe_topk": 2,
            "n_routed_experts": 2,
            "zero_expert_num": 1,
            "zero_expert_type": "identity",
            "routed_scaling_factor": 1.0,
            "kv_lora_rank": 8,
            "q_lora_rank": 8,
            "qk_rope_head_dim": 8,
            "qk_nope_head_dim": 8,
            "v_head_dim": 8,
            "mla_scale_q_lora": True,
            "mla_scale_kv_lora": True,
            "attention_bias": False,
            "router_bias": False,
            "ngram_vocab_size_ratio": 2,
            "emb_neighbor_num": 3,
            "emb_split_num": 2,
        },
    ),
}
PROMPTS = [
    [5, 6, 7, 8, 9, 10, 11],
    [5, 6, 7, 8, 9, 12],
    [5, 6, 7, 8, 9, 10, 11, 13, 14, 15, 16],
    [5, 6, 7, 8, 9, 12],
    [5, 6, 7, 8, 9, 21, 22, 23, 24, 25, 26],
]


def adapted(name, **changes):
    """A tiny model with random weights everywhere and random LoRA matrices."""
    module, settings = ARCHITECTURES[name]
    settings = {**COMMON, "model_type": module.__name__.rsplit(".", 1)[1], **settings, **changes}
    mx.random.seed(3)
    model = module.Model(module.ModelArgs.from_dict(settings))
    for layer in model.modules():  # mlx-lm leaves some parameters at 0 or 1, where mistakes would not show
        layer.update({k: v + 0.2 * mx.random.normal(v.shape) for k, v in layer.items() if isinstance(v, mx.array)})
    attach_lora(model, rank=4)  # of experts: MLX on CUDA needs a multiple of 4
    for layer in model.modules():
        if "lora_b" in layer:
            layer.lora_b = 0.1 * mx.random.normal(layer.lora_b.shape)
    mx.eval(model.parameters())
    return model


def decoding_error(model, max_rows=100, steps=None, view=None, prompts=PROMPTS):
    """Return the largest difference of a decoded log-prob from that of its sequence read at once, without a cache.

    ``view`` decodes, if given.
    """
    prompts, sampling = [np.array(p, np.int32) for p in prompts for _ in range(2)], Sampling(max_tokens=9, seed=1)
    decoded = model if view is None else view
    completions = decode(decoded, prompts, sampling, np.array([0, 1, 2]), max_rows, steps=steps)
    worst = 0.0
    for prompt, c in zip(prompts, completions, strict=True):
        logits = model(mx.array([[*prompt.tolist(), *c.tokens.tolist()]]))[0, len(prompt) - 1 : -1]
        exact = np.array(logits - mx.logsumexp(logits, axis=-1, keepdims=True))[np.arange(len(c.tokens)), c.tokens]
        worst = max(worst, float(np.abs(exact - c.logprobs).max()))
    return worst
