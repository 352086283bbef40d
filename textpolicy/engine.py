"""The interface between the training loop and a model, local or remote."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager
from dataclasses import dataclass, replace
from pathlib import Path
from typing import TYPE_CHECKING, Any, Literal, Protocol, runtime_checkable

import numpy as np

from .errors import UserError, refuse_not_positive, refuse_outside
from .losses import Surrogate
from .types import Batch, Completion, Floats

if TYPE_CHECKING:
    from .devices.team import Team

COOLEST = 1e-6  # the lowest temperature above 0: logits divided by less leave the range of float32
_RANGES: dict[str, tuple[float, float, type]] = {  # of Sampling: lowest, highest, kind; all finite in float32
    "max_tokens": (1, 2**31 - 1, int),
    "temperature": (0, 1e30, float),
    "top_p": (0, 1, float),
    "repetition_penalty": (1e-6, 1e6, float),
    "seed": (0, 2**63 - 1, int),
    "top_k": (0, 2**31 - 1, int),
    "min_p": (0, 1, float),
}


@dataclass(frozen=True)
class Sampling:
    """The settings that completions are sampled with.

    Only ``temperature`` may differ from its default in training: the learner can score
    at any temperature, but not under a truncated or penalised distribution.
    """

    max_tokens: int = 256
    temperature: float = 1.0  # 0 is greedy, which reports log-probs at temperature 1
    top_p: float = 1.0  # keep the smallest set of tokens whose probability reaches this
    repetition_penalty: float = 1.0  # divide (multiply, if negative) logits of tokens already seen
    seed: int = 0  # the same seed samples the same completions, whatever else is in the batch
    top_k: int = 0  # keep the k most likely tokens; 0 keeps all
    min_p: float = 0.0  # keep tokens at least this likely compared with the likeliest

    def __post_init__(self) -> None:
        for name, (low, high, kind) in _RANGES.items():
            value = getattr(self, name)
            refuse_outside(name, value, low, high, whole=kind is int)
            object.__setattr__(self, name, kind(value))  # a number of Python's, which no sum or file is surprised by
        if 0 < self.temperature < COOLEST:
            raise UserError(f"temperature is {self.temperature:g}; set it to 0 (greedy), or to {COOLEST} or more")
        refuse_not_positive("top_p", self.top_p)

    @property
    def scored_temperature(self) -> float | None:
        """The temperature that a learner must score at; None for a truncated or penalised distribution."""
        untouched = (self.top_p, self.top_k, self.min_p, self.repetition_penalty) == (1, 0, 0, 1)
        return self.temperature if untouched else None

    def reseeded(self, *place: int) -> Sampling:
        """Return the same settings with a seed derived from theirs and ``place``, such as a step or a later turn."""
        return replace(self, seed=int(np.random.SeedSequence([self.seed, *place]).generate_state(1)[0]))


def stop_tokens(tokenizer: Any, *, needed: bool = True) -> frozenset[int]:
    """Return the ids that end a completion: the tokenizer's eos, and what its chat template writes after a turn.

    The tokenizer is that of mlx-lm or of transformers; the one that ``load_model`` returns has all that the model's
    files name. Raises UserError if there are none and they are ``needed``.
    """
    given = (getattr(tokenizer, name, None) for name in ("eos_token_ids", "eos_token_id"))
    found = frozenset(i for ids in given if ids is not None for i in ([ids] if isinstance(ids, int) else ids))
    found |= _end_of_turn(tokenizer)
    if needed and not found:
        raise UserError(
            f"the tokenizer, a {type(tokenizer).__name__}, names no token that ends a completion; set its eos_token, "
            "or give the engine stop="
        )
    return found


def _end_of_turn(tokenizer: Any) -> frozenset[int]:
    """Return the special token that the chat template writes right after what the assistant says, if it writes one."""
    if not getattr(tokenizer, "chat_template", None) or not hasattr(tokenizer, "added_tokens_decoder"):
        return frozenset()
    turn = "\u2042turn\u2042"
    messages = [{"role": "user", "content": "?"}, {"role": "assistant", "content": turn}]
    try:
        written = str(tokenizer.apply_chat_template(messages, tokenize=False))
    except Exception:  # noqa: BLE001 - a template is code of others and may raise anything; its prompts say what
        return frozenset()
    after = written.partition(turn)[2].lstrip()
    special = {token.content: i for i, token in tokenizer.added_tokens_decoder.items() if token.special}
    first = max((text for text in special if text and after.startswith(text)), key=len, default=None)
    return frozenset() if first is None else frozenset({special[first]})


class Engine(Protocol):
    """The model that samples and learns. It never sees a reward or an algorithm's name."""

    stop: np.ndarray  # (S,) int, the tokens that end a completion

    def sample(self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling) -> list[list[Completion]]:
        """Sample ``n`` completions for every prompt (token ids), in prompt order."""

    def score(self, batch: Batch, *, reference: bool = False) -> Floats:
        """Return (B, T) float32 log-probs of the batch's targets, 0 off the mask.

        They are those of the current weights or, if ``reference``, of the frozen reference.
        """

    def update(self, batch: Batch, surrogate: Surrogate, learning_rate: float) -> Mapping[str, float]:
        """Take one optimiser step on ``batch`` and return its metrics."""

    def save(self, path: Path) -> None:
        """Write the trained adapter to the folder ``path`` atomically."""


@runtime_checkable
class LocalEngine(Engine, Protocol):
    """The engine in this process, which may be one of several ranks."""

    team: Team  # of one, or the ranks that share every batch with this one

    def sample(
        self, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, streams: Sequence[int] | None = None
    ) -> list[list[Completion]]:
        """Sample ``n`` completions for every prompt, each from the random stream of its number in ``streams``.

        By default these count from 0. What a completion draws depends on ``sampling.seed`` and its stream alone.
        """

    def keep_turns(self) -> AbstractContextManager[None]:
        """Keep what completions have read, within the context, for the prompts that continue them."""


def sample_from(
    engine: Engine, prompts: Sequence[Sequence[int]], n: int, sampling: Sampling, streams: Sequence[int]
) -> list[list[Completion]]:
    """Sample ``n`` completions for every prompt, where the engine is local from the random ``streams`` given."""
    if isinstance(engine, LocalEngine):
        return engine.sample(prompts, n, sampling, streams)
    return engine.sample(prompts, n, sampling)


class ResumableEngine(Engine, Protocol):
    """The engine of a run with checkpoints."""

    def weights(self) -> Any:
        """Return a copy of the trainable parameters, or a name for it, which ``restore`` accepts."""

    def restore(self, weights: Any) -> None:
        """Restore the parameters that ``weights`` returned."""

    def write_weights(self, weights: Any, folder: Path) -> None:
        """Write the result of ``weights`` into the new folder ``folder``. Raises OSError."""

    def read_weights(self, folder: Path) -> Any:
        """Read the result of ``weights`` back from what ``write_weights`` wrote. Raises UserError."""

    def write_state(self, folder: Path) -> None:
        """Write everything that updates change into ``folder``, to resume from bit for bit. Raises OSError."""

    def read_state(self, folder: Path) -> None:
        """Resume where ``write_state`` was called. Raises UserError, changing nothing, if the state does not fit."""

    def close(self, status: Literal["success", "errored", "interrupted"] = "success") -> None:
        """Release remote resources and report how the run ended."""

    packages: tuple[str, ...]  # the packages whose versions its results depend on

    @property
    def platform(self) -> Mapping[str, str]:
        """The facts that the last bits of its results depend on, besides the versions of packages."""
