"""Save and load adapters: a folder that mlx-lm reads or one file, written atomically and checked when read."""

from __future__ import annotations

import json
import os
import tempfile
from collections.abc import Mapping
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx.utils import tree_flatten
from mlx_lm.tuner.utils import linear_to_lora_layers

from ..._system.files import names
from ...config.adapters import Adapter, DoRA, Full, LoRA, make_adapter, settings_of
from ...errors import UserError
from ..files.safetensors import load_arrays, save_arrays
from .attach import (
    WRAPPERS,
    Attached,
    attach,
    attached,
    detach,
    freeze,
    lora_parameters,
    remember,
    trainable,
    with_our_layers,
    wrapped,
)
from .fingerprint import Fingerprint
from .tinylora import Factors, SVDLinear

WEIGHTS, CONFIG = "adapters.safetensors", "adapter_config.json"
_PEFT = "adapter_model."  # what PEFT's files of weights begin with
_METADATA = "adapter_config"  # the metadata key of a single file, which has no CONFIG beside it
_OURS = "textpolicy"  # the part of the config that mlx-lm does not read
_MLX_LM = {"qlora": "lora"}  # mlx-lm's names of our kinds, where they differ


def save_adapter(model: nn.Module, path: str | Path) -> None:
    """Write the adapter of ``model`` to ``path``, a folder, or a file if it ends in .safetensors, by one rename.

    A folder holds ``adapters.safetensors`` and ``adapter_config.json`` and loads with ``load_model(name,
    adapter_path=path)`` and, except for tinylora and lora_xs, with mlx-lm; a file has the config in its
    metadata. An existing adapter is replaced. Raises UserError for a model without an adapter, and for a folder
    that contains anything else.
    """
    record, path = attached(model), Path(path)
    if record is None:
        raise UserError("the model has no adapter to save; attach one first, with apply_lora or attach")
    # The config has mlx-lm's keys, and our ``Attached`` record under "textpolicy".
    adapter = record.adapter
    config: dict[str, Any] = {"fine_tune_type": _MLX_LM.get(adapter.kind, adapter.kind), "num_layers": record.blocks}
    if isinstance(adapter, LoRA):
        config["lora_parameters"] = lora_parameters(adapter, record.keys)
    config[_OURS] = {
        "kind": adapter.kind,
        "settings": settings_of(adapter),
        "keys": list(record.keys),
        "quantised": record.quantised,
        "base": asdict(record.base),
    }
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{path.name}-", dir=path.parent) as workspace:
            if path.suffix == ".safetensors":
                file = Path(workspace) / WEIGHTS
                save_arrays(file, saved_arrays(model), {_METADATA: json.dumps(config)})
                os.replace(file, path)
            else:
                _write_folder(saved_arrays(model), config, Path(workspace), path)
    except OSError as error:
        raise UserError(
            f"cannot write the adapter to {path} ({error.strerror or error}); choose another place"
        ) from error


def load_adapter(model: nn.Module, path: str | Path) -> nn.Module:
    """Attach the adapter at ``path`` to ``model``, a freshly loaded base; only the adapter is trainable afterwards.

    ``path`` is a folder written by ``save_adapter`` or mlx-lm, or a file. Raises UserError that names what does
    not fit: the base, the kind, the rank, a name or a shape.
    """
    saved = read_adapter(path)
    if attached(model) is not None:
        raise UserError(f"the model has an adapter already; load the base again for the one in {path}")
    try:
        if (record := saved.record) is None:
            _attach_as_mlx_lm(model, saved)
        else:
            if fault := Fingerprint.of(model).difference(record.base):
                raise UserError(
                    f"the adapter in {saved.path} has another base: this model is {fault}; give its own base"
                )
            attach(model, record.adapter, None, factors=_zero_factors, quantise=record.quantised is not None)
        _fill(model, saved)
    except UserError:
        detach(model)
        raise
    return model


def reread_adapter(model: nn.Module, path: str | Path) -> nn.Module:
    """Give ``model`` the values of the adapter at ``path``, which must have the kind and settings of the model's.

    A model without an adapter gets it as by ``load_adapter``. Raises UserError that names what differs.
    """
    record, saved = attached(model), read_adapter(path)
    if record is None:
        return load_adapter(model, path)
    if saved.record is None:
        raise UserError(f"the adapter in {path} was not written by textpolicy; load it on a fresh base")
    if fault := record.base.difference(saved.record.base):
        raise UserError(f"the model is {fault}, the base of the adapter in {path}; give that one's own base")
    theirs, ours = saved.record.adapter, record.adapter
    if theirs.kind != ours.kind:
        raise UserError(
            f"the adapter in {saved.path} is a {theirs.kind} and the model's a {ours.kind}; load it on a fresh base"
        )
    mine = settings_of(ours)
    differs = [f"{k} {v} where the model has {mine[k]}" for k, v in settings_of(theirs).items() if v != mine[k]]
    if differs:
        raise UserError(f"the adapter in {saved.path} has {', '.join(differs)}; load it on a fresh base")
    _fill(model, saved)
    return model


# ---- the saved form


@dataclass(frozen=True, slots=True, eq=False)
class Saved:
    """The adapter as read from disk."""

    path: Path
    config: Mapping[str, Any]
    arrays: Mapping[str, mx.array]
    record: Attached | None  # None unless textpolicy wrote it

    @property
    def is_full(self) -> bool:
        """Return whether the arrays are weights of the model itself."""
        return self.config.get("fine_tune_type") == "full"


def saved_arrays(model: nn.Module) -> dict[str, mx.array]:
    """Return the trainable parameters, and the frozen arrays of adapters on an SVD."""
    around = [(name, module.parameters()) for name, module in model.named_modules() if isinstance(module, SVDLinear)]
    arrays: Any = [
        (f"{name}.", key, value) for name, parts in around for key, value in dict(tree_flatten(parts)).items()
    ]
    frozen = {name + key: value for name, key, value in arrays if not key.startswith("linear.")}
    return {**frozen, **trainable(model)}


def _write_folder(arrays: dict[str, mx.array], config: dict[str, Any], workspace: Path, path: Path) -> None:
    if path.exists() and (not path.is_dir() or names(path) - {WEIGHTS, CONFIG}):
        raise UserError(f"{path} contains something other than an adapter; choose another folder, or empty this one")
    new = workspace / "adapter"
    new.mkdir()
    save_arrays(new / WEIGHTS, arrays)
    (new / CONFIG).write_text(json.dumps(config, indent=2) + "\n", encoding="utf-8")
    old = workspace / "old"
    try:
        if path.exists():
            os.replace(path, old)
        os.replace(new, path)
    except BaseException:  # also on Ctrl-C, the older adapter is restored
        if old.exists() and not path.exists():
            os.replace(old, path)
        raise


# ---- reading


def read_adapter(path: str | Path) -> Saved:
    """Read the adapter at ``path``, a folder or a file, without attaching it. Raises UserError."""
    path, advice = Path(path), "save the adapter again"
    if path.name == WEIGHTS and (path.parent / CONFIG).is_file():
        path = path.parent
    if path.name.startswith(_PEFT) or (path.is_dir() and any(path.glob(f"{_PEFT}*")) and not (path / WEIGHTS).exists()):
        raise UserError(
            f"{path} is an adapter of PEFT, in a layout of its own; give a folder of save_adapters or mlx-lm"
        )
    if path.suffix == ".safetensors":
        if not path.is_file():
            raise UserError(f"there is no adapter at {path}; check the path")
        arrays, metadata = load_arrays(path, advice)
        if _METADATA not in metadata:
            raise UserError(f"{path} has no {CONFIG}; give the folder it comes from, or a file of save_adapters")
        return _parsed(path, metadata[_METADATA], arrays)
    for file in (CONFIG, WEIGHTS):
        if not (path / file).is_file():
            raise UserError(f"the adapter folder {path} has no {file}; give a folder of save_adapters or mlx-lm")
    try:
        text = (path / CONFIG).read_text(encoding="utf-8")
    except (OSError, UnicodeDecodeError) as error:
        raise UserError(f"{path / CONFIG} cannot be read ({error}); {advice}") from error
    return _parsed(path, text, load_arrays(path / WEIGHTS, advice)[0])


def _parsed(path: Path, text: str, arrays: dict[str, mx.array]) -> Saved:
    """Return the adapter with config ``text``. Raises UserError if it is malformed, or the arrays contradict it."""
    try:
        config = dict(json.loads(text))
        saved = Saved(path, config, arrays, _record(config[_OURS]) if _OURS in config else None)
        # A rank or length beyond every array is refused here, before memory is allocated for it.
        longest = max((max(a.shape, default=0) for a in arrays.values()), default=0)
        theirs = config.get("lora_parameters") or {}
        ours = {} if saved.record is None else settings_of(saved.record.adapter)
        for settings in () if saved.is_full else (theirs, ours):
            for name in ("rank", "u"):
                if settings.get(name, 0) > longest:
                    raise UserError(
                        f"the {CONFIG} of {path} has {name} {settings[name]} but no array of the adapter is longer "
                        f"than {longest}; save the adapter again"
                    )
        return saved
    except UserError:
        raise
    except (ValueError, TypeError, KeyError, AttributeError, IndexError, OverflowError, RecursionError) as error:
        raise UserError(f"the {CONFIG} of {path} cannot be read ({error!r}); save the adapter again") from error


def _record(ours: Mapping[str, Any]) -> Attached:
    """Return the record that ``save_adapter`` wrote. Raises ValueError, TypeError or KeyError for anything else."""
    adapter = make_adapter(ours["kind"], ours["settings"])
    defaults = settings_of(type(adapter)())
    for name, value in ours["settings"].items():  # whole numbers may stand for floats and None
        kind = type(defaults[name])
        texts = all(isinstance(item, str) for item in value) if isinstance(value, list) else True
        if type(value) not in {kind, int if kind in (float, type(None)) else kind} or not texts:
            raise TypeError(f"{name} is {value!r:.40}")
    quantised = None if ours["quantised"] is None else (int(ours["quantised"][0]), int(ours["quantised"][1]))
    base = ours["base"]
    shapes = tuple(tuple(int(n) for n in shape) for shape in base["shapes"])
    weights = tuple(map(float, base["weights"]))
    fingerprint = Fingerprint(str(base["model_type"]), int(base["blocks"]), shapes, weights)
    return Attached(adapter, fingerprint, 0, tuple(ours["keys"]), quantised)


# ---- attaching


def _attach_as_mlx_lm(model: nn.Module, saved: Saved) -> None:
    """Attach an adapter that mlx-lm wrote, by mlx-lm's rules."""
    base, config = Fingerprint.of(model), saved.config
    try:
        blocks = config.get("num_layers", config.get("lora_layers", 0))  # its name in older versions
        blocks = blocks if 0 < blocks < len(model.layers) else len(model.layers)
        adapter: Adapter = Full()
        if saved.is_full:
            model.set_dtype(mx.float32)
            model.unfreeze()
        else:
            settings, kind = config["lora_parameters"], DoRA if config.get("fine_tune_type") == "dora" else LoRA
            freeze(model)
            linear_to_lora_layers(model, blocks, settings, use_dora=kind is DoRA)
            with_our_layers(model)
            alpha = settings["scale"] * settings["rank"]
            if not (keys := _adapted_keys(model, blocks)):
                raise ValueError(f"no layer is called {', '.join(settings['keys'])}")
            adapter = kind(layers=blocks, modules=keys, rank=settings["rank"], alpha=alpha, dropout=settings["dropout"])
    except (ValueError, TypeError, KeyError, AttributeError, OverflowError, RuntimeError, ZeroDivisionError) as error:
        raise UserError(f"the adapter in {saved.path} does not fit this model ({error!r}); use its own base") from error
    remember(model, Attached(adapter, base, blocks, _adapted_keys(model, blocks)))


def _adapted_keys(model: nn.Module, blocks: int) -> tuple[str, ...]:
    """Return the names of adapted modules: within a block where all of the last ``blocks`` have them, else in full."""
    last = [dict(block.named_modules()) for block in model.layers[-blocks:]]
    bare = {name for block in last for name, module in block.items() if not isinstance(module, WRAPPERS)}
    shared = {name for block in last for name, module in block.items() if isinstance(module, WRAPPERS)} - bare
    inside = {id(module) for block in last for name, module in block.items() if name in shared}
    return tuple(sorted(shared | {name for name, module in wrapped(model) if id(module) not in inside}))


def _zero_factors(modules: Mapping[str, Any], rank: int) -> dict[str, Factors]:
    """Return factors of the right shapes; the saved values then replace them."""
    factors = {}
    for name, module in modules.items():
        outputs, inputs = module.weight.shape
        if isinstance(module, nn.QuantizedLinear):
            inputs = inputs * 32 // module.bits
        r = min(rank, outputs, inputs)
        factors[name] = Factors(mx.zeros((outputs, r)), mx.zeros((r,)), mx.zeros((r, inputs)))
    return factors


def _fill(model: nn.Module, saved: Saved) -> None:
    """Set the adapter's arrays once all of them are known to fit. Raises UserError."""
    wanted = saved_arrays(model)
    if saved.record is None and saved.is_full:
        wanted = {name: value for name, value in wanted.items() if name in saved.arrays}  # mlx-lm saves only some
    for name in [*saved.arrays, *wanted]:
        if name not in wanted or name not in saved.arrays:
            fault = f"this model has no place for {name}" if name not in wanted else f"the adapter lacks {name}"
        elif (found := saved.arrays[name].shape) != (fitting := wanted[name].shape):
            fault = f"{name} has the shape {tuple(found)} instead of {tuple(fitting)}"
            # Name the rank if that alone is wrong.
            record = attached(model)
            rank = None if record is None else settings_of(record.adapter).get("rank")
            differing = {(f, w) for f, w in zip(found, fitting, strict=False) if f != w}
            if len(found) == len(fitting) and len(differing) == 1 and {w for _, w in differing} == {rank}:
                fault = f"its config has rank {rank}, and {name} has rank {differing.pop()[0]}"
        else:
            continue
        raise UserError(f"the adapter in {saved.path} does not fit this model: {fault}; use its own base")
    model.load_weights([(name, saved.arrays[name].astype(value.dtype)) for name, value in wanted.items()], strict=False)
    mx.eval(model.parameters())
