"""The Engine over a local MLX model: decodes whole groups at once, updates with shared prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from ..engine import Sampling
from ..errors import NotFiniteError, UserError
from ..losses import Surrogate, correction_weights, denominator, importance_ratio, kl_estimate, policy_objective
from ..types import Batch, Completion
from .adapters.merging import adapters_off, save_adapter, trainable
from .blas import blas_threads
from .decode.compiled_steps import Steps
from .decode.decoder import decode
from .decode.folded_weights import copies, folded
from .kernels import cuda, exponentials
from .kernels.patching import patched
from .score.gradients import Gradients, Objective, OptimizerStep
from .score.micro_batches import logprobs_of, micro_batches
from .state import read_arrays, restore_training_state, training_state, write_arrays


class MLXEngine:
    """Samples from and trains one model held in this process.

    ``stop`` are the token ids that end a completion. ``micro_batch_tokens`` bounds the padded
    tokens of one forward and backward pass, ``decode_rows`` the completions decoded side by side,
    and the activations of every ``checkpoint_every``-th block (0: of none) are computed again instead
    of kept: none of them changes a result, only memory. ``compile`` passes and optimiser for shapes
    that come again; "auto" does so on a GPU only, because on a CPU it gains nothing.
    """

    packages = ("mlx", "mlx-lm")

    def __init__(
        self,
        model: nn.Module,
        *,
        stop: Iterable[int],
        optimizer: optim.Optimizer | None = None,
        weight_decay: float = 0.0,
        max_grad_norm: float = 1.0,
        micro_batch_tokens: int = 8192,
        decode_rows: int = 128,
        checkpoint_every: int = 0,
        compile: bool | Literal["auto"] = "auto",
    ):
        if checkpoint_every < 0:
            raise UserError(f"checkpoint_every is {checkpoint_every}; set it to 0 (keep all activations) or more")
        compiled = mx.default_device() == mx.gpu if compile == "auto" else compile
        self.model = model
        self.stop = np.array(sorted(stop), np.int32)
        self.optimizer = optimizer or optim.AdamW(0.0, weight_decay=weight_decay, bias_correction=True)
        self.max_grad_norm = max_grad_norm
        self.micro_batch_tokens, self.decode_rows = micro_batch_tokens, decode_rows
        self.checkpoint_every, self.compiled = checkpoint_every, compiled
        self.copies = True  # rollouts on a CPU may fold LoRAs into copies of the weights
        self._gradients = Gradients(model, checkpoint_every=checkpoint_every, compiled=compiled)
        self._optimizer_step = OptimizerStep(model, self.optimizer, compiled=compiled)

    def sample(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling) -> list[list[Completion]]:
        """``n`` completions for every prompt (token ids), in prompt order; each prompt is read once."""
        if any(len(p) == 0 for p in prompts):
            raise UserError("a prompt holds no tokens; give every prompt at least one")
        if not prompts:
            return []
        rows = [np.asarray(p, np.int32) for p in prompts for _ in range(n)]
        with patched(self.model, exponentials.patches()):
            model = folded(self.model, min(len(rows), self.decode_rows)) if self.copies else self.model
            flat = decode(model, rows, sampling, self.stop, self.decode_rows, steps=self._steps)
        return [flat[i * n : (i + 1) * n] for i in range(len(prompts))]

    @cached_property
    def _steps(self) -> Steps | None:
        """Compiled decoding steps, where these have been seen to pay."""
        return Steps(self.model, compiled=self.compiled, share=True) if cuda.is_default() else None

    def gradients(self, batch: Batch, objective: Objective) -> tuple[dict[str, float], Any]:
        """Summed loss statistics and gradients of ``objective`` over micro-batches of ``batch``."""
        totals: dict[str, float] = {}
        grads = None
        for _, layout in micro_batches(batch, self.micro_batch_tokens):
            with patched(self.model, _patches()):
                stats, grad = self._gradients(layout, objective)
            grads = grad if grads is None else tree_map(mx.add, grads, grad)
            mx.eval(stats, grads)
            for name, value in stats.items():
                before, now = totals.get(name, 0.0), float(np.array(value))
                totals[name] = max(before, now) if name.endswith("_max") else before + now
        return totals, grads

    def score(self, batch: Batch, *, reference: bool = False) -> np.ndarray:
        """(B, T) float32 log-probs of the batch's sampled targets, 0 elsewhere.

        Under the model as it is, or under the frozen ``reference``: the same weights with adapters off.
        """
        with adapters_off(self.model) if reference else nullcontext(), patched(self.model, _patches()):
            return logprobs_of(self.model, batch, self.micro_batch_tokens)

    def update(self, batch: Batch, surrogate: Surrogate, learning_rate: float) -> Mapping[str, float]:
        """One optimiser step on ``batch``; rows that cannot change the loss are skipped, exactly.

        If no row is left nothing moves, not even by momentum, and ``updated`` is 0; so it is, and ``skipped``
        1, when the loss or the gradient is not finite. A KL in the loss needs the reference's log-probs; they
        are scored here if the batch does not bring them.
        """
        matters = (batch.weights != 0) & ((batch.advantages != 0) | (surrogate.kl is not None))
        live = np.flatnonzero(matters.any(axis=1))
        if len(live) == 0:
            return {**_IDLE, **_memory()}
        rows = batch.take(live)
        if surrogate.kl is not None and rows.reference is None:
            rows = replace(rows, reference=self.score(rows, reference=True))
        stats, grads = self.gradients(rows, PolicyObjective(surrogate))
        try:
            norm = self.apply(grads, learning_rate) if np.isfinite(stats["loss"]) else np.nan
        except NotFiniteError:
            norm = np.nan
        if np.isnan(norm):
            return {**_IDLE, "skipped": 1.0, **_memory()}
        moved = {"loss": stats["loss"], "grad_norm": norm, "updated": float(norm > 0), "skipped": 0.0}
        return {**moved, **_per_token(stats), **_memory()}

    def apply(self, grads: Any, learning_rate: float | None = None) -> float:
        """Clip and apply gradients; returns their norm before clipping. Raises NotFiniteError, with nothing changed."""
        grads, norm = self._optimizer_step.clip(grads, self.max_grad_norm)
        if not np.isfinite(norm.item()):
            raise NotFiniteError(
                f"the gradient norm is {norm.item()}; nothing was updated: "
                "lower the learning rate or check the rewards for huge values"
            )
        if norm.item() == 0:  # an adaptive optimiser would move by its momentum
            return 0.0
        if learning_rate is not None:
            self.optimizer.learning_rate = learning_rate
        self._optimizer_step(grads)
        mx.eval(self.model.parameters(), self.optimizer.state)
        return float(norm.item())

    def save(self, path: Path) -> None:
        """Write the adapter in mlx-lm's layout to the folder ``path``, whole or not at all."""
        save_adapter(self.model, path)

    def weights(self) -> dict[str, mx.array]:
        """A copy of what is trained, for keeping the best of a run."""
        return {name: mx.array(value) for name, value in trainable(self.model).items()}

    def restore(self, weights: Mapping[str, mx.array]) -> None:
        """Put back what ``weights`` returned."""
        self.model.load_weights(list(weights.items()), strict=False)

    def write_weights(self, weights: Mapping[str, mx.array], folder: Path) -> None:
        """Write what ``weights`` returned into the new folder ``folder``. Raises OSError."""
        folder.mkdir()
        write_arrays(folder / "weights.safetensors", weights, {})

    def read_weights(self, folder: Path) -> dict[str, mx.array]:
        """What ``write_weights`` wrote. Raises UserError."""
        return read_arrays(folder / "weights.safetensors")[0]

    def write_state(self, folder: Path) -> None:
        """Write all that updates change, and the sizes of passes, into ``folder``, bit for bit. Raises OSError."""
        sizes = {"micro_batch_tokens": self.micro_batch_tokens, "decode_rows": self.decode_rows, "copies": self.copies}
        notes = {**sizes, "shapes_seen": self._gradients.seen}
        write_arrays(folder / "engine.safetensors", training_state(self.model, self.optimizer), notes)

    def read_state(self, folder: Path) -> None:
        """Go on where ``write_state`` was called. Raises UserError, changing nothing, for that of another model."""
        arrays, notes = read_arrays(folder / "engine.safetensors")
        restore_training_state(self.model, self.optimizer, arrays, folder)
        self.micro_batch_tokens = min(self.micro_batch_tokens, notes["micro_batch_tokens"])
        self.decode_rows = min(self.decode_rows, notes["decode_rows"])
        self.copies = self.copies and notes.get("copies", True)
        self._gradients.seen = notes["shapes_seen"]

    def close(self, status: str = "success") -> None:
        """Nothing is held elsewhere."""

    @property
    def platform(self) -> dict[str, str]:
        """What the last bits of its numbers depend on, the versions of packages aside."""
        info = mx.device_info()
        names = [str(info[name]) for name in ("device_name", "architecture") if name in info]
        return {
            "device": f"{mx.default_device()} {' '.join(names)}".strip(),
            "blas_threads": str(blas_threads()),
            "copies": str(copies(self.model)),  # bytes; whether rollouts make them depends on the machine's memory
        }


def _patches() -> Mapping[str, Callable[..., Any]]:
    """Return the functions that replace mlx-lm's in passes over whole batches."""
    return {**exponentials.patches(), **cuda.patches()}


_IDLE = {"loss": 0.0, "grad_norm": 0.0, "updated": 0.0, "skipped": 0.0}  # metrics of an update that moved nothing


@dataclass(frozen=True)
class PolicyObjective:
    """The loss that a surrogate asks for; equal surrogates share a compiled function."""

    how: Surrogate

    def __call__(self, logprobs: mx.array, rows: Any) -> tuple[mx.array, dict[str, mx.array]]:
        return _objective_with_stats(logprobs, rows, self.how)


def _objective_with_stats(logprobs: mx.array, rows: Any, how: Surrogate) -> tuple[mx.array, dict]:
    """The loss, and sums over sampled tokens that say how far the learner is from the sampler."""
    loss = policy_objective(logprobs, rows, mx, how)
    live = rows.weights != 0
    gap = mx.where(live, logprobs - rows.logprobs, 0)
    log_r = mx.where(live, logprobs - denominator(logprobs, rows, mx, how), 0)
    low, high = how.objective.clipped(importance_ratio(log_r, live, how.ratio, mx), rows.advantages)
    count = {
        "tokens": live,
        "logprob_gap_mean": mx.abs(gap),
        "sampler_kl": mx.exp(mx.clip(gap, -20, 20)) - 1 - gap,
        "clip_fraction_low": live & low,
        "clip_fraction_high": live & high,
    }
    if how.kl is not None:
        count["reference_kl"] = live * kl_estimate(logprobs, rows.reference, "k3", mx, limit=20)
    if how.correction is not None:
        old = denominator(logprobs, rows, mx, how)
        weights = correction_weights(old, rows.logprobs, live, how.correction, mx)
        count |= {"correction_mean": live * weights, "correction_dropped": live & (weights == 0)}
    sums = {name: mx.stop_gradient(value.sum()) for name, value in count.items()}
    extremes = {"logprob_gap_max": mx.stop_gradient(mx.abs(gap).max())}
    return loss, {"loss": mx.stop_gradient(loss), **extremes, **sums}


def _per_token(stats: Mapping[str, float]) -> dict[str, float]:
    """Sums as means over the sampled tokens; the loss and maxima as they are."""
    tokens = max(stats["tokens"], 1.0)
    sums = {name: value / tokens for name, value in stats.items() if name not in ("loss", "tokens", "logprob_gap_max")}
    return {"logprob_gap_max": stats["logprob_gap_max"], **sums}


def _memory() -> dict[str, float]:
    """The most that arrays took since the update before, rollouts and evaluations included."""
    peak = mx.get_peak_memory()
    mx.reset_peak_memory()
    return {"peak_memory_bytes": float(peak)}
