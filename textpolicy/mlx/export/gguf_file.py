"""Export a merged model of the Llama family as a GGUF file, with the gguf package."""

from __future__ import annotations

from contextlib import closing
from pathlib import Path
from typing import Any

import gguf
import mlx.core as mx
import mlx.nn as nn
import numpy as np
from gguf import GGMLQuantizationType, LlamaFileType
from mlx.utils import tree_flatten

from ...errors import UserError
from ..files.gguf import STOPS
from ..files.tokenizer import TokenizerData
from .bpe import read_bpe
from .files import read_config, written_whole
from .model_folder import merge

QUANTS = {
    "f16": (GGMLQuantizationType.F16, LlamaFileType.MOSTLY_F16),
    "q8_0": (GGMLQuantizationType.Q8_0, LlamaFileType.MOSTLY_Q8_0),
}
BLOCK = 32  # values per scale of Q8_0
FAMILY = ("llama", "mistral")


def export_gguf(model: nn.Module, tokenizer: Any, base: Path, out: Path, *, quant: str = "f16") -> None:
    """Merge the adapters of ``model`` in place and write it with ``tokenizer`` to the new GGUF file ``out``.

    ``base`` is the folder both were loaded from (see ``find_model``); ``quant``, a name in ``QUANTS``, applies to
    the matrices; norms are float32. Raises UserError if ``out`` exists, and for a model or tokenizer that a Llama's
    GGUF file cannot describe.
    """
    args = model.args
    check_family(read_config(base))
    data = read_bpe(base, tokenizer, args.vocab_size)
    weights = dict(tree_flatten(merge(model).parameters()))
    table = gguf.get_tensor_name_map(gguf.MODEL_ARCH.LLAMA, args.num_hidden_layers)
    names: dict[str, str] = {}
    for name in weights:
        filed = table.get_name(name, try_suffixes=(".weight",))
        if filed is None:
            raise UserError(f"--to gguf has no place for the weight {name!r}; use --to mlx or hf")
        names[name] = filed
    # Norms stay float32, and rows that are not a multiple of Q8_0's blocks become float16, as in llama.cpp.
    f32, f16, q8_0 = GGMLQuantizationType.F32, GGMLQuantizationType.F16, GGMLQuantizationType.Q8_0
    kinds = {n: f32 if w.ndim == 1 else f16 if w.shape[-1] % BLOCK else QUANTS[quant][0] for n, w in weights.items()}
    heads = {"q_proj": args.num_attention_heads, "k_proj": args.num_key_value_heads}
    with written_whole(out) as path, closing(gguf.GGUFWriter(path, "llama")) as writer:
        _describe(writer, args, data, out.stem, QUANTS[quant][1])
        for name, filed in names.items():
            kind, shape = kinds[name], weights[name].shape
            stored = gguf.quant_shape_to_byte_shape(shape, kind) if kind is q8_0 else shape
            dtype = np.dtype(np.uint8 if kind is q8_0 else np.float32 if kind is f32 else np.float16)
            writer.add_tensor_info(filed, stored, dtype, int(np.prod(stored)) * dtype.itemsize, raw_dtype=kind)
        writer.write_header_to_file()
        writer.write_kv_data_to_file()
        writer.write_ti_data_to_file()
        for name in names:  # one at a time, so that the model is not in memory twice
            module = name.split(".")[-2]
            rows = permute(weights[name], heads[module]) if module in heads else weights[name]
            array = np.array(rows)
            if not np.abs(array).max() <= np.finfo(np.float16).max:  # also true of NaN
                raise UserError(f"the weight {name!r} has NaN or values beyond float16's range; use --to mlx or hf")
            writer.write_tensor_data(gguf.quants.quantize(array, kinds[name]))


def permute(rows: mx.array, heads: int) -> mx.array:
    """Return the q or k rows in llama.cpp's order: (heads, 2, head_dim/2) -> (heads, head_dim/2, 2)."""
    halves = rows.reshape(heads, 2, -1, *rows.shape[1:])
    return halves.swapaxes(1, 2).reshape(rows.shape)


def check_family(config: dict[str, Any]) -> None:
    """Raise UserError unless llama.cpp's Llama computes the same as the model of this ``config``."""
    kind = config["model_type"]
    if kind not in FAMILY:
        raise UserError(f"--to gguf writes {' and '.join(FAMILY)} models and this is a {kind!r}; use --to mlx or hf")
    rotation = (config.get("rope_scaling") or {}) | (config.get("rope_parameters") or {})
    if rotation.get("rope_type", rotation.get("type", "default")) != "default" or config.get("rope_traditional"):
        raise UserError(
            f"--to gguf supports only the default rope_scaling and this model has {rotation}; use --to mlx or hf"
        )
    if "sliding_attention" in (config.get("layer_types") or ()) or config.get("sliding_window"):
        raise UserError("--to gguf does not support attention with a sliding window; use --to mlx or hf")
    if (act := config.get("hidden_act") or "silu") not in ("silu", "swish"):
        raise UserError(f"--to gguf supports only the activation silu and this model has {act}; use --to mlx or hf")
    if config.get("max_position_embeddings") is None:
        raise UserError("the model's config.json has no max_position_embeddings, which GGUF needs; add it")


def _describe(writer: gguf.GGUFWriter, args: Any, data: TokenizerData, name: str, file_type: LlamaFileType) -> None:
    """Add the metadata of the model and its tokenizer."""
    head_dim = args.head_dim or args.hidden_size // args.num_attention_heads
    writer.add_name(name)
    writer.add_file_type(file_type)
    writer.add_quantization_version(gguf.GGML_QUANT_VERSION)
    writer.add_vocab_size(args.vocab_size)
    writer.add_context_length(args.max_position_embeddings)
    writer.add_embedding_length(args.hidden_size)
    writer.add_block_count(args.num_hidden_layers)
    writer.add_feed_forward_length(args.intermediate_size)
    writer.add_head_count(args.num_attention_heads)
    writer.add_head_count_kv(args.num_key_value_heads)
    writer.add_key_length(head_dim)
    writer.add_value_length(head_dim)
    writer.add_rope_dimension_count(head_dim)
    writer.add_rope_freq_base(args.rope_theta)
    writer.add_layer_norm_rms_eps(args.rms_norm_eps)
    writer.add_tokenizer_model("gpt2")
    writer.add_tokenizer_pre(data.pre_tokenizer)
    writer.add_token_list(list(data.tokens))
    writer.add_token_types(list(data.token_types))
    writer.add_token_merges(list(data.merges))
    writer.add_eos_token_id(data.eos)
    writer.add_add_bos_token(data.add_bos)
    for token, add in (
        (data.bos, writer.add_bos_token_id),
        (data.unknown, writer.add_unk_token_id),
        (data.padding, writer.add_pad_token_id),
    ):
        if token is not None:
            add(token)
    for stop, write in zip(data.stops, (writer.add_eot_token_id, writer.add_eom_token_id), strict=False):
        write(stop)
    if len(data.stops) > 2:
        writer.add_array(STOPS, list(data.stops))
    if isinstance(data.chat_template, dict):
        writer.add_chat_template([{"name": n, "template": text} for n, text in data.chat_template.items()])
    elif data.chat_template is not None:
        writer.add_chat_template(data.chat_template)
