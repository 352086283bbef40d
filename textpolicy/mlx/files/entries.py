"""The entries of config.json that change what a model computes: used by mlx-lm, translated for it, or refused by name.

transformers' class of a type lists the entries that change what a model computes, with their defaults; the source of
mlx-lm's module of the type shows which of them it takes. An entry that it does not take must have its default.
"""

from __future__ import annotations

import ast
import copy
import dataclasses
import importlib
import inspect
import logging
import math
import re
import warnings
from collections.abc import Collection
from dataclasses import dataclass
from functools import lru_cache
from typing import Any

from ...errors import UserError

# Entries that change nothing computed from given weights, or whose other values show in the weights' names and shapes
_INERT = re.compile(
    r".*(dropout|pdrop|initializer|_token_id|loss|jitter|router_logits|_in_fp32|logits_to_keep|_kernels|mtp).*"
    r"|(moe_)?(num|max|vocab|image|patch|hidden|intermediate|summary|time_step)_.*(size|dim|layers?|heads?|experts?|len"
    r"|rank|channels|length|embeddings|type|proj|activation|labels|min|max|floor|scheme|scale|expand)"
    r"|(?!attention_chunk).*_(size|dim|width|rank|expand|inner|interval|layers|step|num_heads)|linear_(a_log|dt)_.*"
    r"|use_(cache|mambapy|associative_scan)|pretraining_tp|expand|mlp_layer_types|layers_block_type|indexer_types"
    r"|first_k_dense_replace|is_decoder|add_cross_attention|rescale_prenorm_residual|reorder_and_upcast_attn"
    r"|w_init_variance_scale|mamba_ssm_cache_dtype|moe_shared_expert_overlap"
)
_ELSEWHERE = {
    "max_position_embeddings",
    "rope_parameters",
    "sliding_window",
    "use_sliding_window",
    "layer_types",
    "tie_word_embeddings",
}
# What other families have: the values, beside null, that change nothing in a family without the entry
_NEUTRAL: dict[str, tuple[Any, ...]] = {
    **dict.fromkeys(("attention_bias", "mlp_bias", "use_qk_norm", "qk_norm", "qk_layernorm", "lm_head_bias"), (False,)),
    **dict.fromkeys(("attn_logit_softcapping", "final_logit_softcapping", "clip_qkv"), ()),
    "scoring_func": ("sigmoid",),
    **dict.fromkeys(("logit_scale", "logits_scaling", "scale_emb", "residual_scale"), (1,)),
}
# Entries that show in tensors of these names
_TENSORS = ((r"\w+_bias", r"\.bias$"), (r"(use_)?qk_(layer)?norm", r"\b(q|k|qk|query|key)_(layer)?norm"))
# What a family reads to no effect, or to another than in transformers
_UNUSED = {
    "falcon_h1": {"key_multiplier", "attention_in_multiplier"},
    "gpt_bigcode": {"multi_query"},
    "phimoe": {"num_experts_per_tok"},
    "qwen2_moe": {"rope_scaling"},
}
_MULTIPLIER = re.compile(r"\w+_multiplier")
_ACTIVATIONS = ("hidden_act", "hidden_activation", "activation_function", "mlp_hidden_act", "mamba_hidden_act")
_ALIKE = (frozenset({"silu", "swish"}), frozenset({"gelu_pytorch_tanh", "gelu_new", "gelu_fast"}))
_IN_SOURCE = {"silu": "silu", "swiglu": "silu", "gelu_approx": "gelu_new", "gelu": "gelu", "relu2": "relu2"}
_ROPE_TYPES = {"linear", "yarn", "longrope", "llama3"}  # those of mlx-lm's initialize_rope
_THETA = ("rope_theta", "rotary_emb_base")
_LOCAL = ("rope_local_base_freq", "swa_rope_theta")
_BY_LAYER = {
    "gemma4",
    "gemma4_text",
    "laguna",
    "mellum",
    "spark2_5",
}  # whose rope_parameters are nested, for each type of layer
_PART = ("partial_rotary_factor", "rotary_pct")


@dataclass(frozen=True)
class Family:
    """The module of mlx-lm for a type: the entries its argument classes name, as annotated, and what it reads."""

    name: str
    named: dict[str, str]
    reads: frozenset[str]

    def takes(self, entry: str) -> bool:
        """Return whether an entry has its effect."""
        return entry in self.named and entry in self.reads and entry not in _UNUSED.get(self.name, ())

    def rotates(self, kind: str) -> bool:
        """Return whether its source has a rotary embedding of a type other than the default."""
        shared = "initialize_rope" in self.reads and kind in _ROPE_TYPES
        own = {"yarn": "yarn", "longrope": "suscaledrope", "llama3": "llama3"}.get(kind)
        return shared or kind in self.reads or any(own and own in name.lower() for name in self.reads)

    @property
    def activation(self) -> str | None:
        """The activation in its source, if it is one."""
        found = {act for name, act in _IN_SOURCE.items() if name in self.reads}
        return found.pop() if len(found) == 1 else None


def family(config: dict[str, Any]) -> Family:
    """Return the family of mlx-lm that loads ``config``. Raises ValueError for a type that mlx-lm does not have."""
    from mlx_lm.utils import _get_classes

    module = _get_classes(config)[0].__module__
    named, reads = _source(module)
    return Family(module.rsplit(".", 1)[1], named, reads)


@lru_cache
def _source(module: str) -> tuple[dict[str, str], frozenset[str]]:
    """Return the fields of a module's argument classes and the names it reads, and those of the models it builds on."""
    tree = ast.parse(inspect.getsource(importlib.import_module(module)))
    named: dict[str, str] = {}
    reads: set[str] = set()
    package = module.rsplit(".", 1)[0]
    for node in ast.walk(tree):
        if isinstance(node, ast.ClassDef) and node.name.endswith(("Args", "Config")):
            fields = [n for n in node.body if isinstance(n, ast.AnnAssign) and isinstance(n.target, ast.Name)]
            kinds = {n: ast.unparse(n.annotation) + (f" = {ast.unparse(n.value)}" if n.value else "") for n in fields}
            named |= {n.target.id: kind for n, kind in kinds.items()}  # type: ignore[union-attr]
        elif isinstance(node, ast.Attribute) and isinstance(node.ctx, ast.Load):
            reads.add(node.attr)
        elif isinstance(node, ast.Compare) and isinstance(node.left, ast.Attribute) and "None" in ast.unparse(node):
            reads |= {node.left.attr, f"{node.left.attr} is None"}
        elif isinstance(node, ast.Name) and isinstance(node.ctx, ast.Load):
            reads.add(node.id)
        elif isinstance(node, ast.Constant) and isinstance(node.value, str):
            reads.add(node.value)
        elif isinstance(node, ast.ImportFrom) and node.level == 1:
            for name in [node.module] if node.module else [alias.name for alias in node.names]:
                if hasattr(importlib.import_module(f"{package}.{name}"), "ModelArgs"):
                    more, read = _source(f"{package}.{name}")
                    named, reads = more | named, reads | read
    return named, frozenset(reads)


@dataclass(frozen=True)
class Settled:
    """The changes to config.json for mlx-lm, and what has to be added to the model that it makes."""

    changes: dict[str, Any]  # entries at the top of config.json
    spare_head: bool = False  # whether the output layer in the files repeats the embedding, and the model has none
    windows: list[int | None] | None = None  # of the attention in each layer, where mlx-lm's model has none
    activation: str | None = None  # of each MLP, where mlx-lm's model has another
    rotation: dict[str, Any] | None = None  # rope_parameters that its rotary embeddings follow only in part


def settle(config: dict[str, Any], names: Collection[str], head: bool | None, where: str) -> Settled:
    """Return how mlx-lm has to load the model of ``config``.

    ``names`` are those of the tensors; ``head`` says whether they have an output layer (None: one like the embedding).
    Raises UserError, which names ``where``, for an entry that changes what is computed and that mlx-lm's module of the
    type does not take.
    """
    return _Settling(config, names, where).result(head)


class _Settling:
    """The comparison of a config.json with transformers' class and mlx-lm's module of its type."""

    def __init__(self, config: dict[str, Any], names: Collection[str], where: str) -> None:
        self.where, self.family = where, family(config)
        nested = "text_config" in self.family.named and isinstance(config.get("text_config"), dict)
        self.text = config["text_config"] if nested else config
        self.known = _known(config, self.text)
        fields = dataclasses.fields(self.known) if self.known else ()
        self.defaults: dict[str, Any] = {f.name: f.default for f in fields if f.name not in _common()}
        self.config, self.names, self.changes = config, names, dict[str, Any]()

    def result(self, head: bool | None) -> Settled:
        self._values()
        self._tying(head)
        spare = head is None and self.changes["tie_word_embeddings"]
        added: dict[str, Any] = {"spare_head": spare, "rotation": self._rotation(), "windows": self._windows()}
        changes = self.changes
        if self.text is not self.config:  # mlx-lm's class may take the size of the vocabulary from the top
            size = self.config.get("vocab_size", self.text.get("vocab_size"))
            changes = {"text_config": self.text | changes} | ({"vocab_size": size} if size else {})
        return Settled(changes, activation=self._activation(), **added)

    def refuse(self, entry: str, value: Any, fault: str = "does not take") -> UserError:
        return UserError(
            f"{self.where} says {entry} {value!r:.80}, which mlx-lm's {self.family.name} {fault}; choose another "
            "model, or remove the entry if this model was trained without it"
        )

    def said(self, entry: str) -> Any:
        """Return a value as transformers understands it or, if it does not know the type or the entry, as it stands."""
        try:
            return getattr(self.known, entry) if entry in self.defaults else self.text.get(entry)
        except (AttributeError, ValueError, RuntimeError):  # one that differs among layers
            return self.text.get(entry)

    def _shows(self, entry: str) -> bool:
        """Return whether an entry changes nothing, or another value shows in the weights, which all have to fit."""
        tensors = next((tensors for entries, tensors in _TENSORS if re.fullmatch(entries, entry)), None)
        return bool(_INERT.fullmatch(entry) or (tensors and any(re.search(tensors, name) for name in self.names)))

    def _values(self) -> None:
        """Fill in transformers' defaults, and refuse what the family does not take, unless it is neutral."""
        for entry in self.defaults.keys() - _ELSEWHERE - set(_ACTIVATIONS):
            value = self.said(entry)
            if self.family.takes(entry):
                scale = isinstance(value, float) or entry == "norm_topk_prob"  # which no weight's shape shows
                wanted = entry in self.text or scale or " = " not in self.family.named[entry]
                if self.text.get(entry) is None and value is not None and wanted:
                    self.changes[entry] = value
            elif not (self.text.get(entry) is None or value in (None, self.defaults[entry]) or self._shows(entry)):
                raise self.refuse(entry, value)
        if self.known and self.family.takes("head_dim") and "head_dim" not in self.text.keys() | self.defaults.keys():
            self.changes["head_dim"] = self.known.hidden_size // self.known.num_attention_heads
        for entry, value in self.text.items():
            neutral = (1,) if _MULTIPLIER.fullmatch(entry) else _NEUTRAL.get(entry)
            if entry == "scoring_func" and {"softmax", "sigmoid"} & self.family.reads == {"softmax"}:
                neutral = ("softmax",)  # as DeepSeek V2 says what it does
            foreign = neutral is not None and entry not in self.defaults and not self.family.takes(entry)
            foreign = foreign and not self._shows(entry)
            if foreign and value not in (None, *(neutral or ())):
                raise self.refuse(entry, value)
            number = re.fullmatch(r"(int|float|bool)( = (?!None).*)?", self.family.named.get(entry, ""))
            needed = number and f"{entry} is None" not in self.family.reads
            if value is None and needed and entry not in self.changes.keys() | _ELSEWHERE:
                raise self.refuse(entry, value, "cannot do without")

    def _activation(self) -> str | None:
        """Return the activation that the family lacks; refuse one that the type does not have."""
        declared = [entry for entry in _ACTIVATIONS if entry in self.defaults and not self.family.takes(entry)]
        usual = self.family.activation or next((self.defaults[entry] for entry in declared), None)
        wanted = next((self.said(entry) for entry in declared), usual)
        for entry in _ACTIVATIONS:
            value = self.text.get(entry)
            foreign = value is not None and entry not in declared and not self.family.takes(entry)
            if foreign and usual is not None and not (_alike(value, usual) or _alike(value, wanted)):
                raise self.refuse(entry, value, "does not compute")
        return None if _alike(wanted, usual) else wanted

    def _tying(self, head: bool | None) -> None:
        entry = "tie_word_embeddings"
        stated = self.config.get(entry, self.text.get(entry))
        usual = head is False or self.said(entry) is not False  # transformers' where there is a choice
        self.changes[entry] = not head and (usual if stated is None else bool(stated))

    def _rotation(self) -> dict[str, Any] | None:
        """Translate the settings of the rotary embedding; return them if the model needs more than its entries."""
        takes = self.family.takes
        given: Any = self.said("rope_parameters")
        if "rope_parameters" not in self.defaults:
            old = {entry: self.text[entry] for entry in ("rope_theta", *_PART) if self.text.get(entry) is not None}
            given = old | (self.text.get("rope_scaling") or {}) | (given or {})
        if not given or (self.known and "rope_parameters" not in self.defaults):
            return None
        layers = {key: value for key, value in given.items() if isinstance(value, dict)}
        if takes("rope_parameters"):
            by_layer = self.family.name in _BY_LAYER and not layers
            self.changes["rope_parameters"] = (
                dict.fromkeys(self.said("layer_types") or (), given) if by_layer else given
            )
            for kind in {_kind(part) for part in layers.values() or [given]} - {"default"}:
                if not self.family.rotates(kind):
                    raise self.refuse("rope_type", kind)
            if layers or by_layer:
                return None
        if layers:
            given, local = layers.get("full_attention", {}), layers.get("sliding_attention")
            if local and _kind(local) == "default" and any(map(takes, _LOCAL)):
                self._take(_LOCAL, local["rope_theta"], None)
            elif self.family.name == "olmo3" and local == {"rope_type": "default", "rope_theta": given["rope_theta"]}:
                pass  # its layers with a window rotate in the default way
            elif any(value != given for value in layers.values()):
                raise self.refuse("rope_parameters", layers, "takes for all layers alike")
        usual = getattr(type(self.known)(), "rope_parameters", None) or {} if self.known else {}
        self._take(_THETA, given.get("rope_theta"), usual.get("rope_theta"))
        self._take(_PART, given.get("partial_rotary_factor"), usual.get("partial_rotary_factor", 1))
        if "rope_scaling" in self.family.named:
            self.changes["rope_scaling"] = None
        kind = _kind(given)
        part = given.get("partial_rotary_factor") or 1
        if kind == "default" and part != 1 and not any(map(takes, (*_PART, "rope_parameters"))):
            width = self.said("head_dim") or self.said("hidden_size") // self.said("num_attention_heads")
            return {"dims": int(width * part)}
        if kind == "default":
            return None
        fits = self.family.rotates(kind) and (kind != "longrope" or takes("max_position_embeddings"))
        if not fits or not (takes("rope_scaling") or takes("rope_parameters")):
            raise self.refuse("rope_type", kind)
        scaling = {key: value for key, value in given.items() if value is not None}
        scaling |= dict.fromkeys(("type", "rope_type"), "dynamic" if kind == "alpha" else kind)
        if kind == "yarn":
            scaling |= _yarn_scales(scaling)
        self.changes |= {entry: scaling for entry in ("rope_scaling", "rope_parameters") if takes(entry)}
        return scaling if kind == "longrope" or not scaling.get("truncate", True) else None

    def _take(self, names: tuple[str, ...], value: Any, usual: Any) -> None:
        """Pass a value on under the name that the family takes; refuse it if there is none and it is not usual."""
        if value is not None:
            self.changes |= dict.fromkeys([name for name in names if name in self.family.named], value)
        unknown = self.known or names[0] not in self.family.named
        if value not in (None, usual) and unknown and not any(map(self.family.takes, (*names, "rope_parameters"))):
            raise self.refuse(names[0], value)

    def _windows(self) -> list[int | None] | None:
        """Translate which layers have a sliding window; return the windows that the family lacks."""
        takes, window, kinds = self.family.takes, self.said("sliding_window"), self.said("layer_types") or []
        slides = [kind == "sliding_attention" for kind in kinds]
        hides = isinstance(window, int) and window < (self.said("max_position_embeddings") or math.inf)
        if hides and any(slides) and self.known and not {"sliding_window", "layer_types"} <= self.defaults.keys():
            raise self.refuse("layer_types", kinds, "applies and transformers' class of the type does not")
        if "sliding_window" not in self.defaults:
            if hides and not takes("sliding_window") and self.text.get("use_sliding_window", True):
                raise self.refuse("sliding_window", window, "does not apply")
            return None
        slides = slides or [True] * self.said("num_hidden_layers")
        if not takes("sliding_window") or (not kinds and takes("layer_types")):
            self.changes |= {"sliding_window": None, "layer_types": None} if takes("sliding_window") else {}
            return [window if slide else None for slide in slides] if hides and any(slides) else None
        if takes("layer_types"):
            self.changes["layer_types"] = self.text.get("layer_types") or kinds or None
        elif takes("sliding_window_pattern") and (any(slides) or hides):
            letters = "".join("L" if slide else "G" for slide in slides)
            period = letters.find("G") + 1
            if not period or letters != (letters[:period] * len(letters))[: len(letters)]:
                raise self.refuse("layer_types", kinds, "takes only in a regular pattern")
            as_text = "str" in self.family.named["sliding_window_pattern"]
            self.changes["sliding_window_pattern"] = letters[:period] if as_text else period
        return None


def _alike(one: Any, other: Any) -> bool:
    """Return whether two names of activations mean the same."""
    return one == other or any({one, other} <= group for group in _ALIKE)


def is_longrope(rotation: Any) -> bool:
    """Return whether rope_parameters or rope_scaling are of the type whose factors change with the length of a text."""
    return isinstance(rotation, dict) and _kind(rotation) == "longrope"


def _kind(rotation: dict[str, Any]) -> str:
    """Return the type of a rotary embedding under mlx-lm's name; a dynamic one is plain within the model's context."""
    kind = rotation.get("rope_type") or rotation.get("type") or "default"
    if kind == "dynamic" and rotation.get("alpha"):
        return "alpha"  # Hunyuan's, which is one for all lengths
    return {"su": "longrope", "mrope": "default", "dynamic": "default"}.get(kind, kind)


def _yarn_scales(scaling: dict[str, Any]) -> dict[str, float]:
    """Return mscale and mscale_all_dim with which mlx-lm's YarnRoPE scales as transformers does."""
    mscale, over_all = scaling.get("mscale") or 0.0, scaling.get("mscale_all_dim") or 0.0
    if not (mscale and over_all):
        mscale, over_all = 1.0, 0.0
    slope = 0.1 * math.log(max(scaling["factor"], 1.0))
    if (wanted := scaling.get("attention_factor")) and slope:
        mscale = (wanted * (over_all * slope + 1.0) - 1.0) / slope
    return {"mscale": mscale, "mscale_all_dim": over_all}


@lru_cache
def _common() -> set[str]:
    """Return the fields of every config of transformers, which do not change what is computed."""
    from transformers import PreTrainedConfig

    return {f.name for f in dataclasses.fields(PreTrainedConfig)}


def _known(config: dict[str, Any], text: dict[str, Any]) -> Any:
    """Return transformers' config of ``text``, or None if transformers does not know the type or refuses the values."""
    from huggingface_hub.errors import StrictDataclassError
    from transformers.models.auto.configuration_auto import CONFIG_MAPPING

    kept = {key: value for key, value in text.items() if not key.startswith("quantization")}
    logger = logging.getLogger("transformers")
    level = logger.level
    logger.setLevel(logging.ERROR)  # its advice is for those who write config.json
    try:
        kind = CONFIG_MAPPING[text.get("model_type") or config["model_type"]]
        with warnings.catch_warnings(action="ignore"):
            return kind.sub_configs.get("text_config", kind)(**copy.deepcopy(kept))
    except (StrictDataclassError, KeyError, TypeError, ValueError, AttributeError, ZeroDivisionError):
        return None
    finally:
        logger.setLevel(level)
