"""The interface between the server and the model it serves: one base, any number of adapters on it.

The server calls a model from one thread only. Every array is NumPy's; ``mlx/tenants`` has the model on MLX.
"""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Protocol

from .engine import Sampling
from .errors import NotFiniteError
from .types import Bools, Completion, Floats, Ints


@dataclass(frozen=True, slots=True)
class Adapter:
    """The LoRA that a client asks for: its rank, and the layers that it is on."""

    rank: int = 32
    seed: int | None = None
    mlp: bool = True
    attention: bool = True
    unembed: bool = True


@dataclass(frozen=True, slots=True)
class Adam:
    """The settings of one step of decoupled AdamW with bias correction; ``clip`` 0 clips nothing."""

    learning_rate: float = 1e-4
    beta1: float = 0.9
    beta2: float = 0.95
    eps: float = 1e-12
    weight_decay: float = 0.0
    clip: float = 0.0  # the longest norm of the accumulated gradient


@dataclass(frozen=True, slots=True, eq=False)
class Datum:
    """The arrays of one sequence of T positions; ``inputs[name][t]`` belongs to the token after ``tokens[: t + 1]``."""

    tokens: Ints  # (T,) int
    inputs: Mapping[str, Any]  # target_tokens (T,) or (T, K) int; weights, logprobs, advantages, ... (T,) or (T, K)


@dataclass(frozen=True, slots=True, eq=False)
class Passed:
    """The result of a pass over data: log-probs of each datum's targets, and sums over all data."""

    logprobs: Sequence[Floats]  # each (T,) or (T, K) float32, as the datum's targets
    metrics: Mapping[str, float]  # named "name:reduction", "loss:sum" among them


class Weights(Protocol):
    """The weights of a sampler: the base, or an adapter as it was when they were taken; nothing changes them."""

    def save(self, folder: Path) -> None:
        """Write them into the new folder ``folder``, in mlx-lm's layout, whole or not at all. Raises OSError."""


class Learner(Protocol):
    """The adapter of a client, with its optimiser and the gradient accumulated since its last step."""

    def passed(self, data: Sequence[Datum], loss: str, config: Mapping[str, Any], *, backward: bool) -> Passed:
        """Return the log-probs of ``data`` and the sums of ``loss``; if ``backward``, add its gradient.

        Raises UserError, adding nothing, for a loss, a setting or data that cannot be.
        """

    def step(self, adam: Adam) -> Mapping[str, float]:
        """Apply the accumulated gradient and forget it. Raises UserError or NotFiniteError, with nothing changed."""

    def weights(self) -> Weights:
        """Return the adapter as it is now."""

    def save(self, folder: Path) -> None:
        """Write adapter and optimiser into the new folder ``folder``, whole or not at all. Raises OSError."""

    def load(self, folder: Path, *, optimizer: bool) -> None:
        """Become what ``save`` wrote, with its optimiser or a fresh one. Raises UserError, changing nothing."""

    def close(self) -> None:
        """Release its memory."""


@dataclass(frozen=True, slots=True, eq=False)
class Request:
    """The wish for ``n`` completions of one prompt; completion i draws from the stream (sampling.seed, i)."""

    weights: Weights
    prompt: Ints  # (P,) int32
    n: int
    sampling: Sampling
    stop: frozenset[int]
    strings: tuple[str, ...] = ()  # texts that end a completion, too; what they are part of is kept
    top: int = 0  # alternatives to report for each sampled token


@dataclass(frozen=True, slots=True, eq=False)
class Alternatives:
    """The likeliest tokens of each of T positions, most likely first, or tokens that were drawn there."""

    tokens: Ints  # (T, K) int32
    logprobs: Floats  # (T, K) float32


@dataclass(frozen=True, slots=True, eq=False)
class Sampled:
    """The completion of a request."""

    completion: Completion
    alternatives: Alternatives | None = None


@dataclass(frozen=True, slots=True, eq=False)
class Read:
    """The log-probs of a prompt of P tokens, each after those before it; the first has none (NaN)."""

    logprobs: Floats  # (P,) float32
    alternatives: Alternatives | None = None  # (P, K); of the first token, id 0 at -99999
    targets: Floats | None = None  # as asked for, float32
    drawn: Alternatives | None = None  # (P - 1, K); row i in the place of token i + 1


class Decoding(Protocol):
    """The continuous batch: requests of any samplers join it between two steps, and are decoded side by side."""

    def admit(self, key: str, request: Request) -> None:
        """Queue a request under its ``key``. Raises UserError for one that can never be served."""

    def cancel(self, key: str) -> None:
        """Forget the request ``key`` and what it has sampled."""

    def step(self) -> Mapping[str, Sequence[Sampled] | NotFiniteError]:
        """Sample a token or a few for every running completion; return requests that have ended, by key.

        A request whose logits are not finite ends with an error, and the others go on.
        """

    def __len__(self) -> int:
        """Return the number of requests that are queued or running."""


class Model(Protocol):
    """The base model in this process."""

    name: str  # as clients name it
    tokenizer: Any
    tokenizer_folder: Path | None  # from which a client can load it without a hub
    vocabulary: int
    context: int | None  # the longest sequence that it can read; None: any
    base: Weights
    stop: frozenset[int]  # the tokens that end a completion unless a request says otherwise

    def learner(self, adapter: Adapter) -> Learner:
        """Return a fresh adapter with its optimiser. Raises UserError if memory or the model does not allow it."""

    def loaded(self, folder: Path, *, optimizer: bool) -> Learner:
        """Return the learner that ``Learner.save`` wrote. Raises UserError."""

    def sampler(self, folder: Path) -> Weights:
        """Return what ``Weights.save`` or ``Learner.save`` wrote. Raises UserError."""

    def read(
        self,
        weights: Weights,
        prompt: Ints,
        *,
        top: int = 0,
        targets: Ints | None = None,
        last: Bools | None = None,
        draws: int = 0,
        sampling: Sampling | None = None,
    ) -> Read:
        """Return the log-probs of ``prompt`` in one prefill, at temperature 1.

        ``draws`` tokens are drawn at each position, with the temperature and seed of ``sampling``.
        """

    def decoding(self) -> Decoding:
        """Return the continuous batch; there is one."""
