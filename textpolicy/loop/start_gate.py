"""The start gate: whether reinforcement learning can begin from here, from some samples of each problem."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Self

from ..errors import UserError
from .evaluation import Estimate, Evaluation
from .pass_at_k import pass_at_k, pass_hat_k

ENOUGH = 0.2  # of the groups disagree: a fifth of the sampling teaches, as NO_SIGNAL of the doctor has it
SOLVED = 0.75  # of the completions are right, so that groups agree because there is little left to learn
FOUND = 0.25  # of the problems are solved by a sample, which is something to learn from


@dataclass(frozen=True)
class StartGate:
    """The figures of a start, each with its 95% interval over problems."""

    average: Estimate  # avg@n
    passed: Estimate  # pass@n
    informative: Estimate  # the expected share of groups whose completions are neither all right nor all wrong
    samples: int  # n
    group_size: int

    @classmethod
    def of(cls, result: Evaluation, group_size: int) -> Self:
        """Return the gate from ``result``. Raises UserError for fewer samples of a problem than a group has.

        With p a problem's chance to be solved, a group of G is informative with probability 1 - p^G - (1 - p)^G,
        which pass@G - pass^G estimates without bias from n >= G samples (arXiv:2107.03374, eq. 1).
        """
        judged = result.judged()
        samples = min(map(len, judged))
        if samples < group_size:
            raise UserError(
                f"a problem has {samples} judged samples and a group {group_size} completions; raise samples to that"
            )
        shares = [
            pass_at_k(len(answers), sum(answers), group_size) - pass_hat_k(len(answers), sum(answers), group_size)
            for answers in judged
        ]
        return cls(result.average, result.pass_at(samples), Estimate.over(shares, samples), samples, group_size)

    @property
    def stage(self) -> str:
        """The kind of stage to begin with: "rl", "rft" or "sft"; "" where there is little left to learn."""
        if self.informative.value >= ENOUGH:
            return "rl"
        if self.average.value >= SOLVED:
            return ""
        return "rft" if self.passed.value >= FOUND else "sft"

    @property
    def advice(self) -> str:
        """The stage to begin with, and the setting to write."""
        few = f"only {self.informative.value:.0%} of groups of {self.group_size} would disagree"
        if self.stage == "rl":
            return f"begin with rl: {self.informative.value:.0%} of groups of {self.group_size} would disagree"
        if not self.stage:
            return f"there is little left to learn: {few}, since most completions are right; take harder problems"
        why = "samples find answers to learn from" if self.stage == "rft" else "samples hardly ever find an answer"
        also = "" if self.stage == "rft" else ', or kind = "distill" with a teacher,'
        return f'teach first: {few}, and {why}; put [[stage]] kind = "{self.stage}"{also} before one of kind = "rl"'
