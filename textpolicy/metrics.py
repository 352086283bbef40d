"""One training step -> one flat row of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from .types import Episode

Row = dict[str, float]


def summarize(
    episodes: Sequence[Episode], update: Mapping[str, float], sample_seconds: float, update_seconds: float
) -> Row:
    """What happened in a step. Lengths are in sampled tokens, entropy in nats, times in seconds."""
    rewards = np.array([e.reward for e in episodes])
    lengths = np.array([int(e.mask.sum()) for e in episodes])
    return {
        "reward_mean": float(rewards.mean()),
        "reward_std": float(rewards.std()),
        "frac_reward_zero_std": frac_reward_zero_std(episodes),
        **_accuracy(episodes),
        "length_mean": float(lengths.mean()),
        "length_max": float(lengths.max()),
        "truncated": float(np.mean([e.truncated for e in episodes])),
        **_entropy(episodes),
        **update,
        "sampled_tokens": float(lengths.sum()),
        "sample_seconds": sample_seconds,
        "update_seconds": update_seconds,
        "tokens_per_second": float(lengths.sum() / (sample_seconds + update_seconds)),
    }


def frac_reward_zero_std(episodes: Sequence[Episode]) -> float:
    """Share of groups whose rewards are all equal, and which therefore teach nothing."""
    groups: dict[int, set[float]] = {}
    for e in episodes:
        groups.setdefault(e.group, set()).add(e.reward)
    return float(np.mean([len(rewards) == 1 for rewards in groups.values()]))


def _accuracy(episodes: Sequence[Episode]) -> Row:
    known = [e.is_correct for e in episodes if e.is_correct is not None]
    return {"accuracy": float(np.mean(known))} if known else {}


def _entropy(episodes: Sequence[Episode]) -> Row:
    seen = [e.entropy[e.mask] for e in episodes if e.entropy is not None]
    return {"entropy": float(np.concatenate(seen).mean())} if seen else {}
