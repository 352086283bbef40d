"""Adapters of every kind put on a model: which modules they sit on, and what is trained of them."""

from __future__ import annotations

import io
from collections.abc import Callable, Mapping, Sequence
from contextlib import redirect_stdout
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np
from mlx.utils import tree_flatten, tree_unflatten
from mlx_lm.models.switch_layers import QuantizedSwitchLinear, SwitchLinear
from mlx_lm.tuner.dora import DoRAEmbedding, DoRALinear
from mlx_lm.tuner.lora import LoRAEmbedding, LoRALinear, LoRASwitchLinear
from mlx_lm.tuner.utils import linear_to_lora_layers

from ...config.adapters import Adapter, DoRA, Full, LoRA, LoRAXS, QLoRA, TinyLoRA
from ...errors import UserError, unknown_name
from .fingerprint import Base
from .lora_linear import LowRankLinear, in_the_models_type
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

Dense = nn.Linear | nn.QuantizedLinear
Experts = SwitchLinear | QuantizedSwitchLinear
Factorise = Callable[[Mapping[str, Any], int], Mapping[str, Factors]]

VECTORS = "adapter_vectors"  # where a model with a TinyLoRA holds them
WRAPPERS = (LoRALinear, LoRASwitchLinear, LoRAEmbedding, DoRALinear, DoRAEmbedding, SVDLinear)
TRAINED: dict[type, list[str]] = {  # of each layer that an adapter adds
    LoRALinear: ["lora_a", "lora_b"],
    LowRankLinear: ["lora_a", "lora_b"],
    LoRASwitchLinear: ["lora_a", "lora_b"],
    LoRAEmbedding: ["lora_a", "lora_b"],
    DoRALinear: ["lora_a", "lora_b", "m"],
    DoRAEmbedding: ["lora_a", "lora_b", "m"],
    TrainedCore: ["r"],
    SharedVectors: ["v"],
}
_RECORD = "_textpolicy_adapter"  # the attribute that remembers what was attached


@dataclass(frozen=True, slots=True)
class Attached:
    """What is on a model, for its folder and for reloading."""

    adapter: Adapter
    base: Base  # the model underneath, before anything was attached
    blocks: int  # the last so many are adapted
    keys: tuple[str, ...]  # names of the adapted modules within a block
    quantised: tuple[int, int] | None = None  # bits and group size, if the base was quantised for this adapter
    save_path: Path | None = None  # where ``Trainer(auto_save_lora=True)`` writes it


def attached(model: nn.Module) -> Attached | None:
    """What ``attach`` has put on ``model``."""
    return vars(model).get(_RECORD)


def remember(model: nn.Module, record: Attached | None) -> None:
    """Let ``attached(model)`` be ``record``."""
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
    """Freeze ``model`` and put ``adapter`` on it, in place; only that trains then.

    The model starts unchanged (a LoRA-XS starts from an R of 1e-5). ``seed`` fixes what is drawn at random;
    with None a LoRA goes on from MLX's random state. ``factors`` makes the SVDs, and without ``quantise`` a
    QLoRA takes the base as it is. The model comes back in evaluation mode, in which dropout does nothing.
    Raises UserError for a model that has an adapter, or none of the modules asked for.
    """
    if attached(model) is not None or wrapped(model):
        raise UserError("the model has an adapter already; load the base again, or merge the adapter first")
    base = Base.of(model)
    quantised = _quantise(model, adapter) if isinstance(adapter, QLoRA) and quantise else None
    model.freeze()
    blocks = chosen_blocks(model, adapter)
    keys = _keys(blocks, adapter)
    match adapter:
        case Full():
            _unfreeze(model, blocks, keys, adapter)
        case LoRA():
            if seed is not None:
                mx.random.seed(seed)
            _add_lora(model, len(blocks), keys, adapter)
        case TinyLoRA():
            _add_tinylora(model, blocks, keys, adapter, 0 if seed is None else seed, factors)
        case LoRAXS():
            _add_lora_xs(model, blocks, keys, adapter, 0 if seed is None else seed, factors)
    remember(model, Attached(adapter, base, len(blocks), tuple(sorted(keys)), quantised))
    model.eval()
    mx.eval(model.parameters())
    return model


def detach(model: nn.Module) -> None:
    """Take the adapter off ``model``, in place; weights that were trained in full stay as they are."""
    if layers := [(name, inner(module)) for name, module in wrapped(model)]:
        model.update_modules(tree_unflatten(layers))
    model.pop(VECTORS, None)
    remember(model, None)


def wrapped(model: nn.Module) -> list[tuple[str, Any]]:
    """The layers that adapters have put around others, by name."""
    return [(name, module) for name, module in model.named_modules() if isinstance(module, WRAPPERS)]


def inner(wrapper: nn.Module) -> nn.Module:
    """The frozen layer inside one of ``wrapped``."""
    return wrapper["embedding"] if "embedding" in wrapper else wrapper["linear"]


def trainable(model: nn.Module) -> dict[str, mx.array]:
    """The trained parameters by their dotted names."""
    return dict(tree_flatten(model.trainable_parameters()))


# ---- which modules


def chosen_blocks(model: nn.Module, adapter: Adapter) -> list[nn.Module]:
    """The last ``adapter.layers`` blocks; all if that is 0, or more than there are."""
    return list(model.layers[-adapter.layers :]) if adapter.layers else list(model.layers)


def _keys(blocks: Sequence[nn.Module], adapter: Adapter) -> list[str]:
    """Names within a block of the modules to adapt, in the order of the model."""
    kinds = Dense | Experts if type(adapter) in (LoRA, QLoRA, Full) else Dense
    found = dict.fromkeys(n for block in blocks for n, m in leaves(block) if isinstance(m, kinds))
    for asked in adapter.modules:
        if not any(_named(name, asked) for name in found):
            raise unknown_name("linear module", asked, {name.rsplit(".", 1)[-1] for name in found})
    keys = [n for n in found if not adapter.modules or any(_named(n, asked) for asked in adapter.modules)]
    if not keys:
        raise UserError(f"the blocks of this {type(blocks[0]).__name__} hold no linear module; train it in full")
    return keys


def _named(name: str, asked: str) -> bool:
    return name == asked or name.endswith(f".{asked}")


def leaves(module: nn.Module) -> list[tuple[str, nn.Module]]:
    """The modules inside without modules of their own, in the order of their definition."""
    return tree_flatten(module.leaf_modules(), is_leaf=nn.Module.is_module)  # type: ignore[return-value]


def _sites(model: nn.Module, blocks: Sequence[nn.Module], keys: Sequence[str]) -> dict[str, Any]:
    """The modules to adapt by their names in the model, first block first."""
    names = {id(module): name for name, module in model.named_modules()}
    return {names[id(m)]: m for block in blocks for n, m in leaves(block) if n in keys}


# ---- the kinds


def _quantise(model: nn.Module, adapter: QLoRA) -> tuple[int, int] | None:
    """Quantise a base in floats by mlx-lm's rules; one that is quantised stays as it is, and gives None."""
    from mlx_lm.utils import quantize_model

    there = {m.bits for m in model.modules() if isinstance(m, nn.QuantizedLinear)}
    if there:
        if adapter.bits is not None and adapter.bits not in there:
            raise UserError(
                f"the base is quantised to {min(there)} bits and bits is {adapter.bits}; leave bits out, "
                "or load the base with dequantize=True"
            )
        return None
    how = (adapter.bits or 4, adapter.group_size)
    try:
        with redirect_stdout(io.StringIO()):  # it prints a line
            quantize_model(model, {}, how[1], how[0])
    except ValueError as error:
        raise UserError(f"the base cannot be quantised to {how[0]} bits in groups of {how[1]}: {error}") from error
    if not any(isinstance(m, nn.QuantizedLinear) for m in model.modules()):
        raise UserError(f"no layer of the base is a multiple of {how[1]} wide; lower group_size (32, 64 or 128)")
    return how


def _unfreeze(model: nn.Module, blocks: Sequence[nn.Module], keys: Sequence[str], adapter: Full) -> None:
    """All of the model; or the chosen blocks; or in these the chosen modules."""
    if any("scales" in module for module in model.modules()):
        raise UserError("a quantised model cannot be trained in full; load it with dequantize=True, or choose qlora")
    if not adapter.layers and not adapter.modules:
        model.unfreeze()
    for module in _sites(model, blocks, keys).values() if adapter.modules else blocks if adapter.layers else ():
        module.unfreeze()


def _add_lora(model: nn.Module, blocks: int, keys: Sequence[str], adapter: LoRA) -> None:
    dora = isinstance(adapter, DoRA)
    for module in model.modules() if dora else ():
        if isinstance(module, nn.QuantizedLinear) and 32 % module.bits:
            raise UserError(f"a DoRA cannot sit on weights of {module.bits} bits; take 4 or 8, or the kind qlora")
    linear_to_lora_layers(model, blocks, lora_parameters(adapter, keys), use_dora=dora)
    in_the_models_type(model)


def lora_parameters(adapter: LoRA, keys: Sequence[str]) -> dict[str, Any]:
    """As mlx-lm names them."""
    return {"rank": adapter.rank, "scale": adapter.scale, "dropout": adapter.dropout, "keys": sorted(keys)}


def _add_tinylora(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    keys: Sequence[str],
    adapter: TinyLoRA,
    seed: int,
    factors: Factorise,
) -> None:
    """R = sum_i v_i P_i with P of each module's own, and the v of its tying group."""
    sites = _sites(model, blocks, keys)
    triplets = factors(sites, adapter.rank)
    groups = _groups(list(sites), adapter)
    vectors = SharedVectors(max(groups) + 1, adapter.u)
    for index, (name, group) in enumerate(zip(sites, groups, strict=True)):
        p = projections(adapter.u, len(triplets[name].s), _seed_of(seed, index))
        core = ProjectedCore(vectors, group, p)
        _put(model, name, SVDLinear(sites[name], triplets[name], core, adapter.sigma))
    setattr(model, VECTORS, vectors)


def _add_lora_xs(
    model: nn.Module,
    blocks: Sequence[nn.Module],
    keys: Sequence[str],
    adapter: LoRAXS,
    seed: int,
    factors: Factorise,
) -> None:
    sites = _sites(model, blocks, keys)
    triplets = factors(sites, adapter.rank)
    for index, (name, module) in enumerate(sites.items()):
        core = TrainedCore(len(triplets[name].s), _seed_of(seed, index))
        _put(model, name, SVDLinear(module, triplets[name], core, adapter.sigma, adapter.scale))


def _groups(names: list[str], adapter: TinyLoRA) -> list[int]:
    """Which v each module reads."""
    if not adapter.tie:
        return [0] * len(names)
    if adapter.tying == "structured":
        return structured_groups(names, adapter.tie)
    return tiled_groups(len(names), adapter.tie)


def _put(model: nn.Module, name: str, layer: nn.Module) -> None:
    model.update_modules(tree_unflatten([(name, layer)]))


def _seed_of(seed: int, index: int) -> int:
    """One for each module, so that no two have the same random numbers."""
    return int(np.random.SeedSequence([seed, index]).generate_state(1)[0])
