"""Read GGUF files of the Llama family, or convert them to folders that mlx-lm loads.

Every size in the header is checked against the file before ``mx.load``, which may crash on a bad file.
"""

from __future__ import annotations

import json
import math
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType, GGUFReader

from ...errors import UserError
from .safetensors import save_arrays
from .tokenizer import TokenizerData, save_tokenizer

GROUP_SIZE = 32  # values per scale in Q4_0, Q4_1 and Q8_0
BITS = {GGMLQuantizationType.Q4_0: 4, GGMLQuantizationType.Q4_1: 4, GGMLQuantizationType.Q8_0: 8}
FLOATS = (GGMLQuantizationType.F16, GGMLQuantizationType.F32)

_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_LAYER = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_norm": "post_attention_layernorm",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_REQUIRED: Any = object()


@dataclass(frozen=True, eq=False)
class GGUFModel:
    """The model in the layout of Hugging Face's Llama, with quantised weights as MLX triples."""

    config: dict[str, Any]  # config.json without the quantization
    weights: dict[str, mx.array]
    quantization: dict[str, Any]  # config.json's "quantization"; empty when no weight is quantised
    tokenizer: TokenizerData


def read_gguf(path: str | Path) -> GGUFModel:
    """Read a GGUF file. Raises UserError that says what is wrong with it."""
    path = Path(path)
    header = _read_header(path)
    metadata = _Metadata(path, header)
    metadata.expect("general.architecture", ("llama",))
    metadata.expect("tokenizer.ggml.model", ("gpt2",))
    tokenizer = _tokenizer(metadata)
    config = _config(metadata, header, tokenizer)
    bits = _check_tensors(path, header, config)
    # mlx-lm's table: the most common number of bits, and the layers that differ.
    quantization: dict[str, Any] = {}
    if bits:
        common = max(BITS.values(), key=list(bits.values()).count)
        quantization = {"group_size": GROUP_SIZE, "bits": common}
        quantization |= {name: {"group_size": GROUP_SIZE, "bits": b} for name, b in bits.items() if b != common}
    return GGUFModel(config, _load_weights(path, config), quantization, tokenizer)


def convert(path: str | Path, folder: str | Path) -> None:
    """Write the model in the GGUF file ``path`` as a folder that ``mlx_lm.load`` reads."""
    model, folder = read_gguf(path), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(model.tokenizer, folder, model.config["max_position_embeddings"])
    config = model.config | ({"quantization": model.quantization} if model.quantization else {})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    save_arrays(folder / "model.safetensors", model.weights, {"format": "mlx"})


# ---- the header


class _StrictReader(GGUFReader):
    """The reader of the gguf package, made to refuse reads past the end, which it would take for empty."""

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)} where its header promises {end} or more")
        return super()._get(int(offset), dtype, int(count), override_order)


def _read_header(path: Path) -> GGUFReader:
    if not path.is_file():
        raise UserError(f"there is no GGUF file at {path}; check the path")
    with path.open("rb") as file:
        magic = file.read(4)
    if magic != b"GGUF":
        raise UserError(f"{path} starts with {magic!r} and not b'GGUF'; give a GGUF file")
    try:
        with np.errstate(over="raise"):
            header = _StrictReader(path)
            if header.byte_order != "I":
                raise ValueError("its byte order is not that of this machine")
            for field in header.fields.values():
                if len(field.types) > 2:
                    raise ValueError(f"the metadata {field.name!r} is a nested array")
            for tensor in header.tensors:
                if not 1 <= len(tensor.shape) <= 4 or math.prod(tensor.shape.tolist()) != tensor.n_elements:
                    raise ValueError(f"the tensor {tensor.name!r} has the shape {tensor.shape.tolist()}")
                offset = tensor.data_offset - header.data_offset
                if offset < 0 or offset % header.alignment:
                    raise ValueError(f"the tensor {tensor.name!r} lies at the offset {offset}")
    except (ValueError, KeyError, IndexError, OverflowError, FloatingPointError, RecursionError) as error:
        reason = " ".join(str(error).split()) or type(error).__name__
        raise UserError(f"{path} is not a valid GGUF file: {reason}; download it again") from error
    return header


class _Metadata:
    """The typed access to the key-value pairs of a header."""

    def __init__(self, path: Path, header: GGUFReader) -> None:
        self.path = path
        self.fields = header.fields

    def get(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        if key not in self.fields:
            if default is _REQUIRED:
                raise UserError(f"{self.path} lacks the metadata {key}; convert the model to GGUF again")
            return default
        try:
            value = self.fields[key].contents()
        except UnicodeDecodeError as error:
            raise UserError(f"{self.path} has text that is not UTF-8 in {key}; download it again") from error
        if not isinstance(value, kind):
            raise UserError(f"{self.path} has {value!r:.60} for {key}; it should be of type {kind.__name__}")
        return value

    def count(self, key: str, default: Any = _REQUIRED) -> int:
        value = self.get(key, int, default)
        if value < 1:
            raise UserError(f"{self.path} has {value} for {key}; it should be 1 or more")
        return value

    def array(self, key: str, kind: type, default: Any = _REQUIRED) -> tuple[Any, ...]:
        values = self.get(key, list, default)
        if not all(isinstance(value, kind) for value in values):
            raise UserError(f"{self.path} has values of a type other than {kind.__name__} in {key}; download it again")
        return tuple(values)

    def expect(self, key: str, supported: tuple[str, ...], default: Any = _REQUIRED) -> None:
        value = self.get(key, str, default)
        if value not in supported:
            raise UserError(
                f"{self.path} has {value!r} for {key}, and only {', '.join(map(repr, supported))} "
                "can be converted; use the model's Hugging Face folder instead"
            )


def _tokenizer(metadata: _Metadata) -> TokenizerData:
    tokens = metadata.array("tokenizer.ggml.tokens", str)

    def token_id(name: str, default: Any = None) -> int | None:
        value = metadata.get(f"tokenizer.ggml.{name}_token_id", int, default)
        if value is not None and not 0 <= value < len(tokens):
            raise UserError(
                f"{metadata.path} has {value} for tokenizer.ggml.{name}_token_id "
                f"but only {len(tokens)} tokens; download it again"
            )
        return value

    types = metadata.array("tokenizer.ggml.token_type", int)
    if len(types) != len(tokens) or len(set(tokens)) != len(tokens):
        raise UserError(
            f"{metadata.path} has {len(tokens)} tokens ({len(set(tokens))} different ones) "
            f"and {len(types)} token types; download it again"
        )
    pre_tokenizer = metadata.get("tokenizer.ggml.pre", str, "default")
    return TokenizerData(
        tokens=tokens,
        token_types=types,
        merges=metadata.array("tokenizer.ggml.merges", str),
        pre_tokenizer=pre_tokenizer,
        eos=token_id("eos", _REQUIRED),  # type: ignore[arg-type]
        bos=token_id("bos"),
        unknown=token_id("unknown"),
        padding=token_id("padding"),
        add_bos=metadata.get("tokenizer.ggml.add_bos_token", bool, pre_tokenizer == "llama-bpe"),
        chat_template=metadata.get("tokenizer.chat_template", str, None),
    )


def _config(metadata: _Metadata, header: GGUFReader, tokenizer: TokenizerData) -> dict[str, Any]:
    heads = metadata.count("llama.attention.head_count")
    hidden = metadata.count("llama.embedding_length")
    head_dim = metadata.count("llama.attention.key_length", hidden // heads)
    metadata.expect("llama.rope.scaling.type", ("none",), "none")
    if (rotated := metadata.count("llama.rope.dimension_count", head_dim)) != head_dim or head_dim % 2:
        raise UserError(f"{metadata.path} rotates {rotated} of {head_dim} dimensions of a head; use another model")
    config = {
        "architectures": ["LlamaForCausalLM"],
        "model_type": "llama",
        "hidden_size": hidden,
        "num_hidden_layers": metadata.count("llama.block_count"),
        "intermediate_size": metadata.count("llama.feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.count("llama.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": _shortest(metadata.get("llama.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _shortest(metadata.get("llama.rope.freq_base", float, 10000.0)),
        "max_position_embeddings": metadata.count("llama.context_length"),
        "vocab_size": len(tokenizer.tokens),
        "tie_word_embeddings": not any(tensor.name == "output.weight" for tensor in header.tensors),
        "eos_token_id": tokenizer.eos,
        "bos_token_id": tokenizer.bos,
        "pad_token_id": tokenizer.padding,
    }
    return {key: value for key, value in config.items() if value is not None}


def _shortest(value: float) -> float:
    """Return 1e-05 for a float32 in the file that reads 9.999999747378752e-06."""
    return float(str(np.float32(value)))


# ---- the tensors


def _check_tensors(path: Path, header: GGUFReader, config: dict[str, Any]) -> dict[str, int]:
    """Return the bits of the quantised layers by their new names, after checking every tensor against ``config``."""
    if config["num_hidden_layers"] > len(header.tensors):
        raise UserError(
            f"{path} promises {config['num_hidden_layers']} layers with {len(header.tensors)} tensors; "
            "download it again"
        )
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = (config[f"num_{name}_heads"] * config["head_dim"] for name in ("attention", "key_value"))
    layer: dict[str, tuple[int, ...]] = {
        "attn_norm": (hidden,),
        "attn_q": (q, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, q),
        "ffn_norm": (hidden,),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    wanted: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        wanted["output.weight"] = (vocab, hidden)
    for i in range(config["num_hidden_layers"]):
        wanted |= {f"blk.{i}.{name}.weight": shape for name, shape in layer.items()}
    for tensor in header.tensors:
        if tensor.tensor_type not in (*BITS, *FLOATS):
            raise UserError(
                f"{path} has {tensor.name!r} as {tensor.tensor_type.name}, which cannot be converted; "
                "use the Q4_0, Q4_1, Q8_0, F16 or F32 file of this model"
            )
        shape = tuple(reversed(tensor.shape.tolist()))
        if (expected := wanted.pop(tensor.name, None)) != shape:
            fault = "is not known" if expected is None else f"has the shape {shape} instead of {expected}"
            raise UserError(
                f"the tensor {tensor.name!r} of {path} {fault}; use the model's Hugging Face folder instead"
            )
    if wanted:
        raise UserError(f"{path} lacks the tensor {next(iter(wanted))}; download it again")
    quantised = [tensor for tensor in header.tensors if tensor.tensor_type in BITS]
    return {_hf_name(tensor.name).removesuffix(".weight"): BITS[tensor.tensor_type] for tensor in quantised}


def _hf_name(name: str) -> str:
    """Return Hugging Face's name: blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    match name.split("."):
        case ["blk", index, module, leaf]:
            return f"model.layers.{index}.{_LAYER[module]}.{leaf}"
        case [module, leaf]:
            return f"{_TOP[module]}.{leaf}"
    raise ValueError(name)


def _load_weights(path: Path, config: dict[str, Any]) -> dict[str, mx.array]:
    try:
        tensors: Any = mx.load(str(path), format="gguf")
    except (RuntimeError, ValueError) as error:
        raise UserError(f"mlx cannot read {path} ({error}); download it again") from error
    weights = {_hf_name(name): array for name, array in tensors.items()}
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for name, array in weights.items():
        module = name.split(".")[-2]
        if module in heads:
            weights[name] = unpermute(array, heads[module])
        elif module.endswith("norm"):
            # float16 where that is exact, so that the scale of a norm does not promote a half model to float32
            half = array.astype(mx.float16)
            weights[name] = half if mx.array_equal(half.astype(array.dtype), array) else array
    return weights


def unpermute(rows: mx.array, heads: int) -> mx.array:
    """Undo llama.cpp's order of the q and k rows: (heads, head_dim/2, 2) -> (heads, 2, head_dim/2).

    The scales and biases of a quantised weight have a row per row of the weight, so they move alike.
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
