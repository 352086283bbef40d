"""One hop of the training loop: prompts in, scored episodes out."""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from dataclasses import dataclass, field, replace

import numpy as np

from ..engine import Engine, Sampling
from ..environment.base import DrivenEnv, Wanted
from ..environment.single_turn import TextGenerationEnv
from ..environment.text.conversation import Conversation
from ..rewards.contract import Scored
from ..types import Batch, Completion, Episode, over_episode


def collect(
    engine: Engine,
    env: TextGenerationEnv | DrivenEnv,
    prompts: Sequence[int],
    group_size: int,
    sampling: Sampling,
    first_group: int = 0,
    pieces: bool = True,
) -> list[Episode]:
    """``group_size`` scored episodes for each of the environment's ``prompts`` (indices), in order.

    A prompt's place in ``prompts``, counted from ``first_group``, is its episodes' group, so a prompt
    drawn twice has two groups. Episodes of several turns take their turns together: all that are not
    over go to the engine in one call, with all their tokens so far. ``pieces`` asks for the text of every
    token, too.
    """
    if isinstance(env, DrivenEnv):
        played = env.play(engine, Wanted(prompts, group_size, sampling, first_group, pieces))
        return [replace(e, prompt_index=prompts[e.group - first_group]) for e in played]
    rollouts = [_Rollout(env.begin(i)) for i in prompts for _ in range(group_size)]
    first = engine.sample([env.prompt_ids(i).tolist() for i in prompts], group_size, sampling)
    waiting = _add(env, rollouts, [completion for members in first for completion in members])
    for turn in itertools.count(1):
        if not waiting:
            break
        sampled = engine.sample([r.conversation.tokens for r in waiting], 1, sampling.elsewhere(turn))
        waiting = _add(env, waiting, [completion for [completion] in sampled])
    scores = env.judge([r.conversation for r in rollouts])
    pairs = zip(rollouts, scores, strict=True)
    return [r.episode(env, scored, first_group + n // group_size, pieces) for n, (r, scored) in enumerate(pairs)]


@dataclass(frozen=True, slots=True)
class _Rollout:
    """An episode in progress, with what the engine said of each turn."""

    conversation: Conversation
    turns: list[Completion] = field(default_factory=list)

    def episode(self, env: TextGenerationEnv, scored: Scored, group: int, pieces: bool) -> Episode:
        done, read = self.conversation, self.turns if pieces else ()
        return Episode.from_turns(
            done.prompt,
            self.turns,
            done.added,
            reward=scored.reward,
            is_correct=scored.is_correct,
            scores=scored.scores,
            group=group,
            prompt=env.prompt_text(done.index),
            prompt_index=done.index,
            text=done.transcript,
            truncated=done.truncated,
            pieces=tuple(piece for turn in read for piece in env.pieces(turn.tokens)),
        )


def _add(env: TextGenerationEnv, rollouts: Sequence[_Rollout], turns: Sequence[Completion]) -> list[_Rollout]:
    """Add a turn to each episode; those that are not over come back."""
    for rollout, turn in zip(rollouts, turns, strict=True):
        rollout.turns.append(turn)
        rollout.conversation.answer(turn.tokens.tolist(), env.text(turn.tokens), turn.truncated)
    return [r for r in rollouts if not r.conversation.over]


def with_reference(engine: Engine, episodes: Sequence[Episode]) -> list[Episode]:
    """The episodes with the log-probs of the frozen reference, for a KL in the reward."""
    batch = Batch.pack(episodes, [np.zeros(len(e.tokens), np.float32) for e in episodes])
    scored = engine.score(batch, reference=True)
    return [replace(e, reference=over_episode(line, e)) for e, line in zip(episodes, scored, strict=True)]
