"""Which episodes of a buffer a step trains on, and the documented dict of arrays that holds them.

The dict of B completions with N sampled tokens, G prompts, and lengths of at most L and R tokens:

    obs              (B, L) int32, prompt and completion, 0 after them; of several turns all of it, replies between them
    act              (B, R) int32, completion, turn after turn, 0 after it
    mask             (B, L) bool, True where obs holds a token of the completion
    logprob          (N,) float32, completion after completion, of the distribution that sampled it
    token_entropies  (N,) float32, nats, exact; there only if every episode carried it
    rewards          (B,) float32, NaN where unscorable
    binary_rewards   (B,) float32, is_correct as 0 or 1; a reward of 1 or more where the reward does not say
    episode_lengths  (B,) int32, tokens of the completion
    prompt_lengths   (B,) int32, tokens before the completion
    prompt_ids       (B,) int32, dense: 0..G-1
    num_prompt_groups  G
    temperature      (B,) float32, behind logprob; NaN where a filter (top-p, penalty) bent it
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from ..errors import UserError
from ..losses import Array
from ..types import Episode
from .rewards import Rewards

NEEDED = ("obs", "logprob", "rewards", "episode_lengths", "prompt_lengths", "prompt_ids")  # to train on


class BufferedEpisode(Protocol):
    """What is read of an episode in a buffer."""

    rew: list[float]
    group: int | None

    def as_training(self) -> Episode:
        """The episode as the record that algorithms read."""


@runtime_checkable
class EpisodeBuffer(Protocol):
    """What is read of a buffer."""

    @property
    def episodes(self) -> Sequence[BufferedEpisode]:
        """The complete ones, oldest first."""


Lengths = Sequence[int] | Array  # (B,) tokens of each completion
Kept = TypeVar("Kept", bound=BufferedEpisode)


def select_all_data(buffer: EpisodeBuffer) -> dict[str, Any]:
    """Every complete episode, oldest first, as the dict above.

    Raises TypeError for what is no buffer, UserError when it is empty or holds what cannot be trained on.
    """
    return as_arrays([episode.as_training() for episode in _episodes(buffer)])


def select_recent_data(buffer: EpisodeBuffer, max_episodes: int = 100) -> dict[str, Any]:
    """The latest ``max_episodes`` episodes, or as many as there are; errors as in ``select_all_data``."""
    if max_episodes < 1:
        raise UserError(f"max_episodes is {max_episodes}; set it to 1 or more")
    return as_arrays([episode.as_training() for episode in _episodes(buffer)[-max_episodes:]])


def select_informative_data(buffer: EpisodeBuffer, min_variance: float = 0.0) -> dict[str, Any]:
    """The episodes that ``filter_informative_prompts`` keeps, and its counts as ``filter_stats``.

    Where every group agrees no row is left, and ``Trainer`` moves nothing. Errors as in ``select_all_data``.
    """
    kept, stats = filter_informative_prompts(_episodes(buffer), min_variance)
    return {**as_arrays([episode.as_training() for episode in kept]), "filter_stats": stats}


def filter_informative_prompts(
    episodes: Sequence[Kept], min_variance: float = 0.0, keep_single_completion: bool = True
) -> tuple[list[Kept], dict[str, float]]:
    """The episodes of groups whose rewards differ, with a variance above ``min_variance``, and counts.

    A group with one scored completion is kept unless ``keep_single_completion`` says no; one without
    any is dropped. A dropped group counts as all correct where its mean reward is above 0.5, else as
    all wrong; filter_rate is the share of episodes dropped. Raises UserError for an episode without group.
    """
    rewards = _rewards(episodes)
    single = rewards.count <= 1
    informative = ~rewards.uniform & (rewards.std(ddof=0) ** 2 > min_variance)
    kept = np.where(single, keep_single_completion & (rewards.count == 1), informative)
    correct = rewards.mean > 0.5
    prompts = {
        "prompts_kept": kept,
        "prompts_dropped_all_correct": ~kept & ~single & correct,
        "prompts_dropped_all_wrong": ~kept & ~single & ~correct,
        "prompts_dropped_single": ~kept & single,
        "prompts_kept_single": kept & single,
    }
    stats: dict[str, float] = {name: len(np.unique(rewards.group[which])) for name, which in prompts.items()}
    stats |= {"episodes_kept": int(kept.sum()), "episodes_dropped": int((~kept).sum())}
    stats["filter_rate"] = stats["episodes_dropped"] / max(len(episodes), 1)
    return [episode for episode, keep in zip(episodes, kept, strict=True) if keep], stats


def compute_prompt_group_stats(episodes: Sequence[BufferedEpisode]) -> dict[str, float]:
    """How many prompts and completions there are, and how far rewards differ within a prompt.

    The variances are those of the population, per prompt. Raises UserError for an episode without group.
    """
    rewards = _rewards(episodes)
    first = np.unique(rewards.group, return_index=True)[1]
    variance = rewards.std(ddof=0)[first] ** 2
    return {
        "num_prompts": len(first),
        "num_episodes": len(episodes),
        "completions_per_prompt": len(episodes) / max(len(first), 1),
        "reward_variance_mean": float(variance.mean()) if len(first) else 0.0,
        "reward_variance_std": float(variance.std()) if len(first) else 0.0,
    }


# ---- the dict and back


def as_arrays(episodes: Sequence[Episode]) -> dict[str, Any]:
    """Episodes as the dict above; none give arrays without rows."""
    completions = [e.tokens[e.mask] for e in episodes]
    entropies = [e.entropy[e.mask] for e in episodes if e.entropy is not None]
    _, prompt_ids = np.unique([e.group for e in episodes], return_inverse=True)
    arrays = {
        "obs": _padded([e.tokens for e in episodes]),
        "act": _padded(completions),
        "mask": _padded([e.mask for e in episodes]).astype(bool),
        "logprob": _joined([e.logprobs[e.mask] for e in episodes]),
        "rewards": np.array([e.reward for e in episodes], np.float32),
        "binary_rewards": np.array([_correct(e) for e in episodes], np.float32),
        "episode_lengths": np.array([len(c) for c in completions], np.int32),
        "prompt_lengths": np.array([_first(e.mask) for e in episodes], np.int32),
        "prompt_ids": prompt_ids.astype(np.int32),
        "num_prompt_groups": int(prompt_ids.max(initial=-1)) + 1,
        "temperature": np.array([np.nan if e.temperature is None else e.temperature for e in episodes], np.float32),
    }
    return arrays | ({"token_entropies": _joined(entropies)} if len(entropies) == len(episodes) else {})


def as_episodes(data: Mapping[str, Any]) -> list[Episode]:
    """The episodes in a dict of that layout; it may lack what is not NEEDED.

    Then a temperature is 1, and without a mask completions follow their prompts at once.

    Raises UserError for what is missing, or does not fit together.
    """
    if missing := [name for name in NEEDED if name not in data]:
        raise UserError(f"the selected data lacks {', '.join(missing)}; give what select_recent_data returns")
    rows = len(data["episode_lengths"])
    data = {"temperature": np.ones(rows), **data}
    names = ("episode_lengths", "prompt_lengths", "prompt_ids")
    count, prompt, group = (_per_completion(data, name, rows).astype(int) for name in names)
    reward, temperature = (_per_completion(data, name, rows) for name in ("rewards", "temperature"))
    obs, logprob = np.asarray(data["obs"]).astype(np.int32), np.asarray(data["logprob"]).astype(np.float32)
    row_and_position(count, len(logprob))
    if obs.ndim != 2 or len(obs) != rows or (prompt + count > obs.shape[1]).any():
        raise UserError(f"obs has shape {obs.shape} and does not hold every prompt and completion; give (B, L) tokens")
    parts = np.split(logprob, np.cumsum(count))[:rows]
    sampled = _sampled(data, obs.shape, prompt, count)
    return [_episode(*row) for row in zip(obs, prompt, sampled, parts, temperature, reward, group, strict=True)]


def row_and_position(lengths: Lengths, count: int) -> tuple[np.ndarray, np.ndarray]:
    """Of each of ``count`` tokens in one line: its completion, (N,) int, and its place there, (N,) int.

    ``lengths`` (B,) are the tokens of each completion. Raises UserError unless they add up to ``count``.
    """
    n = np.asarray(lengths)
    if n.ndim != 1 or (n.size and n.dtype.kind not in "iu") or (n < 0).any() or n.sum() != count:
        raise UserError(f"the lengths of the completions are {n.tolist()} for {count} tokens; give their token counts")
    n = n.astype(int)
    row = np.repeat(np.arange(len(n)), n)
    return row, np.arange(count) - (np.cumsum(n) - n)[row]


def _episodes(buffer: EpisodeBuffer) -> Sequence[BufferedEpisode]:
    if not isinstance(buffer, EpisodeBuffer):
        raise TypeError(
            f"data is selected from a {type(buffer).__name__}; give the Buffer that RolloutRunner.collect returns"
        )
    if not buffer.episodes:
        raise UserError("the buffer holds no complete episode; collect some rollouts first")
    return buffer.episodes


def _rewards(episodes: Sequence[BufferedEpisode]) -> Rewards:
    groups = [episode.group for episode in episodes]
    if None in groups:
        raise UserError("an episode has no group; put 'group' into the step's info, or pass it to Buffer.add")
    return Rewards.of([float(sum(episode.rew)) for episode in episodes], np.array(groups, int))


def _correct(episode: Episode) -> float:
    if episode.is_correct is not None:
        return float(episode.is_correct)
    return float("nan") if np.isnan(episode.reward) else float(episode.reward >= 1)


def _sampled(data: Mapping[str, Any], shape: tuple[int, ...], prompt: np.ndarray, count: np.ndarray) -> np.ndarray:
    """(B, L) bool: where the tokens of the completions stand. Raises UserError for a mask that does not fit."""
    if "mask" not in data:
        place = np.arange(shape[1])
        return (prompt[:, None] <= place) & (place < (prompt + count)[:, None])
    mask = np.asarray(data["mask"]).astype(bool)
    fits = mask.shape == shape and np.array_equal(mask.sum(axis=1), count)
    if not fits or any(_first(row) != p for row, p, n in zip(mask, prompt, count, strict=True) if n):
        raise UserError(
            f"mask has shape {mask.shape} and does not mark the episode_lengths tokens that follow each prompt; "
            "give what select_recent_data returns, or leave it out"
        )
    return mask


def _episode(
    tokens: np.ndarray,
    prompt: int,
    mask: np.ndarray,
    logprobs: np.ndarray,
    temperature: float,
    reward: float,
    group: int,
) -> Episode:
    end = int(np.flatnonzero(mask)[-1]) + 1 if mask.any() else prompt
    spread = np.zeros(end, np.float32)
    spread[mask[:end]] = logprobs
    return Episode(
        tokens=tokens[:end],
        mask=mask[:end],
        logprobs=spread,
        entropy=None,
        reward=float(reward),
        group=int(group),
        temperature=None if np.isnan(temperature) else float(temperature),
    )


def _first(mask: np.ndarray) -> int:
    """The place of the first sampled token; one past the end without any."""
    return int(mask.argmax()) if mask.any() else len(mask)


def _per_completion(data: Mapping[str, Any], name: str, rows: int) -> np.ndarray:
    """(B,) float64: the entry called ``name``."""
    values = np.asarray(data[name])
    if values.shape != (rows,):
        raise UserError(f"{name} has shape {values.shape} for {rows} episode_lengths; give one entry per completion")
    return values.astype(np.float64)


def _padded(rows: Sequence[np.ndarray]) -> np.ndarray:
    """(B, T) int32, 0 after the end of each row."""
    lengths = [len(row) for row in rows]
    out: np.ndarray = np.zeros((len(rows), max(lengths, default=0)), np.int32)
    out[row_and_position(lengths, sum(lengths))] = _joined(rows)
    return out


def _joined(parts: Sequence[np.ndarray]) -> np.ndarray:
    return np.concatenate(parts) if len(parts) else np.zeros(0, np.float32)
