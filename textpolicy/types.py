"""The three values that flow through training: Completion -> Episode -> Batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self, get_args

import numpy as np

from .errors import UserError, unknown_name

Aggregation = Literal[
    "token-mean",  # 1 / all sampled tokens: BNPO, and DAPO's eq. 12
    "seq-mean-token-mean",  # 1 / (sequences x the sequence's tokens): GRPO, GSPO, SAPO
    "seq-mean-token-sum",  # 1 / sequences: LUSPO
    "seq-mean-token-sum-norm",  # 1 / (sequences x a constant length): Dr. GRPO
    "token-sum",  # 1: the losses of the Tinker service
]


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """One sampled continuation, exactly as the engine produced it."""

    tokens: np.ndarray  # (T,) int32; keeps the stop token, so stopping is learnable
    logprobs: np.ndarray  # (T,) float32, of the distribution that sampled it
    entropy: np.ndarray | None = None  # (T,) float32, nats; None when the engine cannot see it
    truncated: bool = False  # True when max_tokens ended it, not a stop token
    temperature: float | None = 1.0  # of that distribution; None when a filter (top-p, penalty) bent it


@dataclass(frozen=True, slots=True, eq=False)
class Credited:
    """What training made of an episode. Every array has one entry per token of it, 0 where nothing was sampled."""

    advantage: float  # of the baseline, before any token-level stage
    credit: np.ndarray  # (L,) float32, what each token was trained with
    planning: np.ndarray | None = None  # (L,) bool; None when the recipe marks no planning tokens


@dataclass(frozen=True, slots=True, eq=False)
class Episode:
    """A scored sequence. Every array has one entry per token of ``tokens``."""

    tokens: np.ndarray  # (L,) int32, prompt and completion together
    mask: np.ndarray  # (L,) bool, True where the policy chose the token
    logprobs: np.ndarray  # (L,) float32, of the distribution that sampled it, 0 where mask is False
    entropy: np.ndarray | None  # (L,) float32, nats; None when the engine could not see it
    reward: float  # NaN where it could not be scored
    group: int  # episodes of one prompt share a group, and a baseline
    prompt: str = ""  # what was asked and what was answered, for people to read
    text: str = ""
    truncated: bool = False
    temperature: float | None = 1.0
    is_correct: bool | None = None  # None when the reward does not say
    pieces: tuple[str, ...] = ()  # the text of each sampled token; () when nobody asked
    reference: np.ndarray | None = None  # (L,) float32, log-probs of the frozen reference, where a recipe needs them
    scores: Mapping[str, float] = field(default_factory=dict)  # of each of several rewards that applied, unweighted
    prompt_index: int | None = None  # of the environment's prompts
    credited: Credited | None = None  # None until it is trained on, and where it is not
    learner: np.ndarray | None = None  # (L,) float32, the learner's log-probs before the update, where it was asked

    @classmethod
    def from_completion(cls, prompt: Sequence[int], completion: Completion, /, **scored: Any) -> Self:
        """Join a prompt (token ids) and the completion sampled after it."""
        return cls.from_turns(prompt, [completion], [], truncated=completion.truncated, **scored)

    @classmethod
    def from_turns(
        cls, prompt: Sequence[int], turns: Sequence[Completion], replies: Sequence[Sequence[int]], /, **scored: Any
    ) -> Self:
        """Join a prompt and turns, each with the reply (token ids) that follows it; the last has none."""
        pairs = [*zip(turns, [*replies, ()], strict=True)]

        def row(of_prompt: Any, of_turn: Callable[[Completion], Any], of_reply: Callable[[Any], Any]) -> np.ndarray:
            return np.concatenate([of_prompt, *(part for t, r in pairs for part in (of_turn(t), of_reply(r)))])

        def sampled(of_turn: Callable[[Completion], Any], dtype: type = np.float32) -> np.ndarray:
            return row(np.zeros(len(prompt)), of_turn, lambda reply: np.zeros(len(reply))).astype(dtype)

        return cls(
            tokens=row(prompt, lambda turn: turn.tokens, lambda reply: reply).astype(np.int32),
            mask=sampled(lambda turn: np.ones(len(turn.tokens)), bool),
            logprobs=sampled(lambda turn: turn.logprobs),
            entropy=None if any(turn.entropy is None for turn in turns) else sampled(lambda turn: turn.entropy),
            temperature=turns[-1].temperature,
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
    weights: np.ndarray  # float32, 0 on prompts, replies of environments and padding
    temperatures: np.ndarray  # (B, 1) float32, that ``logprobs`` were sampled and must be scored at
    old: np.ndarray | None = None  # float32, log-probs the learner gave before the first of several updates
    reference: np.ndarray | None = None  # float32, log-probs of the frozen reference

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
        aggregation: Aggregation = "token-mean",
        length: float | None = None,
    ) -> Self:
        """Shift, pad and weigh. The next-token shift happens here and nowhere else.

        ``advantages`` has one (L,) array per episode; ``aggregation`` and ``length`` are those of
        ``loss_weights``. Raises UserError for episodes that no learner can score.
        """
        refuse_untrainable(episodes)
        _refuse_advantages(episodes, advantages)
        mask = _pad([e.mask[1:] for e in episodes], bool)
        references = [e.reference[1:] for e in episodes if e.reference is not None]
        return cls(
            inputs=_pad([e.tokens[:-1] for e in episodes], np.int32),
            targets=_pad([e.tokens[1:] for e in episodes], np.int32),
            logprobs=_pad([e.logprobs[1:] for e in episodes], np.float32),
            advantages=_pad([a[1:] for a in advantages], np.float32),
            weights=loss_weights(mask, aggregation, length).astype(np.float32),
            temperatures=np.array([[e.temperature] for e in episodes], np.float32),
            reference=_pad(references, np.float32) if len(references) == len(episodes) else None,
        )

    def take(self, rows: np.ndarray, width: int | None = None) -> Batch:
        """The given rows, cut to ``width`` positions."""
        return self.map(lambda array: array[rows, :width])

    def map(self, fn: Callable[[np.ndarray], Any], skip: Sequence[str] = ()) -> Batch:
        """``fn`` of every array that is there, but those named in ``skip``."""
        named = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skip}
        return replace(self, **{name: fn(array) for name, array in named.items() if array is not None})


def over_episode(line: np.ndarray, episode: Episode) -> np.ndarray:
    """A batch's row of log-probs of targets, (T,) -> (L,) float32: one per token of ``episode``, 0 at the first."""
    return np.append(np.float32(0), line[: len(episode.tokens) - 1])


def loss_weights(
    mask: np.ndarray,
    aggregation: Aggregation,
    length: float | None = None,
    empty_rows: Literal["excluded", "counted"] = "excluded",
) -> np.ndarray:
    """(B, T) mask -> (B, T) float64 weights whose weighted sum of token losses is the aggregate.

    ``length`` is the constant of "seq-mean-token-sum-norm" in tokens, the longest completion allowed.
    A row without tokens counts as one of the sequences only if ``empty_rows`` is "counted"; without
    any token all weights are 0. Sources: docs/algorithms.md. Raises UserError.
    """
    live = np.asarray(mask) != 0
    tokens = np.maximum(live.sum(axis=1, keepdims=True), 1)
    sequences = max(len(live) if empty_rows == "counted" else live.any(axis=1).sum(), 1)
    match aggregation:
        case "token-mean":
            denominator = max(live.sum(), 1)
        case "seq-mean-token-mean":
            denominator = sequences * tokens
        case "seq-mean-token-sum":
            denominator = sequences
        case "seq-mean-token-sum-norm":
            if length is None or not length > 0:
                raise UserError(f"{aggregation} divides by a length and got {length}; give the longest completion")
            denominator = sequences * length
        case "token-sum":
            denominator = 1
        case _:
            raise unknown_name("aggregation", aggregation, get_args(Aggregation))
    return live / denominator


def refuse_untrainable(episodes: Sequence[Episode]) -> None:
    """A UserError for what no learner can score: unlike arrays, log-probs that are not finite, a bent distribution."""
    if not episodes:
        raise UserError("a batch needs at least one episode, got none; collect some rollouts first")
    for e in episodes:
        _refuse_unlike(e)
        if not e.temperature:
            raise UserError(
                f"an episode was sampled with temperature {e.temperature} (None means top-p or a repetition "
                "penalty), whose log-probs no learner can reproduce; sample with temperature > 0, top_p=1, "
                "repetition_penalty=1 to train on it"
            )
        if not np.isfinite(e.logprobs).all():
            raise UserError("an episode holds log-probs that are not finite; the policy that sampled it is broken")


def _refuse_unlike(episode: Episode) -> None:
    named = ("tokens", "mask", "logprobs", "entropy", "reference")
    shapes = {n: array.shape for n in named if (array := getattr(episode, n)) is not None}
    if len(set(shapes.values())) > 1 or not len(episode.tokens) or episode.mask[0]:
        listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
        raise UserError(
            f"an episode's arrays are {listed}; give each one entry per token, the first of them a prompt's"
        )


def _refuse_advantages(episodes: Sequence[Episode], advantages: Sequence[np.ndarray]) -> None:
    if len(advantages) != len(episodes):
        raise UserError(f"{len(episodes)} episodes have {len(advantages)} arrays of advantages; give one each")
    for e, a in zip(episodes, advantages, strict=True):
        if np.shape(a) != e.tokens.shape:
            raise UserError(f"{len(e.tokens)} tokens have advantages of shape {np.shape(a)}; give one number per token")
        if not np.isfinite(a).all():
            raise UserError("an episode's advantages are not finite; check the rewards and the algorithm's settings")


def _pad(rows: Sequence[np.ndarray], dtype: type) -> np.ndarray:
    out: np.ndarray = np.zeros((len(rows), max(map(len, rows))), dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out
