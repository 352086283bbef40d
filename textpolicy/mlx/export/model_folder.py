"""Export a model with its adapters merged, as a folder that mlx-lm or transformers loads."""

from __future__ import annotations

import contextlib
import io
import json
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten, tree_unflatten

from ...errors import UserError
from ..adapters.attach import attached, wrapped
from ..adapters.merging import merge_adapters
from ..adapters.quantised import dequantise, is_floating
from ..files.entries import settle
from ..files.folder import INDEX, copy_companions, weight_files
from ..files.safetensors import save_arrays
from ..files.tokenizer import read_json, stop_ids
from .files import DTYPES, cast, check_layout, read_config, write_json, written_whole

BITS = {"q4": 4, "q8": 8}  # bits of MLX's affine quantization
GROUP_SIZE = 64  # weights per scale


def merge(model: nn.Module) -> nn.Module:
    """Merge the adapters of ``model`` into its weights, in place, all of them float32 and none quantised.

    The weights are cast to float32 before the sum, because float16 would round a small change away. Raises UserError
    for a layer that cannot be dequantised.
    """
    model.set_dtype(mx.float32)
    if attached(model) is not None or wrapped(model):
        merge_adapters(model, dequantize=True)
    dequantise(model)
    for name, module in model.named_modules():
        if "scales" in module:
            raise UserError(
                f"the layer {name!r} is a {type(module).__name__}, which cannot be turned into floats, so this model "
                "cannot be exported; export another"
            )
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
    """Merge the adapters of ``model`` in place and write it to the new folder ``out``.

    ``base`` is the folder it was loaded from (see ``find_model``): config, tokenizer and other files come from
    there. ``dtype`` is a name in ``DTYPES``; None keeps each weight's dtype in ``base`` (that of the scales, if it is
    quantised). ``bits``, only for the layout "mlx", quantises in groups of 64. Raises UserError if ``out`` exists, or
    if transformers stores the weights of this model differently.
    """
    config = read_config(base)
    if layout == "hf":
        check_layout(config, "hf")
    merge(model)
    _cast(model, base, dtype)
    with written_whole(out) as folder:
        folder.mkdir()
        _copy_companions(base, folder)
        _keep_stop_tokens(base, folder, config)
        config = _plain_config(config, model, dtype)
        if layout == "mlx":  # whose class may not read the entries as the base has them
            names = dict(tree_flatten(model.parameters()))
            changes = settle(config, names, "lm_head.weight" in names, f"{base / 'config.json'}").changes
            config |= {key: value for key, value in changes.items() if value is not None}
        if bits:
            from mlx_lm.utils import quantize_model

            with contextlib.redirect_stdout(io.StringIO()):  # it prints the bits per weight
                _, config = quantize_model(model, config, GROUP_SIZE, bits)
        write_json(config, folder / "config.json")
        _write_weights(model, folder, "mlx" if layout == "mlx" else "pt")


def _cast(model: nn.Module, base: Path, dtype: str | None) -> None:
    """Turn the floats of ``model``, in place, into ``dtype`` or, without one, into their dtypes in ``base``."""
    tensors: dict[str, Any] = {}
    for file in weight_files(base):
        tensors |= mx.load(str(file))  # type: ignore[arg-type]  # lazily: only the headers are read
    stored = {name: array.dtype for name, array in tensors.items() if array.dtype in DTYPES.values()}
    common = max(stored.values(), key=list(stored.values()).count, default=mx.float32)
    weights: dict[str, mx.array] = dict(tree_flatten(model.parameters()))
    for name in [name for name, weight in weights.items() if is_floating(weight)]:
        scales = stored.get(f"{name.removesuffix('.weight')}.scales", common)
        target = stored.get(name, scales) if dtype is None else DTYPES[dtype]
        model.update(tree_unflatten([(name, cast(name, weights.pop(name), target))]))  # one in memory twice


def _plain_config(config: dict[str, Any], model: nn.Module, dtype: str | None) -> dict[str, Any]:
    """Return the base's config without quantization, with the keys transformers needs that one from GGUF may lack."""
    dropped = ("quantization", "quantization_config", "torch_dtype", "dtype", "_name_or_path")
    plain = {key: value for key, value in config.items() if key not in dropped}
    weights = dict(tree_flatten(model.parameters()))
    plain = {"tie_word_embeddings": True} | plain  # mlx-lm's default is not transformers'
    if "lm_head.weight" in weights:
        plain["tie_word_embeddings"] = False  # whatever the base says: one that differs from the embedding was used
    if plain["model_type"] == "llama":
        plain = {"hidden_act": "silu"} | plain
    if dtype is None:
        found = [array.dtype for array in weights.values() if is_floating(array)]
        common = max(found, key=found.count)
        dtype = next(name for name, d in DTYPES.items() if d == common)
    return plain | {"torch_dtype": dtype}  # the name that every version of transformers reads


def _copy_companions(base: Path, folder: Path) -> None:
    """Copy the companions of the weights, with a tokenizer_config.json that older versions of transformers read."""
    copy_companions(base, folder)
    path = folder / "tokenizer_config.json"
    if path.exists():
        tokenizer = json.loads(path.read_text(encoding="utf-8"))
        if tokenizer.get("tokenizer_class") == "TokenizersBackend":  # only transformers 5 has this class
            write_json(tokenizer | {"tokenizer_class": "PreTrainedTokenizerFast"}, path)


def _keep_stop_tokens(base: Path, folder: Path, config: dict[str, Any]) -> None:
    """Write generation_config.json with every token that ends a completion, unless the base's has them all."""
    from mlx_lm.utils import load_tokenizer

    path, names = folder / "generation_config.json", ("bos_token_id", "eos_token_id", "pad_token_id")
    values = (
        read_json(path) if path.exists() else {name: config[name] for name in names if config.get(name) is not None}
    )
    stop, given = stop_ids(base, load_tokenizer(base)), values.get("eos_token_id")
    if stop and sorted(given if isinstance(given, list) else [given]) != stop:
        values["eos_token_id"] = stop if len(stop) > 1 else stop[0]
    write_json(values, path)


def _write_weights(model: nn.Module, folder: Path, kind: str) -> None:
    """Write the weights in files of at most 5 GB, with an index if there are several."""
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
    write_json({"metadata": total, "weight_map": files}, folder / INDEX)
