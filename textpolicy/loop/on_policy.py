"""The on-policy check: compare the log-probs of sampling with those of the learner for the same tokens."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field

import numpy as np

from ..engine import Engine
from ..errors import UserError
from ..types import Batch, Episode, over_episode
from .metrics import Row


@dataclass(frozen=True)
class Gap:
    """The gap between the learner's log-probs l and the sampler's b, over the sampled tokens of some completions."""

    mean: float  # nats, of |l - b|
    maximum: float  # nats
    kl: float  # E[r - 1 - log r] with r = exp(l - b), which is never negative
    tokens: int
    learner: Mapping[int, np.ndarray] = field(default_factory=dict, repr=False, compare=False)  # l by place, (L,) f32

    @property
    def row(self) -> Row:
        """The metrics of a step."""
        return {"on_policy_gap_mean": self.mean, "on_policy_gap_max": self.maximum, "on_policy_kl": self.kl}


def measure(engine: Engine, episodes: Sequence[Episode], limit: int = 16) -> Gap:
    """Score up to ``limit`` of the ``episodes``, spread over all of them, before anything is updated.

    Raises UserError for a completion that was not cut off and does not end with a stop token.
    """
    chosen = np.unique(np.linspace(0, len(episodes) - 1, min(limit, len(episodes))).astype(int)).tolist()
    places = [i for i in chosen if episodes[i].mask.any()]
    if not places:
        return Gap(0.0, 0.0, 0.0, 0)
    some = [episodes[i] for i in places]
    for e in some:
        last = int(e.tokens[np.flatnonzero(e.mask)[-1]])
        if not e.truncated and last not in engine.stop:
            raise UserError(
                f"training is not on-policy: a completion that was not cut off ends with token {last}, which is not a "
                "stop token, so stopping would not be learnt; the engine must keep the stop token and its log-prob"
            )
    batch = Batch.pack(some, [np.zeros(len(e.tokens), np.float32) for e in some])
    live, scored = batch.weights != 0, engine.score(batch)
    d = (scored.astype(np.float64) - batch.logprobs)[live]
    kl = float((np.exp(np.clip(d, -20, 20)) - 1 - d).mean())
    learner = {i: over_episode(line, episodes[i]) for i, line in zip(places, scored, strict=True)}
    return Gap(float(np.abs(d).mean()), float(np.abs(d).max()), kl, len(d), learner)


@dataclass(frozen=True)
class OnPolicyCheck:
    """The check that measures the gap every so many steps, from the first on, and stops a run that is off-policy."""

    every: int = 20  # steps; 0 is never
    completions: int = 16
    max_gap: float = 0.05  # nats, of the mean; bfloat16 on a GPU has about 0.02, float32 about 1e-5
    corrected: bool = False  # a sampler correction is on, which is what a larger gap needs

    def __call__(self, engine: Engine, step: int, episodes: Sequence[Episode]) -> Gap | None:
        """Return the gap, None in other steps. Raises UserError above ``max_gap`` without a correction."""
        if not self.every or step % self.every:
            return None
        gap = measure(engine, episodes, self.completions)
        if not gap.mean <= self.max_gap and not self.corrected:
            hints = ["load the model in float32 if it is in half precision", "decode with an unquantised cache"]
            temperatures = {e.temperature for e in episodes}
            if temperatures != {1.0}:
                hints.append(f"check that scoring applies the temperature {temperatures.pop()}")
            raise UserError(
                f"training is not on-policy: over {gap.tokens} sampled tokens the learner's log-probs differ from the "
                f"sampler's by {gap.mean:.3g} nats on average (at most {gap.maximum:.3g}, KL {gap.kl:.3g}), more than "
                f"{self.max_gap:g}; {', '.join(hints)}, and suspect a batch mask of this model if that does not help, "
                "or set algorithm.correction.level, or raise on_policy.max_gap"
            )
        return gap

    def after(self, engine: Engine, step: int, episodes: Sequence[Episode]) -> Row:
        """Return metrics of how far the step's updates moved the policy, in the steps that are checked."""
        if not self.every or step % self.every:
            return {}
        change = measure(engine, episodes, self.completions)
        return {"update_logprob_change": change.mean, "update_kl": change.kl}
