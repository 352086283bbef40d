"""The policy-gradient losses, written once for any array namespace (numpy, mlx.core)."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal, NamedTuple, Protocol, get_args

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
Divergence = Literal["tv", "kl"]


class Tokens(NamedTuple):
    """The policies at the tokens of a batch, as an objective reads them; every array is (B, T) unless it says other."""

    ratio: Array  # r, of the surrogate's level: (B, T), or (B, 1) per sequence
    logprobs: Array  # l, under the policy being trained
    old: Array  # o, under the denominator of the ratio, constant in the gradient
    advantages: Array  # A, or (B, 1)


class Objective(Protocol):
    """The quantity to maximise at a token, J(r, l, o, A)."""

    def __call__(self, at: Tokens, xp: Any) -> Array:
        """Return (B, T) values in the array namespace ``xp``."""

    def clipped(self, at: Tokens, xp: Any) -> tuple[Array, Array]:
        """Return where clipping stops the gradient, below the range and above it; nowhere unless overridden."""
        return at.ratio != at.ratio, at.ratio != at.ratio


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

    def __call__(self, at: Tokens, xp: Any) -> Array:
        ratio, advantages = at.ratio, at.advantages
        free = ratio if self.delta is None else xp.minimum(ratio, self.delta)
        clipped = xp.clip(ratio, 1 - self.clip_low, 1 + self.clip_high)
        j = xp.minimum(clipped * advantages, free * advantages)  # MLX gives the slope of a tie to the second
        if self.dual_clip is None:
            return j
        return xp.where(advantages < 0, xp.maximum(j, self.dual_clip * advantages), j)

    def clipped(self, at: Tokens, xp: Any) -> tuple[Array, Array]:
        low, high = at.ratio < 1 - self.clip_low, at.ratio > 1 + self.clip_high
        return low & (at.advantages < 0), high & (at.advantages > 0)


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

    def __call__(self, at: Tokens, xp: Any) -> Array:
        high = np.inf if self.weight_high is None else self.weight_high
        return _fixed(xp.clip(at.ratio, self.weight_low, high), xp) * at.advantages * at.logprobs

    def clipped(self, at: Tokens, xp: Any) -> tuple[Array, Array]:
        high = np.inf if self.weight_high is None else self.weight_high
        return at.ratio < (self.weight_low or 0.0), at.ratio > high


@dataclass(frozen=True)
class WithinDivergence(Objective):
    """Maximise J = M sg(min(r, weight_high)) A l: DPPO (arXiv:2602.04879), which bounds probabilities and not ratios.

    M is 0, and the token has no gradient, where its probability p = exp(l) has moved from p_o = exp(o) the way
    that A pushes it by more than the bound: D > divergence_high upwards with A > 0, D > divergence_low downwards
    otherwise. D is the divergence between (p, 1 - p) and (p_o, 1 - p_o): |p - p_o| for "tv", KL(p_o || p) for "kl".
    ``symmetric`` drops tokens beyond a bound whatever the sign of A (ipo of prime-rl).
    """

    divergence: Divergence = "tv"
    divergence_low: float = 0.15
    divergence_high: float = 0.15
    symmetric: bool = False
    weight_high: float | None = 20.0  # sec. 5.4

    def __post_init__(self) -> None:
        if self.divergence not in get_args(Divergence):
            raise unknown_name("divergence", self.divergence, get_args(Divergence))
        if not 0 <= self.divergence_low < np.inf or not 0 <= self.divergence_high < np.inf:
            raise UserError(
                f"the bounds of the divergence are {self.divergence_low} and {self.divergence_high}; set both to 0 or "
                "more"
            )
        if self.weight_high is not None and not self.weight_high > 0:
            raise UserError(f"weight_high is {self.weight_high}; set it above 0")

    def __call__(self, at: Tokens, xp: Any) -> Array:
        low, high = self.clipped(at, xp)
        weight = at.ratio if self.weight_high is None else xp.minimum(at.ratio, self.weight_high)
        return xp.where(low | high, 0, _fixed(weight, xp) * at.advantages * at.logprobs)

    def clipped(self, at: Tokens, xp: Any) -> tuple[Array, Array]:
        p, p_o = xp.exp(_fixed(at.logprobs, xp)), xp.exp(at.old)
        moved = p - p_o
        if self.divergence == "kl":
            d = p_o * (at.old - _fixed(at.logprobs, xp)) + (1 - p_o) * xp.log((1 - p_o + 1e-8) / (1 - p + 1e-8))
            moved = xp.where(moved > 0, d, -d)
        low, high = moved < -self.divergence_low, moved > self.divergence_high
        return (low, high) if self.symmetric else (low & (at.advantages <= 0), high & (at.advantages > 0))


@dataclass(frozen=True)
class SoftGate(Objective):
    """Maximise J = (4 / tau) sigmoid(tau (r - 1)) A, tau by the sign of A: SAPO (arXiv:2511.20347)."""

    tau_pos: float = 1.0
    tau_neg: float = 1.05

    def __post_init__(self) -> None:
        if not (self.tau_pos > 0 and self.tau_neg > 0):
            raise UserError(f"tau_pos is {self.tau_pos} and tau_neg {self.tau_neg}; set both above 0")

    def __call__(self, at: Tokens, xp: Any) -> Array:
        tau = xp.where(at.advantages > 0, self.tau_pos, self.tau_neg)
        return 4 / tau / (1 + xp.exp(-tau * (at.ratio - 1))) * at.advantages


@dataclass(frozen=True)
class ImportanceSampling(Objective):
    """Maximise J = r A without bounds: REINFORCE with an importance ratio."""

    def __call__(self, at: Tokens, xp: Any) -> Array:
        return at.ratio * at.advantages


@dataclass(frozen=True)
class CrossEntropy(Objective):
    """Maximise J = A l, the log-prob without a ratio: SFT with A = 1, of any tokens, and DRO with a drift."""

    def __call__(self, at: Tokens, xp: Any) -> Array:
        return at.advantages * at.logprobs


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
    drift: float | None = None  # adds drift (l - o)^2 / 2 to the loss of a token, which holds l near o

    def __post_init__(self) -> None:
        if self.drift is not None and not 0 <= self.drift < np.inf:
            raise UserError(f"drift is {self.drift}; set it to 0 or more")
        if self.ratio not in get_args(RatioLevel):
            raise unknown_name("ratio level", self.ratio, get_args(RatioLevel))


def policy_objective(logprobs: Array, batch: Any, xp: Any, surrogate: Surrogate) -> Array:
    """Return sum_t w_t (-c_t J_t + beta KL_t + drift (l_t - o_t)^2 / 2), the scalar to minimise.

    ``logprobs`` is l, (B, T), under the policy being trained; ``batch`` holds arrays of the namespace
    ``xp``. w are its weights, c the sampler correction, constant in the gradient. Raises UserError when
    there is a KL penalty and the batch has no reference log-probs.
    """
    live = batch.weights != 0
    at = tokens_of(logprobs, batch, xp, surrogate)
    l, log_r = at.logprobs, at.logprobs - at.old
    j = surrogate.objective(at, xp)
    if surrogate.correction is not None:
        j = j * correction_weights(at.old, batch.logprobs, live, surrogate.correction, xp)
    if surrogate.off_policy_limit is not None:
        drift = _sequence_mean(xp.where(live, batch.logprobs - _fixed(l, xp), 0), live)
        stale = drift > surrogate.off_policy_limit  # arXiv:2512.02556, eq. 9, against the sampler
        j = xp.where(stale & (batch.advantages < 0), 0, j)
    loss = -(batch.weights * j).sum()
    if surrogate.drift:
        loss = loss + (batch.weights * (surrogate.drift / 2 * log_r * log_r)).sum()
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


def echo_loss(logprobs: Array, batch: Any, xp: Any) -> Array:
    """Return -sum_t e_t l_t, the cross-entropy on what environments said (ECHO); e are the batch's ``echo``."""
    return -xp.where(batch.echo != 0, batch.echo * logprobs, 0).sum()


def tokens_of(logprobs: Array, batch: Any, xp: Any, surrogate: Surrogate) -> Tokens:
    """Return what an objective reads of l, (B, T), and a batch; l and o are 0 where a token has no weight."""
    live = batch.weights != 0
    l = xp.where(live, logprobs, 0)
    o = xp.where(live, denominator(l, batch, xp, surrogate), 0)
    return Tokens(importance_ratio(l - o, live, surrogate.ratio, xp), l, o, batch.advantages)


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


def divergence(logprobs: Array, teacher: Array, beta: float, xp: Any) -> Array:
    """Return D_beta (N,) of a policy p and a teacher q, given as log-probs of all tokens, both (N, V).

    KL(q || p) at beta 0, KL(p || q) at 1, and between them beta KL(q || m) + (1 - beta) KL(p || m) with
    m = (1 - beta) p + beta q: the generalised Jensen-Shannon divergence (arXiv:2306.13649).
    """
    p, q = xp.maximum(logprobs, -1e30), xp.maximum(teacher, -1e30)  # 0 * -inf is not a number
    if beta == 0:
        value, slope = xp.exp(q) * (q - p), xp.exp(p) - xp.exp(q)
    elif beta == 1:
        value = slope = xp.exp(p) * (p - q)
    else:
        d = xp.minimum(q - p, 80)  # beyond it p is 0 in float32
        m = xp.log1p(beta * xp.expm1(d))  # log m - log p
        value = beta * xp.exp(q) * (d - m) - (1 - beta) * xp.exp(p) * m
        slope = -(1 - beta) * xp.exp(p) * m
    # the slope by log p up to a multiple of p, which log-probs do not have: it is exactly 0 where p is q
    return (_fixed(value, xp) + _fixed(slope, xp) * (p - _fixed(p, xp))).sum(axis=-1)


def _sequence_mean(values: Array, live: Array) -> Array:
    """Return the mean over the live tokens of each row, (B, T) -> (B, 1); 0 for an empty row."""
    count = (live * 1.0).sum(axis=1, keepdims=True)
    return (values * live).sum(axis=1, keepdims=True) / (count + (count == 0))


def _fixed(value: Array, xp: Any) -> Array:
    """Return ``value`` as a constant to the gradient; NumPy has no gradients."""
    return value if xp is np else xp.stop_gradient(value)
