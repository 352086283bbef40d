"""Judging a policy on problems it was not trained on, with an honest interval."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

from scipy.stats import binomtest

from .engine import Engine, Sampling
from .environment.base import DrivenEnv
from .environment.text_generation import TextGenerationEnv
from .errors import UserError
from .rollout.collect import collect
from .types import Episode


@dataclass(frozen=True)
class Rate:
    """A share of problems solved, with its 95% Wilson interval."""

    correct: int
    total: int

    @property
    def value(self) -> float:
        return self.correct / self.total

    @property
    def interval(self) -> tuple[float, float]:
        ci = binomtest(self.correct, self.total).proportion_ci(0.95, method="wilson")
        return float(ci.low), float(ci.high)

    def __str__(self) -> str:
        low, high = self.interval
        return f"{self.value:.1%} [{low:.1%}, {high:.1%}]"


@dataclass(frozen=True)
class Evaluation:
    """One pass over an environment's prompts, one completion each."""

    episodes: Sequence[Episode]

    @property
    def accuracy(self) -> Rate:
        """Share of correct completions; needs a reward that says which are."""
        known = [e.is_correct for e in self.episodes if e.is_correct is not None]
        if not known:
            raise UserError(
                "the reward never says whether a completion is correct; "
                'return {"reward": ..., "is_correct": ...} from it to measure accuracy'
            )
        return Rate(int(sum(known)), len(known))


def evaluate(engine: Engine, env: TextGenerationEnv | DrivenEnv, sampling: Sampling) -> Evaluation:
    """Answer every prompt of ``env`` once, greedily if ``sampling.temperature`` is 0."""
    return Evaluation(collect(engine, env, range(len(env)), 1, sampling, pieces=False))
