"""The model of a name or folder, as a server serves it."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import mlx.core as mx

from ...engine import Sampling, stop_tokens
from ...errors import UserError, refuse_outside
from ...serving import Adapter, Read
from ...types import Bools, Ints, token_ids
from ..adapters.attach import freeze
from ..adapters.merging import attach, load_adapter
from ..kernels.plain import refuse_kernels_alone
from ..models import context_length, find_model, load_model
from ..read.bounds import Bounds
from .decoding import Decoding
from .learner import Tenant
from .reading import Drawing, read
from .room import Room
from .shared import lora, twin
from .snapshot import Snapshot


class Base:
    """The base model in this process, and what can be made of it: learners, samplers, a continuous batch."""

    def __init__(
        self,
        name: str,
        model: Any,
        tokenizer: Any,
        *,
        folder: Path | None = None,
        context: int | None = None,
        room: Room | None = None,
    ):
        refuse_kernels_alone(model)
        freeze(model)
        self.name, self.tokenizer, self.tokenizer_folder = name, tokenizer, folder
        self.model, self.bounds = model, Bounds.of(model)
        self.vocabulary = self.bounds.vocabulary or model(mx.zeros((1, 1), mx.int32)).shape[-1]
        known = [n for n in (context, self.bounds.positions) if n is not None]
        self.context = min(known, default=None)
        self.stop = stop_tokens(tokenizer, needed=False)
        self.base, self._room = Snapshot(model), room
        self._decoding = Decoding(model, tokenizer, Bounds(self.vocabulary, self.context), room)

    @classmethod
    def load(cls, name: str) -> Base:
        """Return the model called ``name``: a built-in, a folder, a GGUF file or a hub id. Raises UserError."""
        model, tokenizer = load_model(name)
        return cls(name, model, tokenizer, folder=find_model(name), context=context_length(name), room=Room.of(model))

    def learner(self, adapter: Adapter) -> Tenant:
        """Return a fresh adapter with its optimiser; without a seed it starts from seed 0. Raises UserError."""
        refuse_outside("the rank of a LoRA", adapter.rank, 1, 4096, whole=True)
        seed = adapter.seed or 0
        refuse_outside("the seed of a LoRA", seed, 0, 2**63 - 1, whole=True)
        model = twin(self.model)
        return self._tenant(attach(model, lora(model, adapter), seed))

    def loaded(self, folder: Path, *, optimizer: bool) -> Tenant:
        """Return the learner that ``Tenant.save`` wrote. Raises UserError."""
        tenant = self._tenant(load_adapter(twin(self.model), folder))
        if optimizer:
            tenant.load(folder, optimizer=True)
        return tenant

    def _tenant(self, model: Any) -> Tenant:
        return Tenant(self.model, model, Bounds(self.vocabulary, self.context), self.context, self._room)

    def sampler(self, folder: Path) -> Snapshot:
        """Return the weights that were saved in ``folder``. Raises UserError."""
        return Snapshot(load_adapter(twin(self.model), folder))

    def read(
        self,
        weights: Snapshot,
        prompt: Ints,
        *,
        top: int = 0,
        targets: Ints | None = None,
        last: Bools | None = None,
        draws: int = 0,
        sampling: Sampling | None = None,
    ) -> Read:
        """Return the log-probs of ``prompt`` (P,) in one prefill, at temperature 1. Raises UserError.

        ``top`` of the likeliest tokens are reported for each position; ``targets`` (P - 1, K) are further tokens to
        score, row i in the place of token i + 1, where -1 asks for nothing and gets 0. ``last`` (P,) marks the
        last tokens of the prompt where only those are to be scored; it concerns neither ``targets`` nor ``draws``, so
        many tokens drawn in the place of each token but the first, with the temperature and seed of ``sampling``.
        """
        tokens = token_ids(prompt, self.vocabulary)
        if not len(tokens):
            raise UserError("the prompt is empty; give at least one token")
        if self.context is not None and len(tokens) > self.context:
            raise UserError(f"the prompt has {len(tokens)} tokens and the model reads {self.context}; shorten it")
        drawing = None if not draws else Drawing.of(draws, sampling or Sampling(), len(tokens) - 1)
        return read(weights.model, self.vocabulary, tokens, top, targets, last, drawing)

    def decoding(self) -> Decoding:
        """Return the continuous batch; there is one."""
        return self._decoding
