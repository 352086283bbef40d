"""Attach adapters of every kind to a model: which modules they wrap and what they train."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from copy import copy
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_map, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from ...config.adapters import Adapter, DoRA, Full, LoRA, LoRAXS, QLoRA, TinyLoRA
from ...errors import UserError, unknown_name
from ..kernels import cuda
from .fingerprint import Fingerprint
from .svd import factorise
from .tinylora import (
    Factors,
    ProjectedCore,
    SharedVectors,
    SVDLinear,
    TrainedCore,
    projections,
    structured_groups,
    tiled_groups,
)


class LowRankLinear(LoRALinear):
    """The LoRA y = W x + scale (x A) B, as mlx-lm's LoRALinear, but with A and B in the type of x for the products.

    mlx-lm's does these in float32 in a bfloat16 model, which takes half of an update's time on a GPU.
    """

    @classmethod
    def of(cls, layer: LoRALinear) -> LowRankLinear:
        """Return ``layer`` as this class, sharing its arrays."""
        twin = copy(layer)
        twin.__class__ = cls
        return twin  # type: ignore[return-value]

    def __call__(self, x: mx.array) -> mx.array:
        # Scaling B instead would make mx.compile fail where prompts of unequal length are padded (mlx 0.32.4).
        low = self.dropout(x) @ self.lora_a.astype(x.dtype)
        return self.linear(x) + (self.scale * low) @ self.lora_b.astype(x.dtype)


Dense = nn.Linear | nn.QuantizedLinear
Experts = SwitchLinear | QuantizedSwitchLinear
Factorise = Callable[[Mapping[str, Any], int], Mapping[str, Factors]]

VECTORS = "adapter_vectors"  # the attribute of a model that holds TinyLoRA's trained vectors
WRAPPERS = (LoRALinear, LoRASwitchLinear, LoRAEmbedding, DoRALinear, DoRAEmbedding, SVDLinear)
TRAINED: dict[type, list[str]] = {  # the trained arrays of each layer that an adapter adds
    LoRALinear: ["lora_a", "lora_b"],
    LowRankLinear: ["lora_a", "lora_b"],
    LoRASwitchLinear: ["lora_a", "lora_b"],
    LoRAEmbedding: ["lora_a", "lora_b"],
    DoRALinear: ["lora_a", "lora_b", "m"],
    DoRAEmbedding: ["lora_a", "lora_b", "m"],
    TrainedCore: ["r"],
    SharedVectors: ["v"],
}
_RECORD = "_textpolicy_adapter"  # the attribute of a model that holds its ``Attached``


@dataclass(frozen=True, slots=True)
class Attached:
    """The record of a model's adapter, for saving and reloading it."""

    adapter: Adapter
    base: Fingerprint  # of the model before anything was attached
    blocks: int  # how many of the last blocks are adapted
    keys: tuple[str, ...]  # names of the adapted modules within a block
    quantised: tuple[int, int] | None = None  # bits and group size, if the base was quantised for this adapter
    save_path: Path | None = None  # where ``Trainer(auto_save_lora=True)`` writes it


def attached(model: nn.Module) -> Attached | None:
    """Return the record of the adapter that ``attach`` put on ``model``; None without one."""
    return vars(model).get(_RECORD)


def remember(model: nn.Module, record: Attached | None) -> None:
    """Set what ``attached(model)`` returns."""
    if record is None:
        vars(model).pop(_RECORD, None)
    else:
        setattr(model, _RECORD, record)


def attach(
    model: nn.Module,
    adapter: Adapter,
    seed: int | None = 0,
    *,
    factors: Factorise = factorise,
    quantise: bool = True,
) -> nn.Module:
    """Freeze ``model`` and attach ``adapter``, in place; only the adapter is trainable afterwards.

    The model's outputs start unchanged (a LoRA-XS starts from an R of 1e-5). ``seed`` fixes the random initial
    values; with None a LoRA draws from MLX's global random state. ``factors`` computes the SVDs, and without
    ``quantise`` a QLoRA uses the base as it is. Returns the model in evaluation mode, in which dropout is off.
    Raises UserError for a model that has an adapter, or lacks the requested modules.
    """
    if attached(model) is not None or wrapped(model):
        raise UserError("the model has an adapter already; load the base again, or merge the adapter first")
    base = Fingerprint.of(model)
    quantised = _quantise(model, adapter) if isinstance(adapter, QLoRA) and quantise else None
    freeze(model)
    blocks = list(model.layers[-adapter.layers :])  # 0 layers are all blocks
    keys, sites = _sites(model, blocks, adapter)
    match adapter:
        case Full():
            if any("scales" in module for module in model.modules()):
                raise UserError(
                    "a quantised model cannot be trained in full; load it with dequantize=True, or choose qlora"
                )
            model.set_dtype(mx.float32)
            for module in sites.values() if adapter.modules else blocks if adapter.layers else [model]:
                module.unfreeze()
        case LoRA():
            if adapter.rank % 4 and cuda.is_nvidia() and any(isinstance(m, Experts) for m in sites.values()):
                raise UserError(  # benchmarks/upstream/gather_mm_alignment.py
                    f"MLX reads memory that is not aligned in a LoRA of rank {adapter.rank} on experts on an NVIDIA "
                    "GPU; choose a multiple of 4"
                )
            if seed is not None:
                mx.random.seed(seed)
            dora = isinstance(adapter, DoRA)
            for module in model.modules() if dora else ():
                if isinstance(module, nn.QuantizedLinear) and 32 % module.bits:
                    raise UserError(
                        f"DoRA does not support weights of {module.bits} bits; use a base of 4 or 8, or the kind qlora"
                    )
            linear_to_lora_layers(model, len(blocks), lora_parameters(adapter, keys), use_dora=dora)
            with_our_layers(model)
        case TinyLoRA() | LoRAXS():
            _wrap_in_svd(model, sites, adapter, seed or 0, factors)
    remember(model, Attached(adapter, base, len(blocks), tuple(sorted(keys)), quantised))
    _refuse_layers_read_by_the_model(model)
    model.eval()
    mx.eval(model.parameters())
    return model


def freeze(model: nn.Module) -> None:
    """Freeze all parameters of ``model``, in place."""
    complete(model)
    model.freeze()


def complete(model: nn.Module) -> None:
    """Give modules whose class in mlx-lm leaves out ``nn.Module.__init__`` (RecurrentGemma's) what it sets."""
    for module in model.modules():
        vars(module).setdefault("_no_grad", set())


def detach(model: nn.Module) -> None:
    """Remove the adapter of ``model``, in place; weights that were trained in full keep their values."""
    if layers := [(name, inner(module)) for name, module in wrapped(model)]:
        model.update_modules(tree_unflatten(layers))
    model.pop(VECTORS, None)
    remember(model, None)


def wrapped(model: nn.Module) -> list[tuple[str, Any]]:
    """Return the layers with which adapters wrap others, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, WRAPPERS)]


def inner(wrapper: nn.Module) -> nn.Module:
    """Return the frozen layer inside one of ``wrapped``."""
    return wrapper["embedding"] if "embedding" in wrapper else wrapper["linear"]


def trainable(model: nn.Module) -> dict[str, mx.array]:
    """Return the trainable parameters by their dotted names."""
    return dict(tree_flatten(model.trainable_parameters()))


def with_our_layers(model: nn.Module) -> None:
    """Replace mlx-lm's LoRA layers in ``model`` by ``LowRankLinear``, in place; what is trained becomes float32."""
    theirs = [(name, module) for name, module in model.named_modules() if type(module) is LoRALinear]
    if theirs:
        model.update_modules(tree_unflatten([(name, LowRankLinear.of(module)) for name, module in theirs]))
    model.update(tree_map(lambda value: value.astype(mx.float32), model.trainable_parameters()))


def lora_parameters(adapter: LoRA, keys: Sequence[str]) -> dict[str, Any]:
    """Return the settings of a LoRA under mlx-lm's names."""
    return {"rank": adapter.rank, "scale": adapter.scale, "dropout": adapter.dropout, "keys": sorted(keys)}


def _sites(model: nn.Module, blocks: Sequence[nn.Module], adapter: Adapter) -> tuple[list[str], dict[str, Any]]:
    """Return the names of the modules to adapt, within a block or in full, and the modules by their full names.

    A layer outside the blocks, an embedding among them, is adapted if ``adapter.modules`` has its full name.
    """
    kinds: Any = Dense | Experts if type(adapter) in (LoRA, QLoRA, Full) else Dense
    anywhere: Any = kinds | nn.Embedding if isinstance(adapter, LoRA | Full) else kinds
    anywhere = anywhere | nn.QuantizedEmbedding if type(adapter) in (LoRA, QLoRA) else anywhere
    whole = {name: module for name, module in model.named_modules() if isinstance(module, anywhere)}
    found = dict.fromkeys(n for block in blocks for n, m in _leaves(block) if isinstance(m, kinds))
    chosen = {name: {name} & {*found} or {n for n in found if n.endswith(f".{name}")} for name in adapter.modules}
    for name, matches in chosen.items():
        if not matches and name not in whole:
            raise unknown_name("linear module", name, {n.rsplit(".", 1)[-1] for n in found})
    keys = [n for n in found if not chosen or any(n in matches for matches in chosen.values())]
    inside = {id(m) for block in blocks for n, m in _leaves(block) if n in keys}
    keys += [name for name, module in whole.items() if name in chosen and id(module) not in inside]
    if not keys:
        raise UserError(
            f"the blocks of this {type(blocks[0]).__name__} have no linear modules; set adapter.kind to full"
        )
    return keys, {name: module for name, module in whole.items() if id(module) in inside or name in keys}


def _refuse_layers_read_by_the_model(model: nn.Module) -> None:
    """Raise UserError that names the adapted layers whose weights ``model`` reads itself, past their adapters.

    Nothing is computed: the passes end at their graphs. In training mode models keep no products of their weights.
    """
    model.train()
    if (fault := _fault(model)) is None:
        return
    adapted = wrapped(model)
    model.update_modules(tree_unflatten([(name, inner(module)) for name, module in adapted]))
    kinds: dict[str, list[Any]] = {}
    for name, module in adapted:
        kinds.setdefault(".".join(part for part in name.split(".") if not part.isdigit()), []).append((name, module))
    read = []
    for layers in kinds.values() if _fault(model) is None else ():
        model.update_modules(tree_unflatten(layers))
        read += layers[:1] if _fault(model) else []
        model.update_modules(tree_unflatten([(name, inner(module)) for name, module in layers]))
    model.update_modules(tree_unflatten(adapted))
    family, names = type(model).__module__.rsplit(".", 1)[-1], [name for name, _ in read]
    if not names:
        raise UserError(f"this {family} cannot read a token here ({fault}); choose another model")
    ends = {name.rsplit(".", 1)[-1] for name, _ in adapted} - {name.rsplit(".", 1)[-1] for name in names}
    raise UserError(
        f"{family} reads the weights of {', '.join(names)} itself, so no adapter can stand around them ({fault}); "
        f"leave them out by setting adapter.modules to {','.join(sorted(ends))}"
    )


def _fault(model: nn.Module) -> str | None:
    """Return what a pass over two tokens raises, in a line; None if nothing."""
    try:
        model(mx.zeros((1, 2), mx.int32))
    except (ArithmeticError, AttributeError, LookupError, RuntimeError, TypeError, ValueError) as error:
        return (str(error).strip() or type(error).__name__).splitlines()[0]
    return None


def _leaves(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """Return the modules inside ``module`` that contain no others, in the order of their definition."""
    return tree_flatten(module.leaf_modules(), is_leaf=nn.Module.is_module)  # type: ignore[return-value]


def _quantise(model: nn.Module, adapter: QLoRA) -> tuple[int, int] | None:
    """Quantise a floating-point base as mlx-lm does and return bits and group size; None if it is quantised already."""
    from mlx_lm.utils import quantize_model

    present = {m.bits for m in model.modules() if isinstance(m, nn.QuantizedLinear)}
    if present:
        if adapter.bits is not None and adapter.bits not in present:
            raise UserError(
                f"the base is quantised to {min(present)} bits and bits is {adapter.bits}; leave bits out, "
                "or load the base with dequantize=True"
            )
        return None
    bits, group_size = adapter.bits or 4, adapter.group_size
    try:
        with redirect_stdout(io.StringIO()):  # it prints a line
            quantize_model(model, {}, group_size, bits)
    except ValueError as error:
        raise UserError(f"the base cannot be quantised to {bits} bits in groups of {group_size}: {error}") from error
    if not any(isinstance(m, nn.QuantizedLinear) for m in model.modules()):
        raise UserError(
            f"no layer of the base has a width that is a multiple of {group_size}; lower group_size (32, 64 or 128)"
        )
    return bits, group_size


def _wrap_in_svd(
    model: nn.Module, sites: Mapping[str, Any], adapter: TinyLoRA | LoRAXS, seed: int, factors: Factorise
) -> None:
    """Wrap each module of ``sites`` (by name) in an SVDLinear.

    R of a TinyLoRA is sum_i v_i P_i, with P the module's own and v shared by its tying group; a LoRA-XS trains R.
    """
    triplets, names = factors(sites, adapter.rank), list(sites)
    if isinstance(adapter, TinyLoRA):
        if not adapter.tie:
            groups = [0] * len(names)
        else:
            structured = adapter.tying == "structured"
            groups = structured_groups(names, adapter.tie) if structured else tiled_groups(len(names), adapter.tie)
        vectors = SharedVectors(max(groups) + 1, adapter.u)
    for index, (name, module) in enumerate(sites.items()):
        rank = len(triplets[name].s)
        own_seed = int(np.random.SeedSequence([seed, index]).generate_state(1)[0])  # so that modules differ
        core: ProjectedCore | TrainedCore
        if isinstance(adapter, TinyLoRA):
            core, scale = ProjectedCore(vectors, groups[index], projections(adapter.u, rank, own_seed)), 1.0
        else:
            core, scale = TrainedCore(rank, own_seed), adapter.scale
        layer = SVDLinear(module, triplets[name], core, adapter.sigma, scale)
        model.update_modules(tree_unflatten([(name, layer)]))
    if isinstance(adapter, TinyLoRA):
        setattr(model, VECTORS, vectors)
