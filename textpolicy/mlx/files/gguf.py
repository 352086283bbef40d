"""Read GGUF files of Llama, Qwen 2 and 3, and Gemma 3, or convert them to folders that mlx-lm loads.

What a file says and is not read would change what is computed, so every entry about the model and its tokenizer is
used, has the one value that changes nothing, or is refused by name. Sizes are checked against the file first.
"""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import numpy as np
from gguf import GGMLQuantizationType as Kind
from gguf import GGUFReader, quants
from gguf.constants import GGML_QUANT_SIZES, Keys

from ...errors import UserError
from .safetensors import save_arrays
from .tokenizer import NORMAL, TokenizerData, save_tokenizer

GROUP_SIZE = 32  # values per scale of what MLX holds exactly
# The types whose groups of 32 values are scale * q + bias, as MLX's are, and the bits of q
BITS = {
    Kind.Q4_0: 4,
    Kind.Q4_1: 4,
    Kind.Q4_K: 4,
    Kind.Q5_0: 5,
    Kind.Q5_1: 5,
    Kind.Q5_K: 5,
    Kind.Q8_0: 8,
    Kind.IQ4_NL: 8,
}
_ZERO = {Kind.Q4_0: 8, Kind.Q5_0: 16, Kind.Q8_0: 128, Kind.IQ4_NL: 128}  # the q of 0 in types without a bias
FLOATS = (Kind.F16, Kind.F32, Kind.BF16)
NOTES = "gguf.json"  # in a converted folder: the layers whose type became floats, and the bits that hold it nearly
_CHUNK = 2**24  # values unpacked at a time

STOPS = "textpolicy.stop_token_ids"  # all of them, which GGUF itself has places for three
_REQUIRED: Any = object()
_ANY: Any = object()


@dataclass(frozen=True, slots=True)
class Family:
    """The differences of one architecture from Llama, in its files and in Hugging Face's folders."""

    kind: str  # config.json's model_type
    architecture: str
    layer: Mapping[str, str]  # names of a block's parts, without the common ones
    paired: bool = False  # rows of q and k pair neighbours, and not halves
    norm_shift: float = 0.0  # what the file adds to the scale of a norm


_COMMON = {
    "attn_norm": "input_layernorm",
    "attn_q": "self_attn.q_proj",
    "attn_k": "self_attn.k_proj",
    "attn_v": "self_attn.v_proj",
    "attn_output": "self_attn.o_proj",
    "ffn_gate": "mlp.gate_proj",
    "ffn_up": "mlp.up_proj",
    "ffn_down": "mlp.down_proj",
}
_TOP = {"token_embd": "model.embed_tokens", "output_norm": "model.norm", "output": "lm_head"}
_HEAD_NORMS = {"attn_q_norm": "self_attn.q_norm", "attn_k_norm": "self_attn.k_norm"}
_AFTER = {"ffn_norm": "post_attention_layernorm"}
FAMILIES = {
    "llama": Family("llama", "LlamaForCausalLM", _AFTER, paired=True),
    "qwen2": Family("qwen2", "Qwen2ForCausalLM", _AFTER),
    "qwen3": Family("qwen3", "Qwen3ForCausalLM", _AFTER | _HEAD_NORMS),
    "gemma3": Family(
        "gemma3_text",
        "Gemma3ForCausalLM",
        {
            "post_attention_norm": "post_attention_layernorm",
            "ffn_norm": "pre_feedforward_layernorm",
            "post_ffw_norm": "post_feedforward_layernorm",
        }
        | _HEAD_NORMS,
        norm_shift=1.0,
    ),
}

# The entries about the architecture that are not read, with the values that change nothing
_NEUTRAL: dict[str, Any] = {
    "vocab_size": _ANY,
    "tensor_data_layout": _ANY,
    "pooling_type": _ANY,
    "rope.scaling.finetuned": _ANY,
    "rope.scaling.original_context_length": _ANY,  # of scalings that are refused
    "rope.scaling.attn_factor": (1,),
    "rope.scaling.yarn_log_multiplier": (0,),
    "attention.causal": (True,),
    "attention.clamp_kqv": (0,),
    "attention.max_alibi_bias": (0,),
    "attention.scale": (0,),
    "attn_logit_softcapping": (0,),
    "final_logit_softcapping": (0,),
    "expert_count": (0,),
    "expert_used_count": (0,),
    "logit_scale": (0, 1),
    "residual_scale": (0, 1),
    "embedding_scale": (0, 1),
    "use_parallel_residual": (False,),
}
_NEUTRAL_TOKENIZER: dict[str, Any] = {
    "add_eos_token": (False,),
    "add_sep_token": (False,),
    "remove_extra_whitespaces": (False,),
    "escape_whitespaces": (True,),
    "token_type_count": _ANY,
    Keys.Tokenizer.SEP_ID.removeprefix("tokenizer.ggml."): _ANY,  # its spelling is llama.cpp's
    **dict.fromkeys((f"{name}_token_id" for name in ("mask", "cls", "prefix", "suffix", "middle")), _ANY),
    **dict.fromkeys((f"fim_{name}_token_id" for name in ("pre", "suf", "mid", "pad", "rep", "sep")), _ANY),
}


@dataclass(frozen=True, eq=False)
class GGUFModel:
    """The model in the layout of Hugging Face's Llama, with quantised weights as MLX triples."""

    config: dict[str, Any]  # config.json without the quantization
    weights: dict[str, mx.array]
    quantization: dict[str, Any]  # config.json's "quantization"; empty when no weight is quantised
    tokenizer: TokenizerData
    inexact: dict[
        str, int
    ]  # the layers that are floats because MLX's groups cannot hold their type, and nearly holding bits


def read_gguf(path: str | Path) -> GGUFModel:
    """Read a GGUF file. Raises UserError that says what is wrong with it."""
    path = Path(path)
    header = _read_header(path)
    metadata = _Metadata(path, header)
    metadata.expect("general.architecture", tuple(FAMILIES))
    metadata.expect("general.type", ("model",), "model")
    if (files := metadata.get("split.count", int, 1)) > 1:
        raise UserError(f"{path} is one of {files} files of a model; merge them first, with llama-gguf-split")
    name = metadata.get("general.architecture", str)
    tokenizer = _tokenizer(metadata)
    config = _config(metadata, FAMILIES[name], name, header, tokenizer)
    metadata.refuse_unread(f"{name}.", _NEUTRAL)
    metadata.refuse_unread("tokenizer.ggml.", _NEUTRAL_TOKENIZER)
    bits = _check_tensors(path, header, FAMILIES[name], config)
    # mlx-lm's table: the most common number of bits, and the layers that differ.
    quantization: dict[str, Any] = {}
    if bits:
        common = max(sorted(set(BITS.values())), key=list(bits.values()).count)
        quantization = {"group_size": GROUP_SIZE, "bits": common}
        quantization |= {name: {"group_size": GROUP_SIZE, "bits": b} for name, b in bits.items() if b != common}
    with np.errstate(all="ignore"):  # a scale of 0 has no inverse; one that is no number stays none
        weights, inexact = _load_weights(header, FAMILIES[name], config)
    return GGUFModel(config, weights, quantization, tokenizer, inexact)


def convert(path: str | Path, folder: str | Path) -> None:
    """Write the model in the GGUF file ``path`` as a folder that ``mlx_lm.load`` reads."""
    model, folder = read_gguf(path), Path(folder)
    folder.mkdir(parents=True, exist_ok=True)
    save_tokenizer(model.tokenizer, folder, model.config["max_position_embeddings"])
    config = model.config | ({"quantization": model.quantization} if model.quantization else {})
    (folder / "config.json").write_text(json.dumps(config, indent=2) + "\n")
    (folder / NOTES).write_text(json.dumps(model.inexact, indent=2) + "\n")
    save_arrays(folder / "model.safetensors", model.weights, {"format": "mlx"})


# ---- the header


class _StrictReader(GGUFReader):
    """The reader of the gguf package, made to refuse reads past the end, which it would take for empty.

    It slices a plain array instead of the file's map, which takes half the time of a large vocabulary.
    """

    def _get(self, offset: Any, dtype: Any, count: Any = 1, override_order: Any = None) -> Any:
        end = int(offset) + np.dtype(dtype).itemsize * int(count)
        if end > len(self.data):
            raise ValueError(f"it ends at byte {len(self.data)} where its header promises {end} or more")
        found = vars(self).setdefault("plain", np.asarray(self.data))[int(offset) : end].view(dtype)
        order = override_order or self.byte_order
        return found if order == "I" else found.view(found.dtype.newbyteorder(order))


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
        self.read: set[str] = set()

    def get(self, key: str, kind: type, default: Any = _REQUIRED) -> Any:
        self.read.add(key)
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

    def refuse_unread(self, prefix: str, neutral: Mapping[str, Any]) -> None:
        """Raise UserError for an entry that nothing has read, unless its value is one of ``neutral``'s."""
        for key in self.fields:
            if key in self.read or not key.startswith(prefix):
                continue
            allowed = neutral.get(key.removeprefix(prefix), ())
            if allowed is not _ANY and (value := self.fields[key].contents()) not in allowed:
                raise UserError(
                    f"{self.path} has {value!r:.60} for {key}, which textpolicy does not use; use the model's "
                    "Hugging Face folder instead"
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
    metadata.expect("tokenizer.ggml.model", ("gpt2", "llama"))
    sentencepiece = metadata.get("tokenizer.ggml.model", str) == "llama"
    pre_tokenizer = metadata.get("tokenizer.ggml.pre", str, "default")
    scores = metadata.array("tokenizer.ggml.scores", float, _REQUIRED if sentencepiece else [])
    if sentencepiece and len(scores) != len(tokens):
        raise UserError(f"{metadata.path} has {len(tokens)} tokens and {len(scores)} scores; download it again")
    # a file leaves an empty list out; words then come from nowhere, unless they are whole in the vocabulary
    letters = pre_tokenizer == "llama-bpe" or all(
        len(t) == 1 for t, k in zip(tokens, types, strict=True) if k == NORMAL
    )
    stops = {token_id(name) for name in ("eot", "eom")} | set(metadata.array(STOPS, int, []))
    return TokenizerData(
        tokens=tokens,
        token_types=types,
        merges=metadata.array("tokenizer.ggml.merges", str, [] if sentencepiece or letters else _REQUIRED),
        pre_tokenizer=pre_tokenizer,
        eos=token_id("eos", _REQUIRED),  # type: ignore[arg-type]
        bos=token_id("bos"),
        unknown=token_id("unknown"),
        padding=token_id("padding"),
        add_bos=metadata.get("tokenizer.ggml.add_bos_token", bool, sentencepiece or pre_tokenizer == "llama-bpe"),
        chat_template=metadata.get("tokenizer.chat_template", str, None),
        stops=tuple(sorted(stop for stop in stops if stop is not None)),
        scores=scores if sentencepiece else None,
        add_space=metadata.get("tokenizer.ggml.add_space_prefix", bool, True),
    )


def _config(
    metadata: _Metadata, family: Family, name: str, header: GGUFReader, tokenizer: TokenizerData
) -> dict[str, Any]:
    heads = metadata.count(f"{name}.attention.head_count")
    hidden = metadata.count(f"{name}.embedding_length")
    head_dim = metadata.count(f"{name}.attention.key_length", hidden // heads)
    if (values := metadata.count(f"{name}.attention.value_length", head_dim)) != head_dim:
        raise UserError(f"{metadata.path} has keys of {head_dim} and values of {values} numbers; use another model")
    if (rotated := metadata.count(f"{name}.rope.dimension_count", head_dim)) != head_dim or head_dim % 2:
        raise UserError(f"{metadata.path} rotates {rotated} of {head_dim} dimensions of a head; use another model")
    layers, context = metadata.count(f"{name}.block_count"), metadata.count(f"{name}.context_length")
    stops = sorted({tokenizer.eos, *tokenizer.stops})
    config: dict[str, Any] = {
        "architectures": [family.architecture],
        "model_type": family.kind,
        "hidden_size": hidden,
        "num_hidden_layers": layers,
        "intermediate_size": metadata.count(f"{name}.feed_forward_length"),
        "num_attention_heads": heads,
        "num_key_value_heads": metadata.count(f"{name}.attention.head_count_kv", heads),
        "head_dim": head_dim,
        "rms_norm_eps": _shortest(metadata.get(f"{name}.attention.layer_norm_rms_epsilon", float)),
        "rope_theta": _shortest(metadata.get(f"{name}.rope.freq_base", float, 10000.0)),
        "max_position_embeddings": context,
        "vocab_size": len(tokenizer.tokens),
        "tie_word_embeddings": not any(tensor.name == "output.weight" for tensor in header.tensors),
        "eos_token_id": stops if len(stops) > 1 else tokenizer.eos,
        "bos_token_id": tokenizer.bos,
        "pad_token_id": tokenizer.padding,
    }
    config["rope_scaling"] = _rope_scaling(metadata, name, header, config)
    window = metadata.get(f"{name}.attention.sliding_window", int, 0)
    if family.kind == "gemma3_text":
        config |= {
            "sliding_window": metadata.count(f"{name}.attention.sliding_window"),
            "sliding_window_pattern": metadata.count(f"{name}.attention.sliding_window_pattern", 6),
            "rope_local_base_freq": _shortest(metadata.get(f"{name}.rope.freq_base_swa", float, 10000.0)),
            # llama.cpp's rule: the model of 27 billion weights alone has another scale
            "query_pre_attn_scalar": hidden // heads if layers == 62 else head_dim,
            "hidden_activation": "gelu_pytorch_tanh",
        }
    elif 0 < window < context:
        raise UserError(
            f"{metadata.path} has {window} for {name}.attention.sliding_window, which textpolicy does not use; use the "
            "model's Hugging Face folder instead"
        )
    return {key: value for key, value in config.items() if value is not None}


def _rope_scaling(metadata: _Metadata, name: str, header: GGUFReader, config: dict[str, Any]) -> dict[str, Any] | None:
    """Return config.json's rope_scaling: linear, Llama 3's, which a file has as a tensor of factors, or None."""
    metadata.expect(f"{name}.rope.scaling.type", ("none", "linear"), "linear")
    old = metadata.get(f"{name}.rope.scale_linear", float, 0.0)
    factor = _shortest(metadata.get(f"{name}.rope.scaling.factor", float, old))
    if metadata.get(f"{name}.rope.scaling.type", str, "linear") == "linear" and factor not in (0, 1):
        return {"rope_type": "linear", "type": "linear", "factor": factor}
    for tensor in header.tensors:
        if tensor.name == "rope_freqs.weight" and tensor.tensor_type == Kind.F32 and name == "llama":
            largest, count = _shortest(tensor.data.max(initial=0)), config["head_dim"] // 2
            scaling = {"rope_type": "llama3", "factor": largest, **_LLAMA_3}
            if largest > 1 and tensor.data.shape == (count,):
                wanted = llama_3_factors(config["rope_theta"], config["head_dim"], scaling)
                return scaling if np.allclose(tensor.data, wanted, rtol=1e-4) else None
    return None


_LLAMA_3: dict[str, Any] = {
    "low_freq_factor": 1.0,
    "high_freq_factor": 4.0,
    "original_max_position_embeddings": 8192,
}


def llama_3_factors(base: float, head_dim: int, scaling: Mapping[str, Any]) -> np.ndarray:
    """Return (head_dim / 2,) the factors by which Llama 3.1 stretches the wavelengths of its rotations."""
    wavelengths = 2 * np.pi * base ** (np.arange(0, head_dim, 2) / head_dim)
    low, high = scaling["low_freq_factor"], scaling["high_freq_factor"]
    share = np.clip((scaling["original_max_position_embeddings"] / wavelengths - low) / (high - low), 0, 1)
    factors: np.ndarray = 1 / ((1 - share) / scaling["factor"] + share)
    return factors


def _shortest(value: float) -> float:
    """Return 1e-05 for a float32 in the file that reads 9.999999747378752e-06."""
    return float(str(np.float32(value)))


# ---- the tensors


def _check_tensors(path: Path, header: GGUFReader, family: Family, config: dict[str, Any]) -> dict[str, int]:
    """Return the bits of the quantised layers by their new names, after checking every tensor against ``config``."""
    if config["num_hidden_layers"] > len(header.tensors):
        raise UserError(
            f"{path} promises {config['num_hidden_layers']} layers with {len(header.tensors)} tensors; "
            "download it again"
        )
    hidden, inner, vocab = config["hidden_size"], config["intermediate_size"], config["vocab_size"]
    q, kv = (config[f"num_{name}_heads"] * config["head_dim"] for name in ("attention", "key_value"))
    shapes: dict[str, tuple[int, ...]] = {
        "attn_q": (q, hidden),
        "attn_k": (kv, hidden),
        "attn_v": (kv, hidden),
        "attn_output": (hidden, q),
        "ffn_gate": (inner, hidden),
        "ffn_up": (inner, hidden),
        "ffn_down": (hidden, inner),
    }
    layer = {f"{n}.weight": shapes.get(n, (hidden,)) for n in (*_COMMON, *family.layer)}
    layer |= {f"{n}.weight": (config["head_dim"],) for n in _HEAD_NORMS if n in family.layer}
    if family.kind == "qwen2":
        layer |= {f"attn_{n}.bias": shapes[f"attn_{n}"][:1] for n in "qkv"}
    wanted: dict[str, tuple[int, ...]] = {"token_embd.weight": (vocab, hidden), "output_norm.weight": (hidden,)}
    if not config["tie_word_embeddings"]:
        wanted["output.weight"] = (vocab, hidden)
    if config.get("rope_scaling", {}).get("rope_type") == "llama3":
        wanted["rope_freqs.weight"] = (config["head_dim"] // 2,)
    for i in range(config["num_hidden_layers"]):
        wanted |= {f"blk.{i}.{name}": shape for name, shape in layer.items()}
    for tensor in header.tensors:
        kind, shape = tensor.tensor_type, tuple(reversed(tensor.shape.tolist()))
        if (expected := wanted.pop(tensor.name, None)) != shape:
            fault = "is not known" if expected is None else f"has the shape {shape} instead of {expected}"
            raise UserError(
                f"the tensor {tensor.name!r} of {path} {fault}; use the model's Hugging Face folder instead"
            )
        if kind not in (*BITS, *FLOATS) and (not _can_unpack(kind) or len(shape) != 2):
            raise UserError(
                f"{path} has {tensor.name!r} as {kind.name}, which cannot be converted; use a file of this model in "
                "Q4_K_M, Q5_K_M, Q6_K, Q8_0, F16 or F32"
            )
    if wanted:
        raise UserError(f"{path} lacks the tensor {next(iter(wanted))}; download it again")
    quantised = [tensor for tensor in header.tensors if tensor.tensor_type in BITS]
    return {_hf_name(t.name, family).removesuffix(".weight"): BITS[t.tensor_type] for t in quantised}


def _can_unpack(kind: Kind) -> bool:
    """Return whether the gguf package reads values of this type."""
    _, size = GGML_QUANT_SIZES[kind]
    try:
        quants.dequantize(np.zeros(size, np.uint8), kind)
    except NotImplementedError:
        return False
    return True


def _hf_name(name: str, family: Family) -> str:
    """Return Hugging Face's name: blk.3.attn_q.weight -> model.layers.3.self_attn.q_proj.weight."""
    match name.split("."):
        case ["blk", index, module, leaf]:
            return f"model.layers.{index}.{(_COMMON | dict(family.layer))[module]}.{leaf}"
        case [module, leaf]:
            return f"{_TOP[module]}.{leaf}"
    raise ValueError(name)


def _load_weights(
    header: GGUFReader, family: Family, config: dict[str, Any]
) -> tuple[dict[str, mx.array], dict[str, int]]:
    """Return the weights by their new names, and the layers that are floats although the file has them in few bits."""
    weights: dict[str, mx.array] = {}
    inexact: dict[str, int] = {}
    heads = {"q_proj": config["num_attention_heads"], "k_proj": config["num_key_value_heads"]}
    for tensor in header.tensors:
        if tensor.name == "rope_freqs.weight":  # in the config
            continue
        name, kind = _hf_name(tensor.name, family), tensor.tensor_type
        layer, module = name.removesuffix(".weight"), name.split(".")[-2]
        if kind in BITS:
            parts = dict(zip((name, f"{layer}.scales", f"{layer}.biases"), _triple(tensor.data, kind), strict=True))
        elif kind in FLOATS:
            bits16 = kind == Kind.BF16
            array = mx.array(tensor.data.view(np.uint16) if bits16 else tensor.data)
            parts = {name: array.view(mx.bfloat16) if bits16 else array}
        else:
            block, size = GGML_QUANT_SIZES[kind]
            parts = {name: mx.array(quants.dequantize(tensor.data, kind))}
            inexact[layer] = next(b for b in (2, 3, 4, 5, 6, 8) if b >= min(8, 8 * size / block + 1))
        for part, array in parts.items():
            if family.paired and module in heads:
                array = unpermute(array, heads[module])
            elif module.endswith("norm"):
                array = array.astype(mx.float32) - family.norm_shift
                # float16 where that is exact, so that the scale of a norm does not promote a half model to float32
                half = array.astype(mx.float16)
                array = half if mx.array_equal(half.astype(array.dtype), array) else array
            weights[part] = array
    return weights, inexact


def _triple(data: np.ndarray, kind: Kind) -> tuple[mx.array, mx.array, mx.array]:
    """Return (rows, n) uint32 packed q, scales and biases of their groups of 32, as ``mx.dequantize`` takes them.

    The type's blocks tell scale and bias; q follows from them and the values of the gguf package, exactly.
    """
    bits, rows = BITS[kind], len(data)
    blocks = np.ascontiguousarray(data).reshape(-1, GGML_QUANT_SIZES[kind][1])
    head = blocks[:, :4].copy().view(np.float16)
    if kind in (Kind.Q4_K, Kind.Q5_K):
        scale, least = quants.Q4_K.get_scale_min(blocks[:, 4:16])
        scales, biases = (h[:, None].astype(np.float32) * x for h, x in ((head[:, 0], scale), (-head[:, 1], least)))
    else:
        scales = head[:, :1]
        biases = scales.astype(np.float32) * -_ZERO[kind] if kind in _ZERO else head[:, 1:]
        exact = np.float16 if (np.abs(biases) <= np.finfo(np.float16).max).all() else np.float32
        scales, biases = scales.astype(exact), biases.astype(exact)
    scales, biases = scales.reshape(rows, -1), biases.reshape(rows, -1)
    packed = []
    step = max(1, _CHUNK // (scales.shape[1] * GROUP_SIZE))
    for i in range(0, rows, step):
        values = quants.dequantize(data[i : i + step], kind).reshape(-1, scales.shape[1], GROUP_SIZE)
        scale, bias = (a[i : i + step, :, None].astype(np.float32) for a in (scales, biases))
        q = np.nan_to_num(np.rint((values - bias) / scale), nan=0, posinf=0, neginf=0).astype(np.uint8)
        if bits == 4:
            q = q[..., 0::2] | (q[..., 1::2] << 4)
        elif bits == 5:
            spread = (q[..., None] >> np.arange(bits, dtype=np.uint8)) & 1
            q = np.packbits(spread.reshape(*q.shape[:2], -1), axis=-1, bitorder="little")
        packed.append(np.ascontiguousarray(q.reshape(len(values), -1)).view(np.uint32))
    return mx.array(np.concatenate(packed)), mx.array(scales), mx.array(biases)


def unpermute(rows: mx.array, heads: int) -> mx.array:
    """Undo llama.cpp's order of the q and k rows: (heads, head_dim/2, 2) -> (heads, 2, head_dim/2).

    The scales and biases of a quantised weight have a row per row of the weight, so they move alike.
    """
    pairs = rows.reshape(heads, -1, 2, *rows.shape[1:])
    return pairs.swapaxes(1, 2).reshape(rows.shape)
