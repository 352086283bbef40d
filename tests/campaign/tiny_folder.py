"""A model folder that trains in seconds: two random layers, letters for tokens, a chat template."""

import json

CONFIG = {
    "architectures": ["LlamaForCausalLM"],
    "model_type": "llama",
    "hidden_size": 32,
    "num_hidden_layers": 2,
    "intermediate_size": 64,
    "num_attention_heads": 4,
    "num_key_value_heads": 2,
    "rms_norm_eps": 1e-5,
    "max_position_embeddings": 4096,
    "tie_word_embeddings": True,
}
TEMPLATE = "{% for m in messages %}{{ '<|im_start|>' + m['content'] + '<|im_end|>' }}{% endfor %}<|im_start|>"
SMALL = {
    "steps": 2,
    "optimizer": {"warmup_steps": 1},
    "rollout": {"prompts_per_step": 2, "group_size": 4, "max_tokens": 3},
    "evaluation": {"every": 1, "problems": 6},
    "adapter": {"rank": 2},
    "machine": {"threads": 1},
}


def write_tiny_model(folder, mkdir=False):
    """Random weights, so that its runs differ and none of them learns anything."""
    import textpolicy.mlx  # noqa: F401  (before mlx, which thereby gets its fast BLAS)

    # isort: split
    import mlx.core as mx
    from mlx.utils import tree_flatten
    from mlx_lm.models import llama
    from tokenizers import Tokenizer, decoders, models, pre_tokenizers
    from transformers import PreTrainedTokenizerFast

    if mkdir:
        folder.mkdir()
    special = ["<|im_start|>", "<|im_end|>"]
    words = [*special, *sorted(pre_tokenizers.ByteLevel.alphabet())]
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, []))
    core.pre_tokenizer, core.decoder = pre_tokenizers.ByteLevel(add_prefix_space=False), decoders.ByteLevel()
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token=special[1], additional_special_tokens=special)
    tokenizer.chat_template = TEMPLATE
    tokenizer.save_pretrained(folder)
    mx.random.seed(0)
    values = {**CONFIG, "vocab_size": len(words), "eos_token_id": 1}
    model = llama.Model(llama.ModelArgs.from_dict(values))
    mx.save_safetensors(str(folder / "model.safetensors"), dict(tree_flatten(model.parameters())))
    (folder / "config.json").write_text(json.dumps(values))
