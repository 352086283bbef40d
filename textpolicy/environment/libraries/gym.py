"""The environments of Gymnasium: as an ``Environment``, several side by side, and as games for a language model."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from typing import Any, Self

import numpy as np

from ..._system.extras import extra
from ...errors import UserError
from ..base import Environment
from ..multi_turn import MultiTurnEnv
from ..text.conversation import Reply

INSTALL = "textpolicy[gymnasium]"
STEP = ("observation", "reward", "terminated", "truncated", "info")  # the order of Gymnasium's tuple
MakeGame = Callable[[], Any]  # makes a gymnasium.Env


class GymAdapter(Environment):
    """The adapter of one Gymnasium environment to our contract; ``env`` is the environment itself."""

    def __init__(self, env_name: str, **kwargs: Any) -> None:
        """Make the environment; ``kwargs`` are those of ``gymnasium.make``.

        Raises MissingDependencyError without Gymnasium.
        """
        self.env_name, self.kwargs = env_name, kwargs
        self.env = extra("gymnasium", INSTALL).make(env_name, **kwargs)
        self.observation_space, self.action_space = self.env.observation_space, self.env.action_space

    def reset(self, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode, the one that ``seed`` determines if it is given."""
        return self.env.reset(seed=seed)

    def step(self, action: Any) -> dict[str, Any]:
        """Take one action of the environment's own action space."""
        observation, reward, terminated, truncated, info = self.env.step(action)
        return dict(zip(STEP, (observation, float(reward), bool(terminated), bool(truncated), info), strict=True))

    def clone(self) -> Self:
        """Make a new environment of the same name and settings."""
        return type(self)(self.env_name, **self.kwargs)

    def render(self) -> Any:
        """Return the environment's own picture, in the mode it was made with."""
        return self.env.render()

    def close(self) -> None:
        """Close the environment."""
        self.env.close()


class VectorizedEnvironment:
    """The adapter of N Gymnasium environments side by side; all arrays have N rows."""

    def __init__(self, vec_env: Any) -> None:
        """Wrap ``vec_env``, a ``gymnasium.vector.VectorEnv``, which ``gymnasium.make_vec`` returns."""
        self.vec_env, self.num_envs = vec_env, vec_env.num_envs

    def reset(self, seed: int | None = None) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the first observations (N, ...) float32, and Gymnasium's infos."""
        observations, infos = self.vec_env.reset(seed=seed)
        return np.asarray(observations, np.float32), infos

    def step(self, actions: Any) -> dict[str, Any]:
        """Take one action in each environment, with (N, ...) ``actions``.

        Returns observation (N, ...) float32, reward (N,) float32, terminated and truncated (N,) bool, and
        info, Gymnasium's. ``autoreset_mode`` of ``gymnasium.make_vec`` decides when a finished environment
        begins anew. Raises UserError unless there is an action for each.
        """
        chosen = np.asarray(actions)
        if len(chosen) != self.num_envs:
            raise UserError(f"{len(chosen)} actions were given for {self.num_envs} environments; give one each")
        *arrays, info = self.vec_env.step(chosen)
        types = (np.float32, np.float32, bool, bool)
        typed = [np.asarray(array, dtype) for array, dtype in zip(arrays, types, strict=True)]
        return dict(zip(STEP, (*typed, info), strict=True))

    def close(self) -> None:
        """Close all environments."""
        self.vec_env.close()


def make_vectorized_env(
    env_id: str, num_envs: int = 1, use_async: bool = True, env_kwargs: Mapping[str, Any] | None = None
) -> VectorizedEnvironment:
    """Make ``num_envs`` environments of ``env_id``, with ``use_async`` in processes of their own. Raises UserError."""
    if num_envs < 1:
        raise UserError(f"num_envs is {num_envs}; set it to 1 or more")
    mode = "async" if use_async else "sync"
    return VectorizedEnvironment(extra("gymnasium", INSTALL).make_vec(env_id, num_envs, mode, **(env_kwargs or {})))


# ---- as a conversation


class GymnasiumTextEnv(MultiTurnEnv):
    """The Gymnasium environment that a language model plays: observations are messages, turns are actions.

    Prompt i is the game that ``reset(seed=seed + i)`` begins, so the episodes of a group play the same one. The
    reward is the sum of the game's rewards. A turn that is not a valid action gets a message that says so, and counts
    as a turn.
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
        """Make ``games`` prompts of ``game``, an id or a function that makes the environment.

        A prompt is ``instructions`` and ``describe(observation)``. ``read_action(text)`` turns the text of a turn
        into an action and raises ValueError if it is not one; by default a text space takes the text, and a
        discrete one the last whole number in it. ``is_correct(reward)`` decides whether an episode with that
        total reward succeeded. The other ``settings`` are those of ``MultiTurnEnv``. Raises UserError.
        """
        if games < 1:
            raise UserError(f"games is {games}; set it to 1 or more")
        make: MakeGame = (lambda: extra("gymnasium", INSTALL).make(game)) if isinstance(game, str) else game
        first = make()
        read = read_action or _reader(first.action_space)
        starts = [describe(first.reset(seed=seed + i)[0]) for i in range(games)]
        first.close()
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
    """The partner that plays one game: it takes the policy's turns as actions and replies with observations."""

    game: Any  # a gymnasium.Env
    seed: int
    describe: Callable[[Any], str]
    read: Callable[[str], Any]
    is_correct: Callable[[float], bool] | None = None
    reward: float = field(default=0.0, init=False)  # so far

    def __post_init__(self) -> None:
        self.game.reset(seed=self.seed)

    def reply(self, text: str) -> Reply:
        """Return the next observation; no message once the game is over."""
        try:
            action = self.read(text)
        except ValueError as error:
            return Reply(({"role": "user", "content": f"That is no action: {error}"},))
        observation, value, terminated, truncated, _ = self.game.step(action)
        reward = float(value)
        self.reward += reward
        if not (terminated or truncated):
            return Reply(({"role": "user", "content": self.describe(observation)},), reward)
        self.game.close()
        correct = self.is_correct(self.reward) if self.is_correct else None
        return Reply(reward=reward, is_correct=correct, truncated=bool(truncated))


def _reader(space: Any) -> Callable[[str], Any]:
    """Return the default function from a text to an action of ``space``. Raises UserError if there is none."""
    spaces = extra("gymnasium", INSTALL).spaces
    if not isinstance(space, spaces.Text | spaces.Discrete):
        raise UserError(f"no text is an action of {space} by itself; give read_action, which turns one into it")

    def read(text: str) -> Any:
        action: Any = text
        if isinstance(space, spaces.Discrete):
            numbers = re.findall(r"-?[0-9]{1,9}", text)
            if not numbers:
                raise ValueError("it has no number")
            action = int(numbers[-1])
        if not space.contains(action):
            raise ValueError(f"{action!r} is not in {space}")
        return action

    return read
