"""The adapters of few parameters on a frozen SVD: TinyLoRA (arXiv:2602.04118) and LoRA-XS (arXiv:2405.17604)."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from functools import partial
from typing import Literal

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ...config.adapters import Sigma as SigmaPlacement
from ...errors import UserError, unknown_name
from .quantised import dense_weight

_SIGMA_POWERS = {"paper": (1.0, 0.0), "peft": (0.5, 0.5), "loraxs_code": (0.0, 1.0)}  # left and right of R


@dataclass(frozen=True, slots=True, eq=False)
class Factors:
    """The leading r singular triplets of a weight, W ~ U S V^T, float32."""

    u: mx.array  # (out, r)
    s: mx.array  # (r,), descending
    vt: mx.array  # (r, in)


def truncated_svd(weight: mx.array, rank: int) -> Factors:
    """Return the leading triplets of an (out, in) ``weight``, at most min(out, in) of them.

    The largest entry of every u_k is made positive: otherwise the sign of the pair (u_k, v_k) would depend on the
    SVD routine, and another sign is another adapter.
    """
    from scipy.sparse.linalg import svds  # a slow import

    if rank < 1:
        raise UserError(f"the rank of the SVD is {rank}; set it to 1 or more")
    w = np.array(weight.astype(mx.float32))
    if not 0 < np.abs(w).max() < np.inf:
        raise UserError(f"a weight of shape {w.shape} is all zeros or not finite; exclude its layer from the adapter")
    if rank < min(w.shape):
        start = np.random.default_rng(0).standard_normal(min(w.shape)).astype(np.float32)
        u, s, vt = svds(w, rank, v0=start)
    else:
        u, s, vt = np.linalg.svd(w, full_matrices=False)
    order = np.argsort(-s)
    u, s, vt = u[:, order], s[order], vt[order]
    signs = np.where(u[np.abs(u).argmax(axis=0), np.arange(len(s))] < 0, -1, 1).astype(np.float32)
    return Factors(mx.array(u * signs), mx.array(s), mx.array(vt * signs[:, None]))


def projections(count: int, rank: int, seed: int) -> mx.array:
    """Return the fixed P (count, rank, rank) float32 with entries of N(0, 1/rank), as in PEFT.

    The paper does not name their distribution. Give every module a ``seed`` of its own.
    """
    return mx.random.normal((count, rank, rank), scale=1 / math.sqrt(rank), key=mx.random.key(seed))


def mixture(v: mx.array, projections: mx.array) -> mx.array:
    """Return R = sum_i v_i P_i (r, r), of ``v`` (u,) and ``projections`` (u, r, r)."""
    return mx.tensordot(v, projections, axes=1)


def delta_weight(factors: Factors, core: mx.array, placement: SigmaPlacement = "paper", scale: float = 1.0) -> mx.array:
    """Return what an adapter with ``core`` R (r, r) adds to the weight (out, in), with Sigma where it was published.

    "paper" (TinyLoRA): scale U S R V^T; "peft": scale U S^1/2 R S^1/2 V^T; "loraxs_code" (the LoRA-XS
    authors' code, scale alpha / r): scale U R S V^T.
    """
    left, right = _outer(factors, placement, scale)
    return left @ core @ right


def _outer(factors: Factors, placement: SigmaPlacement, scale: float) -> tuple[mx.array, mx.array]:
    """Return the factors left (out, r) and right (r, in) of R."""
    if placement not in _SIGMA_POWERS:
        raise unknown_name("placement of Sigma", placement, _SIGMA_POWERS)
    left, right = _SIGMA_POWERS[placement]
    return scale * factors.u * factors.s**left, factors.s[:, None] ** right * factors.vt


class SharedVectors(nn.Module):
    """The v of every tying group, (groups, u) float32: all that TinyLoRA trains; 0 at the start.

    The model holds it once, and the adapted layers read it without owning it: an array in several modules would be
    trained as several.
    """

    def __init__(self, groups: int, u: int):
        super().__init__()
        self.v = mx.zeros((groups, u))

    def __call__(self, group: int) -> mx.array:
        return self.v[group]


class ProjectedCore(nn.Module):
    """The R of a TinyLoRA, sum_i v_i P_i, of the v of ``group`` and frozen ``projections`` (u, r, r)."""

    def __init__(self, vectors: SharedVectors, group: int, projections: mx.array):
        super().__init__()
        self.vector = partial(vectors, group)  # out of reach of parameters(), which would list v again
        self.projections = projections
        self.freeze()

    @property
    def vectors(self) -> SharedVectors:
        """Return the shared vectors that this layer uses."""
        return self.vector.func  # type: ignore[return-value]

    def __call__(self) -> mx.array:
        return mixture(self.vector(), self.projections)


class TrainedCore(nn.Module):
    """The R of a LoRA-XS, (rank, rank) float32, itself trained and drawn from N(0, (1e-5)^2)."""

    def __init__(self, rank: int, seed: int):
        super().__init__()
        self.r = mx.random.normal((rank, rank), scale=1e-5, key=mx.random.key(seed))

    def __call__(self) -> mx.array:
        return self.r


class SVDLinear(nn.Module):
    """The layer y = x (W + delta W)^T + b around a (quantised) linear layer, frozen except for what ``core`` trains.

    The outer factors, Sigma included, are the frozen arrays ``left`` (out, r) and ``right`` (r, in): save them with
    the trained values, which mean nothing without them.
    """

    def __init__(
        self,
        linear: nn.Linear | nn.QuantizedLinear,
        factors: Factors,
        core: ProjectedCore | TrainedCore,
        placement: SigmaPlacement = "paper",
        scale: float = 1.0,
    ):
        super().__init__()
        self.linear = linear
        self.core = core
        self.left, self.right = _outer(factors, placement, scale)
        self.linear.freeze()
        self.freeze(recurse=False, keys=["left", "right"])

    def __call__(self, x: mx.array) -> mx.array:
        change = x @ self.right.T @ self.core().T @ self.left.T
        return self.linear(x) + change.astype(x.dtype)

    def fuse(self) -> nn.Linear:
        """Return one float32 layer of weight W + delta W."""
        weight = dense_weight(self.linear, mx.float32) + self.left @ self.core() @ self.right
        outputs, inputs = weight.shape
        fused = nn.Linear(inputs, outputs, bias=False)
        fused.weight = weight
        if "bias" in self.linear:
            fused.bias = self.linear.bias
        return fused


def tying_groups(modules: int, groups: int, layout: Literal["balanced", "peft"] = "balanced") -> list[int]:
    """Return the tying group, of G ``groups``, of each of n neighbouring ``modules``: floor(i G / n).

    "peft" is that library's floor(i / floor(n / G)), which puts the remainder into the last group.
    """
    if not 1 <= groups <= modules:
        raise UserError(f"{modules} modules cannot form {groups} tying groups; set them to 1 to {modules}")
    match layout:
        case "balanced":
            return [i * groups // modules for i in range(modules)]
        case "peft":
            return [min(i // (modules // groups), groups - 1) for i in range(modules)]
    raise unknown_name("layout of tying groups", layout, ("balanced", "peft"))


def group_count(modules: int, tying: float) -> int:
    """Return the number of groups for PEFT's ``tying``: max(1, round(n (1 - tying))); 0 ties nothing, 1 everything."""
    if not 0 <= tying <= 1:
        raise UserError(f"tying is {tying}; set it between 0 (nothing is shared) and 1 (one v for all)")
    return max(1, round(modules * (1 - tying)))


def tiled_groups(modules: int, n_tie: int) -> list[int]:
    """Return groups of at most ``n_tie`` neighbouring modules of any kind (better than "structured" in the paper)."""
    return tying_groups(modules, _groups_of(modules, n_tie))


def structured_groups(names: Sequence[str], n_tie: int) -> list[int]:
    """Return groups of at most ``n_tie`` modules of one kind in neighbouring layers.

    The kind is the dotted name without its numbers. Raises UserError for fewer modules of a kind than ``n_tie``.
    """
    kinds = [".".join(part for part in name.split(".") if not part.isdigit()) for name in names]
    out, used = [0] * len(names), 0
    for kind in dict.fromkeys(kinds):
        members = [i for i, k in enumerate(kinds) if k == kind]
        if len(members) < n_tie:
            raise UserError(
                f"n_tie is {n_tie} but {len(members)} modules are of kind {kind}; set it to {len(members)} or less"
            )
        groups = _groups_of(len(members), n_tie)
        for i, group in zip(members, tying_groups(len(members), groups), strict=True):
            out[i] = used + group
        used += groups
    return out


def _groups_of(modules: int, n_tie: int) -> int:
    if n_tie < 1:
        raise UserError(f"n_tie is {n_tie}; set it to 1 (nothing is shared) or more")
    return math.ceil(modules / n_tie)


def tinylora_size(groups: Sequence[int], u: int) -> int:
    """Return the parameter count of a TinyLoRA whose modules form ``groups``: u for each distinct one."""
    return len(set(groups)) * u


def lora_size(shapes: Sequence[tuple[int, int]], rank: int) -> int:
    """Return the parameter count of a LoRA on layers of these (in, out) ``shapes``: the sum of rank (in + out)."""
    return sum(rank * (inputs + outputs) for inputs, outputs in shapes)


def lora_xs_size(modules: int, rank: int) -> int:
    """Return the parameter count of a LoRA-XS on this many ``modules``: rank^2 each."""
    return modules * rank**2
