"""Adapters on disk: a folder as mlx-lm reads it, or one file; written whole or not at all, and checked when read."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from ...config.adapters import Adapter, DoRA, Full, LoRA, make_adapter, settings_of
from ...errors import UserError
from ..files.safetensors import load_arrays, save_arrays
from .attach import Attached, attach, attached, detach, lora_parameters, remember, trainable, wrapped
from .fingerprint import Base
from .lora_linear import in_the_models_type
from .tinylora import Factors, SVDLinear

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
_METADATA = "adapter_config"  # of a single file, which has no CONFIG beside it
_OURS = "textpolicy"  # the part of the config that mlx-lm does not read
_MLX_LM = {"qlora": "lora"}  # its names of our kinds, where they differ


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Write the adapter of ``model`` to ``path``, a folder, or a file if it ends in .safetensors, by one rename.

    A folder holds ``adapters.safetensors`` and ``adapter_config.json`` and loads with ``load_model(name,
    adapter_path=path)`` and, but for tinylora and lora_xs, with mlx-lm; a file has the config in its
    metadata. An adapter that was there is replaced. Raises UserError for a model without an adapter,
    and for a folder in which there is anything else.
    """
    record, path = attached(model), Path(path)
    if record is None:
        raise UserError("the model has no adapter to save; attach one first, with apply_lora or attach")
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as workspace:
            write = _write_file if path.suffix == ".safetensors" else _write_folder
            write(saved_arrays(model), _config(record), Path(workspace), path)
    except OSError as error:
        raise UserError(
            f"cannot write the adapter to {path} ({error.strerror or error}); choose another place"
        ) from error


def load_adapter(model: nn.Module, path: str | Path) -> nn.Module:
    """Put the adapter at ``path`` on ``model``, a freshly loaded base; only the adapter trains then.

    ``path`` is a folder written by ``save_adapter`` or mlx-lm, or a file. Raises UserError that says what does
    not fit: the base, the kind, the rank, a name or a shape.
    """
    saved = read_adapter(path)
    if attached(model) is not None:
        raise UserError(f"the model has an adapter already; load the base again for the one in {path}")
    try:
        if (record := saved.record) is None:
            _attach_of_mlx_lm(model, saved)
        else:
            _check_base(saved, Base.of(model))
            attach(model, record.adapter, None, factors=_blank, quantise=record.quantised is not None)
        fill(model, saved)
    except UserError:
        detach(model)
        raise
    return model


def reread_adapter(model: nn.Module, path: str | Path) -> nn.Module:
    """Give ``model`` the values of the adapter at ``path``, which must be of the kind and settings it has.

    A model without an adapter gets it as by ``load_adapter``. Raises UserError that names what differs.
    """
    record, saved = attached(model), read_adapter(path)
    if record is None:
        return load_adapter(model, path)
    if saved.record is None:
        raise UserError(f"the adapter in {path} was not written by textpolicy; load it on a fresh base")
    if fault := record.base.difference(saved.record.base):
        raise UserError(f"the model is {fault}, the base of the adapter in {path}; give that one's own base")
    _check_settings(saved, record)
    fill(model, saved)
    return model


# ---- what is saved


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """An adapter as it was read."""

    path: Path
    config: Mapping[str, Any]
    arrays: Mapping[str, mx.array]
    record: Attached | None  # None for one that textpolicy did not write

    @property
    def is_full(self) -> bool:
        """Whether it is the weights of the model itself."""
        return self.config.get("fine_tune_type") == "full"


def saved_arrays(model: nn.Module) -> dict[str, mx.array]:
    """The trained parameters, and the frozen ones that an adapter on an SVD has beside them."""
    around = tuple(f"{name}." for name, module in model.named_modules() if isinstance(module, SVDLinear))
    everything: Any = tree_flatten(model.parameters())
    frozen = {name: a for name, a in everything if name.startswith(around) and ".linear." not in name}
    return {**frozen, **trainable(model)}


def _config(record: Attached) -> dict[str, Any]:
    """mlx-lm's entries, and under one name of ours all that ``Attached`` holds."""
    adapter = record.adapter
    theirs: dict[str, Any] = {"fine_tune_type": _MLX_LM.get(adapter.kind, adapter.kind), "num_layers": record.blocks}
    if isinstance(adapter, LoRA):
        theirs["lora_parameters"] = lora_parameters(adapter, record.keys)
    ours = {
        "kind": adapter.kind,
        "settings": settings_of(adapter),
        "keys": list(record.keys),
        "quantised": record.quantised,
        "base": record.base.written(),
    }
    return {**theirs, _OURS: ours}


def _write_file(arrays: dict[str, mx.array], config: dict[str, Any], workspace: Path, path: Path) -> None:
    save_arrays(workspace / WEIGHTS, arrays, {_METADATA: json.dumps(config)})
    os.replace(workspace / WEIGHTS, path)


def _write_folder(arrays: dict[str, mx.array], config: dict[str, Any], workspace: Path, path: Path) -> None:
    if path.exists() and (not path.is_dir() or {p.name for p in path.iterdir()} - {WEIGHTS, CONFIG}):
        raise UserError(f"{path} holds something else than an adapter; choose another folder, or empty this one")
    new = workspace / "adapter"
    new.mkdir()
    save_arrays(new / WEIGHTS, arrays)
    (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    old = workspace / "old"
    try:
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
    except BaseException:  # Ctrl-C must not lose the older one either
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise


# ---- what is read


def read_adapter(path: str | Path) -> Saved:
    """The adapter at ``path``, a folder or a file, not yet on a model. Raises UserError."""
    path = Path(path)
    if path.name == WEIGHTS and (path.parent / CONFIG).is_file():
        path = path.parent
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise UserError(f"there is no adapter at {path}; check the path")
        arrays, metadata = _load(path)
        if _METADATA not in metadata:
            raise UserError(f"{path} holds no {CONFIG}; give the folder it comes from, or a file of save_adapters")
        return _saved(path, metadata[_METADATA], arrays)
    for file in (CONFIG, WEIGHTS):
        if not (path / file).is_file():
            raise UserError(f"the adapter folder {path} has no {file}; give a folder of save_adapters or mlx-lm")
    return _saved(path, _text(path / CONFIG), _load(path / WEIGHTS)[0])


def _load(path: Path) -> tuple[dict[str, mx.array], dict[str, str]]:
    return load_arrays(path, "save the adapter again")


def _text(path: Path) -> str:
    try:
        return path.read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path} cannot be read ({error}); save the adapter again") from error


def _saved(path: Path, text: str, arrays: dict[str, mx.array]) -> Saved:
    try:
        config = dict(json.loads(text))
        saved = Saved(path, config, arrays, _record(config[_OURS]) if _OURS in config else None)
        _refuse_lies(saved)
        return saved
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise UserError(f"the {CONFIG} of {path} cannot be read ({error!r}); save the adapter again") from error


def _refuse_lies(saved: Saved) -> None:
    """Raise UserError for a rank or length beyond every array, for which memory would be taken before it is missed."""
    longest = max((max(a.shape, default=0) for a in saved.arrays.values()), default=0)
    theirs = saved.config.get("lora_parameters") or {}
    ours = {} if saved.record is None else settings_of(saved.record.adapter)
    for settings in (theirs, ours):
        for name in ("rank", "u"):
            if not saved.is_full and settings.get(name, 0) > longest:
                raise UserError(
                    f"the {CONFIG} of {saved.path} says {name} {settings[name]} and no array of the adapter is longer "
                    f"than {longest}; save the adapter again"
                )


def _record(ours: Mapping[str, Any]) -> Attached:
    adapter = make_adapter(ours["kind"], ours["settings"])
    _refuse_types(ours["settings"], settings_of(type(adapter)()))
    quantised = None if ours["quantised"] is None else (int(ours["quantised"][0]), int(ours["quantised"][1]))
    return Attached(adapter, Base.read(ours["base"]), 0, tuple(ours["keys"]), quantised)


def _refuse_types(settings: Mapping[str, Any], defaults: Mapping[str, Any]) -> None:
    """Raise TypeError for a value of another type than the default, whole numbers for floats and None aside."""
    for name, value in settings.items():
        allowed = {type(defaults[name]), int if type(defaults[name]) in (float, type(None)) else type(defaults[name])}
        texts = all(isinstance(item, str) for item in value) if isinstance(value, list) else True
        if type(value) not in allowed or not texts:
            raise TypeError(f"{name} is {value!r:.40}")


def _attach_of_mlx_lm(model: nn.Module, saved: Saved) -> None:
    """An adapter that mlx-lm wrote, by its own rules."""
    base, config = Base.of(model), saved.config
    try:
        blocks = config.get("num_layers", 0)
        blocks = blocks if 0 < blocks < len(model.layers) else len(model.layers)
        adapter: Adapter = Full()
        if saved.is_full:
            model.unfreeze()
        else:
            how, kind = config["lora_parameters"], DoRA if config.get("fine_tune_type") == "dora" else LoRA
            model.freeze()
            linear_to_lora_layers(model, blocks, how, use_dora=kind is DoRA)
            in_the_models_type(model)
            alpha = how["scale"] * how["rank"]
            keys = _adapted_keys(model)
            adapter = kind(layers=blocks, modules=keys, rank=how["rank"], alpha=alpha, dropout=how["dropout"])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"the adapter in {saved.path} does not fit this model ({error!r}); use its own base") from error
    remember(model, Attached(adapter, base, blocks, _adapted_keys(model)))


def _adapted_keys(model: nn.Module) -> tuple[str, ...]:
    """As mlx-lm gives them: names within a block, or in the model for what is in none."""
    blocks = {id(module) for block in model.layers for module in block.modules()}
    inside = {name for block in model.layers for name, _ in wrapped(block)}
    return tuple(sorted(inside | {name for name, module in wrapped(model) if id(module) not in blocks}))


def _blank(modules: Mapping[str, Any], rank: int) -> dict[str, Factors]:
    """Of the right shapes, for values that are then read."""
    return {name: _blank_factors(module, rank) for name, module in modules.items()}


def _blank_factors(module: nn.Linear | nn.QuantizedLinear, rank: int) -> Factors:
    outputs, inputs = module.weight.shape
    if isinstance(module, nn.QuantizedLinear):
        inputs = inputs * 32 // module.bits
    r = min(rank, outputs, inputs)
    return Factors(mx.zeros((outputs, r)), mx.zeros((r,)), mx.zeros((r, inputs)))


# ---- whether it fits


def _check_base(saved: Saved, base: Base) -> None:
    assert saved.record is not None
    if fault := base.difference(saved.record.base):
        raise UserError(f"the adapter in {saved.path} has another base: this model is {fault}; give its own base")


def _check_settings(saved: Saved, record: Attached) -> None:
    """One kind and equal settings."""
    assert saved.record is not None
    theirs, ours = saved.record.adapter, record.adapter
    if theirs.kind != ours.kind:
        raise UserError(f"the adapter in {saved.path} is a {theirs.kind} and the model's a {ours.kind}; load it anew")
    mine = settings_of(ours)
    differs = [f"{k} {v} where the model has {mine[k]}" for k, v in settings_of(theirs).items() if v != mine[k]]
    if differs:
        raise UserError(f"the adapter in {saved.path} has {', '.join(differs)}; load it on a fresh base")


def fill(model: nn.Module, saved: Saved) -> None:
    """Set the adapter's arrays, once all of them are known to fit. Raises UserError."""
    wanted = saved_arrays(model)
    if saved.record is None and saved.is_full:
        wanted = {name: value for name, value in wanted.items() if name in saved.arrays}  # mlx-lm saves what moved
    for name in [*saved.arrays, *wanted]:
        if name not in wanted or name not in saved.arrays:
            where = "this model has no place for" if name not in wanted else "it lacks"
            raise _misfit(saved, f"{where} {name}")
        if saved.arrays[name].shape != wanted[name].shape:
            raise _misfit(saved, _shape_fault(name, saved.arrays[name].shape, wanted[name].shape, _adapter(model)))
    model.load_weights([(name, saved.arrays[name].astype(value.dtype)) for name, value in wanted.items()], strict=False)
    mx.eval(model.parameters())


def _adapter(model: nn.Module) -> Adapter:
    record = attached(model)
    assert record is not None
    return record.adapter


def _shape_fault(name: str, found: tuple[int, ...], wanted: tuple[int, ...], adapter: Adapter) -> str:
    differing = {(f, w) for f, w in zip(found, wanted, strict=False) if f != w}
    rank = settings_of(adapter).get("rank")
    if len(found) == len(wanted) and len(differing) == 1 and {w for _, w in differing} == {rank}:
        return f"its config says rank {rank}, and {name} is of rank {differing.pop()[0]}"
    return f"{name} is of shape {tuple(found)} and would have to be of {tuple(wanted)}"


def _misfit(saved: Saved, what: str) -> UserError:
    return UserError(f"the adapter in {saved.path} does not fit this model: {what}; use its own base")
