"""One training step -> one flat row of numbers."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ..algorithms.credit import Rewards
from ..types import Episode
from .collect import Rollouts

Row = dict[str, float]


def summarize(
    rollouts: Rollouts, updates: Sequence[Mapping[str, float]], sample_seconds: float, update_seconds: float
) -> Row:
    """What happened in a step. Lengths are in sampled tokens, entropy in nats, times in seconds.

    Rewards and lengths are those of everything sampled, not only of what was trained on.
    """
    episodes = rollouts.sampled
    rewards = np.array([e.reward for e in episodes])
    lengths = np.array([int(e.mask.sum()) for e in episodes])
    return {
        **_rewards(rewards),
        **_each_reward(episodes),
        "frac_reward_zero_std": frac_reward_zero_std(episodes),
        **_accuracy(episodes),
        "length_mean": float(lengths.mean()),
        "length_max": float(lengths.max()),
        "truncated": float(np.mean([e.truncated for e in episodes])),
        **_entropy(episodes),
        "prompt_draws": float(rollouts.draws),
        "batch_full": float(rollouts.full),
        **merge(updates),
        "sampled_tokens": float(lengths.sum()),
        "trained_tokens": float(sum(len(e.tokens) for e in rollouts.trained)),
        "sample_seconds": sample_seconds,
        "update_seconds": update_seconds,
        "tokens_per_second": float(lengths.sum() / (sample_seconds + update_seconds)),
    }


def merge(updates: Sequence[Mapping[str, float]]) -> Row:
    """The updates of one step as one: maxima of maxima, means of the rest over those that moved; memory over all."""
    moved = [u for u in updates if u["updated"]] or updates[:1]
    names = [name for name in moved[0] if name != "updated"]
    row = {name: (max if name.endswith("_max") else _mean)([u[name] for u in moved]) for name in names}
    memory = {name: max(u[name] for u in updates) for name in names if name.endswith("_bytes")}
    counts = {name: sum(u[name] for u in updates) for name in ("updated", "skipped") if name in updates[0]}
    return {**row, **memory, **counts}


def frac_reward_zero_std(episodes: Sequence[Episode]) -> float:
    """Share of groups whose rewards are all equal, and which therefore teach nothing."""
    group = np.array([e.group for e in episodes])
    uniform = Rewards.of([e.reward for e in episodes], group).uniform
    _, first = np.unique(group, return_index=True)
    return float(uniform[first].mean())


def _rewards(rewards: np.ndarray) -> Row:
    """Of what could be scored; without any there is no mean to report."""
    scored = rewards[~np.isnan(rewards)]
    known = {"reward_mean": float(scored.mean()), "reward_std": float(scored.std())} if len(scored) else {}
    return {**known, "unscorable": float(np.isnan(rewards).mean())}


def _each_reward(episodes: Sequence[Episode]) -> Row:
    """Mean and standard deviation of each of several rewards, over the completions that it could score."""
    row: Row = {}
    for name in sorted({name for e in episodes for name in e.scores}):
        scores = np.array([e.scores[name] for e in episodes if not np.isnan(e.scores.get(name, np.nan))])
        if len(scores):
            row |= {f"reward_mean/{name}": float(scores.mean()), f"reward_std/{name}": float(scores.std())}
    return row


def _mean(values: Sequence[float]) -> float:
    return float(np.mean(values))


def _accuracy(episodes: Sequence[Episode]) -> Row:
    known = [e.is_correct for e in episodes if e.is_correct is not None]
    return {"accuracy": float(np.mean(known))} if known else {}


def _entropy(episodes: Sequence[Episode]) -> Row:
    """The mean entropy, or where the engine sees none the mean surprisal, by its own name."""
    seen = [e.entropy[e.mask] for e in episodes if e.entropy is not None]
    if seen:
        return {"entropy": float(np.concatenate(seen).mean())}
    surprisal = -np.concatenate([e.logprobs[e.mask] for e in episodes])
    return {"surprisal": float(surprisal.mean())} if len(surprisal) else {}
