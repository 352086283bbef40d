"""The documented functions of GSPO (arXiv:2507.18071): one length-normalised ratio per completion of flat tokens.

The functions accept arrays of NumPy, MLX or any library with the same function names. Tokens are (N,),
completion after completion; ``sequence_lengths`` (B,) are the token counts of the completions.
"""

from __future__ import annotations

from collections.abc import Callable
from functools import partial
from typing import Any

import numpy as np

from ..errors import UserError, unknown_name
from ..losses import Array, Clip, RatioLevel, Surrogate, importance_ratio, policy_objective
from ..types import Bools, Ints, loss_weights
from .arrays import namespace, refuse_unlike, values_of
from .grpo import FlatBatch, clip_range
from .selection import Lengths, row_and_position

LOW, HIGH = 3e-4, 4e-4  # sec. 5.1; a ratio of means stays a thousand times closer to 1 than a token's


def policy_loss_sequence(
    old_logprobs: Array,
    new_logprobs: Array,
    advantages: Array,
    sequence_lengths: Lengths | None = None,
    clip_ratio: float | None = None,
    clip_ratio_low: float = LOW,
    clip_ratio_high: float = HIGH,
) -> Array:
    """Return -(1/B) sum_i min(s_i A_i, clip(s_i, 1 - low, 1 + high) A_i), s_i = exp(mean_t (new_it - old_it)).

    See eq. 5-7. ``advantages`` are (B,), one per completion, or (N,), one per token, of which the mean
    over a completion is taken. ``clip_ratio`` sets both bounds. A completion without tokens is not counted.
    ``Trainer`` passes ``sequence_lengths`` to any loss that accepts them. Raises UserError, also without them.
    """
    clip = clip_range(clip_ratio, clip_ratio_low, clip_ratio_high)
    return _loss("sequence", clip, old_logprobs, new_logprobs, advantages, sequence_lengths)


def policy_loss_token(
    old_logprobs: Array,
    new_logprobs: Array,
    advantages: Array,
    sequence_lengths: Lengths | None = None,
    clip_ratio: float | None = None,
    clip_ratio_low: float = LOW,
    clip_ratio_high: float = HIGH,
) -> Array:
    """Return the loss of GSPO-token (eq. 13-14), ``policy_loss_sequence`` with an advantage per token.

    The ratio of a token is s_i in value and has the gradient of its own log-prob. With one advantage per
    completion value and gradient are those of ``policy_loss_sequence``, as are arguments and errors.
    """
    clip = clip_range(clip_ratio, clip_ratio_low, clip_ratio_high)
    return _loss("sequence-token", clip, old_logprobs, new_logprobs, advantages, sequence_lengths)


VARIANTS = {"sequence": policy_loss_sequence, "token": policy_loss_token}


def create_gspo_policy_loss(
    variant: str = "sequence",
    clip_ratio: float | None = None,
    clip_ratio_low: float = LOW,
    clip_ratio_high: float = HIGH,
) -> Callable[..., Array]:
    """Return a loss(old_logprobs, new_logprobs, advantages, sequence_lengths) with these bounds.

    ``variant`` is sequence or token. Raises UserError for any other.
    """
    if variant not in VARIANTS:
        raise unknown_name("GSPO variant", variant, VARIANTS)
    loss = VARIANTS[variant]
    return partial(loss, clip_ratio=clip_ratio, clip_ratio_low=clip_ratio_low, clip_ratio_high=clip_ratio_high)


def compute_sequence_importance_weights(
    old_logprobs: Array, new_logprobs: Array, sequence_lengths: Lengths | None
) -> Array:
    """Return s_i = exp(mean_t (new_it - old_it)), (N,) and (N,) -> (B,); 1 for a completion without tokens.

    Nothing is clipped here: the minimum in the loss needs both branches. Raises UserError.
    """
    xp = namespace(new_logprobs)
    place, live = _grid(old_logprobs, new_logprobs, sequence_lengths)
    log_r = _spread(new_logprobs - old_logprobs, place, live, xp)
    return importance_ratio(log_r, xp.array(live), "sequence", xp)[:, 0]


def compute_metrics_sequence(
    old_logprobs: Array,
    new_logprobs: Array,
    advantages: Array,
    sequence_lengths: Lengths | None = None,
    clip_ratio: float | None = None,
    clip_ratio_low: float = LOW,
    clip_ratio_high: float = HIGH,
) -> dict[str, float]:
    """Return statistics of a GSPO update as plain floats: the ratios s of completions with tokens, advantages, KL.

    kl_divergence estimates KL(old || new) per token by mean(r - 1 - log r). Arguments and errors as in
    ``policy_loss_sequence``.
    """
    clip = clip_range(clip_ratio, clip_ratio_low, clip_ratio_high)
    weights = compute_sequence_importance_weights(old_logprobs, new_logprobs, sequence_lengths)
    s, a = values_of(weights)[np.asarray(sequence_lengths) > 0], values_of(advantages)
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
        "seq_clip_fraction": float(((s < 1 - clip.clip_low) | (s > 1 + clip.clip_high)).mean()),
        "kl_divergence": float((np.exp(log_r) - 1 - log_r).mean()),
    }


def _grid(old: Array, new: Array, lengths: Lengths | None) -> tuple[Ints, Bools]:
    """Lay out flat tokens in rows of one completion each, (B, T). Raises UserError.

    Returns the token of each cell, 0 in an empty one, and whether the cell has a token.
    """
    refuse_unlike(old_logprobs=old, new_logprobs=new)
    if new.ndim != 1:
        raise UserError(f"the log-probs have shape {new.shape}; give them in one line, completion after completion")
    if lengths is None:
        raise UserError(
            "GSPO averages over a completion's tokens and got no sequence_lengths; give each one's token count"
        )
    row, position = row_and_position(lengths, new.size)
    place = np.zeros((len(lengths), int(position.max(initial=-1)) + 1), int)
    live = np.zeros(place.shape, bool)
    place[row, position], live[row, position] = np.arange(new.size), True
    return place, live


def _spread(flat: Array, place: Ints, live: Bools, xp: Any) -> Array:
    """Return flat tokens in the rows of ``_grid``, (N,) -> (B, T), 0 in empty cells."""
    return xp.where(xp.array(live), flat[xp.array(place)], 0)


def _loss(level: RatioLevel, clip: Clip, old: Array, new: Array, advantages: Array, lengths: Lengths | None) -> Array:
    """Return the loss of flat tokens whose ratio is of the given level. Raises UserError."""
    xp = namespace(new)
    place, live = _grid(old, new, lengths)
    namespace(advantages)
    tokens, completions = int(live.sum()), len(live)
    if advantages.shape == (tokens,):
        advantages = _spread(advantages, place, live, xp)
    elif advantages.shape == (completions,):
        advantages = advantages[:, None]
    else:
        raise UserError(
            f"advantages have shape {advantages.shape}; give one for each of {tokens} tokens or {completions} "
            "completions"
        )
    batch = FlatBatch(
        logprobs=_spread(old, place, live, xp),
        advantages=advantages,
        weights=xp.array(loss_weights(live, "seq-mean-token-mean"), dtype=new.dtype),
    )
    return policy_objective(_spread(new, place, live, xp), batch, xp, Surrogate(clip, level))
