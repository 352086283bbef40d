"""One hop of the training loop: prompts in, scored episodes out."""

from __future__ import annotations

from collections.abc import Sequence

from ..engine import Engine, Sampling
from ..environment.text_generation import TextGenerationEnv
from ..types import Episode


def collect(
    engine: Engine, env: TextGenerationEnv, prompts: Sequence[int], group_size: int, sampling: Sampling
) -> list[Episode]:
    """``group_size`` scored episodes for each of the environment's ``prompts`` (indices), in order.

    A prompt's place in ``prompts`` is its episodes' group, so a prompt drawn twice has two groups.
    """
    completions = engine.sample([env.prompt_ids(i).tolist() for i in prompts], group_size, sampling)
    episodes = []
    for group, (i, members) in enumerate(zip(prompts, completions, strict=True)):
        for completion in members:
            scored = env.score(i, completion.tokens, completion.truncated)
            episodes.append(
                Episode.from_completion(
                    env.prompt_ids(i).tolist(),
                    completion,
                    reward=scored.reward,
                    is_correct=scored.is_correct,
                    group=group,
                    prompt=env.prompt_text(i),
                    text=env.text(completion.tokens),
                )
            )
    return episodes
