"""GSPO (arXiv:2507.18071): one length-normalised ratio per completion, as the documented functions of flat tokens.

The functions take arrays of NumPy, MLX or any library that names its functions alike. Tokens are (N,),
completion after completion; ``sequence_lengths`` (B,) says how many each has.
"""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from typing import Any

import numpy as np

from ..errors import UserError, unknown_name
from ..losses import Array, Clip, RatioLevel, Surrogate, importance_ratio, policy_objective
from ..types import loss_weights
from .arrays import namespace, refuse_unlike, values_of
from .grpo import Rows, clip_range
from .selection import Lengths, row_and_position

LOW, HIGH = 3e-4, 4e-4  # sec. 5.1; a ratio of means leaves 1 a thousand times less far than a token's


def policy_loss_sequence(
    old_logprobs: Array,
    new_logprobs: Array,
    advantages: Array,
    sequence_lengths: Lengths | None = None,
    clip_ratio: float | None = None,
    clip_ratio_low: float = LOW,
    clip_ratio_high: float = HIGH,
) -> Array:
    """-(1/B) sum_i min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i), s_i = exp(mean_t (new_it - old_it)) (eq. 5-7).

    ``advantages`` are (N,), one per token (the mean over a completion's tokens is then taken), or else (B,),
    one per completion. ``clip_ratio`` sets both bounds. A completion without tokens is not counted.
    ``Trainer`` gives ``sequence_lengths`` to any loss that takes them. Raises UserError, without them too.
    """
    band = clip_range(clip_ratio, clip_ratio_low, clip_ratio_high)
    return _loss("sequence", band, old_logprobs, new_logprobs, advantages, sequence_lengths)


def policy_loss_token(
    old_logprobs: Array,
    new_logprobs: Array,
    advantages: Array,
    sequence_lengths: Lengths | None = None,
    clip_ratio: float | None = None,
    clip_ratio_low: float = LOW,
    clip_ratio_high: float = HIGH,
) -> Array:
    """GSPO-token (eq. 13-14): value and gradient of ``policy_loss_sequence`` where A is one per completion.

    The ratio of a token is s_i in value and has the gradient of its own log-prob, so that advantages may
    differ from token to token. Arguments and errors as there.
    """
    band = clip_range(clip_ratio, clip_ratio_low, clip_ratio_high)
    return _loss("sequence-token", band, old_logprobs, new_logprobs, advantages, sequence_lengths)


VARIANTS = {"sequence": policy_loss_sequence, "token": policy_loss_token}


def create_gspo_policy_loss(
    variant: str = "sequence",
    clip_ratio: float | None = None,
    clip_ratio_low: float = LOW,
    clip_ratio_high: float = HIGH,
) -> Callable[..., Array]:
    """A loss(old_logprobs, new_logprobs, advantages, sequence_lengths) with these bounds.

    ``variant`` is sequence or token; a UserError names them for any other.
    """
    if variant not in VARIANTS:
        raise unknown_name("GSPO variant", variant, VARIANTS)
    loss = VARIANTS[variant]
    return partial(loss, clip_ratio=clip_ratio, clip_ratio_low=clip_ratio_low, clip_ratio_high=clip_ratio_high)


def compute_sequence_importance_weights(old_logprobs: Array, new_logprobs: Array, sequence_lengths: Lengths) -> Array:
    """s_i = exp(mean_t (new_it - old_it)), (N,) and (N,) -> (B,); 1 for a completion without tokens.

    Nothing is clipped here: the minimum in the loss needs both branches. Raises UserError.
    """
    xp, grid = namespace(new_logprobs), _Grid.of(sequence_lengths, _count(old_logprobs, new_logprobs))
    log_r = grid.spread(new_logprobs - old_logprobs, xp)
    return importance_ratio(log_r, xp.array(grid.live), "sequence", xp)[:, 0]


def compute_metrics_sequence(
    old_logprobs: Array,
    new_logprobs: Array,
    advantages: Array,
    sequence_lengths: Lengths | None = None,
    clip_ratio: float | None = None,
    clip_ratio_low: float = LOW,
    clip_ratio_high: float = HIGH,
) -> dict[str, float]:
    """What a GSPO update looks like, as plain floats: the ratios s of completions with tokens, advantages, KL.

    kl_divergence estimates KL(old || new) per token by mean(r - 1 - log r). Arguments and errors as in
    ``policy_loss_sequence``.
    """
    how = clip_range(clip_ratio, clip_ratio_low, clip_ratio_high)
    lengths = _given(sequence_lengths)
    weights = compute_sequence_importance_weights(old_logprobs, new_logprobs, lengths)
    s, a = values_of(weights)[np.asarray(lengths) > 0], values_of(advantages)
    if not s.size:
        raise UserError("there are no tokens to measure; give at least one")
    log_r = np.clip(values_of(new_logprobs) - values_of(old_logprobs), -20, 20)
    return {
        "mean_advantage": float(a.mean()),
        "std_advantage": float(a.std()),
        "mean_seq_weight": float(s.mean()),
        "std_seq_weight": float(s.std()),
        "min_seq_weight": float(s.min()),
        "max_seq_weight": float(s.max()),
        "seq_clip_fraction": float(((s < 1 - how.clip_low) | (s > 1 + how.clip_high)).mean()),
        "kl_divergence": float((np.exp(log_r) - 1 - log_r).mean()),
    }


@dataclass(frozen=True, slots=True, eq=False)
class _Grid:
    """Where flat tokens go in (B, T) rows."""

    place: np.ndarray  # (B, T) int, the token of each cell; 0 where there is none
    live: np.ndarray  # (B, T) bool

    @classmethod
    def of(cls, lengths: Lengths, count: int) -> _Grid:
        row, position = row_and_position(lengths, count)
        place = np.zeros((len(lengths), int(position.max(initial=-1)) + 1), int)
        live = np.zeros(place.shape, bool)
        place[row, position], live[row, position] = np.arange(count), True
        return cls(place, live)

    def spread(self, flat: Array, xp: Any) -> Array:
        """(N,) -> (B, T), 0 where there is no token."""
        return xp.where(xp.array(self.live), flat[xp.array(self.place)], 0)


def _loss(level: RatioLevel, band: Clip, old: Array, new: Array, advantages: Array, lengths: Lengths | None) -> Array:
    xp, grid = namespace(new), _Grid.of(_given(lengths), _count(old, new))
    weights = loss_weights(grid.live, "seq-mean-token-mean")
    rows = Rows(
        logprobs=grid.spread(old, xp),
        advantages=_advantages(advantages, grid, xp),
        weights=xp.array(weights, dtype=new.dtype),
    )
    return policy_objective(grid.spread(new, xp), rows, xp, Surrogate(band, level))


def _advantages(advantages: Array, grid: _Grid, xp: Any) -> Array:
    """(B, T) from one per token, or (B, 1) from one per completion."""
    namespace(advantages)
    rows, tokens = len(grid.live), int(grid.live.sum())
    if advantages.shape == (tokens,):
        return grid.spread(advantages, xp)
    if advantages.shape == (rows,):
        return advantages[:, None]
    raise UserError(
        f"advantages have shape {advantages.shape}; give one for each of {tokens} tokens or {rows} completions"
    )


def _count(old: Array, new: Array) -> int:
    """N, of log-probs in one line."""
    refuse_unlike(old_logprobs=old, new_logprobs=new)
    if new.ndim != 1:
        raise UserError(f"the log-probs have shape {new.shape}; give them in one line, completion after completion")
    return new.size


def _given(lengths: Lengths | None) -> Lengths:
    if lengths is None:
        raise UserError(
            "GSPO averages over a completion's tokens and got no sequence_lengths; give each one's token count"
        )
    return lengths
