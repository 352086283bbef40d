"""Episodes of a shape that stays the same, so that a server compiles it once."""

import numpy as np

from textpolicy.types import Completion, Episode

PROMPT, ANSWER = 14, 6  # tokens


def fixed_episodes(seed=0, groups=2, size=4, answers=()):
    """Episodes made up at random, of equal length unless ``answers`` says how long each completion is."""
    rng = np.random.default_rng(seed)
    out = []
    for g in range(groups):
        prompt = rng.integers(32, 127, PROMPT).tolist()
        for i in range(size):
            t = answers[(g * size + i) % len(answers)] if answers else ANSWER
            completion = Completion(rng.integers(32, 127, t).astype(np.int32), np.full(t, -5, np.float32))
            pieces = (" let", " me", " check", " then", " so", " seven")[:t]
            out.append(Episode.from_completion(prompt, completion, reward=float(i % 2), group=g, pieces=pieces))
    return out
