"""Write the model that all peers load as a folder in the Hugging Face layout.

    python write_model.py smollm2-135m FOLDER               SmolLM2-135M-Instruct in float32
    python write_model.py qwen3-0.6b FOLDER TOKENIZER       random weights in bfloat16, with the tokenizer of a folder

It has no chat template, so that every peer continues exactly the tokens it is given.
"""

from __future__ import annotations

import json
import shutil
import sys
from pathlib import Path
from typing import Any

from textpolicy.mlx.models import find_model, load_model

QWEN3 = {
    "architectures": ["Qwen3ForCausalLM"],
    "model_type": "qwen3",
    "hidden_size": 1024,
    "num_hidden_layers": 28,
    "intermediate_size": 3072,
    "num_attention_heads": 16,
    "num_key_value_heads": 8,
    "head_dim": 128,
    "hidden_act": "silu",
    "attention_bias": False,
    "rms_norm_eps": 1e-6,
    "vocab_size": 151936,
    "max_position_embeddings": 40960,
    "rope_theta": 1000000.0,
    "rope_parameters": {"rope_type": "default", "rope_theta": 1000000.0},
    "tie_word_embeddings": True,
    "dtype": "bfloat16",
    "torch_dtype": "bfloat16",
    "eos_token_id": 0,
    "bos_token_id": 0,
    "pad_token_id": 0,
}


def write_smollm2(folder: Path) -> None:
    import mlx.core as mx  # after textpolicy, which puts OpenBLAS below it

    source = find_model("smollm2-135m")
    model, _ = load_model(source)
    config = json.loads((source / "config.json").read_text())
    config = {k: v for k, v in config.items() if not k.startswith("quantization")} | {"dtype": "float32"}
    finish(folder, config, source, model, mx.float32)


def write_qwen3(folder: Path, tokenizer: Path) -> None:
    import mlx.core as mx
    from mlx.utils import tree_map
    from mlx_lm.models import qwen3

    mx.random.seed(0)
    model = qwen3.Model(qwen3.ModelArgs.from_dict(QWEN3))
    model.update(tree_map(lambda w: mx.random.normal(w.shape) * 0.02 if w.ndim > 1 else w, model.parameters()))
    finish(folder, QWEN3, tokenizer, model, mx.bfloat16)


def finish(folder: Path, config: dict[str, Any], tokenizer: Path, model: Any, dtype: Any) -> None:
    import mlx.core as mx
    from mlx.utils import tree_flatten

    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    shutil.copy(tokenizer / "tokenizer.json", folder)
    settings = json.loads((tokenizer / "tokenizer_config.json").read_text())
    settings.pop("chat_template", None)
    (folder / "tokenizer_config.json").write_text(json.dumps(settings, indent=2) + "\n")
    weights = {name: value.astype(dtype) for name, value in tree_flatten(model.parameters())}
    mx.save_safetensors(str(folder / "model.safetensors"), weights, metadata={"format": "pt"})


if __name__ == "__main__":
    if sys.argv[1] == "qwen3-0.6b":
        write_qwen3(Path(sys.argv[2]), Path(sys.argv[3]))
    else:
        write_smollm2(Path(sys.argv[2]))
