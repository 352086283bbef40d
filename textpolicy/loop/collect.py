"""Collect rollouts: prompts in, scored episodes out; and dynamic sampling, which replaces groups without signal."""

from __future__ import annotations

import itertools
from collections.abc import Callable, Mapping, Sequence
from contextlib import nullcontext
from dataclasses import dataclass, replace
from operator import attrgetter

import numpy as np

from ..algorithms.credit import Rewards
from ..devices.team import ALONE, SAMPLING, SCORING
from ..engine import Engine, LocalEngine, Sampling, sample_from
from ..environment.base import DrivenEnv, Wanted
from ..environment.single_turn import TextGenerationEnv
from ..types import Batch, Completion, Episode, over_episode

Collect = Callable[[int], list[Episode]]  # the number of a draw of prompts, 0 for the step's own -> its episodes
Signal = Callable[[Episode], float]  # the value on which the completions of a group agree or not


def collect(
    engine: Engine,
    env: TextGenerationEnv | DrivenEnv,
    prompts: Sequence[int],
    group_size: int,
    sampling: Sampling,
    first_group: int = 0,
    pieces: bool = True,
) -> list[Episode]:
    """Return ``group_size`` scored episodes for each of the environment's ``prompts`` (indices), in order.

    The group of an episode is its prompt's place in ``prompts``, counted from ``first_group``, so a prompt
    drawn twice has two groups. Episodes of several turns take their turns together: all unfinished ones
    go to the engine in one call, with all their tokens so far. ``pieces`` adds the text of every token.
    Where the engine is one of several ranks, one of them plays and scores a whole group, and all return all episodes.
    """
    wanted = Wanted(prompts, group_size, sampling, first_group, pieces)
    if not isinstance(engine, LocalEngine) or engine.team.size == 1:
        return _play(engine, env, wanted)

    def play(places: Sequence[int]) -> tuple[list[list[Episode]], float]:
        groups = [first_group + place for place in places]
        played = _play(engine, env, replace(wanted, prompts=[prompts[p] for p in places], groups=groups))
        tokens = sum(int(e.mask.sum()) for e in played)
        return [[e for e in played if e.group == group] for group in groups], tokens

    read = [0 if isinstance(env, DrivenEnv) else len(env.prompt_ids(i)) for i in prompts]
    with engine.team.doing(SAMPLING):
        dealt = engine.team.share_out([n + group_size * sampling.max_tokens for n in read], play)
    return [e for group in dealt for e in group]


def _play(engine: Engine, env: TextGenerationEnv | DrivenEnv, wanted: Wanted) -> list[Episode]:
    """Return the scored episodes that are ``wanted``; the draws of each depend on the number of its group alone."""
    several = isinstance(env, DrivenEnv) or not env.single_turn
    local = engine if isinstance(engine, LocalEngine) else None
    team, kept = local.team if local else ALONE, local.keep_turns() if local and several else nullcontext()
    if isinstance(env, DrivenEnv):
        with kept:
            played, index = env.play(engine, wanted), dict(zip(wanted.numbers, wanted.prompts, strict=True))
        return [replace(e, prompt_index=index[e.group]) for e in played]
    size, sampling, streams = wanted.group_size, wanted.sampling, wanted.streams
    conversations = [env.begin(i) for i in wanted.prompts for _ in range(size)]
    turns: list[list[Completion]] = [[] for _ in conversations]
    with kept:
        prompts = [env.prompt_ids(i).tolist() for i in wanted.prompts]
        groups = sample_from(engine, prompts, size, sampling, streams)
        sampled, unfinished = [completion for group in groups for completion in group], [*range(len(conversations))]
        for turn in itertools.count(1):
            for n, completion in zip(unfinished, sampled, strict=True):
                turns[n].append(completion)
                conversations[n].add(completion.tokens.tolist(), completion.truncated)
            unfinished = [n for n in unfinished if not conversations[n].over]
            if not unfinished:
                break
            texts, drawn = [conversations[n].tokens for n in unfinished], sampling.reseeded(turn)
            groups = sample_from(engine, texts, 1, drawn, [streams[n] for n in unfinished])
            sampled = [completion for [completion] in groups]
    with team.doing(SCORING):
        judged = env.judge(conversations)
    return [
        Episode.from_turns(
            c.prompt,
            turns[n],
            c.added,
            reward=scored.reward,
            is_correct=scored.is_correct,
            scores=scored.scores,
            reward_weights=scored.weights,
            group=wanted.numbers[n // size],
            prompt=env.prompt_text(c.index),
            prompt_index=c.index,
            text=c.text if len(turns[n]) == 1 else "\n".join(f"[{m['role']}] {m['content']}" for m in c.messages),
            truncated=c.truncated,
            pieces=tuple(piece for turn in turns[n] for piece in env.pieces(turn.tokens)) if wanted.pieces else (),
        )
        for n, (c, scored) in enumerate(zip(conversations, judged, strict=True))
    ]


def with_reference(engine: Engine, episodes: Sequence[Episode]) -> list[Episode]:
    """Return the episodes with the log-probs of the frozen reference, for a KL in the reward."""
    batch = Batch.pack(episodes, [np.zeros(len(e.tokens), np.float32) for e in episodes])
    scored = engine.score(batch, reference=True)
    return [replace(e, reference=over_episode(line, e)) for e, line in zip(episodes, scored, strict=True)]


# ---- dynamic sampling (DAPO, arXiv:2503.14476, eq. 11)


@dataclass(frozen=True)
class Rollouts:
    """The episodes that a step sampled, and those of them that it trains on."""

    sampled: Sequence[Episode]
    trained: Sequence[Episode]
    draws: int = 1  # of prompts
    full: bool = True  # training got as many informative groups as it asked for

    @property
    def outcomes(self) -> list[tuple[int, bool]]:
        """The prompt of each judged completion, and whether it is correct."""
        pairs = [(e.prompt_index, e.is_correct) for e in self.sampled]
        return [(prompt, correct) for prompt, correct in pairs if prompt is not None and correct is not None]

    def handed_out(self, trained: Sequence[Episode], learner: Mapping[int, np.ndarray]) -> list[Episode]:
        """Return all sampled episodes, those of ``trained`` updated, with the ``learner``'s log-probs by place."""
        updated = {id(e): t for e, t in zip(self.trained, trained, strict=True)}
        return [replace(updated.get(id(e), e), learner=learner.get(i)) for i, e in enumerate(self.sampled)]


def collect_informative(collect: Collect, resample: int, signal: Signal = attrgetter("reward")) -> Rollouts:
    """Draw until there are as many informative groups as one draw has groups, at most ``resample`` times more.

    A group is informative where its completions' signals differ. With ``resample`` 0 the step trains on its one draw
    as it is. Every draw must number its groups differently. If no draw is left, training gets the informative groups
    there are, or the first draw if there are none.
    """
    first = collect(0)
    if resample == 0:
        return Rollouts(first, first)
    wanted = len({e.group for e in first})
    sampled, kept, draws = first, informative(first, signal), 1
    while len({e.group for e in kept}) < wanted and draws <= resample:
        more = collect(draws)
        sampled, kept, draws = [*sampled, *more], [*kept, *informative(more, signal)], draws + 1
    chosen = set(list(dict.fromkeys(e.group for e in kept))[:wanted])  # in the order drawn
    trained = [e for e in kept if e.group in chosen]
    return Rollouts(sampled, trained or first, draws, len(chosen) == wanted)


def informative(episodes: Sequence[Episode], signal: Signal = attrgetter("reward")) -> list[Episode]:
    """Return the episodes of groups whose scored completions do not all agree."""
    uniform = Rewards.of([signal(e) for e in episodes], [e.group for e in episodes]).uniform
    return [e for e, same in zip(episodes, uniform, strict=True) if not same]
