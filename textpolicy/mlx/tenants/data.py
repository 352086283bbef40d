"""The data of a pass as rows of a batch: checked, padded, and cut where prompts are shared."""

from __future__ import annotations

from collections import Counter
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

import numpy as np

from ...errors import UserError
from ...serving import Datum
from ...types import Batch, Bools, Floats, Ints, token_ids
from .objectives import MASK, Loss


@dataclass(frozen=True, slots=True, eq=False)
class Rows:
    """The B data of one pass as arrays, padded with zeros to T positions and K targets (K is 1 unless one has more)."""

    tokens: Ints  # (B, T) int32
    targets: Ints  # (B, T, K) int32
    factors: Floats  # (B, T, K) float32: weights of cross_entropy, else advantages
    sampled: Floats  # (B, T) float32, the sampler's log-probs; 0 in cross_entropy
    mask: Bools  # (B, T) bool, the positions of GSPO's ratio, and those that count in DRO
    lengths: Ints  # (B,) int
    shapes: Sequence[tuple[int, ...]]  # of each datum's targets
    matters: Bools  # (B, T) bool, the positions that the loss depends on

    @classmethod
    def of(cls, data: Sequence[Datum], loss: Loss, vocabulary: int | None, longest: int | None) -> Rows:
        """Return checked ``data``. Raises UserError that names the datum and what is wrong with it."""
        if not data:
            raise UserError("there are no data; give at least one datum")
        checked = [_checked(f"datum {i}", datum, loss, vocabulary, longest) for i, datum in enumerate(data)]
        shapes = [arrays["target_tokens"].shape for arrays in checked]
        size = (len(data), max(shape[0] for shape in shapes))
        k = max(shape[1] if len(shape) > 1 else 1 for shape in shapes)
        tokens, targets = np.zeros(size, np.int32), np.zeros((*size, k), np.int32)
        factors, sampled, mask = np.zeros((*size, k), np.float32), np.zeros(size, np.float32), np.zeros(size, bool)
        for i, (arrays, (n, *_)) in enumerate(zip(checked, shapes, strict=True)):
            per = (n, -1)
            wide = arrays["target_tokens"].reshape(per)
            tokens[i, :n], targets[i, :n, : wide.shape[1]] = arrays["tokens"], wide
            factors[i, :n, : wide.shape[1]] = arrays[loss.inputs[-1]].reshape(per)
            if "logprobs" in arrays:
                sampled[i, :n] = arrays["logprobs"]
            if MASK in arrays:
                mask[i, :n] = arrays[MASK] != 0
        weighted = (factors != 0).any(axis=2)
        given = np.array([MASK in arrays for arrays in checked])
        known = weighted | (sampled != 0)  # a prompt's positions have 0 for both
        mask = np.where(given[:, None], mask, known)
        matters = {"gspo": weighted | mask, "dro": known}.get(loss.name, weighted)
        return cls(tokens, targets, factors, sampled, mask, np.array([s[0] for s in shapes]), shapes, matters)

    def split(self) -> tuple[Ints, Ints]:
        """Return for each datum where its own part begins, (B,) int, and those that have one, (L,) int.

        Before it are positions without a part in the loss that other data have, too: a prompt, read once for all.
        """
        alike = [
            (int(np.argmax(m)) if m.any() else int(n)) for m, n in zip(self.matters, self.lengths.tolist(), strict=True)
        ]
        keys = [self.tokens[i, : start + 1].tobytes() for i, start in enumerate(alike)]
        times, some = Counter(keys), np.asarray(self.matters.any(axis=1))
        starts = [start if times[key] > 1 or not s else 0 for start, key, s in zip(alike, keys, some, strict=True)]
        return np.array(starts), np.flatnonzero(some)

    def batch(self, rows: Ints, starts: Ints, stops: Ints, *, loss: bool = True) -> Batch:
        """Return the given rows with the positions [start, stop) of each as targets."""
        wide = int(stops.max())
        where = np.arange(wide)
        inside = (where >= starts[:, None]) & (where < stops[:, None])
        targets, factors = self.targets[rows, :wide], self.factors[rows, :wide]
        if targets.shape[2] == 1:
            targets, factors = targets[..., 0], factors[..., 0]
        return Batch(
            inputs=self.tokens[rows, :wide],
            targets=targets,
            logprobs=self.sampled[rows, :wide],
            advantages=factors,
            weights=inside.astype(np.float32),
            temperatures=np.ones((len(rows), 1), np.float32),
            old=self.mask[rows, :wide].astype(np.float32) if loss else None,
        )


def _checked(
    what: str, datum: Datum, loss: Loss, vocabulary: int | None, longest: int | None
) -> Mapping[str, np.ndarray]:
    """Return a datum's tokens and inputs in the types that a pass wants. Raises UserError."""
    if missing := [name for name in loss.inputs if name not in datum.inputs]:
        raise UserError(f"{what} lacks {missing[0]}, which the loss {loss.name} needs; give {', '.join(loss.inputs)}")
    known = (*loss.inputs, *((MASK,) if loss.name == "gspo" else ()))
    if idle := sorted(set(datum.inputs) - set(known)):
        raise UserError(
            f"{what} has {idle[0]}, which the loss {loss.name} does not read; give {', '.join(known)} alone"
        )
    tokens = token_ids(datum.tokens, vocabulary)
    n = len(tokens)
    if n == 0 or (longest is not None and n > longest):
        room = "any number" if longest is None else f"1 to {longest}"
        raise UserError(f"{what} has {n} tokens and the model reads {room}; give it another length")
    arrays: dict[str, Any] = {name: np.asarray(datum.inputs[name]) for name in known if name in datum.inputs}
    targets = arrays["target_tokens"]
    most = 2 if loss.name == "cross_entropy" else 1
    if not 1 <= targets.ndim <= most or targets.shape[0] != n or targets.size == 0:
        forms = f"({n},)" + (f" or ({n}, K)" if most == 2 else "")
        raise UserError(f"{what} has {n} tokens and target_tokens of shape {targets.shape}; give it the shape {forms}")
    out: dict[str, np.ndarray] = {"tokens": tokens}
    out["target_tokens"] = token_ids(targets.reshape(-1), vocabulary).reshape(targets.shape)
    for name, array in arrays.items():
        if name == "target_tokens":
            continue
        if array.shape != targets.shape:
            raise UserError(f"{what} has {name} of shape {array.shape} and targets of {targets.shape}; make them equal")
        if array.dtype.kind not in "fiub" or not (np.abs(array) <= np.finfo(np.float32).max).all():
            raise UserError(f"{what} has {name} that are not finite numbers of float32; check how they are computed")
        out[name] = array.astype(np.float32)
    return out
