"""The environments of Gymnasium: as an ``Environment``, several side by side, and as games for a language model."""

from __future__ import annotations

import logging
import math
import re
import weakref
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, ClassVar, Self, cast

import numpy as np

from ..._system.extras import extra
from ...errors import UserError
from ...rewards.answer import answered
from ...rewards.contract import Scored
from ..base import Environment
from ..multi_turn import MultiTurnEnv
from ..text.conversation import Conversation, Reply

logger = logging.getLogger(__name__)

INSTALL = "textpolicy[gymnasium]"
STEP = ("observation", "reward", "terminated", "truncated", "info")  # the order of Gymnasium's tuple
MakeGame = Callable[[], Any]  # makes a gymnasium.Env
WHOLE = (
    re.compile(  # a whole number that is no part of a word, a decimal, a sum, a time, a percentage, "1 000" or "1'000"
        r"""(?<![\w\u2212\u2013])(?<![0-9][.,:/^*'+-])(?<!(?<!\.)\.)(?!(?<=[0-9][ \xa0\u202f])[0-9]{3}(?![0-9]))"""
        r"""[+-]?[0-9]+(?![\w%]|[.,:/^*'+-][0-9]|[ \xa0\u202f][0-9]{3}(?![0-9]))"""
    )
)


def made(make: str, env_id: str, *arguments: Any, **settings: Any) -> Any:
    """Return what ``gymnasium.make`` or ``make_vec`` makes. Raises UserError, and MissingDependencyError without it."""
    library = extra("gymnasium", INSTALL)
    try:
        return getattr(library, make)(env_id, *arguments, **settings)
    except (library.error.Error, ImportError, AttributeError, TypeError, ValueError) as error:
        why = " ".join(str(error).split())
        raise UserError(
            f"Gymnasium cannot make {env_id!r} ({why}); check its name and settings, and install what it needs"
        ) from error


def result(of: str, values: Any, names: tuple[str, ...]) -> tuple[Any, ...]:
    """Return the ``values`` of a game's ``of``, a tuple with those ``names``. Raises UserError for anything else."""
    if not isinstance(values, tuple) or len(values) != len(names):
        given = f"a tuple of {len(values)}" if isinstance(values, tuple) else f"a {type(values).__name__}"
        raise UserError(f"{of} of a game returned {given}; return {', '.join(names)}, as Gymnasium does")
    return values


def number(reward: Any) -> float:
    """Return a reward as a number, NaN for None or an infinite one. Raises UserError for several, or for text."""
    try:
        [value] = np.asarray(reward, float).reshape(-1).tolist()
    except (TypeError, ValueError) as error:
        raise UserError(f"step() of a game returned the reward {reward!r:.60}; return one number") from error
    return value if math.isfinite(value) else math.nan


class GymAdapter(Environment):
    """The adapter of one Gymnasium environment to our contract; ``env`` is the environment itself."""

    def __init__(self, env_name: str, **kwargs: Any) -> None:
        """Make the environment; ``kwargs`` are those of ``gymnasium.make``.

        Raises UserError for what Gymnasium cannot make, MissingDependencyError without Gymnasium.
        """
        self.env_name, self.kwargs = env_name, kwargs
        self.env = made("make", env_name, **kwargs)
        self.observation_space, self.action_space = self.env.observation_space, self.env.action_space

    def reset(self, seed: int | None = None) -> tuple[Any, dict[str, Any]]:
        """Begin an episode, the one that ``seed`` determines if it is given."""
        observation, info = result("reset()", self.env.reset(seed=seed), ("observation", "info"))
        return observation, info

    def step(self, action: Any) -> dict[str, Any]:
        """Take one action of the environment's own action space."""
        observation, reward, terminated, truncated, info = result("step()", self.env.step(action), STEP)
        return dict(zip(STEP, (observation, number(reward), bool(terminated), bool(truncated), info), strict=True))

    def clone(self) -> Self:
        """Make a new environment of the same name and settings."""
        return type(self)(self.env_name, **self.kwargs)

    def render(self, mode: str = "human") -> Any:
        """Return the environment's own picture, in the mode it was made with, not in ``mode``."""
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
        """Return the first observations (N, ...) float32, and Gymnasium's infos.

        Observations of several parts (a tuple, a dict) are one row (N, parts) each. Raises UserError for text.
        """
        observations, infos = self.vec_env.reset(seed=seed)
        return self._rows(observations), infos

    def _rows(self, observations: Any) -> np.ndarray:
        """Return observations (N, ...) float32."""
        if isinstance(observations, Mapping):
            observations = tuple(observations.values())
        try:
            if isinstance(observations, tuple):
                parts = [self._rows(part).reshape(self.num_envs, -1) for part in observations]
                return np.concatenate(parts, axis=1)
            return np.asarray(observations, np.float32)
        except (TypeError, ValueError) as error:
            space = self.vec_env.single_observation_space
            raise UserError(f"observations of {space} are no numbers; wrap the environment so that they are") from error

    def step(self, actions: Any) -> dict[str, Any]:
        """Take one action in each environment, with (N, ...) ``actions``.

        Returns observation (N, ...) float32, reward (N,) float32, terminated and truncated (N,) bool, and
        info, Gymnasium's. ``autoreset_mode`` of ``gymnasium.make_vec`` decides when a finished environment
        begins anew. Raises UserError unless there is an action for each.
        """
        chosen = np.asarray(actions)
        if chosen.shape[:1] != (self.num_envs,):
            given = len(chosen) if chosen.ndim else 1
            raise UserError(f"{given} actions were given for {self.num_envs} environments; give one each")
        observations, *arrays, info = self.vec_env.step(chosen)
        typed = [np.asarray(array, dtype) for array, dtype in zip(arrays, (np.float32, bool, bool), strict=True)]
        return dict(zip(STEP, (self._rows(observations), *typed, info), strict=True))

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
    return VectorizedEnvironment(made("make_vec", env_id, num_envs, mode, **(env_kwargs or {})))


# ---- as a conversation


class GymnasiumTextEnv(MultiTurnEnv):
    """The Gymnasium environment that a language model plays: observations are messages, turns are actions.

    Prompt i is the game that ``reset(seed=seed + i)`` begins, so the episodes of a group play the same one. The
    reward is the sum of the game's rewards. A turn that is not a valid action, or that the game refuses, gets a message
    that says so, and counts as a turn. A game that fails otherwise ends its episode, which is unscorable.
    """

    special: ClassVar[bool] = True  # which may end a thought

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

        A prompt is ``instructions`` and ``describe(observation)``. ``read_action(text)`` turns the text of a turn,
        after the thought, into an action and raises ValueError or KeyError if it is not one; by default a text space
        takes the text, and a discrete one the last whole number in it (``WHOLE``). ``is_correct(reward)`` decides
        whether an episode with that total reward succeeded. The other ``settings`` are those of ``MultiTurnEnv``.
        Raises UserError.
        """
        if games < 1:
            raise UserError(f"games is {games}; set it to 1 or more")
        if not isinstance(game, str) and not callable(game):
            raise UserError(f"game is a {type(game).__name__}; give the id of one, or a function that makes it")
        make: MakeGame = (lambda: made("make", game)) if isinstance(game, str) else game
        try:
            first = make()
        except UserError:
            raise
        except Exception as error:
            why = f"{type(error).__name__}: {' '.join(str(error).split())}"
            raise UserError(f"the function of the game raised {why}; fix it") from error
        if not isinstance(first, extra("gymnasium", INSTALL).Env):
            raise UserError(f"the function of the game made a {type(first).__name__}; make a gymnasium.Env")
        try:
            read = read_action or _reader(getattr(first, "action_space", None))
            starts = [describe(begun(first, seed + i)) for i in range(games)]
        finally:
            closed(first)
        super().__init__(
            ["\n\n".join(filter(None, [instructions, start])) for start in starts],
            lambda example: GamePartner(make(), example["seed"], describe, read, is_correct),
            max_tokens=max_tokens,
            tokenizer=tokenizer,
            examples=[{"seed": seed + i} for i in range(games)],
            **settings,
        )

    def judge(self, conversations: Sequence[Conversation]) -> list[Scored]:
        """Return the rewards of finished episodes, in order, and close their games. Raises RewardError."""
        for conversation in conversations:
            cast(GamePartner, conversation.partner).close()
        return super().judge(conversations)


def begun(game: Any, seed: int) -> Any:
    """Return the first observation of the game that ``seed`` determines. Raises UserError."""
    try:
        values = game.reset(seed=seed)
    except (Exception, SystemExit) as error:
        why = f"{type(error).__name__}: {' '.join(str(error).split())}"
        raise UserError(f"a game cannot begin with seed {seed} ({why}); fix its reset()") from error
    return result("reset()", values, ("observation", "info"))[0]


def closed(game: Any) -> None:
    """Close a game, and log what it raises."""
    try:
        game.close()
    except (Exception, SystemExit) as error:  # noqa: BLE001 - the game is over, and the run is not
        logger.warning("a game raised when it was closed: %r", error)


@dataclass(eq=False)
class GamePartner:
    """The partner that plays one game: it takes the policy's turns as actions and replies with observations.

    The game is closed when it or its episode is over, or when the episode is dropped.
    """

    game: Any  # a gymnasium.Env
    seed: int
    describe: Callable[[Any], str]
    read: Callable[[str], Any]
    is_correct: Callable[[float], bool] | None = None
    reward: float = field(default=0.0, init=False)  # so far
    failed: bool = field(default=False, init=False)

    def __post_init__(self) -> None:
        self.close = weakref.finalize(self, closed, self.game)
        try:
            begun(self.game, self.seed)
        except UserError as error:  # another began with that seed
            logger.warning("%s; its episode is unscorable", error)
            self.failed = True

    def reply(self, text: str) -> Reply:
        """Return the next observation; no message once the game is over."""
        refusal = extra("gymnasium", INSTALL).error.InvalidAction
        if self.failed:
            return Reply(reward=math.nan)
        try:
            if (said := answered(text)) is None:
                raise ValueError("it ends inside a thought")
            action = self.read(said.strip())
        except (ValueError, LookupError) as error:
            return Reply(({"role": "user", "content": f"That is no action: {error}"},))
        try:
            values = self.game.step(action)
        except (ValueError, AssertionError, refusal) as error:  # as games refuse an illegal move
            return Reply(({"role": "user", "content": f"The game refuses {action!r}: {error}"},))
        except (Exception, SystemExit) as error:  # noqa: BLE001 - whatever it is, the other episodes go on
            logger.warning("a game failed at the action %r and is unscorable: %r", action, error)
            self.close()
            return Reply(reward=math.nan)
        observation, value, terminated, truncated, _ = result("step()", values, STEP)
        reward = number(value)
        self.reward += reward
        if not (terminated or truncated):
            return Reply(({"role": "user", "content": self.describe(observation)},), reward)
        self.close()
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
            numbers = WHOLE.findall(text)
            if not numbers:
                raise ValueError("it has no whole number")
            action = int(numbers[-1])
        if not space.contains(action):
            raise ValueError(f"{action!r} is not in {space}")
        return action

    return read
