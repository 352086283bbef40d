"""Select the episodes of a buffer to train on, as the documented dict of arrays.

The dict of B completions with N sampled tokens, G prompts, and lengths of at most L and R tokens:

    obs              (B, L) int32, prompt and completion, with the replies between several turns; 0 after them
    act              (B, R) int32, completion, turn after turn, 0 after it
    mask             (B, L) bool, True where obs holds a token of the completion
    logprob          (N,) float32, completion after completion, of the distribution that sampled it
    token_entropies  (N,) float32, nats, exact; included only if every episode has it
    rewards          (B,) float32, NaN where scoring failed
    binary_rewards   (B,) float32, is_correct as 0 or 1; reward >= 1 where is_correct is None
    episode_lengths  (B,) int32, tokens of the completion
    prompt_lengths   (B,) int32, tokens before the completion
    prompt_ids       (B,) int32, dense: 0..G-1
    num_prompt_groups  G
    temperature      (B,) float32, behind logprob; NaN where top-p or a penalty altered the distribution
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from typing import Any, Protocol, TypeVar, runtime_checkable

import numpy as np

from ..errors import UserError, refuse_outside
from ..losses import Array
from ..types import Episode, Ints, pad
from .credit import Rewards

NEEDED = ("obs", "logprob", "rewards", "episode_lengths", "prompt_lengths", "prompt_ids")  # to train on
Lengths = Sequence[int] | Array  # (B,) tokens of each completion


class BufferedEpisode(Protocol):
    """The part of an episode in a buffer that is read here."""

    rew: list[float]
    group: int | None

    def as_training(self) -> Episode:
        """Return the episode as the record that algorithms read."""


@runtime_checkable
class EpisodeBuffer(Protocol):
    """The part of a buffer that is read here."""

    episodes: list[Any]  # complete ones, oldest first


Kept = TypeVar("Kept", bound=BufferedEpisode)


def select_all_data(buffer: EpisodeBuffer) -> dict[str, Any]:
    """Return every complete episode, oldest first, as the dict above.

    Raises TypeError unless given a Buffer, UserError when it is empty or an episode cannot be trained on.
    """
    return as_arrays([episode.as_training() for episode in _episodes(buffer)])


def select_recent_data(buffer: EpisodeBuffer, max_episodes: int = 100) -> dict[str, Any]:
    """Return the latest ``max_episodes`` episodes, or all if there are fewer; errors as in ``select_all_data``."""
    refuse_outside("max_episodes", max_episodes, 1)
    return as_arrays([episode.as_training() for episode in _episodes(buffer)[-max_episodes:]])


def select_informative_data(buffer: EpisodeBuffer, min_variance: float = 0.0) -> dict[str, Any]:
    """Return the episodes that ``filter_informative_prompts`` keeps, and its counts as ``filter_stats``.

    If every group's rewards are equal no row is left, and ``Trainer`` changes nothing. Errors as in
    ``select_all_data``.
    """
    kept, stats = filter_informative_prompts(_episodes(buffer), min_variance)
    return {**as_arrays([episode.as_training() for episode in kept]), "filter_stats": stats}


def filter_informative_prompts(
    episodes: Sequence[Kept], min_variance: float = 0.0, keep_single_completion: bool = True
) -> tuple[list[Kept], dict[str, float]]:
    """Return the episodes of groups whose rewards differ, with a variance above ``min_variance``, and counts.

    A group with one scored completion is kept if ``keep_single_completion``; a group with none is
    dropped. A dropped group counts as all correct if its mean reward is above 0.5, else as all wrong;
    filter_rate is the share of episodes dropped. Raises UserError for an episode without group.
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
    """Return the numbers of prompts and completions, and how much rewards differ within a prompt.

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
    """Return episodes as the dict above; no episodes give arrays without rows."""
    none = np.zeros(0, np.float32)
    completions = [e.tokens[e.mask] for e in episodes]
    entropies = [e.entropy[e.mask] for e in episodes if e.entropy is not None]
    _, prompt_ids = np.unique([e.group for e in episodes], return_inverse=True)
    correct = [e.is_correct if e.is_correct is not None or np.isnan(e.reward) else e.reward >= 1 for e in episodes]
    arrays = {
        "obs": pad([e.tokens for e in episodes], np.int32),
        "act": pad(completions, np.int32),
        "mask": pad([e.mask for e in episodes], bool),
        "logprob": np.concatenate([none, *(e.logprobs[e.mask] for e in episodes)]),
        "rewards": np.array([e.reward for e in episodes], np.float32),
        "binary_rewards": np.array([np.nan if c is None else c for c in correct], np.float32),
        "episode_lengths": np.array([len(c) for c in completions], np.int32),
        "prompt_lengths": np.array([e.mask.argmax() if e.mask.any() else len(e.mask) for e in episodes], np.int32),
        "prompt_ids": prompt_ids.astype(np.int32),
        "num_prompt_groups": int(prompt_ids.max(initial=-1)) + 1,
        "temperature": np.array([np.nan if e.temperature is None else e.temperature for e in episodes], np.float32),
    }
    return arrays | ({"token_entropies": np.concatenate([none, *entropies])} if len(entropies) == len(episodes) else {})


def as_episodes(data: Mapping[str, Any]) -> list[Episode]:
    """Return the episodes in a dict of that layout, of which only NEEDED entries are required.

    Without temperatures they are 1; without a mask each completion follows its prompt at once.
    Raises UserError for missing entries, and for entries that do not fit together.
    """
    if missing := [name for name in NEEDED if name not in data]:
        raise UserError(f"the selected data lacks {', '.join(missing)}; give what select_recent_data returns")
    rows = len(data["episode_lengths"])
    data = {"temperature": np.ones(rows), **data}
    columns = []
    for name in ("episode_lengths", "prompt_lengths", "prompt_ids", "rewards", "temperature"):
        values = np.asarray(data[name])
        if values.shape != (rows,):
            raise UserError(
                f"{name} has shape {values.shape} for {rows} episode_lengths; give one entry per completion"
            )
        columns.append(values.astype(np.float64))
    count, prompt, group = (column.astype(int) for column in columns[:3])
    reward, temperature = columns[3:]
    obs, logprob = np.asarray(data["obs"]).astype(np.int32), np.asarray(data["logprob"]).astype(np.float32)
    row_and_position(count, len(logprob))
    if obs.ndim != 2 or len(obs) != rows or (prompt + count > obs.shape[1]).any():
        raise UserError(f"obs has shape {obs.shape} and does not hold every prompt and completion; give (B, L) tokens")
    place = np.arange(obs.shape[1])
    mask = (prompt[:, None] <= place) & (place < (prompt + count)[:, None])
    if "mask" in data:
        mask = np.asarray(data["mask"]).astype(bool)
        fits = mask.shape == obs.shape and np.array_equal(mask.sum(axis=1), count)
        if not fits or (count.any() and (mask.argmax(axis=1) != prompt)[count > 0].any()):
            raise UserError(
                f"mask has shape {mask.shape} and does not mark the episode_lengths tokens that follow each prompt; "
                "give what select_recent_data returns, or leave it out"
            )
    episodes = []
    for i, sampled in enumerate(np.split(logprob, np.cumsum(count))[:rows]):
        end = int(np.flatnonzero(mask[i])[-1]) + 1 if mask[i].any() else int(prompt[i])
        logprobs = np.zeros(end, np.float32)
        logprobs[mask[i, :end]] = sampled
        episode = Episode(
            tokens=obs[i, :end],
            mask=mask[i, :end],
            logprobs=logprobs,
            entropy=None,
            reward=float(reward[i]),
            group=int(group[i]),
            temperature=None if np.isnan(temperature[i]) else float(temperature[i]),
        )
        episodes.append(episode)
    return episodes


def row_and_position(lengths: Lengths, count: int, rewards: int | None = None) -> tuple[Ints, Ints]:
    """Return the completion of each of ``count`` tokens in one line, (N,) int, and its place in it, (N,) int.

    ``lengths`` (B,) are the tokens of each completion. Raises UserError unless they add up to ``count``,
    and, with a number of ``rewards``, unless there is one for each completion.
    """
    n = np.asarray(lengths)
    if n.ndim != 1 or (n.size and n.dtype.kind not in "iu") or (n < 0).any() or n.sum() != count:
        raise UserError(f"the lengths of the completions are {n.tolist()} for {count} tokens; give their token counts")
    if rewards is not None and rewards != len(n):
        raise UserError(f"there are {rewards} rewards for {len(n)} completions; give one for each")
    n = n.astype(int)
    row = np.repeat(np.arange(len(n)), n)
    return row, np.arange(count) - (np.cumsum(n) - n)[row]


def _episodes(buffer: EpisodeBuffer) -> list[Any]:
    """Return the complete episodes of a buffer. Raises TypeError and UserError."""
    if not isinstance(buffer, EpisodeBuffer):
        raise TypeError(
            f"data is selected from a {type(buffer).__name__}; give the Buffer that RolloutRunner.collect returns"
        )
    if not buffer.episodes:
        raise UserError("the buffer has no complete episode; collect some rollouts first")
    return buffer.episodes


def _rewards(episodes: Sequence[BufferedEpisode]) -> Rewards:
    """Return the summed reward of each episode by group. Raises UserError for an episode without group."""
    groups = [episode.group for episode in episodes]
    if None in groups:
        raise UserError("an episode has no group; put 'group' into the step's info, or pass it to Buffer.add")
    return Rewards.of([float(sum(episode.rew)) for episode in episodes], np.array(groups, int))
