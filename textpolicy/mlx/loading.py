"""Load weights into mlx-lm's model so that every tensor is used, and add to it what its class lacks of its config."""

from __future__ import annotations

import inspect
import math
import re
import tempfile
from collections.abc import Callable, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
from mlx_lm.models import gpt_oss

from ..errors import UserError
from .files.entries import Settled

# Tensors that text alone does not need: rotary tables, heads that predict further tokens, parts for images and sound
_UNNEEDED = re.compile(
    r"(^|\.)(rotary_emb|rotary_pos_emb|inv_freq|masked_bias|position_ids|mtp\w*|visual|vision\w*|vit\w*|audio\w*|image\w*"
    r"|multi_modal_projector|mm_\w+|embed_vision|embed_audio|aligner|(input|activation|k|v)_scale)(\.|$)"
)


_ACTIVATIONS: dict[str, Callable[[mx.array], mx.array]] = {
    **dict.fromkeys(("silu", "swish"), nn.silu),
    **dict.fromkeys(("gelu_pytorch_tanh", "gelu_new", "gelu_fast"), nn.gelu_approx),
    "gelu": nn.gelu,
    "quick_gelu": nn.gelu_fast_approx,
    "relu": nn.relu,
    "relu2": nn.relu2,
    "sigmoid": mx.sigmoid,
    "tanh": mx.tanh,
    "linear": lambda x: x,
}
# The MLPs whose activation can be another, by the layers they consist of
_MLPS: dict[str, Callable[..., mx.array]] = {
    "gate_proj up_proj down_proj": lambda act, m, x: m.down_proj(act(m.gate_proj(x)) * m.up_proj(x)),
    "dense_h_to_4h dense_4h_to_h": lambda act, m, x: m.dense_4h_to_h(act(m.dense_h_to_4h(x))),
    "up_proj down_proj": lambda act, m, x: m.down_proj(act(m.up_proj(x))),
    "c_fc c_proj": lambda act, m, x: m.c_proj(act(m.c_fc(x))),
    "fc1 fc2": lambda act, m, x: m.fc2(act(m.fc1(x))),
}


def load_weights(folder: Path, files: Sequence[Path], settled: Settled) -> nn.Module:
    """Return the model of ``folder`` with the weights in ``files``, lazily.

    Raises UserError for tensors that mlx-lm's class leaves out, and for windows that cannot be added to it.
    """
    from mlx_lm.utils import load_model

    left_out: list[str] = []

    def classes(config: dict[str, Any]) -> tuple[Any, Any]:
        return _watched(config, left_out)

    with tempfile.TemporaryDirectory() as view:
        source = folder
        if set(files) != set(folder.glob("model*.safetensors")):  # which is what mlx-lm reads
            source = Path(view)
            links = {path.name: path for path in folder.glob("*.json")}
            links |= {f"model-{i}.safetensors": path for i, path in enumerate(files)}
            for name, path in links.items():
                (source / name).symlink_to(path.absolute())
        model, _ = load_model(source, lazy=True, model_config=settled.changes, get_model_classes=classes)
    vars(model).pop("sanitize", None)
    if settled.spare_head:
        left_out = [name for name in left_out if "lm_head." not in name]
    if left_out:
        raise UserError(
            f"{folder} has {left_out[0]!r}{f' and {len(left_out) - 1} more tensors' if left_out[1:] else ''}, which "
            f"mlx-lm's {type(model).__module__.rsplit('.', 1)[1]} leaves out; choose another model, or remove what is "
            "not part of it"
        )
    complete(model, settled, f"{folder / 'config.json'}")
    return model


def complete(model: nn.Module, settled: Settled, where: str) -> None:
    """Add to ``model`` what its class lacks of its config. Raises UserError that names ``where`` if that cannot be."""
    additions: list[tuple[str, Any, Callable[[nn.Module, Any], bool]]] = [
        ("sliding_window", settled.windows, add_windows),
        ("hidden_act", settled.activation, add_activation),
    ]
    for entry, value, add in additions:
        if value is not None and not add(model, value):
            raise UserError(
                f"{where} says {entry} {value!r:.80}, which cannot be added to mlx-lm's model; choose another model, "
                "or remove the entry if this model was trained without it"
            )
    if settled.rotation:
        fix_rotation(model, settled.rotation)


def _watched(config: dict[str, Any], left_out: list[str]) -> tuple[Any, Any]:
    """Return mlx-lm's classes for ``config``, of which a model notes in ``left_out`` the tensors it leaves out."""
    from mlx_lm.utils import _get_classes

    kind, args_class = _get_classes(config)

    def build(args: Any) -> nn.Module:
        model = kind(args)
        if plain := getattr(model, "sanitize", None):

            def sanitize(weights: dict[str, mx.array]) -> dict[str, mx.array]:
                if kind is gpt_oss.Model:
                    weights = _split_experts(weights)
                kept = plain(dict(weights))
                left_out.extend(_left_out(weights, kept, lambda some: kind(args).sanitize(some), len(model.layers)))
                return kept

            model.sanitize = sanitize
        return model

    return build, args_class


def _left_out(weights: dict[str, mx.array], kept: dict[str, mx.array], sanitize: Any, layers: int) -> list[str]:
    """Return the names of ``weights`` without which ``sanitize`` returns the same as ``kept``.

    Those that differ in numbers alone stand and fall together. Layers beyond the model's, and tables of a mask, do not
    count.
    """
    ids = {id(array) for array in kept.values()}
    groups: dict[str, list[str]] = {}
    for name, array in weights.items():
        beyond = any(int(number) >= layers for number in re.findall(r"\blayers\.(\d+)\.", name))
        is_table = array.ndim == 4 and array.shape[:2] == (1, 1)
        if not (name in kept or id(array) in ids or beyond or is_table or _UNNEEDED.search(name)):
            groups.setdefault(re.sub(r"\d+", "#", name), []).append(name)
    found: list[str] = []
    for group in groups.values():
        try:
            rest = sanitize({name: array[...] for name, array in weights.items() if name not in set(group)})
        except (KeyError, IndexError, TypeError, ValueError, AttributeError, RuntimeError):  # it needs them
            continue
        if rest.keys() == kept.keys():
            found += group
    return found


def _split_experts(weights: dict[str, mx.array]) -> dict[str, mx.array]:
    """Return gpt-oss's weights with its experts, (E, in, 2 out) with gates in even columns, as mlx-lm has them."""
    split: dict[str, mx.array] = {}
    for name, array in weights.items():
        found = re.fullmatch(r"(.*\.experts)\.(gate_up|down)_proj(_bias)?", name)
        if found is None:
            split[name] = array
            continue
        end, turned = (".bias", array) if found[3] else (".weight", array.swapaxes(-1, -2))
        axis = turned.ndim - (1 if found[3] else 2)
        parts = {"down": turned}
        if found[2] == "gate_up":
            even = mx.arange(0, turned.shape[axis], 2)
            parts = {"gate": mx.take(turned, even, axis), "up": mx.take(turned, even + 1, axis)}
        split |= {f"{found[1]}.{part}_proj{end}": mx.contiguous(value) for part, value in parts.items()}
    return split


def add_windows(model: Any, windows: Sequence[int | None]) -> bool:
    """Limit the attention of each layer to its window, in tokens, where there is one; return whether that was possible.

    A layer's ``self_attn`` is made to take a mask of our own for the ``mask`` that it is called with.
    """
    layers: list[Any] = [getattr(layer, "self_attn", None) for layer in model.layers]
    forms = [inspect.signature(type(layer).__call__) for layer in layers]
    if len(layers) != len(windows) or not all({"mask", "cache"} <= form.parameters.keys() for form in forms):
        return False
    for layer, form, window in zip(layers, forms, windows, strict=True):
        if window is not None:
            _override(layer, partial(_attend, type(layer).__call__, form, window))
    return True


def _attend(plain: Any, form: inspect.Signature, window: int, *values: Any, **named: Any) -> mx.array:
    """Call the ``plain`` attention with a mask that hides what is not in the last ``window`` tokens."""
    from mlx_lm.models.base import create_attention_mask

    given = form.bind(*values, **named).arguments
    as_array = isinstance(given.get("mask"), mx.array)
    mask = create_attention_mask(values[1], given.get("cache"), window_size=window, return_array=as_array)
    return plain(**{**given, "mask": mask})


def add_activation(model: Any, name: str) -> bool:
    """Give each layer's ``mlp`` the activation that transformers calls ``name``; return whether that was possible."""
    act = _ACTIVATIONS.get(name)
    mlps: list[Any] = [getattr(layer, "mlp", {}) for layer in model.layers]
    for mlp in mlps:
        call = next((call for names, call in _MLPS.items() if set(mlp) == set(names.split())), None)
        if act is None or call is None:
            return False
        _override(mlp, partial(call, act))
    return True


def _override(module: nn.Module, call: Callable[..., mx.array]) -> None:
    """Make ``call`` what calling ``module`` does; its parameters and the name of its class stay."""
    kind = type(module)
    members = {"__call__": lambda *values, **named: call(*values, **named), "__module__": kind.__module__}
    module.__class__ = type(kind.__name__, (kind,), members)


def fix_rotation(model: nn.Module, rotation: dict[str, Any]) -> None:
    """Set the frequencies of rotary embeddings as transformers computes them from ``rotation``, its rope_parameters.

    ``dims``, alone, is the number of dimensions to rotate.
    Longrope takes ``short_factor``, and the model no text beyond ``original_max_position_embeddings``: with one more
    token transformers takes ``long_factor`` for all of them, so that what was sampled would get other log-probs.
    Yarn with ``truncate`` false takes the bounds of its ramp as they are, not rounded to whole dimensions.
    """
    from mlx_lm.models.rope_utils import SuScaledRoPE, YarnRoPE

    for module in model.modules():
        if isinstance(module, nn.RoPE) and "dims" in rotation:
            module.dims = rotation["dims"]
        elif isinstance(module, SuScaledRoPE):
            powers = rotation["rope_theta"] ** (mx.arange(0, module.dim, 2, dtype=mx.float32) / module.dim)
            vars(model)["longest"] = rotation["original_max_position_embeddings"]  # for Bounds
            module._freqs = mx.array(rotation["short_factor"], dtype=mx.float32) * powers
            module._scale = rotation.get("attention_factor") or rotation.get("short_mscale") or module._scale
        elif isinstance(module, YarnRoPE):
            module._freqs = _yarn_frequencies(module.dims, rotation)


def _yarn_frequencies(dims: int, rotation: dict[str, Any]) -> mx.array:
    """Return the wavelengths over 2 pi, (dims / 2,), of yarn whose ramp is not rounded (Peng et al. 2023)."""
    base, length = rotation["rope_theta"], rotation["original_max_position_embeddings"]

    def bound(rotations: float) -> float:
        return dims * math.log(length / (rotations * 2 * math.pi)) / (2 * math.log(base))

    low = max(bound(rotation.get("beta_fast") or 32), 0)
    high = min(bound(rotation.get("beta_slow") or 1), dims - 1)
    ramp = mx.clip((mx.arange(dims // 2, dtype=mx.float32) - low) / ((high - low) or 0.001), 0, 1)
    powers = base ** (mx.arange(0, dims, 2, dtype=mx.float32) / dims)
    return 1 / (ramp / (rotation["factor"] * powers) + (1 - ramp) / powers)
