"""A model with its adapters merged, as a folder that mlx-lm or transformers loads."""

from __future__ import annotations

import contextlib
import io
import json
import shutil
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ..adapters.attach import attached, wrapped
from ..adapters.merging import merge_adapters
from ..files.safetensors import save_arrays
from .files import DTYPES, check_layout, read_config, write_json, written_whole

BITS = {"q4": 4, "q8": 8}  # of MLX's own affine quantization
GROUP_SIZE = 64  # weights per scale

_BESIDE_THE_WEIGHTS = {".json", ".jsonl", ".jinja", ".model", ".py", ".tiktoken", ".txt"}
_WEIGHTS = ("config.json", "model.safetensors.index.json")  # written anew


def merge(model: nn.Module) -> nn.Module:
    """``model`` itself, its adapters added to its weights, all of them float32 and none quantised.

    float32 comes before the sum, because a small change is lost in the rounding of a half.
    """
    from mlx_lm.utils import dequantize_model

    model.set_dtype(mx.float32)
    if attached(model) is not None or wrapped(model):
        merge_adapters(model, dequantize=True)
    dequantize_model(model)
    model.set_dtype(mx.float32)  # layers whose scales are no floats dequantise to bfloat16
    return model


def export_folder(
    model: nn.Module,
    base: Path,
    out: Path,
    *,
    layout: Literal["mlx", "hf"] = "hf",
    dtype: str | None = None,
    bits: int | None = None,
) -> None:
    """Write ``model``, whose adapters are merged into it, to the new folder ``out``.

    ``base`` is the folder it was loaded from (see ``find_model``): config, tokenizer and the rest come from
    there. ``dtype`` is a name in ``DTYPES``; None takes for each weight what ``base`` stores it in (a
    quantised one's scales). ``bits``, for the layout "mlx" alone, quantises in groups of 64.
    Raises UserError if ``out`` exists, or if transformers keeps the weights of this model otherwise.
    """
    config = read_config(base)
    if layout == "hf":
        check_layout(config, "hf")
    merge(model)
    model.update(tree_unflatten(list(_cast(model, base, dtype).items())))
    with written_whole(out) as folder:
        folder.mkdir()
        _copy_companions(base, folder)
        _write_generation_config(config, folder)
        config = _plain_config(config, model, dtype)
        write_json(_quantize(model, config, bits) if bits else config, folder / "config.json")
        _write_weights(model, folder, "mlx" if layout == "mlx" else "pt")


def _cast(model: nn.Module, base: Path, dtype: str | None) -> dict[str, mx.array]:
    weights = dict(tree_flatten(model.parameters()))
    if dtype is not None:
        return {name: w.astype(DTYPES[dtype]) for name, w in weights.items()}
    stored = _stored_dtypes(base)
    common = max(stored.values(), key=list(stored.values()).count, default=mx.float32)
    return {name: w.astype(_dtype_of(name, stored, common)) for name, w in weights.items()}


def _stored_dtypes(base: Path) -> dict[str, mx.Dtype]:
    """The floating dtypes in the files of ``base`` by name; nothing but the headers is read."""
    tensors: dict[str, Any] = {}
    for file in sorted(base.glob("model*.safetensors")):
        tensors |= mx.load(str(file))  # type: ignore[arg-type]
    return {name: array.dtype for name, array in tensors.items() if array.dtype in DTYPES.values()}


def _dtype_of(name: str, stored: dict[str, mx.Dtype], common: mx.Dtype) -> mx.Dtype:
    scales = f"{name.removesuffix('.weight')}.scales"
    return stored.get(name, stored.get(scales, common))


def _plain_config(config: dict[str, Any], model: nn.Module, dtype: str | None) -> dict[str, Any]:
    """The base's config without its quantization, and with what transformers asks of one made from a GGUF file."""
    dropped = ("quantization", "quantization_config", "torch_dtype", "dtype", "_name_or_path")
    plain = {key: value for key, value in config.items() if key not in dropped}
    weights = dict(tree_flatten(model.parameters()))
    plain = {"tie_word_embeddings": "lm_head.weight" not in weights} | plain  # mlx-lm and transformers assume different
    if plain["model_type"] == "llama":
        plain = {"hidden_act": "silu"} | plain
    if dtype is None:
        found = [array.dtype for array in weights.values()]
        common = max(found, key=found.count)
        dtype = next(name for name, d in DTYPES.items() if d == common)
    return plain | {"torch_dtype": dtype}  # the name that every version of transformers reads


def _copy_companions(base: Path, folder: Path) -> None:
    """Tokenizer, chat template, code, licence: all that stands beside the weights."""
    for file in base.iterdir():
        named = file.suffix in _BESIDE_THE_WEIGHTS or file.name.startswith("LICENSE")
        if named and file.name not in _WEIGHTS and file.is_file():
            shutil.copyfile(file, folder / file.name)
    path = folder / "tokenizer_config.json"
    if path.exists():
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        if tokenizer.get("tokenizer_class") == "TokenizersBackend":  # transformers 5 alone knows this name
            write_json(tokenizer | {"tokenizer_class": "PreTrainedTokenizerFast"}, path)


def _write_generation_config(config: dict[str, Any], folder: Path) -> None:
    path = folder / "generation_config.json"
    if not path.exists():
        tokens = {key: config.get(key) for key in ("bos_token_id", "eos_token_id", "pad_token_id")}
        write_json({key: value for key, value in tokens.items() if value is not None}, path)


def _quantize(model: nn.Module, config: dict[str, Any], bits: int) -> dict[str, Any]:
    """Quantise ``model`` in place as mlx-lm does, and return the config that says so."""
    from mlx_lm.utils import quantize_model

    with contextlib.redirect_stdout(io.StringIO()):  # it prints the bits per weight
        _, config = quantize_model(model, config, GROUP_SIZE, bits)
    return config


def _write_weights(model: nn.Module, folder: Path, kind: str) -> None:
    """In files of at most 5 GB, with the index that more than one file needs."""
    from mlx_lm.utils import make_shards

    weights = dict(tree_flatten(model.parameters()))
    shards = make_shards(weights)
    if len(shards) == 1:
        save_arrays(folder / "model.safetensors", weights, {"format": kind})
        return
    files: dict[str, str] = {}
    for i, shard in enumerate(shards, 1):
        file = f"model-{i:05d}-of-{len(shards):05d}.safetensors"
        save_arrays(folder / file, shard, {"format": kind})
        files |= dict.fromkeys(shard, file)
    total = {"total_size": sum(array.nbytes for array in weights.values())}
    write_json({"metadata": total, "weight_map": files}, folder / "model.safetensors.index.json")
