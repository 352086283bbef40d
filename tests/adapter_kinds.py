"""Adapters of every kind, and a tiny model with one of them."""

import textpolicy.mlx  # noqa: F401 - first, because it puts a fast BLAS below mlx

# isort: split
import mlx.core as mx
from conftest import VOCABULARY, tiny_llama

from textpolicy.config.adapters import DoRA, Full, LoRA, LoRAXS, QLoRA, TinyLoRA
from textpolicy.mlx.adapters.attach import attach
from textpolicy.mlx.adapters.merging import trainable

ADAPTERS = {
    "lora": LoRA(rank=4),
    "lora, rank-stabilised": LoRA(rank=4, rank_stabilised=True),
    "lora on some": LoRA(rank=4, layers=1, modules=("q_proj", "mlp.down_proj")),
    "dora": DoRA(rank=4),
    "qlora": QLoRA(rank=4, bits=4, group_size=32),
    "full": Full(),
    "full on some": Full(layers=1, modules=("o_proj",)),
    "lora_xs": LoRAXS(rank=4),
    "lora_xs as its authors": LoRAXS(rank=4, sigma="loraxs_code"),
    "tinylora": TinyLoRA(),
    "tinylora in groups": TinyLoRA(rank=3, u=2, tie=3, sigma="peft"),
    "tinylora by kind": TinyLoRA(u=2, tie=2, tying="structured"),
}


def adapted(name, seed=0):
    """A tiny model whose adapter has been moved away from where it starts."""
    model = attach(tiny_llama(VOCABULARY), ADAPTERS[name])
    mx.random.seed(seed)
    size = 0.02 if ADAPTERS[name].kind == "full" else 0.2
    moved = [(name, value + size * mx.random.normal(value.shape)) for name, value in trainable(model).items()]
    model.load_weights(moved, strict=False)
    return model
