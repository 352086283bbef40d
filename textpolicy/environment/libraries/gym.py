"""Gymnasium environments: as an ``Environment``, many at once, and as a conversation that a language model plays."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from ..._system.extras import extra
from ...errors import UserError
from ..base import Environment
from ..multi_turn import MultiTurnEnv
from ..text.conversation import Reply

MakeGame = Callable[[], Any]  # makes a gymnasium.Env


class GymAdapter(Environment):
    """One Gymnasium environment under our contract; ``env`` is the environment itself."""

    def __init__(self, env_name: str, **kwargs: Any) -> None:
        """``kwargs`` are those of ``gymnasium.make``. Raises MissingDependencyError without Gymnasium."""
        self.env_name, self.kwargs = env_name, kwargs
        self.env = _gymnasium().make(env_name, **kwargs)
        self.observation_space, self.action_space = self.env.observation_space, self.env.action_space

    def reset(self, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode, the one that ``seed`` draws if there is one."""
        return self.env.reset(seed=seed)

    def step(self, action: Any) -> dict[str, Any]:
        """Act once; ``action`` is one of the environment's own."""
        return _as_step(self.env.step(action))

    def clone(self) -> Self:
        """A new environment of the same name and settings."""
        return type(self)(self.env_name, **self.kwargs)

    def render(self) -> Any:
        """What the environment renders, in the mode it was made with."""
        return self.env.render()

    def close(self) -> None:
        self.env.close()


class VectorizedEnvironment:
    """N environments of Gymnasium's vector kind, acting side by side; all arrays have N rows."""

    def __init__(self, vec_env: Any) -> None:
        """``vec_env`` is a ``gymnasium.vector.VectorEnv``, which ``gymnasium.make_vec`` returns."""
        self.vec_env = vec_env
        self.num_envs = vec_env.num_envs

    def reset(self, seed: int | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """The first observations (N, ...) float32, and Gymnasium's infos."""
        observations, infos = self.vec_env.reset(seed=seed)
        return np.asarray(observations, np.float32), infos

    def step(self, actions: Any) -> dict[str, Any]:
        """Act once in each, with (N, ...) actions.

        Returns observation (N, ...) float32, reward (N,) float32, terminated and truncated (N,) bool, and
        info, Gymnasium's. When an environment that is over begins anew is set by ``autoreset_mode`` of
        ``gymnasium.make_vec``. Raises UserError unless there is an action for each.
        """
        chosen = np.asarray(actions)
        if len(chosen) != self.num_envs:
            raise UserError(f"{len(chosen)} actions were given for {self.num_envs} environments; give one each")
        observation, reward, terminated, truncated, info = self.vec_env.step(chosen)
        return {
            "observation": np.asarray(observation, np.float32),
            "reward": np.asarray(reward, np.float32),
            "terminated": np.asarray(terminated, bool),
            "truncated": np.asarray(truncated, bool),
            "info": info,
        }

    def close(self) -> None:
        self.vec_env.close()


def make_vectorized_env(
    env_id: str, num_envs: int = 1, use_async: bool = True, env_kwargs: Mapping[str, Any] | None = None
) -> VectorizedEnvironment:
    """``num_envs`` environments of ``env_id``, in processes of their own with ``use_async``. Raises UserError."""
    if num_envs < 1:
        raise UserError(f"num_envs is {num_envs}; set it to 1 or more")
    mode = "async" if use_async else "sync"
    return VectorizedEnvironment(_gymnasium().make_vec(env_id, num_envs, mode, **(env_kwargs or {})))


# ---- as a conversation


class GymnasiumTextEnv(MultiTurnEnv):
    """A Gymnasium environment that a language model plays: observations are messages, turns are actions.

    Prompt i is the game that ``reset(seed=seed + i)`` begins, so the episodes of a group play the same one. The
    reward is the sum of the game's. A turn that is no action is answered with a sentence, and costs a turn.
    """

    def __init__(
        self,
        game: str | MakeGame,
        games: int,
        *,
        tokenizer: Any,
        instructions: str = "",
        describe: Callable[[Any], str] = str,
        read_action: Callable[[str], Any] | None = None,
        is_correct: Callable[[float], bool] | None = None,
        max_tokens: int = 16,
        seed: int = 0,
        **settings: Any,
    ) -> None:
        """``games`` prompts of ``game``, an id or a function that makes the environment.

        A prompt is ``instructions`` and ``describe(observation)``. ``read_action(text)`` turns what the policy wrote
        into an action and raises ValueError for what is none; by default a text space takes the text, and a
        discrete one the last whole number in it. ``is_correct(reward)`` says whether an episode with that
        reward in all succeeded. Further ``settings`` are those of ``MultiTurnEnv``. Raises UserError.
        """
        if games < 1:
            raise UserError(f"games is {games}; set it to 1 or more")
        make = _maker(game)
        example = make()
        read = read_action or _reader(example.action_space)
        starts = [describe(example.reset(seed=seed + i)[0]) for i in range(games)]
        example.close()
        super().__init__(
            ["\n\n".join(filter(None, [instructions, start])) for start in starts],
            lambda example: GamePartner(make(), example["seed"], describe, read, is_correct),
            max_tokens=max_tokens,
            tokenizer=tokenizer,
            examples=[{"seed": seed + i} for i in range(games)],
            **settings,
        )


@dataclass(eq=False)
class GamePartner:
    """One game: takes the policy's turns as actions, and answers with observations."""

    game: Any  # a gymnasium.Env
    seed: int
    describe: Callable[[Any], str]
    read: Callable[[str], Any]
    is_correct: Callable[[float], bool] | None = None
    reward: float = field(default=0.0, init=False)  # so far

    def __post_init__(self) -> None:
        self.game.reset(seed=self.seed)

    def reply(self, text: str) -> Reply:
        """The next observation; nothing once the game is over."""
        try:
            action = self.read(text)
        except ValueError as error:
            return Reply((_says(f"That is no action: {error}"),))
        result = _as_step(self.game.step(action))
        self.reward += result["reward"]
        if not (result["terminated"] or result["truncated"]):
            return Reply((_says(self.describe(result["observation"])),), result["reward"])
        self.game.close()
        correct = self.is_correct(self.reward) if self.is_correct else None
        return Reply(reward=result["reward"], is_correct=correct, truncated=result["truncated"])


def _says(text: str) -> dict[str, str]:
    return {"role": "user", "content": text}


def _maker(game: str | MakeGame) -> MakeGame:
    return (lambda: _gymnasium().make(game)) if isinstance(game, str) else game


def _reader(space: Any) -> Callable[[str], Any]:
    """How a text becomes an action of ``space``."""
    spaces = _gymnasium().spaces
    if isinstance(space, spaces.Text):
        return lambda text: _checked(space, text)
    if isinstance(space, spaces.Discrete):
        return lambda text: _checked(space, _last_number(text))
    raise UserError(f"no text is an action of {space} by itself; give read_action, which turns one into it")


def _last_number(text: str) -> int:
    numbers = re.findall(r"-?[0-9]{1,9}", text)
    if not numbers:
        raise ValueError("it has no number")
    return int(numbers[-1])


def _checked(space: Any, action: Any) -> Any:
    if not space.contains(action):
        raise ValueError(f"{action!r} is not in {space}")
    return action


def _as_step(result: Sequence[Any]) -> dict[str, Any]:
    observation, reward, terminated, truncated, info = result
    return {
        "observation": observation,
        "reward": float(reward),
        "terminated": bool(terminated),
        "truncated": bool(truncated),
        "info": info,
    }


def _gymnasium() -> Any:
    return extra("gymnasium", "textpolicy[gymnasium]")
