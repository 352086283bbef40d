"""The bounded buffer of episodes of the step-by-step API; an episode is a list of steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np

from .errors import UserError, gone
from .types import Completion
from .types import Episode as TrainingEpisode

REQUIRED = ("obs", "act", "rew", "next_obs", "done", "timeout")
OPTIONAL = ("logprob", "value", "entropy", "is_correct")


@dataclass(eq=False)
class Episode:
    """The steps of one episode, one list entry per step.

    A text episode has a step for every turn of the policy: ``obs[0]`` is the prompt (P,) int32, ``act[0]`` the
    list of the turn's token ids, ``logprob[0]`` (R,) float32; a later ``obs`` holds every token before its turn.
    An optional list is None, or has an entry for every step.
    """

    obs: list[Any] = field(default_factory=list)
    act: list[Any] = field(default_factory=list)
    rew: list[float] = field(default_factory=list)
    next_obs: list[Any] = field(default_factory=list)
    done: list[bool] = field(default_factory=list)
    timeout: list[bool] = field(default_factory=list)  # True where a limit ended the episode
    logprob: list[Any] | None = None
    value: list[Any] | None = None
    entropy: list[Any] | None = None  # nats
    is_correct: list[bool] | None = None
    group: int | None = None  # episodes of one prompt share a group
    temperature: float | None = 1.0  # behind logprob; None when top-p or a penalty altered the distribution

    def __len__(self) -> int:
        return len(self.obs)

    def append(
        self,
        obs: Any,
        act: Any,
        rew: float,
        next_obs: Any,
        done: bool,
        timeout: bool = False,
        logprob: Any = None,
        value: Any = None,
        entropy: Any = None,
        is_correct: bool | None = None,
    ) -> None:
        """Add a step. Raises ValueError for an optional field that only some steps would have."""
        optional = dict(zip(OPTIONAL, (logprob, value, entropy, is_correct), strict=True))
        for name, entry in optional.items():
            if len(self) and (getattr(self, name) is None) != (entry is None):
                raise ValueError(f"{name} is given for some steps of an episode only; give it for all or none")
        for name, entry in optional.items():
            if entry is not None and not len(self):
                setattr(self, name, [])
            if entry is not None:
                getattr(self, name).append(entry)
        for name, entry in zip(REQUIRED, (obs, act, rew, next_obs, done, timeout), strict=True):
            getattr(self, name).append(entry)

    def validate_consistency(self) -> None:
        """Raise ValueError, naming the field, unless every list has one entry per step."""
        for name, entries in self._lists().items():
            if len(entries) != len(self):
                raise ValueError(f"{name} has {len(entries)} entries and obs {len(self)}; give one per step")

    def to_dict(self) -> dict[str, Any]:
        """Return the fields by name, as ``from_dict`` reads them, without optional ones that are None."""
        return {**self._lists(), "group": self.group, "temperature": self.temperature}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """Make an episode from its fields. Raises ValueError when a required one is missing or lengths differ."""
        if missing := [name for name in REQUIRED if name not in fields]:
            raise ValueError(f"an episode lacks {', '.join(missing)}; give {', '.join(REQUIRED)}")
        lists = {n: list(fields[n]) for n in (*REQUIRED, *OPTIONAL) if fields.get(n) is not None}
        episode = cls(**lists, group=fields.get("group"), temperature=fields.get("temperature", 1.0))
        episode.validate_consistency()
        return episode

    def to_tensor_dict(self) -> dict[str, np.ndarray]:
        """Return (T, ...) arrays by field; an object array (T,) where the steps' shapes differ."""
        return {name: _stack(entries) for name, entries in self._lists().items()}

    def as_training(self) -> TrainingEpisode:
        """Return this text episode as the record that algorithms and engines read; its reward is summed over steps.

        Raises UserError when a step lacks token ids or log-probs of the same length, when a later observation
        does not begin with every token before it, or when there is no step or no group.
        """
        if not len(self):
            raise UserError("a buffered episode has no steps; add at least one")
        if self.group is None:
            raise UserError("an episode has no group; put 'group' into the step's info, or pass it to Buffer.add")
        if self.logprob is None:
            raise UserError("an episode has no logprob; let the policy return it, one float per token")
        lists = {name: entries for name, entries in self._lists().items() if name in ("logprob", "entropy")}
        added: list[list[int]] = []  # the prompt, then the reply before each later turn
        turns: list[Completion] = []
        before = np.zeros(0, np.int32)  # every token up to and including the last turn
        for n in range(len(self)):
            now = _token_ids("obs", self.obs[n])
            if not np.array_equal(now[: len(before)], before):
                raise UserError(
                    f"the observation of step {n} of an episode does not begin with the {len(before)} tokens before "
                    "it, so the episode is not a single text to train on; let the environment only append"
                )
            tokens = _token_ids("act", self.act[n])
            values = {name: np.asarray(entries[n], np.float32).reshape(-1) for name, entries in lists.items()}
            for name, array in values.items():
                if len(array) != len(tokens):
                    raise UserError(f"{name} has {len(array)} entries for {len(tokens)} tokens; give one per token")
            added.append(now[len(before) :].tolist())
            turns.append(Completion(tokens, values["logprob"], values.get("entropy"), temperature=self.temperature))
            before = np.concatenate([now, tokens])
        prompt, *replies = added
        return TrainingEpisode.from_turns(
            prompt,
            turns,
            replies,
            truncated=bool(self.timeout[-1]),
            reward=float(sum(self.rew)),
            group=self.group,
            is_correct=None if self.is_correct is None else self.is_correct[-1],
        )

    def _lists(self) -> dict[str, list[Any]]:
        named = {name: getattr(self, name) for name in (*REQUIRED, *OPTIONAL)}
        return {name: entries for name, entries in named.items() if entries is not None}


class Buffer:
    """The latest ``max_episodes`` complete episodes, and the one that is still open."""

    def __init__(self, max_episodes: int = 100) -> None:
        if max_episodes < 1:
            raise UserError(f"max_episodes is {max_episodes}; set it to 1 or more")
        self.max_episodes = max_episodes
        self.episodes: list[Episode] = []  # complete ones, oldest first
        self.current_episode = Episode()

    def __len__(self) -> int:
        """Return the number of steps, including those of the open episode."""
        return sum(map(len, self.episodes)) + len(self.current_episode)

    @property
    def episode_count(self) -> int:
        return len(self.episodes)

    def ready(self, n: int = 1) -> bool:
        """Return whether ``n`` episodes are complete."""
        return self.episode_count >= n

    def clear(self) -> None:
        self.episodes = []
        self.current_episode = Episode()

    def add(
        self,
        obs: Any,
        act: Any,
        rew: float,
        next_obs: Any,
        done: bool,
        timeout: bool = False,
        logprob: Any = None,
        value: Any = None,
        entropy: Any = None,
        is_correct: bool | None = None,
        group: int | None = None,
        temperature: float | None = 1.0,
    ) -> None:
        """Add a step to the open episode, which ``done`` or ``timeout`` completes.

        ``group`` and ``temperature`` belong to the whole episode; those of its last step are kept. Raises
        ValueError for a temperature that differs from that of the steps before.
        """
        if len(self.current_episode) and self.current_episode.temperature != temperature:
            raise ValueError(
                f"a step was sampled with temperature {temperature} and those before it with "
                f"{self.current_episode.temperature}; sample an episode at one temperature"
            )
        self.current_episode.append(obs, act, rew, next_obs, done, timeout, logprob, value, entropy, is_correct)
        self.current_episode.group, self.current_episode.temperature = group, temperature
        if done or timeout:
            self._keep(self.current_episode)
            self.current_episode = Episode()

    def add_episode_from_dict(self, fields: Mapping[str, Any]) -> None:
        """Add a complete episode, as ``Episode.to_dict`` returns it. Raises ValueError."""
        self._keep(Episode.from_dict(fields))

    def validate_consistency(self) -> None:
        """Raise ValueError, naming the field, if an episode's lists differ in length."""
        for episode in [*self.episodes, self.current_episode]:
            episode.validate_consistency()

    def sample(self) -> dict[str, np.ndarray]:
        """Return every complete step, oldest first: arrays (N, ...) by field, object arrays where shapes differ.

        Optional fields are included only if every episode has them. Raises ValueError when empty.
        """
        return self.sample_latest_steps(max(1, sum(map(len, self.episodes))))

    def sample_latest_steps(self, n: int) -> dict[str, np.ndarray]:
        """Return the last ``n`` complete steps, or all if there are fewer, as ``sample`` does."""
        if n < 1:
            raise ValueError(f"n is {n}; set it to 1 or more")
        if not self.episodes:
            raise ValueError("the buffer has no complete episode; collect some first")
        fields = [episode._lists() for episode in self.episodes]
        common = [name for name in fields[0] if all(name in f for f in fields)]
        return {name: _stack([step for f in fields for step in f[name]][-n:]) for name in common}

    def sample_episodes(self, k: int, order: Literal["asc", "desc"] = "asc") -> list[Episode]:
        """Return the latest ``k`` episodes, or all if there are fewer: oldest first ("asc") or newest ("desc")."""
        if k < 1:
            raise ValueError(f"k is {k}; set it to 1 or more")
        if order not in ("asc", "desc"):
            raise ValueError(f"order is {order!r}; set it to 'asc' or 'desc'")
        latest = self.episodes[-k:]
        return latest if order == "asc" else latest[::-1]

    sample_sequences = gone("Buffer.sample_sequences", "cut the episodes that sample_episodes returns into sequences")
    print_state = gone("Buffer.print_state", "print episode_count, len(buffer), or the episodes")

    def _keep(self, episode: Episode) -> None:
        self.episodes.append(episode)
        del self.episodes[: -self.max_episodes]


def _stack(entries: Sequence[Any]) -> np.ndarray:
    """Return (T, ...), or an object array (T,) where the entries' shapes differ."""
    arrays = [np.asarray(entry) for entry in entries]
    if len({array.shape for array in arrays}) <= 1:
        return np.array(arrays)
    ragged = np.empty(len(arrays), object)
    for i, array in enumerate(arrays):
        ragged[i] = array
    return ragged


def _token_ids(name: str, values: Iterable[int]) -> np.ndarray:
    ids = np.asarray(values)
    if ids.ndim != 1 or (ids.size and ids.dtype.kind not in "iu"):
        raise UserError(f"{name} of an episode is {values!r}, not a list of token ids; only those can be trained on")
    return ids.astype(np.int32)
