"""Turn scored episodes into a training batch: the pipeline, and its parts as one value, a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Any, Literal, Protocol

import numpy as np
from numpy.typing import NDArray

from ..errors import UserError
from ..losses import Surrogate
from ..types import Aggregation, Batch, Credited, Episode, Floats, refuse_untrainable
from .credit import Credit, Rewards
from .distillation import Distillation
from .entropy_bonus import EntropyControl
from .gdpo import DecoupledRelative
from .gtpo import ShapeByEntropy
from .length import overlong_penalty
from .maxrl import MeanNormalized
from .planning import PlanningGrams, planning_masks
from .sepa import Pooling, SEPAController, pool_execution
from .weighting import WeightByUncertainty

Signal = Literal["reward", "correctness"]
Uncertainty = Literal["surprisal", "entropy"]
Baseline = Callable[[Rewards], Floats]  # (B,) rewards and their groups -> (B,) advantages
Stage = Callable[[Credit], Credit]


class Controller(Protocol):
    """The rule that sets how strongly SEPA pools in each step."""

    def advance(self, correct_rate: float | None, execution: Floats) -> float:
        """Return the strength of this step, from its share of correct completions and its execution uncertainties."""


@dataclass(frozen=True)
class Algorithm:
    """The recipe of a policy update: a group baseline, token-level stages, and how the loss reads them."""

    baseline: Baseline
    stages: tuple[Stage, ...] = ()
    surrogate: Surrogate = field(default_factory=Surrogate)
    aggregation: Aggregation = "token-mean"
    length: float | None = None  # the longest completion, in tokens; set by the run
    pooling: Pooling | None = None  # SEPA, before the stages
    grams: PlanningGrams | None = None  # the phrases that mark planning tokens
    signal: Signal = "reward"  # or "correctness": is_correct as 0 or 1
    uncertainty: Uncertainty = "surprisal"  # or "entropy": exact, from engines that report it
    reward_kl: float = 0.0  # coefficient of a KL (k1) inside the reward
    overlong_cache: float = 0.0  # share of ``length`` over which the soft overlong penalty grows; 0 is off
    mask_truncated: bool = False  # truncated completions count in their group and get no gradient
    distillation: Distillation | None = None  # a teacher's signal for every token, added to that of the rewards
    echo: float = 0.0  # weight of the cross-entropy on what tools and environments say; 0 is off
    entropy_bonus: float = 0.0  # coefficient of the mean entropy in the loss, with a target the first; 0 is off
    entropy_target: float | None = None  # nats per token; the coefficient adapts to it
    entropy_step: float = 0.005  # by which it does
    resample: int = 0  # further draws of prompts in a step to replace uniform groups (dynamic sampling)
    summary: str = ""
    paper: str = ""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("signal", self.signal, ("reward", "correctness")),
            ("uncertainty", self.uncertainty, ("surprisal", "entropy")),
        ):
            if value not in known:
                raise UserError(f"{name} is {value!r}; set it to {known[0]} or {known[1]}")
        why = ""
        if ShapeByEntropy in map(type, self.stages):
            why = "GTPO's paper form makes its own advantages from the outcomes, so that would have no effect"
        elif type(self.baseline) is MeanNormalized:
            why = "MaxRL divides by the mean reward, which that could make negative"
        elif type(self.baseline) is DecoupledRelative:
            why = "GDPO normalises each reward on its own, and that is none of them"
        if why and (self.overlong_cache or self.reward_kl):
            raise UserError(
                "the recipe has an overlong penalty or a KL in the reward, and "
                f"{why}; leave overlong_cache at 0 and put the KL into the loss"
            )

    @property
    def idle_settings(self) -> frozenset[str]:
        """The fields of this recipe and its baseline that have no effect in it."""
        stages = {type(stage) for stage in self.stages}
        idle = {"scale_rewards", "overlong_cache", "reward_kl"} if ShapeByEntropy in stages else set()
        if type(self.baseline) in (MeanNormalized, DecoupledRelative):
            idle |= {"overlong_cache", "reward_kl"}
        return frozenset(idle if self.pooling or WeightByUncertainty in stages else {*idle, "uncertainty"})

    def controller(self) -> SEPAController | None:
        """Return a new controller of SEPA's strength, if the recipe pools."""
        return None if self.pooling is None else self.pooling.controller()

    def entropy_control(self) -> EntropyControl | None:
        """Return a new control of the entropy bonus, if the recipe has one."""
        if self.entropy_target is None and not self.entropy_bonus:
            return None
        return EntropyControl(self.entropy_bonus, self.entropy_target, self.entropy_step)

    def signal_of(self, episode: Episode) -> float:
        """Return the signal to learn from, the reward, or correctness as 0 or 1; NaN if unscored. Raises UserError."""
        if self.signal == "reward":
            return episode.reward
        if episode.is_correct is None:
            if np.isnan(episode.reward):
                return episode.reward
            raise UserError(
                "signal is correctness and the reward does not report what is correct; "
                'return {"reward": ..., "is_correct": ...} from it'
            )
        return float(episode.is_correct)

    def credit(self, episodes: Sequence[Episode], controller: Controller | None = None) -> Batch:
        """Turn scored episodes into one training batch. ``controller`` is SEPA's; without it nothing is pooled."""
        return self.mini_batches(episodes, 1, controller)[0]

    def mini_batches(
        self, episodes: Sequence[Episode], count: int, controller: Controller | None = None
    ) -> list[Batch]:
        """Turn scored episodes into ``count`` batches of whole groups, credited together, each normalised alone."""
        return self.pack(episodes, self.tokens(episodes, controller), count)

    def tokens(self, episodes: Sequence[Episode], controller: Controller | None = None) -> Credit:
        """Compute the credit of every sampled token, from the baseline through pooling and stages. Raises UserError.

        An unscored completion and those of a uniform group carry no learning signal, so their credit is set
        to 0 after baseline and stages.
        """
        refuse_untrainable(episodes)
        credit = self._before_stages(episodes)
        if self.pooling is not None and controller is not None:
            scored = [e for e in episodes if not np.isnan(e.reward)]
            correct = [e.reward >= 1 if e.is_correct is None else e.is_correct for e in scored]
            rate = float(np.mean(correct)) if correct else None
            strength = controller.advance(rate, credit.uncertainty[~credit.planning])
            pooled = pool_execution(credit.uncertainty, credit.planning, credit.row, strength)
            credit = replace(credit, uncertainty=pooled)
        for stage in self.stages:
            credit = stage(credit)
        advantage = np.where(credit.silent[credit.row], 0.0, credit.advantage)
        if self.distillation is not None:  # what a teacher says of a token needs no reward
            advantage = self.distillation(advantage, episodes)
        return replace(credit, advantage=advantage)

    def _before_stages(self, episodes: Sequence[Episode]) -> Credit:
        """Return the credit before any stage: the baseline's advantage on every token, and what stages read."""
        count = np.array([int(e.mask.sum()) for e in episodes])
        row = np.repeat(np.arange(len(episodes)), count)
        rewards = Rewards.of([self.signal_of(e) for e in episodes], [e.group for e in episodes])
        surprisal = -_sampled(episodes, [e.logprobs for e in episodes])
        # without exact entropy and reference log-probs for every episode the recipe has none
        entropies = [e.entropy for e in episodes if e.entropy is not None]
        entropy = _sampled(episodes, entropies) if len(entropies) == len(episodes) else None
        penalty = np.zeros_like(surprisal)
        if self.reward_kl:
            references = [e.reference for e in episodes if e.reference is not None]
            if len(references) < len(episodes):
                raise UserError("the reward has a KL penalty and an episode no reference log-probs; score them first")
            penalty = self.reward_kl * (-surprisal - _sampled(episodes, references))  # beta (l - q), k1
        overlong: Floats | float = 0.0
        if self.overlong_cache:
            if self.length is None:
                raise UserError("the overlong penalty needs the longest completion; set the algorithm's length")
            overlong = overlong_penalty(count, self.length, max(1.0, round(self.overlong_cache * self.length)))
        shaped = rewards.value + overlong - np.bincount(row, penalty, len(episodes))
        parts = _parts(episodes) if self.signal == "reward" else ()
        baseline = self.baseline(Rewards(shaped, rewards.group, count, parts))
        uncertainty = surprisal if self.uncertainty == "surprisal" else entropy
        if uncertainty is None:
            raise UserError(
                "uncertainty is entropy and the engine reports none; use an engine that does, or set it to surprisal"
            )
        planning = np.zeros(len(row), bool)
        if self.grams is not None:
            for e, n in zip(episodes, count, strict=True):
                if len(e.pieces) != n:
                    raise UserError(
                        f"planning tokens are found in their text and an episode has {len(e.pieces)} pieces of text "
                        f"for {n} sampled tokens; collect episodes with rollout.collect, or give Episode pieces"
                    )
            planning = planning_masks([e.pieces for e in episodes], self.grams)
        return Credit(
            advantage=baseline[row],
            uncertainty=uncertainty,
            entropy=entropy,
            planning=planning,
            penalty=penalty,
            row=row,
            position=np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count),
            reward=rewards.value,
            group=rewards.group,
            baseline=baseline,
        )

    def pack(self, episodes: Sequence[Episode], tokens: Credit, count: int = 1, bonus: float = 0.0) -> list[Batch]:
        """Pack episodes and ``tokens``, their credit, into ``count`` batches of whole groups, each normalised alone.

        ``bonus`` is the coefficient of the entropy in this step.
        """
        spread = _over_episodes(tokens.advantage, episodes)
        left_out = {*np.flatnonzero(tokens.baseline == 0)} if tokens.alone else set()
        muted = [(self.mask_truncated and e.truncated) or i in left_out for i, e in enumerate(episodes)]
        kept = [replace(e, mask=np.zeros_like(e.mask)) if m else e for e, m in zip(episodes, muted, strict=True)]
        parts = np.array_split(np.arange(tokens.group.max() + 1), min(count, tokens.group.max() + 1))
        members = [np.flatnonzero(np.isin(tokens.group, part)) for part in parts]
        return [
            Batch.pack([kept[i] for i in m], [spread[i] for i in m], self.aggregation, self.length, self.echo, bonus)
            for m in members
        ]

    def credited(self, episodes: Sequence[Episode], tokens: Credit) -> list[Episode]:
        """Return the episodes with a record of ``tokens``, the credit that each was trained with, for display."""
        assert tokens.baseline is not None  # ``tokens`` above sets it
        advantage = np.where(tokens.silent, 0.0, tokens.baseline)
        spread = _over_episodes(tokens.advantage, episodes)
        planning = _over_episodes(tokens.planning, episodes)
        out = []
        for e, a, credit, marks in zip(episodes, advantage, spread, planning, strict=True):
            trained = 0 * credit if self.mask_truncated and e.truncated else credit
            out.append(replace(e, credited=Credited(float(a), trained, marks != 0 if self.grams else None)))
        return out


def _parts(episodes: Sequence[Episode]) -> tuple[tuple[float, Floats], ...]:
    """Return the weight and the (B,) scores, NaN where it did not apply, of each reward that is not only reported."""
    weights = {name: weight for e in episodes for name, weight in e.reward_weights.items() if weight}
    return tuple(
        (weights[name], np.array([e.scores.get(name, np.nan) for e in episodes], np.float64))
        for name in sorted(weights)
    )


def _sampled(episodes: Sequence[Episode], arrays: Sequence[Floats]) -> NDArray[np.float64]:
    """Return the sampled tokens' entries of one (L,) array per episode, (N,) float64."""
    return np.concatenate([a[e.mask] for e, a in zip(episodes, arrays, strict=True)]).astype(np.float64)


def _over_episodes(values: NDArray[Any], episodes: Sequence[Episode]) -> list[Floats]:
    """Return the values of sampled tokens, (N,), as one (L,) float32 array per episode, 0 where nothing was sampled."""
    ends = np.cumsum([int(e.mask.sum()) for e in episodes])
    out = []
    for e, part in zip(episodes, np.split(values, ends[:-1]), strict=True):
        spread = np.zeros(len(e.tokens), np.float32)
        with np.errstate(over="ignore"):  # a value that overflows to infinity is refused when the batch is packed
            spread[e.mask] = part
        out.append(spread)
    return out
