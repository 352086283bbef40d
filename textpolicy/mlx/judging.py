"""Read how likely the next token is each of some digits, after messages that begin alike, for a judge."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from itertools import takewhile
from typing import Any

import mlx.core as mx
import mlx.nn as nn
import numpy as np

from ..environment.text.conversation import ChatCodec
from ..errors import UserError
from .engine import pass_patches
from .kernels.patching import patched
from .kernels.plain import plain_operations
from .models import load_model
from .read.context import Context
from .score.checkpointing import held
from .score.logprobs import Split


class Reader:
    """The model that reads messages and is asked for a digit. What messages begin with is read once and kept.

    Each message is a pass of its own, so that what else is read changes no bit of its result.
    """

    def __init__(
        self, model: str | tuple[nn.Module, Any], digits: str, template_args: Mapping[str, Any] | None = None
    ) -> None:
        """Load ``model``, or take a model with its tokenizer. Raises UserError for a tokenizer without such digits."""
        self.model, tokenizer = load_model(model) if isinstance(model, str) else model
        self._codec, self._split = ChatCodec.of(tokenizer, template_args), Split.of(self.model)
        self._kept: dict[str, tuple[list[int], Context]] = {}  # by what messages begin with: its tokens, as read
        self._ids: list[list[int]] = []  # the tokens of each digit, alone and after a space
        for digit in digits:
            forms = [list(self._codec.encode_more(text)) for text in (digit, f" {digit}")]
            self._ids.append(sorted({form[0] for form in forms if len(form) == 1}))
            if not self._ids[-1]:
                raise UserError(f"the judge's tokenizer has no token for {digit!r}; choose another model")

    @plain_operations()
    def __call__(self, opening: str, rests: Sequence[str]) -> np.ndarray:
        """Return the probabilities (N, digits) float64 of the next token after each message ``opening + rest``."""
        with patched(self.model, pass_patches()):
            return np.array([self._one(opening, rest) for rest in rests], float).reshape(-1, len(self._ids))

    def _one(self, opening: str, rest: str) -> list[float]:
        ids = list(self._codec.encode(opening + rest, None))
        if opening not in self._kept:
            others = [list(self._codec.encode(opening + end, None)) for end in ("a", "7 z", "(\n")]
            alike = takewhile(lambda column: len({*column}) == 1, zip(*others, strict=False))
            begin, context = [column[0] for column in alike], Context(self.model)
            if begin:
                context.read(self._split.body, mx.array([begin]))
                mx.eval(held(context.layers))
            self._kept[opening] = (begin, context)
        begin, context = self._kept[opening]
        if not begin or ids[: len(begin)] != begin or len(ids) == len(begin):
            begin, context = [], Context(self.model)
        hidden = context.fork(np.zeros(1, np.int32)).read(self._split.body, mx.array([ids[len(begin) :]]))
        probabilities = mx.softmax(self._split.head(hidden[0, -1:]).astype(mx.float32), axis=-1)
        found = np.array(probabilities, float)[0]
        return [float(found[some].sum()) for some in self._ids]
