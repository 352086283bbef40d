"""The tiny Qwen3 with random weights and a tokenizer of bytes, for tests of everything around a model."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import numpy as np

TEMPLATE = (
    "{% for m in messages %}{{ '<|im_start|>' + m['role'] + '\n' + m['content'] + '<|im_end|>' + '\n' }}{% endfor %}"
    "{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"
)
SPECIAL = ("<|im_start|>", "<|im_end|>", "<|pad|>")  # ids 256, 257, 258; the second ends a completion
CONFIG: dict[str, Any] = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "vocab_size": 264,
    "hidden_size": 48,
    "intermediate_size": 96,
    "num_hidden_layers": 2,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "head_dim": 12,
    "hidden_act": "silu",
    "max_position_embeddings": 4096,
    "rms_norm_eps": 1e-6,
    "rope_theta": 10000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 10000.0},
    "attention_bias": False,
    "tie_word_embeddings": False,
    "bos_token_id": None,
    "eos_token_id": 257,
    "pad_token_id": 258,
    "dtype": "float32",
    "torch_dtype": "float32",
}


def write_tiny_model(folder: Path, seed: int = 0) -> None:
    """Write a model folder in the Hugging Face layout, of about 80,000 float32 parameters; ``seed`` fixes them.

    Matrices are (out, in) of variance 1 / in, norms are ones; token i below 256 is the byte i.
    """
    from safetensors.numpy import save_file

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(CONFIG, indent=2) + "\n")
    c, rng = CONFIG, np.random.default_rng(seed)
    hidden, inner = c["hidden_size"], c["intermediate_size"]
    heads, shared = c["num_attention_heads"], c["num_key_value_heads"]
    width, words = c["head_dim"], c["vocab_size"]
    block = {
        "self_attn.q_proj": (heads * width, hidden),
        "self_attn.k_proj": (shared * width, hidden),
        "self_attn.v_proj": (shared * width, hidden),
        "self_attn.o_proj": (hidden, heads * width),
        "self_attn.q_norm": (width,),
        "self_attn.k_norm": (width,),
        "mlp.gate_proj": (inner, hidden),
        "mlp.up_proj": (inner, hidden),
        "mlp.down_proj": (hidden, inner),
        "input_layernorm": (hidden,),
        "post_attention_layernorm": (hidden,),
    }
    shapes = {"model.embed_tokens": (words, hidden), "lm_head": (words, hidden), "model.norm": (hidden,)}
    for layer in range(c["num_hidden_layers"]):
        shapes |= {f"model.layers.{layer}.{name}": shape for name, shape in block.items()}
    weights = {}
    for name, shape in shapes.items():
        drawn = np.ones(shape) if len(shape) == 1 else rng.standard_normal(shape) / np.sqrt(shape[1])
        weights[f"{name}.weight"] = drawn.astype(np.float32)
    save_file(weights, folder / "model.safetensors", metadata={"format": "pt"})
    _write_tokenizer(folder)


def _write_tokenizer(folder: Path) -> None:
    """Write the tokenizer of bytes, in the letters of byte-level BPE: a byte that prints, else one from 256 upwards."""
    from tokenizers import AddedToken, Tokenizer, decoders, models, pre_tokenizers

    printing = [*range(ord("!"), ord("~") + 1), *range(0xA1, 0xAC + 1), *range(0xAE, 0xFF + 1)]
    other = [byte for byte in range(256) if byte not in printing]
    letters = [chr(byte) if byte in printing else chr(256 + other.index(byte)) for byte in range(256)]
    tokenizer = Tokenizer(models.BPE({letter: byte for byte, letter in enumerate(letters)}, []))
    tokenizer.pre_tokenizer = pre_tokenizers.ByteLevel(add_prefix_space=False, use_regex=False)
    tokenizer.decoder = decoders.ByteLevel()
    tokenizer.add_special_tokens([AddedToken(token, special=True, normalized=False) for token in SPECIAL])
    tokenizer.save(str(folder / "tokenizer.json"))
    settings = {
        "tokenizer_class": "PreTrainedTokenizerFast",
        "eos_token": SPECIAL[1],
        "pad_token": SPECIAL[2],
        "clean_up_tokenization_spaces": False,
        "model_max_length": CONFIG["max_position_embeddings"],
        "chat_template": TEMPLATE,
    }
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
