"""The three records that flow through training: Completion -> Episode -> Batch."""

from __future__ import annotations

from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field, fields, replace
from typing import Any, Literal, Self, get_args

import numpy as np
from numpy.typing import NDArray

from .errors import UserError, unknown_name

Floats = NDArray[np.floating[Any]]
Ints = NDArray[np.integer[Any]]
Bools = NDArray[np.bool_]

Aggregation = Literal[
    "token-mean",  # 1 / all sampled tokens: BNPO, and DAPO's eq. 12
    "prompt-mean",  # 1 / (prompts x the prompt's tokens): ScaleRL
    "seq-mean-token-mean",  # 1 / (sequences x the sequence's tokens): GRPO, GSPO, SAPO
    "seq-mean-token-sum",  # 1 / sequences: LUSPO
    "seq-mean-token-sum-norm",  # 1 / (sequences x a constant length): Dr. GRPO
    "token-sum",  # 1: the losses of the Tinker service
]


@dataclass(frozen=True, slots=True, eq=False)
class Completion:
    """The continuation that an engine sampled after one prompt, unchanged."""

    tokens: Ints  # (T,) int32; includes the stop token, so that stopping can be learned
    logprobs: Floats  # (T,) float32, under the distribution that sampled the tokens
    entropy: Floats | None = None  # (T,) float32, nats; None when the engine does not report it
    truncated: bool = False  # True when max_tokens ended it, not a stop token
    temperature: float | None = 1.0  # of that distribution; None when top-p or a penalty altered it


@dataclass(frozen=True, slots=True, eq=False)
class Credited:
    """The credit that an episode was trained with. Arrays have one entry per token, 0 where nothing was sampled."""

    advantage: float  # of the baseline, before any token-level stage
    credit: Floats  # (L,) float32, the advantage of each token in the update
    planning: Bools | None = None  # (L,) bool; None when the recipe marks no planning tokens


@dataclass(frozen=True, slots=True, eq=False)
class Episode:
    """The record of one scored sequence. Every array has one entry per token of ``tokens``."""

    tokens: Ints  # (L,) int32, prompt and completion together
    mask: Bools  # (L,) bool, True where the policy chose the token
    logprobs: Floats  # (L,) float32, under the distribution that sampled the tokens, 0 where mask is False
    entropy: Floats | None  # (L,) float32, nats; None when the engine does not report it
    reward: float  # NaN when scoring failed
    group: int  # episodes of one prompt share a group, and a baseline
    prompt: str = ""  # prompt and completion as text, for display
    text: str = ""
    truncated: bool = False
    temperature: float | None = 1.0
    is_correct: bool | None = None  # None when the reward function does not report it
    pieces: tuple[str, ...] = ()  # the text of each sampled token; () unless requested
    reference: Floats | None = None  # (L,) float32, log-probs under the frozen reference, where a recipe needs them
    lead: Floats | None = None  # (L,) float32, a teacher's log-probs minus the policy's, where a recipe distils
    scores: Mapping[str, float] = field(default_factory=dict)  # the unweighted score of each reward that applied
    reward_weights: Mapping[str, float] = field(default_factory=dict)  # of those scores in ``reward``
    prompt_index: int | None = None  # index among the environment's prompts
    credited: Credited | None = None  # None unless the episode was trained on
    learner: Floats | None = None  # (L,) float32, the learner's log-probs before the update, where they were measured

    @classmethod
    def from_completion(cls, prompt: Sequence[int], completion: Completion, /, **scored: Any) -> Self:
        """Join a prompt (token ids) and the completion sampled after it; ``scored`` are further fields."""
        return cls.from_turns(prompt, [completion], [], truncated=completion.truncated, **scored)

    @classmethod
    def from_turns(
        cls, prompt: Sequence[int], turns: Sequence[Completion], replies: Sequence[Sequence[int]], /, **scored: Any
    ) -> Self:
        """Join a prompt and turns, each with the reply (token ids) that follows it; the last turn has no reply."""
        zeros: NDArray[Any] = np.zeros(len(prompt))
        tokens: list[Any] = [token_ids(prompt)]
        mask, logprobs, entropy = [zeros], [zeros], [zeros]
        for turn, reply in zip(turns, [*replies, ()], strict=True):
            zeros = np.zeros(len(reply))
            tokens += [token_ids(turn.tokens), token_ids(reply)]
            mask += [np.ones(len(turn.tokens)), zeros]
            logprobs += [turn.logprobs, zeros]
            if turn.entropy is not None:
                entropy += [turn.entropy, zeros]
        return cls(
            tokens=np.concatenate(tokens),
            mask=np.concatenate(mask).astype(bool),
            logprobs=np.concatenate(logprobs).astype(np.float32),
            entropy=np.concatenate(entropy).astype(np.float32) if len(entropy) == len(logprobs) else None,
            temperature=turns[-1].temperature,
            **scored,
        )


@dataclass(frozen=True, slots=True, eq=False)
class Batch:
    """The arrays of next-token training, all (B, T) but the last: ``inputs[:, t]`` predicts ``targets[:, t]``.

    ``weights`` carries both the mask and the normaliser, so every loss is a plain
    sum and a batch may be split anywhere without changing its gradient.
    """

    inputs: Ints  # int32
    targets: Ints  # int32
    logprobs: Floats  # float32, under the distribution that sampled the targets
    advantages: Floats  # float32
    weights: Floats  # float32, 0 on prompts, replies of environments and padding
    temperatures: Floats  # (B, 1) float32, at which ``logprobs`` were sampled and must be scored
    old: Floats | None = None  # float32, the learner's log-probs before the first of several updates
    reference: Floats | None = None  # float32, log-probs under the frozen reference
    echo: Floats | None = None  # float32, weights of the cross-entropy on replies of environments, 0 elsewhere
    bonus: Floats | None = None  # float32, weights of each target's entropy; to an objective, times that entropy

    def __len__(self) -> int:
        return len(self.inputs)

    @property
    def scored(self) -> Bools:
        """The targets whose log-probs the loss reads, (B, T) bool: those with a weight of either kind."""
        sampled: Bools = self.weights != 0
        return sampled if self.echo is None else sampled | (self.echo != 0)

    @property
    def lengths(self) -> Ints:
        """The length of each row without padding, (B,) int: one past its last weighted target."""
        length: Ints = self.weights.shape[1] - np.argmax(self.scored[:, ::-1], axis=1)
        return length

    @property
    def starts(self) -> Ints:
        """The position of each row's first weighted target, (B,) int."""
        first: Ints = np.argmax(self.scored, axis=1)
        return first

    @classmethod
    def pack(
        cls,
        episodes: Sequence[Episode],
        advantages: Sequence[Floats],
        aggregation: Aggregation = "token-mean",
        length: float | None = None,
        echo: float = 0.0,
        bonus: float = 0.0,
    ) -> Self:
        """Pack episodes: shift, pad and weigh them. The next-token shift happens here and nowhere else.

        ``advantages`` has one (L,) array per episode; ``aggregation`` and ``length`` are those of
        ``loss_weights``. ``echo`` is the weight of the mean cross-entropy over all tokens that environments wrote
        after a policy's first, ``bonus`` that of the mean entropy over the sampled tokens. Raises UserError for
        episodes that no learner can score.
        """
        refuse_untrainable(episodes)
        if len(advantages) != len(episodes):
            raise UserError(f"{len(episodes)} episodes have {len(advantages)} arrays of advantages; give one each")
        for e, a in zip(episodes, advantages, strict=True):
            if np.shape(a) != e.tokens.shape:
                raise UserError(
                    f"{len(e.tokens)} tokens have advantages of shape {np.shape(a)}; give one number per token"
                )
            if not np.isfinite(a).all():
                raise UserError(
                    "an episode's advantages are not finite; check the rewards and the algorithm's settings"
                )
        replies = pad([(np.cumsum(e.mask) > 0)[1:] & ~e.mask[1:] for e in episodes], bool)
        sampled = pad([e.mask[1:] for e in episodes], bool)
        references = [e.reference[1:] for e in episodes if e.reference is not None]
        return cls(
            inputs=pad([e.tokens[:-1] for e in episodes], np.int32),
            targets=pad([e.tokens[1:] for e in episodes], np.int32),
            logprobs=pad([e.logprobs[1:] for e in episodes], np.float32),
            advantages=pad([a[1:] for a in advantages], np.float32),
            weights=loss_weights(sampled, aggregation, length, groups=[e.group for e in episodes]).astype(np.float32),
            temperatures=np.array([[e.temperature] for e in episodes], np.float32),
            reference=pad(references, np.float32) if len(references) == len(episodes) else None,
            echo=(echo * replies / replies.sum()).astype(np.float32) if echo and replies.any() else None,
            bonus=(bonus * sampled / sampled.sum()).astype(np.float32) if bonus and sampled.any() else None,
        )

    def take(self, rows: NDArray[Any], width: int | None = None) -> Batch:
        """Return the given rows, cut to ``width`` positions."""
        return self.map(lambda array: array[rows, :width])

    def map(self, fn: Callable[[NDArray[Any]], Any], skip: Sequence[str] = ()) -> Batch:
        """Return a batch with ``fn`` applied to every array that is not None, except those named in ``skip``."""
        arrays = {f.name: getattr(self, f.name) for f in fields(self) if f.name not in skip}
        return replace(self, **{name: fn(array) for name, array in arrays.items() if array is not None})


def token_ids(ids: Any, vocabulary: int | None = None) -> NDArray[np.int32]:
    """Return the ids of one text as (n,) int32. Raises UserError for anything but whole numbers from 0 on.

    With a ``vocabulary``, the number of tokens that a model has, they must lie below it: an array read beyond its
    end gives other memory, or ends the process.
    """
    found = np.asarray(ids)
    if found.ndim != 1 or (found.size and found.dtype.kind not in "iu"):
        shown = " ".join(f"{ids!r:.60}".split())
        raise UserError(f"{shown} is not a flat array of token ids; encode text first, with textpolicy.encode")
    wrong = found[(found < 0) | (found >= (vocabulary or 2**31))]
    if wrong.size:
        owns = "ids start at 0" if vocabulary is None else f"the model has the ids 0 to {vocabulary - 1}"
        raise UserError(f"there is no token {wrong[0]}, since {owns}; use the tokenizer that belongs to the model")
    return found.astype(np.int32)


def over_episode(row: Floats, episode: Episode) -> Floats:
    """Return a batch's row of log-probs of targets, (T,), as one float32 per token of ``episode``, 0 at the first."""
    return np.append(np.float32(0), row[: len(episode.tokens) - 1])


def pad(rows: Sequence[NDArray[Any]], dtype: type) -> NDArray[Any]:
    """Return rows of different lengths as one (B, T) array, 0 after the end of each."""
    out: NDArray[Any] = np.zeros((len(rows), max(map(len, rows), default=0)), dtype)
    for i, row in enumerate(rows):
        out[i, : len(row)] = row
    return out


def loss_weights(
    mask: NDArray[Any],
    aggregation: Aggregation,
    length: float | None = None,
    empty_rows: Literal["excluded", "counted"] = "excluded",
    groups: Sequence[int] | None = None,
) -> NDArray[np.float64]:
    """Return the (B, T) float64 weights whose weighted sum of token losses is the aggregate, from a (B, T) mask.

    ``length`` is the constant of "seq-mean-token-sum-norm" in tokens, the longest completion allowed.
    ``groups`` are the prompts of the rows, (B,), which "prompt-mean" needs; a prompt without tokens does not count.
    A row without tokens counts as a sequence only if ``empty_rows`` is "counted"; with no tokens at
    all every weight is 0. Sources: docs/algorithms.md. Raises UserError.
    """
    live: Bools = np.asarray(mask) != 0
    tokens = np.maximum(live.sum(axis=1, keepdims=True), 1)
    sequences = max(len(live) if empty_rows == "counted" else live.any(axis=1).sum(), 1)
    match aggregation:
        case "token-mean":
            denominator = max(live.sum(), 1)
        case "prompt-mean":
            if groups is None:
                raise UserError("prompt-mean averages over prompts and got none; give the group of each row")
            _, prompt = np.unique(np.asarray(groups), return_inverse=True)
            of_prompt = np.bincount(prompt, live.sum(axis=1))
            denominator = max((of_prompt > 0).sum(), 1) * np.maximum(of_prompt, 1)[prompt][:, None]
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
    weights: NDArray[np.float64] = live / denominator
    return weights


def refuse_untrainable(episodes: Sequence[Episode]) -> None:
    """Raise UserError for episodes that no learner can score.

    Their arrays differ in shape, their log-probs are not finite, or they were sampled greedily or from
    a truncated or penalised distribution.
    """
    if not episodes:
        raise UserError("a batch needs at least one episode, got none; collect some rollouts first")
    for e in episodes:
        named = ("tokens", "mask", "logprobs", "entropy", "reference", "lead")
        shapes = {n: array.shape for n in named if (array := getattr(e, n)) is not None}
        if len(set(shapes.values())) > 1 or not len(e.tokens) or e.mask[0]:
            listed = ", ".join(f"{name} {shape}" for name, shape in shapes.items())
            raise UserError(
                f"an episode's arrays are {listed}; give each one entry per token, the first of them a prompt's"
            )
        if not e.temperature:
            raise UserError(
                f"an episode was sampled with temperature {e.temperature} (None means top-p or a repetition "
                "penalty), whose log-probs no learner can reproduce; sample with temperature > 0, top_p=1, "
                "repetition_penalty=1 to train on it"
            )
        if not np.isfinite(e.logprobs).all():
            raise UserError("an episode has log-probs that are not finite; check the policy that sampled it")
        token_ids(e.tokens)
