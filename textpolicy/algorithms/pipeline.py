"""The pipeline that turns scored episodes into a training batch, and its parts as one value: a recipe."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass, field, replace
from typing import Literal, Protocol

import numpy as np

from ..errors import UserError
from ..losses import Surrogate
from ..types import Aggregation, Batch, Credited, Episode, refuse_untrainable
from .credit import Credit, row_sum
from .gtpo import ShapeByEntropy
from .length import overlong_penalty
from .maxrl import MeanNormalized
from .planning import PlanningGrams, planning_masks
from .rewards import Rewards
from .sepa import Pooling, SEPAController, pool_execution
from .weighting import WeightByUncertainty

Signal = Literal["reward", "correctness"]
Uncertainty = Literal["surprisal", "entropy"]
Baseline = Callable[[Rewards], np.ndarray]  # (B,) rewards and their groups -> (B,) advantages
Stage = Callable[[Credit], Credit]


class Controller(Protocol):
    """Decides, step by step, how strongly SEPA pools."""

    @property
    def strength(self) -> float:
        """Of the last step; 0 before the first."""

    def advance(self, correct_rate: float | None, execution: np.ndarray) -> float:
        """The strength of this step, from its share of correct completions and its execution uncertainties."""


@dataclass(frozen=True)
class Algorithm:
    """A named recipe: a group baseline, token-level stages, and how the loss reads them."""

    baseline: Baseline
    stages: tuple[Stage, ...] = ()
    surrogate: Surrogate = field(default_factory=Surrogate)
    aggregation: Aggregation = "token-mean"
    length: float | None = None  # the longest completion, in tokens; the run sets it
    pooling: Pooling | None = None  # SEPA, before the stages
    grams: PlanningGrams | None = None  # what marks a planning token
    signal: Signal = "reward"  # or "correctness": is_correct as 0 or 1
    uncertainty: Uncertainty = "surprisal"  # or "entropy": exact, from engines that report it
    reward_kl: float = 0.0  # coefficient of a KL (k1) inside the reward
    overlong_cache: float = 0.0  # share of ``length`` over which the soft overlong penalty grows; 0 is off
    mask_truncated: bool = False  # truncated completions count in their group and teach nothing
    resample: int = 0  # draws of more prompts in a step whose groups agree (dynamic sampling)
    summary: str = ""
    paper: str = ""

    def __post_init__(self) -> None:
        for name, value, known in (
            ("signal", self.signal, ("reward", "correctness")),
            ("uncertainty", self.uncertainty, ("surprisal", "entropy")),
        ):
            if value not in known:
                raise UserError(f"{name} is {value!r}; set it to {known[0]} or {known[1]}")
        if self.overlong_cache or self.reward_kl:
            self._refuse_penalties()

    @property
    def idle_settings(self) -> frozenset[str]:
        """Fields of this recipe and its baseline that nothing in it reads."""
        stages = {type(stage) for stage in self.stages}
        idle = {"scale_rewards", "overlong_cache", "reward_kl"} if ShapeByEntropy in stages else set()
        if type(self.baseline) is MeanNormalized:
            idle |= {"overlong_cache", "reward_kl"}
        return frozenset(idle if self.pooling or WeightByUncertainty in stages else {*idle, "uncertainty"})

    def credit(self, episodes: Sequence[Episode], controller: Controller | None = None) -> Batch:
        """Scored episodes -> one training batch. ``controller`` is SEPA's; without it nothing is pooled."""
        return self.mini_batches(episodes, 1, controller)[0]

    def mini_batches(
        self, episodes: Sequence[Episode], count: int, controller: Controller | None = None
    ) -> list[Batch]:
        """``count`` batches of whole groups, credited together and normalised each on its own."""
        return self.pack(episodes, self.tokens(episodes, controller), count)

    def pack(self, episodes: Sequence[Episode], tokens: Credit, count: int = 1) -> list[Batch]:
        """The same of ``tokens``, the credit of these episodes."""
        spread = _over_episodes(tokens.advantage, episodes)
        kept = [_without_tokens(e) if self._mutes(e) else e for e in episodes]
        parts = np.array_split(np.arange(tokens.group.max() + 1), min(count, tokens.group.max() + 1))
        members = [np.flatnonzero(np.isin(tokens.group, part)) for part in parts]
        return [
            Batch.pack([kept[i] for i in m], [spread[i] for i in m], self.aggregation, self.length) for m in members
        ]

    def credited(self, episodes: Sequence[Episode], tokens: Credit) -> list[Episode]:
        """The episodes, each with what ``tokens``, their credit, made of it: for people to look at."""
        assert tokens.baseline is not None  # ``tokens`` below makes it
        advantage = np.where(tokens.silent, 0.0, tokens.baseline)
        credit = _over_episodes(tokens.advantage, episodes)
        planning = _over_episodes(tokens.planning, episodes)
        return [
            replace(e, credited=Credited(float(a), 0 * c if self._mutes(e) else c, p != 0 if self.grams else None))
            for e, a, c, p in zip(episodes, advantage, credit, planning, strict=True)
        ]

    def _mutes(self, episode: Episode) -> bool:
        return self.mask_truncated and episode.truncated

    def tokens(self, episodes: Sequence[Episode], controller: Controller | None = None) -> Credit:
        """The credit of every sampled token, and what it was made of.

        Wherever a group agrees on the reward, or a completion has none, the credit is 0, whatever baseline
        and stages made of it: it says nothing about which completion did better.
        """
        refuse_untrainable(episodes)
        credit = self._facts(episodes)
        if self.pooling is not None and controller is not None:
            strength = controller.advance(_correct_rate(episodes), credit.uncertainty[~credit.planning])
            pooled = pool_execution(credit.uncertainty, credit.planning, credit.row, strength)
            credit = replace(credit, uncertainty=pooled)
        for stage in self.stages:
            credit = stage(credit)
        return replace(credit, advantage=np.where(credit.silent[credit.row], 0.0, credit.advantage))

    def controller(self) -> SEPAController | None:
        """A fresh controller of SEPA's strength, if the recipe pools."""
        return None if self.pooling is None else self.pooling.controller()

    def _facts(self, episodes: Sequence[Episode]) -> Credit:
        """Credit before any stage: the baseline's advantage on every token."""
        count = np.array([int(e.mask.sum()) for e in episodes])
        row = np.repeat(np.arange(len(episodes)), count)
        rewards = Rewards.of([self.signal_of(e) for e in episodes], [e.group for e in episodes])
        surprisal = -_sampled(episodes, [e.logprobs for e in episodes])
        seen = [e.entropy for e in episodes if e.entropy is not None]
        entropy = _sampled(episodes, seen) if len(seen) == len(episodes) else None
        penalty = self._penalty(episodes, surprisal)
        shaped = rewards.value + self._overlong(count) - row_sum(penalty, row, len(episodes))
        baseline = self.baseline(Rewards(shaped, rewards.group))
        return Credit(
            advantage=baseline[row],
            uncertainty=surprisal if self.uncertainty == "surprisal" else _exact(entropy),
            entropy=entropy,
            planning=self._planning(episodes, count),
            penalty=penalty,
            row=row,
            position=np.arange(len(row)) - np.repeat(np.cumsum(count) - count, count),
            reward=rewards.value,
            group=rewards.group,
            baseline=baseline,
        )

    def _planning(self, episodes: Sequence[Episode], count: np.ndarray) -> np.ndarray:
        if self.grams is None:
            return np.zeros(count.sum(), bool)
        return planning_masks([_pieces(e, n) for e, n in zip(episodes, count, strict=True)], self.grams)

    def signal_of(self, episode: Episode) -> float:
        """What the recipe learns from: the reward, or correctness as 0 or 1; NaN where unscorable. Raises UserError."""
        if self.signal == "reward":
            return episode.reward
        if episode.is_correct is None:
            if np.isnan(episode.reward):
                return episode.reward
            raise UserError(
                "signal is correctness and the reward does not say what is correct; "
                'return {"reward": ..., "is_correct": ...} from it'
            )
        return float(episode.is_correct)

    def _refuse_penalties(self) -> None:
        why = ""
        if ShapeByEntropy in map(type, self.stages):
            why = "GTPO's paper form makes its own advantages from the outcomes, so that would have no effect"
        elif type(self.baseline) is MeanNormalized:
            why = "MaxRL divides by the mean reward, which that could make negative"
        if why:
            raise UserError(
                "the recipe has an overlong penalty or a KL in the reward, and "
                f"{why}; leave overlong_cache at 0 and put the KL into the loss"
            )

    def _overlong(self, count: np.ndarray) -> np.ndarray | float:
        if not self.overlong_cache:
            return 0.0
        if self.length is None:
            raise UserError("the overlong penalty needs the longest completion; set the algorithm's length")
        return overlong_penalty(count, self.length, max(1.0, round(self.overlong_cache * self.length)))

    def _penalty(self, episodes: Sequence[Episode], surprisal: np.ndarray) -> np.ndarray:
        """beta (l - q) at each token, the k1 estimate."""
        if not self.reward_kl:
            return np.zeros_like(surprisal)
        references = [e.reference for e in episodes if e.reference is not None]
        if len(references) < len(episodes):
            raise UserError("the reward has a KL penalty and an episode no reference log-probs; score them first")
        return self.reward_kl * (-surprisal - _sampled(episodes, references))


def _sampled(episodes: Sequence[Episode], arrays: Sequence[np.ndarray]) -> np.ndarray:
    """(N,) float64: the sampled tokens' entries of one (L,) array per episode."""
    return np.concatenate([a[e.mask] for e, a in zip(episodes, arrays, strict=True)]).astype(np.float64)


def _over_episodes(values: np.ndarray, episodes: Sequence[Episode]) -> list[np.ndarray]:
    """(N,) -> (L,) float32 per episode, 0 where nothing was sampled."""
    ends = np.cumsum([int(e.mask.sum()) for e in episodes])
    out = []
    for e, part in zip(episodes, np.split(values, ends[:-1]), strict=True):
        spread = np.zeros(len(e.tokens), np.float32)
        with np.errstate(over="ignore"):  # what becomes infinite is refused when the batch is packed
            spread[e.mask] = part
        out.append(spread)
    return out


def _without_tokens(episode: Episode) -> Episode:
    return replace(episode, mask=np.zeros_like(episode.mask))


def _exact(entropy: np.ndarray | None) -> np.ndarray:
    if entropy is None:
        raise UserError(
            "uncertainty is entropy and the engine reports none; use an engine that does, or set it to surprisal"
        )
    return entropy


def _pieces(episode: Episode, count: int) -> tuple[str, ...]:
    if len(episode.pieces) != count:
        raise UserError(
            f"planning tokens are found in their text and an episode has {len(episode.pieces)} pieces of text for "
            f"{count} sampled tokens; collect episodes with rollout.collect, or give Episode pieces"
        )
    return episode.pieces


def _correct_rate(episodes: Sequence[Episode]) -> float | None:
    """Share of correct completions; a reward of 1 or more counts where the reward does not say."""
    known = [e.reward >= 1 if e.is_correct is None else e.is_correct for e in episodes if not np.isnan(e.reward)]
    return float(np.mean(known)) if known else None
