"""GRPO (arXiv:2402.03300) and Dr. GRPO (arXiv:2503.20783): group baselines, and their parts as plain functions.

The public functions below the baselines take arrays of NumPy, MLX or any library that names its
functions alike; it is found through the array, not imported.
"""

from __future__ import annotations

import sys
from dataclasses import dataclass
from typing import Any

import numpy as np

from ..errors import UserError
from ..losses import Array, Surrogate, clipped_surrogate


def center(rewards: np.ndarray) -> np.ndarray:
    """A_i = r_i - mean(r). Keeps a problem's difficulty in the scale (arXiv:2503.20783, sec. 3).

    Exactly 0 for a group that agrees, where the rounding of the mean could leave a residue
    that an adaptive optimiser would blow up to a full step.
    """
    if (rewards == rewards[0]).all():
        return np.zeros_like(rewards)
    return rewards - rewards.mean()


def standardize(rewards: np.ndarray, eps: float = 1e-6) -> np.ndarray:
    """A_i = (r_i - mean(r)) / (std(r) + eps), with the sample (Bessel) std (arXiv:2402.03300, sec. 4.1.2).

    A group of one, and a group that agrees, get 0.
    """
    if len(rewards) == 1:
        return np.zeros_like(rewards)
    return center(rewards) / (rewards.std(ddof=1) + eps)


# ---- public functions over one group's rewards, or over flat arrays of sampled tokens


def compute_advantages(rewards: Array) -> Array:
    """A_i = r_i - mean(r) over the group given, (G,) -> (G,); exactly 0 where all agree.

    An array gives an array of its own kind, a list a NumPy array. Raises TypeError for anything else.
    """
    values = _floats(rewards)
    if values.ndim != 1:
        raise UserError(f"rewards have shape {values.shape}; give the rewards of one group, (G,)")
    advantages = center(values) if len(values) else values
    return advantages if isinstance(rewards, list) else _namespace(rewards).array(advantages)


def compute_advantages_dr_grpo(rewards: Array) -> Array:
    """Dr. GRPO's advantages, r - mean(r) without a standard deviation: those of ``compute_advantages``."""
    return compute_advantages(rewards)


def policy_loss(
    old_logprobs: Array,
    new_logprobs: Array,
    advantages: Array,
    clip_ratio: float | None = None,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.28,
    normalize_constant: float | None = None,
) -> Array:
    """-mean_t min(r_t A_t, clip(r_t, 1 - low, 1 + high) A_t) with r_t = exp(new_t - old_t), all (N,).

    ``clip_ratio`` sets both bounds. ``normalize_constant`` divides the sum by itself instead of by N
    (arXiv:2503.20783). The wider upper bound is DAPO's (arXiv:2503.14476). Raises UserError.
    """
    _refuse_unlike(old_logprobs, new_logprobs, advantages)
    if normalize_constant is not None and not normalize_constant > 0:
        raise UserError(f"normalize_constant is {normalize_constant}; set it above 0, or leave it out")
    weight = 1 / (normalize_constant or max(new_logprobs.size, 1))
    row = _Row(old_logprobs, advantages, weight)
    return clipped_surrogate(
        new_logprobs, row, _namespace(new_logprobs), _clip(clip_ratio, clip_ratio_low, clip_ratio_high)
    )


def compute_metrics(
    old_logprobs: Array,
    new_logprobs: Array,
    advantages: Array,
    clip_ratio: float | None = None,
    clip_ratio_low: float = 0.2,
    clip_ratio_high: float = 0.28,
) -> dict[str, float]:
    """What a policy update looks like over N tokens, as plain floats.

    The clip fractions are shares of tokens whose ratio r is outside the clip range. kl_divergence
    estimates KL(old || new) by mean(r - 1 - log r), which is never negative. Raises UserError.
    """
    _refuse_unlike(old_logprobs, new_logprobs, advantages)
    how = _clip(clip_ratio, clip_ratio_low, clip_ratio_high)
    old, new, a = _floats(old_logprobs), _floats(new_logprobs), _floats(advantages)
    if not a.size:
        raise UserError("there are no tokens to measure; give at least one")
    log_r = np.clip(new - old, -20, 20)
    r = np.exp(log_r)
    lower, upper = float((r < 1 - how.clip_low).mean()), float((r > 1 + how.clip_high).mean())
    return {
        "mean_advantage": float(a.mean()),
        "std_advantage": float(a.std()),
        "min_advantage": float(a.min()),
        "max_advantage": float(a.max()),
        "mean_ratio": float(r.mean()),
        "clip_fraction": lower + upper,
        "clip_fraction_lower": lower,
        "clip_fraction_upper": upper,
        "kl_divergence": float((r - 1 - log_r).mean()),
        "clip_ratio_low": how.clip_low,
        "clip_ratio_high": how.clip_high,
    }


@dataclass(frozen=True, slots=True, eq=False)
class _Row:
    """What ``clipped_surrogate`` reads of a batch, for flat tokens of one weight."""

    logprobs: Array  # (N,)
    advantages: Array  # (N,)
    weights: float


def _clip(both: float | None, low: float, high: float) -> Surrogate:
    return Surrogate("token", low, high) if both is None else Surrogate("token", both, both)


def _namespace(array: Array) -> Any:
    """The module that ``array`` comes from: numpy, mlx.core, ..."""
    module = sys.modules[type(array).__module__]
    if not hasattr(module, "minimum"):
        raise TypeError(f"{array!r} is a {type(array).__name__}; give an array of numpy or mlx")
    return module


def _floats(values: Array) -> np.ndarray:
    """A list or an array as NumPy floats, of its own precision where it has one."""
    if not isinstance(values, list):
        _namespace(values)
    array = np.asarray(values)
    return array if array.dtype.kind == "f" else array.astype(np.float32)


def _refuse_unlike(old: Array, new: Array, advantages: Array) -> None:
    for array in (old, new, advantages):
        _namespace(array)
    if not old.shape == new.shape == advantages.shape:
        raise UserError(
            f"old log-probs, new log-probs and advantages have shapes {old.shape}, {new.shape} and "
            f"{advantages.shape}; give one number per token to each"
        )
