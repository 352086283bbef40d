"""Learn by cross-entropy from what was sampled and is right: rejection sampling, also RAFT (arXiv:2304.06767)."""

from __future__ import annotations

from collections import Counter
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..losses import CrossEntropy, Surrogate
from ..types import Bools, Episode
from .credit import Credit
from .pipeline import Algorithm, Baseline
from .reinforce import NoBaseline


@dataclass(frozen=True)
class RejectionSampling(Algorithm):
    """Give the tokens of a kept completion A = 1 and average -l over them alone; one that is not kept counts nowhere.

    Of the correct completions of a prompt in a step the first ``cap`` are kept (None: all), each text once if
    ``unique``. Correct is what the reward reports, or a reward of 1 or more.
    """

    baseline: Baseline = field(default_factory=NoBaseline)
    surrogate: Surrogate = field(default_factory=lambda: Surrogate(CrossEntropy()))
    unique: bool = True
    cap: int | None = None

    def kept(self, episodes: Sequence[Episode]) -> Bools:
        """Return which of the ``episodes`` are learned from, (B,) bool."""
        kept, count, seen = [], Counter[bytes](), set[bytes]()
        for e in episodes:
            prompt, whole = e.tokens[: int(np.argmax(e.mask))].tobytes(), e.tokens.tobytes()
            right = bool(e.reward >= 1 if e.is_correct is None else e.is_correct) and bool(e.mask.any())
            right = right and not (self.unique and whole in seen) and not (self.cap and count[prompt] >= self.cap)
            if right:
                seen.add(whole)
                count[prompt] += 1
            kept.append(right)
        return np.array(kept, bool)

    def _before_stages(self, episodes: Sequence[Episode]) -> Credit:
        credit, kept = super()._before_stages(episodes), self.kept(episodes).astype(float)
        return replace(credit, advantage=kept[credit.row], baseline=kept, alone=True)
