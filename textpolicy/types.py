"""The three values that flow through training: Completion -> Episode -> Batch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, fields, replace
from typing import Any, Literal, Self

import numpy as np

from .errors import UserError

Normalize = Literal["token", "sequence", "constant"]


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """One sampled continuation, exactly as the engine produced it."""

    tokens: np.ndarray  # (T,) int32; keeps the stop token, so stopping is learnable
    logprobs: np.ndarray  # (T,) float32, of the distribution that sampled it
    entropy: np.ndarray | None = None  # (T,) float32, nats; None when the engine cannot see it
    truncated: bool = False  # True when max_tokens ended it, not a stop token
    temperature: float | None = 1.0  # of that distribution; None when a filter (top-p, penalty) bent it


@dataclass(frozen=True, slots=True, eq=False)
class Episode:
    """A scored sequence. Every array has one entry per token of ``tokens``."""

    tokens: np.ndarray  # (L,) int32, prompt and completion together
    mask: np.ndarray  # (L,) bool, True where the policy chose the token
    logprobs: np.ndarray  # (L,) float32, of the distribution that sampled it, 0 where mask is False
    entropy: np.ndarray | None  # (L,) float32, nats; None when the engine could not see it
    reward: float
    group: int  # episodes of one prompt share a group, and a baseline
    prompt: str = ""  # what was asked and what was answered, for people to read
    text: str = ""
    truncated: bool = False
    temperature: float | None = 1.0
    is_correct: bool | None = None  # None when the reward does not say

    @classmethod
    def from_completion(cls, prompt: Sequence[int], completion: Completion, /, **scored: Any) -> Self:
        """Join a prompt (token ids) and the completion sampled after it."""

        def after_prompt(values: np.ndarray, dtype: type = np.float32) -> np.ndarray:
            return np.concatenate([np.zeros(len(prompt), dtype), np.asarray(values, dtype)])

        return cls(
            tokens=np.concatenate([np.asarray(prompt, np.int32), completion.tokens]),
            mask=after_prompt(np.ones(len(completion.tokens)), bool),
            logprobs=after_prompt(completion.logprobs),
            entropy=None if completion.entropy is None else after_prompt(completion.entropy),
            truncated=completion.truncated,
            temperature=completion.temperature,
            **scored,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """Next-token training arrays, all (B, T) but the last: ``inputs[:, t]`` predicts ``targets[:, t]``.

    ``weights`` carries both the mask and the normaliser, so every loss is a plain
    sum and a batch may be split anywhere without changing its gradient.
    """

    inputs: np.ndarray  # int32
    targets: np.ndarray  # int32
    logprobs: np.ndarray  # float32, of the distribution that sampled the targets
    advantages: np.ndarray  # float32
    weights: np.ndarray  # float32, 0 on prompt and padding
    temperatures: np.ndarray  # (B, 1) float32, that ``logprobs`` were sampled and must be scored at

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def lengths(self) -> np.ndarray:
        """(B,) int: real length of each row, one past its last weighted target."""
        return self.weights.shape[1] - np.argmax(self.weights[:, ::-1] != 0, axis=1)

    @property
    def starts(self) -> np.ndarray:
        """(B,) int: position of each row's first weighted target."""
        return np.argmax(self.weights != 0, axis=1)

    @classmethod
    def pack(
        cls,
        episodes: Sequence[Episode],
        advantages: Sequence[np.ndarray],
        normalize: Normalize = "token",
        constant: float = 1.0,
    ) -> Self:
        """Shift, pad and weigh. The next-token shift happens here and nowhere else.

        ``advantages`` has one (L,) array per episode. ``normalize`` divides by the number of
        sampled tokens ("token"), by each sequence's length and the number of sequences
        ("sequence"), or by ``constant`` times the number of sequences ("constant").
        """
        _refuse_untrainable(episodes)
        mask = _pad([e.mask[1:] for e in episodes], np.float32)
        live = mask.any(axis=1).sum()
        match normalize:
            case "token":
                weights = mask / max(mask.sum(), 1)
            case "sequence":
                weights = mask / np.maximum(mask.sum(axis=1, keepdims=True), 1) / max(live, 1)
            case "constant":
                weights = mask / (constant * max(live, 1))
        return cls(
            inputs=_pad([e.tokens[:-1] for e in episodes], np.int32),
            targets=_pad([e.tokens[1:] for e in episodes], np.int32),
            logprobs=_pad([e.logprobs[1:] for e in episodes], np.float32),
            advantages=_pad([a[1:] for a in advantages], np.float32),
            weights=weights,
            temperatures=np.array([[e.temperature] for e in episodes], np.float32),
        )

    def take(self, rows: np.ndarray, width: int | None = None) -> Batch:
        """The given rows, cut to ``width`` positions."""
        return replace(self, **{f.name: getattr(self, f.name)[rows, :width] for f in fields(self)})


def _refuse_untrainable(episodes: Sequence[Episode]) -> None:
    if not episodes:
        raise UserError("a batch needs at least one episode, got none; collect some rollouts first")
    for e in episodes:
        if not e.temperature:
            raise UserError(
                f"an episode was sampled with temperature {e.temperature} (None means top-p or a repetition "
                "penalty), whose log-probs no learner can reproduce; sample with temperature > 0, top_p=1, "
                "repetition_penalty=1 to train on it"
            )
        if not np.isfinite(e.logprobs).all():
            raise UserError("an episode holds log-probs that are not finite; the policy that sampled it is broken")


def _pad(rows: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    out: np.ndarray = np.zeros((len(rows), max(map(len, rows))), dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
