"""The learner of one client: an adapter on the shared base, its optimiser, and the gradient since the last step."""

from __future__ import annotations

import math
import os
import tempfile
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import fields
from pathlib import Path
from types import SimpleNamespace
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_flatten, tree_map

from ..._system.files import sync_tree
from ...errors import NotFiniteError, refuse_outside
from ...serving import Adam, Datum, Passed
from ..adapters.merging import load_adapter, save_adapter, trainable
from ..engine import pass_patches
from ..kernels.patching import patched
from ..read.bounds import Bounds
from ..score.micro_batches import Gradients, logprobs_of, micro_batches
from ..state import read_arrays, restore_training_state, training_state, write_arrays
from .data import Rows
from .objectives import Loss
from .room import Room
from .shared import twin
from .snapshot import Snapshot, writing

STATE = "training.safetensors"  # beside the adapter: weights, moments and the number of steps, bit for bit
_BELOW_1 = float(np.nextafter(1, 0))
_HIGHEST = {"beta1": _BELOW_1, "beta2": _BELOW_1}


class Tenant:
    """The learner of one adapter; its model is a twin of the base, with which it shares all frozen arrays."""

    def __init__(self, base: nn.Module, model: nn.Module, bounds: Bounds, longest: int | None, room: Room | None):
        self._base, self._bounds, self._longest, self._room = base, bounds, longest, room
        self.micro_batch_tokens = 8192
        self._become(model, _fresh())

    def _become(self, model: nn.Module, optimizer: optim.AdamW) -> None:
        if self._room is not None:
            self._room.refuse_adapter(sum(value.nbytes for value in trainable(model).values()))
        self.model, self.optimizer = model, optimizer
        optimizer.init(model.trainable_parameters())
        self._gradients = Gradients(model)
        self.gradient: Any = None  # the sum since the last step

    def passed(self, data: Sequence[Datum], loss: str, config: Mapping[str, Any], *, backward: bool) -> Passed:
        """Return log-probs of the targets, at every position, and the loss, a sum; if ``backward``, add its gradient.

        Raises UserError, and NotFiniteError for a loss or gradient that is not finite; then nothing is added.
        """
        chosen = Loss.of(loss, config)
        rows = Rows.of(data, chosen, self._bounds.vocabulary, self._longest)
        every, k = np.arange(len(data)), rows.targets.shape[2]
        l = np.zeros(rows.targets.shape, np.float32)
        starts, own = rows.split()
        tokens = self.micro_batch_tokens
        if self._room is not None:
            tokens = self._room.pass_tokens(len(data), int(rows.lengths.max()), tokens)
        gradient: Any = None
        with patched(self.model, pass_patches()):
            if len(own) and backward:
                batch = rows.batch(own, starts[own], rows.lengths[own])
                for some, layout in micro_batches(batch, tokens):
                    reported, grad = self._gradients(layout, chosen)
                    gradient = grad if gradient is None else tree_map(mx.add, gradient, grad)
                    mx.eval(reported, gradient)
                    for i, line in zip(own[some], np.array(reported["logprobs"]), strict=False):
                        n = rows.lengths[i] - starts[i]
                        l[i, starts[i] : rows.lengths[i]] = line[:n].reshape(n, k)
            elif len(own):
                self._score(l, rows, own, starts[own], rows.lengths[own], tokens)
            self._score(l, rows, every, np.zeros_like(starts), starts, tokens)
        whole = rows.batch(every, np.zeros_like(starts), rows.lengths)
        double = {f.name: _double(getattr(whole, f.name)) for f in fields(whole)}
        total = float(
            chosen.total(l[..., 0].astype(float) if k == 1 else l.astype(float), SimpleNamespace(**double), np)
        )
        if not np.isfinite(total) or (gradient is not None and not np.isfinite(_norm(gradient))):
            raise NotFiniteError(
                f"the loss {loss} is {total}, or its gradient is not finite, so nothing was added; check the data for "
                "log-probs far from the model's, and for huge weights or advantages"
            )
        if gradient is not None:
            self.gradient = gradient if self.gradient is None else tree_map(mx.add, self.gradient, gradient)
            mx.eval(self.gradient)
        kept = [
            line[: shape[0], : math.prod(shape[1:])].reshape(shape) for line, shape in zip(l, rows.shapes, strict=True)
        ]
        return Passed(kept, {"loss:sum": total})

    def _score(
        self, l: np.ndarray, rows: Rows, which: np.ndarray, starts: np.ndarray, stops: np.ndarray, tokens: int
    ) -> None:
        """Fill l (B, T, K) with the log-probs of the rows ``which`` at [start, stop), equal ones computed once."""
        some = stops > starts
        which, starts, stops = which[some], starts[some], stops[some]
        if not len(which):
            return
        keys = [
            rows.tokens[i, :b].tobytes() + rows.targets[i, a:b].tobytes()
            for i, a, b in zip(which, starts, stops, strict=True)
        ]
        _, first, back = np.unique(np.array(keys, object), return_index=True, return_inverse=True)
        batch = rows.batch(which[first], starts[first], stops[first], loss=False)
        found = logprobs_of(self.model, batch, tokens)
        for i, a, b, j in zip(which, starts, stops, back.reshape(-1), strict=True):
            l[i, a:b] = found[j, a:b].reshape(b - a, -1)

    def step(self, adam: Adam) -> Mapping[str, float]:
        """Apply the accumulated gradient, zeros if there is none, and forget it; return its norm before clipping.

        Raises UserError for a setting that cannot be, NotFiniteError where the result would not be finite.
        """
        for f in fields(adam):
            refuse_outside(f.name, getattr(adam, f.name), 0, _HIGHEST.get(f.name, float("inf")))
        parameters = self.model.trainable_parameters()
        gradient = tree_map(mx.zeros_like, parameters) if self.gradient is None else self.gradient
        norm = _norm(gradient)
        if adam.clip > 0:
            gradient, _ = optim.clip_grad_norm(gradient, adam.clip)
        optimizer = self.optimizer
        before = tree_map(lambda value: value, optimizer.state)
        optimizer.betas, optimizer.eps = [adam.beta1, adam.beta2], adam.eps
        optimizer.learning_rate, optimizer.weight_decay = adam.learning_rate, adam.weight_decay
        after = optimizer.apply_gradients(gradient, parameters)
        mx.eval(after, optimizer.state)
        if not (np.isfinite(norm) and np.isfinite(_norm(after))):
            optimizer.state = before
            raise NotFiniteError(
                f"a step with the gradient norm {norm:g} gives weights that are not finite, so nothing was updated; "
                "lower the learning rate, or raise eps"
            )
        self.model.update(after)
        self.gradient = None
        return {"grad_norm": norm}

    def weights(self) -> Snapshot:
        """Return the adapter as it is now; later steps do not change it."""
        return Snapshot(twin(self.model))

    def save(self, folder: Path) -> None:
        """Write adapter and optimiser into the new folder ``folder``, whole or not at all. Raises OSError.

        It is an adapter in mlx-lm's layout, with one file more. The accumulated gradient is no part of it.
        """
        folder.parent.mkdir(parents=True, exist_ok=True)
        with tempfile.TemporaryDirectory(prefix=f".{folder.name}-", dir=folder.parent) as workspace, writing():
            new = Path(workspace) / "learner"
            save_adapter(self.model, new)
            write_arrays(new / STATE, training_state(self.model, self.optimizer), {})
            sync_tree(new)
            os.replace(new, folder)

    def load(self, folder: Path, *, optimizer: bool) -> None:
        """Become what ``save`` wrote, with its optimiser or a fresh one. Raises UserError, changing nothing."""
        model, fresh = load_adapter(twin(self._base), folder), _fresh()
        if optimizer:
            restore_training_state(model, fresh, read_arrays(folder / STATE)[0], folder)
        self._become(model, fresh)

    def close(self) -> None:
        """Release its memory; it must not be used afterwards."""
        del self.model, self.optimizer, self._gradients, self.gradient


def _fresh() -> optim.AdamW:
    return optim.AdamW(0.0, weight_decay=0.0, bias_correction=True)


def _double(array: np.ndarray | None) -> np.ndarray | None:
    return None if array is None else array.astype(float)


def _norm(tree: Any) -> float:
    """Return the norm of all arrays of ``tree`` together."""
    flat: Iterable[tuple[str, mx.array]] = tree_flatten(tree)  # type: ignore[assignment]
    squares = mx.stack([mx.square(array).sum() for _, array in flat])
    return float(np.sqrt(np.array(squares).astype(float).sum()))
