"""Dynamic sampling (DAPO, arXiv:2503.14476, eq. 11): a step's groups that agree are replaced by others that do not."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, replace

import numpy as np

from ..algorithms.credit import Rewards
from ..types import Episode

Collect = Callable[[int], list[Episode]]  # the episodes of a draw of prompts; draw 0 is the step's own
Signal = Callable[[Episode], float]  # what groups agree or disagree on


@dataclass(frozen=True)
class Rollouts:
    """What a step sampled, and what of it it trains on."""

    sampled: Sequence[Episode]
    trained: Sequence[Episode]
    draws: int = 1  # of prompts
    full: bool = True  # training got as many informative groups as it asked for

    def handed_out(self, trained: Sequence[Episode], learner: Mapping[int, np.ndarray]) -> list[Episode]:
        """Everything sampled, those ``trained`` on as they are now, with the ``learner``'s log-probs by place."""
        now = {id(e): t for e, t in zip(self.trained, trained, strict=True)}
        return [replace(now.get(id(e), e), learner=learner.get(i)) for i, e in enumerate(self.sampled)]


def _reward(episode: Episode) -> float:
    return episode.reward


def collect_informative(collect: Collect, resample: int, signal: Signal = _reward) -> Rollouts:
    """Draw until as many groups disagree as one draw holds, at most ``resample`` times more.

    With ``resample`` 0 the one draw is trained on as it is. A draw's groups must have numbers of their own.
    If no draw is left, training gets the informative groups there are, or the first draw if there are none.
    """
    first = collect(0)
    if resample == 0:
        return Rollouts(first, first)
    wanted = len(_groups(first))
    sampled, kept, draws = first, informative(first, signal), 1
    while len(_groups(kept)) < wanted and draws <= resample:
        more = collect(draws)
        sampled, kept, draws = [*sampled, *more], [*kept, *informative(more, signal)], draws + 1
    chosen = set(_groups(kept)[:wanted])
    trained = [e for e in kept if e.group in chosen]
    return Rollouts(sampled, trained or first, draws, len(chosen) == wanted)


def informative(episodes: Sequence[Episode], signal: Signal = _reward) -> list[Episode]:
    """The episodes of groups whose scored completions do not all agree."""
    uniform = Rewards.of([signal(e) for e in episodes], [e.group for e in episodes]).uniform
    return [e for e, same in zip(episodes, uniform, strict=True) if not same]


def _groups(episodes: Sequence[Episode]) -> list[int]:
    """Their numbers, in the order drawn."""
    return list(dict.fromkeys(e.group for e in episodes))
