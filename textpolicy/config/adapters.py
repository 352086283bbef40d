"""The kinds of adapter: their trainable parameters, the modules they adapt, and their scale."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import asdict, dataclass, fields
from typing import Any, ClassVar, Literal

from ..errors import UserError, unknown_name

Sigma = Literal["paper", "peft", "loraxs_code"]


@dataclass(frozen=True, slots=True, kw_only=True)
class Adapter:
    """The base of all kinds: an adapter on linear modules of a model's blocks."""

    kind: ClassVar[str]
    learning_rate: ClassVar[float]  # a good default for AdamW
    dequantize: ClassVar[bool | None] = None  # whether to load the base dequantised; None leaves it to load_model

    layers: int = 0  # adapt this many last blocks; 0 for all
    modules: tuple[str, ...] = ()  # names or their ends, such as "q_proj"; () for all

    def __post_init__(self) -> None:
        if self.layers < 0:
            raise UserError(f"layers is {self.layers}; set it to the number of last blocks to adapt, or 0 for all")


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRA(Adapter):
    """The LoRA y = W x + s (x A) B with A ~ U(+-1/sqrt(in)) and B = 0 (arXiv:2106.09685)."""

    kind: ClassVar[str] = "lora"
    learning_rate: ClassVar[float] = 3e-4

    rank: int = 16
    alpha: float = 32.0
    rank_stabilised: bool = False
    dropout: float = 0.0

    def __post_init__(self) -> None:
        Adapter.__post_init__(self)
        _check_rank(self.rank, "LoRA rank")
        if not 0 <= self.dropout < 1:
            raise UserError(f"the dropout of a LoRA is {self.dropout}; set it from 0 to below 1")

    @property
    def scale(self) -> float:
        """The scale s = alpha / r, or alpha / sqrt(r) if rank-stabilised (arXiv:2312.03732)."""
        return self.alpha / (math.sqrt(self.rank) if self.rank_stabilised else self.rank)


@dataclass(frozen=True, slots=True, kw_only=True)
class DoRA(LoRA):
    """The LoRA of the weight's direction, with a trained magnitude m for each row (arXiv:2402.09353)."""

    kind: ClassVar[str] = "dora"


@dataclass(frozen=True, slots=True, kw_only=True)
class QLoRA(LoRA):
    """The float LoRA on a base that stays quantised (arXiv:2305.14314)."""

    kind: ClassVar[str] = "qlora"
    dequantize: ClassVar[bool | None] = False

    bits: int | None = None  # for a base in floats, 4 if None; a quantised base must have the same
    group_size: int = 64  # weights that share a scale, for a base in floats


@dataclass(frozen=True, slots=True, kw_only=True)
class Full(Adapter):
    """The model's own weights, without an adapter: there is then no reference for a KL penalty."""

    kind: ClassVar[str] = "full"
    learning_rate: ClassVar[float] = 2e-5
    dequantize: ClassVar[bool | None] = True


@dataclass(frozen=True, slots=True, kw_only=True)
class LoRAXS(Adapter):
    """The adapter y = W x + U S R V^T x on the frozen SVD of W, with R (r, r) trained (arXiv:2405.17604)."""

    kind: ClassVar[str] = "lora_xs"
    learning_rate: ClassVar[float] = 1e-3

    rank: int = 16
    sigma: Sigma = "paper"
    alpha: float = 32.0  # scale alpha / r for sigma "loraxs_code"; the other two have no scale

    def __post_init__(self) -> None:
        Adapter.__post_init__(self)
        _check_rank(self.rank, "rank of a LoRA-XS")

    @property
    def scale(self) -> float:
        return self.alpha / self.rank if self.sigma == "loraxs_code" else 1.0


@dataclass(frozen=True, slots=True, kw_only=True)
class TinyLoRA(Adapter):
    """The LoRA-XS with R = sum_i v_i P_i: P fixed and random, v (u,) shared by tied modules (arXiv:2602.04118)."""

    kind: ClassVar[str] = "tinylora"
    learning_rate: ClassVar[float] = 5e-3

    rank: int = 2
    u: int = 13
    tie: int = 0  # modules that share one v; 0 for all of them
    tying: Literal["tiled", "structured"] = "tiled"
    sigma: Literal["paper", "peft"] = "paper"

    def __post_init__(self) -> None:
        Adapter.__post_init__(self)
        _check_rank(self.rank, "rank of a TinyLoRA")
        if self.u < 1:
            raise UserError(f"u, the length of a TinyLoRA's vector, is {self.u}; set it to 1 or more")
        if self.tie < 0:
            raise UserError(f"tie is {self.tie}; set it to the number of modules that share a vector, or 0 for all")


KINDS: dict[str, type[Adapter]] = {kind.kind: kind for kind in (LoRA, DoRA, QLoRA, Full, LoRAXS, TinyLoRA)}


def make_adapter(kind: str, settings: Mapping[str, Any]) -> Adapter:
    """Return an adapter of that ``kind`` with these ``settings``. Raises UserError for one that does not apply."""
    if kind not in KINDS:
        raise unknown_name("kind of adapter", kind, KINDS)
    known = {f.name for f in fields(KINDS[kind])}
    if idle := sorted(set(settings) - known):
        raise UserError(
            f"an adapter of the kind {kind} does not use {', '.join(idle)}; "
            f"leave it out, or choose from {', '.join(sorted(known))}"
        )
    return KINDS[kind](**{**settings, "modules": tuple(settings.get("modules", ()))})


def settings_of(adapter: Adapter) -> dict[str, Any]:
    """Return the settings for ``make_adapter``, as JSON values."""
    return {**asdict(adapter), "modules": list(adapter.modules)}


def _check_rank(rank: int, name: str) -> None:
    if rank < 1:
        raise UserError(f"the {name} is {rank}; set it to 1 or more")
