"""The continuous batch of a model."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from ...errors import UserError
from ...serving import Request, Sampled
from ...types import token_ids
from ..decode.decoder import decode
from ..decode.folded_weights import folded
from ..kernels import exponentials
from ..kernels.patching import patched
from ..kernels.plain import plain_operations
from ..read.bounds import Bounds

DECODE_ROWS = 128


class Decoding:
    """The requests that are queued; a step decodes one."""

    def __init__(self, bounds: Bounds, longest: int | None):
        self._bounds, self._longest = bounds, longest
        self._queue: dict[str, Request] = {}

    def __len__(self) -> int:
        return len(self._queue)

    def admit(self, key: str, request: Request) -> None:
        """Queue a request. Raises UserError for a prompt that the model cannot read."""
        prompt = token_ids(request.prompt, self._bounds.vocabulary)
        if not len(prompt):
            raise UserError("the prompt is empty; give at least one token")
        room = len(prompt) + request.sampling.max_tokens
        if self._longest is not None and room > self._longest:
            raise UserError(
                f"{len(prompt)} tokens and up to {request.sampling.max_tokens} more are beyond the {self._longest} "
                "that the model reads; shorten the prompt, or lower max_tokens"
            )
        self._queue[key] = request

    def cancel(self, key: str) -> None:
        """Forget a request."""
        self._queue.pop(key, None)

    def step(self) -> Mapping[str, Sequence[Sampled]]:
        """Decode one request to its end."""
        if not self._queue:
            return {}
        key = next(iter(self._queue))
        request = self._queue.pop(key)
        model = request.weights.model  # type: ignore[attr-defined]
        with patched(model, exponentials.patches()), plain_operations("kimi_k3"):
            view = folded(model, min(request.n, DECODE_ROWS))
            stop = np.array(sorted(request.stop), np.int32)
            flat = decode(view, [np.array(request.prompt)] * request.n, request.sampling, stop, DECODE_ROWS)
        return {key: [Sampled(completion) for completion in flat]}
