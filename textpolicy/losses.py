"""The policy-gradient losses, written once for any array namespace (numpy, mlx.core)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, Protocol, get_args

import numpy as np

from .errors import UserError, unknown_name

Array = Any

RatioLevel = Literal[
    "token",  # r_t = exp(l_t - o_t): PPO, GRPO
    "sequence",  # exp(mean_t): GSPO's s_i (arXiv:2507.18071, eq. 7)
    "sequence-token",  # sg(s_i) exp(l_t - sg(l_t)): GSPO-token (eq. 13-14)
    "sequence-sum",  # exp(sum_t): RLOO's, of the whole completion
    "sequence-mean",  # mean_t r_t: GRPO-S (arXiv:2508.04349)
]
Estimator = Literal["k1", "k2", "k3", "abs", "k1+", "k3+"]


class Objective(Protocol):
    """The quantity to maximise at a token, J(r, A)."""

    def __call__(self, ratio: Array, logprobs: Array, advantages: Array, xp: Any) -> Array:
        """Return (B, T) values; ``ratio`` is (B, T) or (B, 1)."""

    def clipped(self, ratio: Array, advantages: Array) -> tuple[Array, Array]:
        """Return where clipping stops the gradient, below the range and above it; nowhere unless overridden."""
        return ratio != ratio, ratio != ratio


@dataclass(frozen=True)
class Clip(Objective):
    """Maximise J = min(r A, clip(r, 1 - low, 1 + high) A), as PPO does (arXiv:1707.06347).

    A wider upper bound is DAPO's clip-higher (arXiv:2503.14476). The minimum is taken after clipping,
    which keeps the gradient of every token that clipping would make look better. ``delta`` caps r in the
    unclipped branch too (two-sided, arXiv:2505.07291); ``dual_clip`` keeps J above dual_clip x A where
    A < 0 (arXiv:1912.09729).
    """

    clip_low: float = 0.2
    clip_high: float = 0.2
    delta: float | None = None
    dual_clip: float | None = None

    def __post_init__(self) -> None:
        if not 0 <= self.clip_low < np.inf or not 0 <= self.clip_high < np.inf:
            raise UserError(f"the clip range is [1 - {self.clip_low}, 1 + {self.clip_high}]; set both to 0 or more")
        if self.delta is not None and not self.delta > 1 + self.clip_high:
            raise UserError(f"delta is {self.delta}; set it above 1 + clip_high, {1 + self.clip_high}")
        if self.dual_clip is not None and not self.dual_clip > 1:
            raise UserError(f"dual_clip is {self.dual_clip}; set it above 1")

    def __call__(self, ratio: Array, logprobs: Array, advantages: Array, xp: Any) -> Array:
        free = ratio if self.delta is None else xp.minimum(ratio, self.delta)
        clipped = xp.clip(ratio, 1 - self.clip_low, 1 + self.clip_high)
        j = xp.minimum(clipped * advantages, free * advantages)  # MLX gives the slope of a tie to the second
        if self.dual_clip is None:
            return j
        return xp.where(advantages < 0, xp.maximum(j, self.dual_clip * advantages), j)

    def clipped(self, ratio: Array, advantages: Array) -> tuple[Array, Array]:
        low, high = ratio < 1 - self.clip_low, ratio > 1 + self.clip_high
        return low & (advantages < 0), high & (advantages > 0)


@dataclass(frozen=True)
class ClippedWeight(Objective):
    """Maximise J = sg(clip(r, low, high)) A l: CISPO (arXiv:2506.13585, eq. 4-5), where every token has a gradient.

    The bounds are absolute; None means no bound. ScaleRL (arXiv:2510.13786) uses an upper bound of 5 alone.
    """

    weight_low: float | None = None
    weight_high: float | None = 5.0

    def __post_init__(self) -> None:
        low, high = self.weight_low or 0.0, np.inf if self.weight_high is None else self.weight_high
        if not 0 <= low < high:
            raise UserError(
                f"the weight range is [{self.weight_low}, {self.weight_high}]; set 0 <= weight_low < weight_high"
            )

    def __call__(self, ratio: Array, logprobs: Array, advantages: Array, xp: Any) -> Array:
        high = np.inf if self.weight_high is None else self.weight_high
        return _fixed(xp.clip(ratio, self.weight_low, high), xp) * advantages * logprobs

    def clipped(self, ratio: Array, advantages: Array) -> tuple[Array, Array]:
        high = np.inf if self.weight_high is None else self.weight_high
        return ratio < (self.weight_low or 0.0), ratio > high


@dataclass(frozen=True)
class SoftGate(Objective):
    """Maximise J = (4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A: SAPO (arXiv:2511.20347)."""

    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def __post_init__(self) -> None:
        if not (self.tau_pos > 0 and self.tau_neg > 0):
            raise UserError(f"tau_pos is {self.tau_pos} and tau_neg {self.tau_neg}; set both above 0")

    def __call__(self, ratio: Array, logprobs: Array, advantages: Array, xp: Any) -> Array:
        tau = xp.where(advantages > 0, self.tau_pos, self.tau_neg)
        return 4 / tau / (1 + xp.exp(-tau * (ratio - 1))) * advantages


@dataclass(frozen=True)
class ImportanceSampling(Objective):
    """Maximise J = r A without bounds: REINFORCE with an importance ratio."""

    def __call__(self, ratio: Array, logprobs: Array, advantages: Array, xp: Any) -> Array:
        return ratio * advantages


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """Maximise J = A l, the log-prob without a ratio, of tokens that no policy need have sampled (A = 1: SFT)."""

    def __call__(self, ratio: Array, logprobs: Array, advantages: Array, xp: Any) -> Array:
        return advantages * logprobs


@dataclass(frozen=True)
class KL:
    """The penalty in the loss that keeps the policy near the reference: the same weights with adapters off.

    ``importance_weighted`` multiplies the estimate by the token ratio. k3 then has the gradient of the
    KL itself (arXiv:2512.02556); so has k2, whose ratio is held constant. k1 and plain k3 are for replication.
    """

    coefficient: float
    estimator: Estimator = "k3"
    importance_weighted: bool = True

    def __post_init__(self) -> None:
        if not 0 < self.coefficient < np.inf:
            raise UserError(f"the KL coefficient is {self.coefficient}; set it above 0, or leave the KL out")
        if self.estimator not in get_args(Estimator):
            raise unknown_name("KL estimator", self.estimator, get_args(Estimator))


@dataclass(frozen=True)
class Correction:
    """The weights that correct for the mismatch between sampler and learner, d_t = o_t - b_t.

    "token" weighs by exp(d_t), "sequence" by exp(sum_t d_t). "truncate" limits that weight to
    [low, high] (TIS), "mask" drops tokens or sequences outside of it (MIS, IcePop). "geometric" keeps
    or drops whole sequences by exp(mean_t d_t), without weights.
    """

    level: Literal["token", "sequence", "geometric"] = "sequence"
    how: Literal["truncate", "mask"] = "mask"
    low: float | None = None
    high: float = 3.0

    def __post_init__(self) -> None:
        if self.level not in ("token", "sequence", "geometric"):
            raise unknown_name("correction level", self.level, ("token", "sequence", "geometric"))
        if self.how not in ("truncate", "mask"):
            raise unknown_name("correction", self.how, ("truncate", "mask"))
        if self.level == "geometric" and self.how == "truncate":
            raise UserError("a geometric correction rejects sequences and cannot truncate; set how to mask")
        if not 0 <= (self.low or 0.0) < self.high:
            raise UserError(f"the correction keeps [{self.low}, {self.high}]; set 0 <= low < high")


@dataclass(frozen=True)
class Surrogate:
    """The loss that a policy update applies to a batch; the only part of an algorithm that an engine sees."""

    objective: Objective = Clip()
    ratio: RatioLevel = "token"
    kl: KL | None = None
    correction: Correction | None = None
    off_policy_limit: float | None = None  # drop tokens with A < 0 of sequences whose mean b - l exceeds it

    def __post_init__(self) -> None:
        if self.ratio not in get_args(RatioLevel):
            raise unknown_name("ratio level", self.ratio, get_args(RatioLevel))


def policy_objective(logprobs: Array, batch: Any, xp: Any, surrogate: Surrogate) -> Array:
    """Return sum_t w_t (-c_t J(r_t, A_t) + beta KL_t), the scalar to minimise.

    ``logprobs`` is l, (B, T), under the policy being trained; ``batch`` holds arrays of the namespace
    ``xp``. w are its weights, c the sampler correction, constant in the gradient. Raises UserError when
    there is a KL penalty and the batch has no reference log-probs.
    """
    live = batch.weights != 0
    l = xp.where(live, logprobs, 0)
    log_r = xp.where(live, l - denominator(l, batch, xp, surrogate), 0)
    j = surrogate.objective(importance_ratio(log_r, live, surrogate.ratio, xp), l, batch.advantages, xp)
    if surrogate.correction is not None:
        o = denominator(l, batch, xp, surrogate)
        j = j * correction_weights(o, batch.logprobs, live, surrogate.correction, xp)
    if surrogate.off_policy_limit is not None:
        drift = _sequence_mean(xp.where(live, batch.logprobs - _fixed(l, xp), 0), live)
        stale = drift > surrogate.off_policy_limit  # arXiv:2512.02556, eq. 9, against the sampler
        j = xp.where(stale & (batch.advantages < 0), 0, j)
    loss = -(batch.weights * j).sum()
    kl = surrogate.kl
    if kl is None:
        return loss
    if batch.reference is None:
        raise UserError("the loss has a KL penalty and the batch no reference log-probs; score them first")
    value = kl_estimate(l, xp.where(live, batch.reference, 0), kl.estimator, xp, limit=20)
    if kl.importance_weighted:
        ratio = xp.exp(xp.clip(log_r, -20, 20))
        value = value * (ratio if kl.estimator in ("k1", "k3", "abs") else _fixed(ratio, xp))
    return loss + (batch.weights * (kl.coefficient * value)).sum()


def denominator(logprobs: Array, batch: Any, xp: Any, surrogate: Surrogate) -> Array:
    """Return o, the log-probs under the ratio: the sampler's or, with a correction, the learner's own.

    The learner's are ``batch.old`` or, in the only update on a batch, its current ``logprobs``.
    """
    if surrogate.correction is None:
        return batch.logprobs
    return _fixed(logprobs, xp) if batch.old is None else batch.old


def importance_ratio(log_r: Array, live: Array, level: RatioLevel, xp: Any) -> Array:
    """Return r from log r (B, T), 0 where not ``live``: (B, T), or (B, 1) per sequence; an empty row has 1."""
    bounded = xp.clip(log_r, -20, 20)
    match level:
        case "token":
            return xp.exp(bounded)
        case "sequence":
            return xp.exp(xp.clip(_sequence_mean(log_r, live), -20, 20))
        case "sequence-token":
            s = xp.exp(xp.clip(_sequence_mean(log_r, live), -20, 20))
            return _fixed(s, xp) * xp.exp(log_r - _fixed(log_r, xp))
        case "sequence-sum":
            return xp.exp(xp.clip((log_r * live).sum(axis=1, keepdims=True), -20, 20))
        case "sequence-mean":
            return _sequence_mean(xp.exp(bounded), live) + (live.sum(axis=1, keepdims=True) == 0)
    raise unknown_name("ratio level", level, get_args(RatioLevel))


def correction_weights(old: Array, sampler: Array, live: Array, correction: Correction, xp: Any) -> Array:
    """Return c from o and b, both (B, T): (B, T), or (B, 1) per sequence; constant in the gradient.

    A token without a sampler log-prob (NaN) counts as d = 0. Sources: docs/algorithms.md.
    """
    known = live & (sampler == sampler)  # NaN differs from itself
    d = _fixed(xp.where(known, old - xp.where(known, sampler, 0), 0), xp)
    match correction.level:
        case "token":
            w = xp.exp(xp.clip(d, -20, 20))
        case "sequence":
            w = xp.exp(xp.clip(d.sum(axis=1, keepdims=True), -20, 20))
        case "geometric":
            w = xp.exp(xp.clip(_sequence_mean(d, live), -20, 20))
    low = correction.low or 0.0
    if correction.how == "truncate":
        return xp.clip(w, low, correction.high)
    kept = ((w >= low) & (w <= correction.high)) * 1.0
    return kept if correction.level == "geometric" else w * kept


def kl_estimate(logprobs: Array, reference: Array, estimator: Estimator, xp: Any, limit: float = np.inf) -> Array:
    """Estimate KL(policy || reference) at each token, d = q - l (Schulman, "Approximating KL divergence", 2020).

    k1 = -d, k2 = d^2 / 2, k3 = exp(d) - d - 1, abs = |d|; "k1+" and "k3+" have their values and
    the gradient of k2. d is kept within +-``limit`` nats. Raises UserError for an unknown name.
    """
    d = xp.clip(reference - logprobs, -limit, limit)
    match estimator:
        case "k1":
            return -d
        case "k2":
            return d * d / 2
        case "k3":
            return xp.exp(d) - d - 1
        case "abs":
            return xp.abs(d)
        case "k1+" | "k3+":
            value = _fixed(kl_estimate(logprobs, reference, estimator[:2], xp, limit), xp)  # type: ignore[arg-type]
            slope = d * d / 2
            return value + slope - _fixed(slope, xp)
    raise unknown_name("KL estimator", estimator, get_args(Estimator))


def _sequence_mean(values: Array, live: Array) -> Array:
    """Return the mean over the live tokens of each row, (B, T) -> (B, 1); 0 for an empty row."""
    count = (live * 1.0).sum(axis=1, keepdims=True)
    return (values * live).sum(axis=1, keepdims=True) / (count + (count == 0))


def _fixed(value: Array, xp: Any) -> Array:
    """Return ``value`` as a constant to the gradient; NumPy has no gradients."""
    return value if xp is np else xp.stop_gradient(value)
