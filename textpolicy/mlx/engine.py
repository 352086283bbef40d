"""The Engine over a local MLX model: decodes whole groups at once, updates with shared prompts."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Mapping, Sequence
from functools import partial
from pathlib import Path
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import mlx.optimizers as optim
import numpy as np
from mlx.utils import tree_map

from ..engine import Sampling
from ..errors import UserError
from ..losses import Surrogate, clipped_surrogate, log_ratio
from ..types import Batch, Completion
from .decode import decode
from .lora import save_adapter, trainable
from .scoring import Layout, arrays, micro_batches, score

# (B, T) log-probs and the rows they belong to, MLX arrays in their fields -> loss, sums to report
Objective = Callable[[mx.array, Any], tuple[mx.array, dict[str, mx.array]]]


class MLXEngine:
    """Samples from and trains one model held in this process.

    ``stop`` are the token ids that end a completion. ``micro_batch_tokens`` bounds the padded
    tokens of one forward and backward pass, ``decode_rows`` the completions decoded side by side;
    neither changes a result, only memory.
    """

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
    ):
        self.model = model
        self.stop = np.array(sorted(stop), np.int32)
        self.optimizer = optimizer or optim.AdamW(0.0, weight_decay=weight_decay, bias_correction=True)
        self.max_grad_norm = max_grad_norm
        self.micro_batch_tokens, self.decode_rows = micro_batch_tokens, decode_rows

    def sample(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling) -> list[list[Completion]]:
        """``n`` completions for every prompt (token ids), in prompt order; each prompt is read once."""
        if any(len(p) == 0 for p in prompts):
            raise UserError("a prompt holds no tokens; give every prompt at least one")
        if not prompts:
            return []
        rows = [np.asarray(p, np.int32) for p in prompts for _ in range(n)]
        flat = decode(self.model, rows, sampling, self.stop, self.decode_rows)
        return [flat[i * n : (i + 1) * n] for i in range(len(prompts))]

    def gradients(self, batch: Batch, objective: Objective) -> tuple[dict[str, float], Any]:
        """Summed loss statistics and gradients of ``objective`` over micro-batches of ``batch``."""
        compute = nn.value_and_grad(self.model, partial(_loss, objective=objective))
        totals: dict[str, float] = {}
        grads = None
        for layout in micro_batches(batch, self.micro_batch_tokens):
            (_, stats), grad = compute(self.model, layout, arrays(layout.rows))
            grads = grad if grads is None else tree_map(mx.add, grads, grad)
            mx.eval(stats, grads)
            for name, value in stats.items():
                merge = max if name.endswith("_max") else sum
                totals[name] = merge((totals.get(name, 0.0), value.item()))
        return totals, grads

    def update(self, batch: Batch, surrogate: Surrogate, learning_rate: float) -> Mapping[str, float]:
        """One optimiser step on ``batch``; rows whose every advantage is 0 are skipped, exactly.

        If no row is left nothing moves, not even by momentum, and ``updated`` is 0.
        """
        live = np.flatnonzero(((batch.advantages != 0) & (batch.weights != 0)).any(axis=1))
        if len(live) == 0:
            return {"loss": 0.0, "grad_norm": 0.0, "updated": 0.0, **_memory()}
        stats, grads = self.gradients(batch.take(live), partial(_surrogate_with_stats, how=surrogate))
        norm = self.apply(grads, learning_rate)
        return {"loss": stats["loss"], "grad_norm": norm, "updated": 1.0, **_per_token(stats), **_memory()}

    def apply(self, grads: Any, learning_rate: float | None = None) -> float:
        """Clip and apply gradients; returns their norm before clipping. NaN or infinite ones are refused."""
        grads, norm = optim.clip_grad_norm(grads, self.max_grad_norm)
        if not np.isfinite(norm.item()):
            raise UserError(
                f"the gradient norm is {norm.item()}; nothing was updated: "
                "lower the learning rate or check the rewards for huge values"
            )
        if learning_rate is not None:
            self.optimizer.learning_rate = learning_rate
        self.optimizer.update(self.model, grads)
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


def _loss(model: nn.Module, layout: Layout, rows: Any, objective: Objective) -> tuple[mx.array, dict]:
    return objective(score(model, layout), rows)


def _surrogate_with_stats(logprobs: mx.array, rows: Any, how: Surrogate) -> tuple[mx.array, dict]:
    """The loss, and sums over sampled tokens that say how far the learner is from the sampler."""
    loss = clipped_surrogate(logprobs, rows, mx, how)
    live = rows.weights != 0
    gap = mx.where(live, logprobs - rows.logprobs, 0)
    ratio = mx.exp(mx.clip(log_ratio(logprobs, rows, how), -20, 20))
    count = {
        "tokens": live,
        "gap": mx.abs(gap),
        "kl": mx.exp(mx.clip(gap, -20, 20)) - 1 - gap,
        "clipped_low": live & (ratio < 1 - how.clip_low) & (rows.advantages < 0),
        "clipped_high": live & (ratio > 1 + how.clip_high) & (rows.advantages > 0),
    }
    sums = {name: mx.stop_gradient(value.sum()) for name, value in count.items()}
    return loss, {"loss": mx.stop_gradient(loss), "gap_max": mx.stop_gradient(mx.abs(gap).max()), **sums}


def _per_token(stats: Mapping[str, float]) -> dict[str, float]:
    tokens = max(stats["tokens"], 1.0)
    return {
        "logprob_gap_mean": stats["gap"] / tokens,
        "logprob_gap_max": stats["gap_max"],
        "sampler_kl": stats["kl"] / tokens,
        "clip_fraction_low": stats["clipped_low"] / tokens,
        "clip_fraction_high": stats["clipped_high"] / tokens,
    }


def _memory() -> dict[str, float]:
    return {"peak_memory_bytes": float(mx.get_peak_memory())}
