"""The metrics of one training step, as one flat row of numbers."""

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
    """Return the metrics of a step. Lengths are in sampled tokens, entropy in nats, times in seconds.

    Rewards and lengths are those of everything sampled, not only of the episodes that were trained on.
    """
    episodes = rollouts.sampled
    rewards = np.array([e.reward for e in episodes])
    lengths = np.array([int(e.mask.sum()) for e in episodes])
    scored = rewards[~np.isnan(rewards)]
    row: Row = {"reward_mean": float(scored.mean()), "reward_std": float(scored.std())} if len(scored) else {}
    row["unscorable"] = float(np.isnan(rewards).mean())
    for name in sorted({name for e in episodes for name in e.scores}):  # each of several rewards, where it could score
        scores = np.array([e.scores[name] for e in episodes if not np.isnan(e.scores.get(name, np.nan))])
        if len(scores):
            row |= {f"reward_mean/{name}": float(scores.mean()), f"reward_std/{name}": float(scores.std())}
    row["frac_reward_zero_std"] = frac_reward_zero_std(episodes)
    if known := [e.is_correct for e in episodes if e.is_correct is not None]:
        row["accuracy"] = float(np.mean(known))
    row["length_mean"], row["length_max"] = float(lengths.mean()), float(lengths.max())
    row["truncated"] = float(np.mean([e.truncated for e in episodes]))
    # an engine that cannot see the entropy reports the log-probs, whose negative is the surprisal
    surprisal = -np.concatenate([e.logprobs[e.mask] for e in episodes])
    if entropies := [e.entropy[e.mask] for e in episodes if e.entropy is not None]:
        row["entropy"] = float(np.concatenate(entropies).mean())
    elif len(surprisal):
        row["surprisal"] = float(surprisal.mean())
    return {
        **row,
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
    """Return the metrics of a step's updates: maxima of maxima, means of the rest over updates that moved weights.

    Memory is the maximum over all updates, and ``updated`` and ``skipped`` are counts.
    """
    moved = [u for u in updates if u["updated"]] or updates[:1]
    row: Row = {}
    for name in moved[0]:
        values = [u[name] for u in (updates if name.endswith("_bytes") else moved)]
        if name != "updated":
            row[name] = max(values) if name.endswith(("_max", "_bytes")) else float(np.mean(values))
    counts = {name: sum(u[name] for u in updates) for name in ("updated", "skipped") if name in updates[0]}
    return {**row, **counts}


def frac_reward_zero_std(episodes: Sequence[Episode]) -> float:
    """Return the share of groups whose rewards are all equal, and which therefore give no signal."""
    group = np.array([e.group for e in episodes])
    uniform = Rewards.of([e.reward for e in episodes], group).uniform
    _, first = np.unique(group, return_index=True)
    return float(uniform[first].mean())
