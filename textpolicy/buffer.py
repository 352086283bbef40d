"""``Buffer``: a bounded list of ``Episode``s, each a list of steps."""

from __future__ import annotations

from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Literal, Self

import numpy as np

from .errors import UserError
from .types import Completion
from .types import Episode as TrainingEpisode

REQUIRED = ("obs", "act", "rew", "next_obs", "done", "timeout")
OPTIONAL = ("logprob", "value", "entropy", "is_correct")


@dataclass(eq=False)
class Episode:
    """The steps of one episode, one list entry per step.

    A text episode has a step for every turn of the policy: ``obs[0]`` is the prompt (P,) int32, ``act[0]`` the
    list of the turn's token ids, ``logprob[0]`` (R,) float32, and a later ``obs`` is everything before its turn.
    An optional list is None, or has an entry for every step.
    """

    obs: list[Any] = field(default_factory=list)
    act: list[Any] = field(default_factory=list)
    rew: list[float] = field(default_factory=list)
    next_obs: list[Any] = field(default_factory=list)
    done: list[bool] = field(default_factory=list)
    timeout: list[bool] = field(default_factory=list)  # True where a limit cut the episode off
    logprob: list[Any] | None = None
    value: list[Any] | None = None
    entropy: list[Any] | None = None  # nats
    is_correct: list[bool] | None = None
    group: int | None = None  # episodes of one prompt share a group
    temperature: float | None = 1.0  # behind logprob; None when a filter (top-p, penalty) bent it

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
        """The fields by name, as ``from_dict`` reads them; optional ones that are None are left out."""
        return {**self._lists(), "group": self.group, "temperature": self.temperature}

    @classmethod
    def from_dict(cls, fields: Mapping[str, Any]) -> Self:
        """An episode from its fields. Raises ValueError when a required one is missing or lengths differ."""
        if missing := [name for name in REQUIRED if name not in fields]:
            raise ValueError(f"an episode lacks {', '.join(missing)}; give {', '.join(REQUIRED)}")
        lists = {n: list(fields[n]) for n in (*REQUIRED, *OPTIONAL) if fields.get(n) is not None}
        episode = cls(**lists, group=fields.get("group"), temperature=fields.get("temperature", 1.0))
        episode.validate_consistency()
        return episode

    def to_tensor_dict(self) -> dict[str, np.ndarray]:
        """(T, ...) arrays by field; an object array (T,) where the steps' shapes differ."""
        return {name: _stack(entries) for name, entries in self._lists().items()}

    def as_training(self) -> TrainingEpisode:
        """This text episode as the record that algorithms and engines read; its reward is the sum over the steps.

        Raises UserError when a step lacks token ids, or log-probs of the same length, when the observation of a
        later one does not begin with every token before it, or when there is no step or no group.
        """
        if not len(self):
            raise UserError("a buffered episode has no steps; add at least one")
        if self.group is None:
            raise UserError("an episode has no group; put 'group' into the step's info, or pass it to Buffer.add")
        turns = [self._turn(n) for n in range(len(self))]
        return TrainingEpisode.from_turns(
            _token_ids("obs", self.obs[0]).tolist(),
            turns,
            [self._added(n, turn) for n, turn in enumerate(turns[:-1])],
            truncated=bool(self.timeout[-1]),
            reward=float(sum(self.rew)),
            group=self.group,
            is_correct=None if self.is_correct is None else self.is_correct[-1],
        )

    def _turn(self, n: int) -> Completion:
        """What the policy said in step ``n``."""
        return Completion(
            tokens=_token_ids("act", self.act[n]),
            logprobs=self._per_token(self.logprob, n, "logprob"),
            entropy=None if self.entropy is None else self._per_token(self.entropy, n, "entropy"),
            temperature=self.temperature,
        )

    def _added(self, n: int, turn: Completion) -> list[int]:
        """The tokens between turn ``n`` and the next: what the next observation has beyond those before it."""
        seen, now = (_token_ids("obs", self.obs[step]) for step in (n, n + 1))
        before = np.concatenate([seen, turn.tokens])
        if not np.array_equal(now[: len(before)], before):
            raise UserError(
                f"the observation of step {n + 1} of an episode does not begin with the {len(before)} tokens before "
                "it, so it is no one text to train on; let the environment only add to what was said"
            )
        return now[len(before) :].tolist()

    def _lists(self) -> dict[str, list[Any]]:
        named = {name: getattr(self, name) for name in (*REQUIRED, *OPTIONAL)}
        return {name: entries for name, entries in named.items() if entries is not None}

    def _per_token(self, entries: list[Any] | None, n: int, name: str) -> np.ndarray:
        """(R,) float32: those of step ``n``."""
        if entries is None:
            raise UserError(f"an episode has no {name}; let the policy return it, one float per token")
        values = np.asarray(entries[n], np.float32).reshape(-1)
        if len(values) != len(self.act[n]):
            raise UserError(f"{name} has {len(values)} entries for {len(self.act[n])} tokens; give one per token")
        return values


class Buffer:
    """The latest ``max_episodes`` complete episodes, and the one that is still open."""

    def __init__(self, max_episodes: int = 100) -> None:
        if max_episodes < 1:
            raise UserError(f"max_episodes is {max_episodes}; set it to 1 or more")
        self.max_episodes = max_episodes
        self.episodes: list[Episode] = []  # complete ones, oldest first
        self.current_episode = Episode()

    def __len__(self) -> int:
        """The number of steps, those of the open episode too."""
        return sum(map(len, self.episodes)) + len(self.current_episode)

    @property
    def episode_count(self) -> int:
        return len(self.episodes)

    def ready(self, n: int = 1) -> bool:
        """Whether ``n`` episodes are complete."""
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

        ``group`` and ``temperature`` belong to the whole episode: its last step says them. Raises ValueError for
        another temperature than that of the steps before.
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
        """Add a complete episode, as ``Episode.to_dict`` gives it. Raises ValueError."""
        self._keep(Episode.from_dict(fields))

    def validate_consistency(self) -> None:
        """Raise ValueError, naming the field, if an episode's lists differ in length."""
        for episode in [*self.episodes, self.current_episode]:
            episode.validate_consistency()

    def sample(self) -> dict[str, np.ndarray]:
        """Every complete step, oldest first: arrays (N, ...) by field, object arrays where shapes differ.

        Optional fields are there only if every episode has them. Raises ValueError when empty.
        """
        return {name: _stack(entries) for name, entries in self._steps().items()}

    def sample_latest_steps(self, n: int) -> dict[str, np.ndarray]:
        """The last ``n`` complete steps, or as many as there are, as ``sample`` gives them."""
        _refuse_below_one("n", n)
        return {name: _stack(entries[-n:]) for name, entries in self._steps().items()}

    def sample_episodes(self, k: int, order: Literal["asc", "desc"] = "asc") -> list[Episode]:
        """The latest ``k`` episodes, or as many as there are: oldest first ("asc") or newest ("desc")."""
        _refuse_below_one("k", k)
        if order not in ("asc", "desc"):
            raise ValueError(f"order is {order!r}; set it to 'asc' or 'desc'")
        latest = self.episodes[-k:]
        return latest if order == "asc" else latest[::-1]

    def _keep(self, episode: Episode) -> None:
        self.episodes.append(episode)
        del self.episodes[: -self.max_episodes]

    def _steps(self) -> dict[str, list[Any]]:
        if not self.episodes:
            raise ValueError("the buffer holds no complete episode; collect some first")
        fields = [episode._lists() for episode in self.episodes]
        common = [name for name in fields[0] if all(name in f for f in fields)]
        return {name: [step for f in fields for step in f[name]] for name in common}


def _stack(entries: Sequence[Any]) -> np.ndarray:
    """(T, ...), or an object array (T,) where the entries' shapes differ."""
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


def _refuse_below_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name} is {value}; set it to 1 or more")
