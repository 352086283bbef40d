"""One hop of the training loop: prompts in, scored episodes out."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import replace

import numpy as np

from ..engine import Engine, Sampling
from ..environment.text_generation import TextGenerationEnv
from ..types import Batch, Episode


def collect(
    engine: Engine,
    env: TextGenerationEnv,
    prompts: Sequence[int],
    group_size: int,
    sampling: Sampling,
    first_group: int = 0,
    pieces: bool = True,
) -> list[Episode]:
    """``group_size`` scored episodes for each of the environment's ``prompts`` (indices), in order.

    A prompt's place in ``prompts``, counted from ``first_group``, is its episodes' group, so a prompt
    drawn twice has two groups. ``pieces`` asks for the text of every token, too.
    """
    completions = engine.sample([env.prompt_ids(i).tolist() for i in prompts], group_size, sampling)
    sampled = [(i, c) for i, members in zip(prompts, completions, strict=True) for c in members]
    scores = iter(env.scores([(i, c.tokens, c.truncated) for i, c in sampled]))
    episodes = []
    for group, (i, members) in enumerate(zip(prompts, completions, strict=True), first_group):
        for completion in members:
            scored = next(scores)
            episodes.append(
                Episode.from_completion(
                    env.prompt_ids(i).tolist(),
                    completion,
                    reward=scored.reward,
                    is_correct=scored.is_correct,
                    scores=scored.scores,
                    group=group,
                    prompt=env.prompt_text(i),
                    text=env.text(completion.tokens),
                    pieces=env.pieces(completion.tokens) if pieces else (),
                )
            )
    return episodes


def with_reference(engine: Engine, episodes: Sequence[Episode]) -> list[Episode]:
    """The episodes with the log-probs of the frozen reference, for a KL in the reward."""
    batch = Batch.pack(episodes, [np.zeros(len(e.tokens), np.float32) for e in episodes])
    scored = engine.score(batch, reference=True)
    return [
        replace(e, reference=np.append(np.float32(0), line[: len(e.tokens) - 1]))
        for e, line in zip(episodes, scored, strict=True)
    ]
