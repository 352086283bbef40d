"""Answer requests for completions: read prompts, and decode those of all samplers side by side."""

from __future__ import annotations

from collections import OrderedDict, deque
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path

import numpy as np

from ..engine import Sampling as Settings
from ..errors import NotFiniteError, UserError
from ..serving import Decoding, Model, Read, Request, Sampled, Weights
from ..types import Bools, Completion, Ints, token_ids
from . import messages, requests
from .checkpoints import Checkpoints
from .registry import Registry, Sampler, Tenant

IN_MEMORY = 8  # samplers' weights that are kept there
UNBOUNDED = 4096  # tokens of a completion, where neither the client nor the model bounds it


@dataclass(eq=False, slots=True)
class Wish:
    """The wish for completions, for what is read of the prompt, or for both."""

    key: str
    sampler: Sampler
    prompt: Ints  # (P,) int32
    n: int
    settings: Settings
    stop: frozenset[int] | None = None  # None: the model's
    strings: tuple[str, ...] = ()
    top: int = 0  # alternatives to each sampled token
    read: bool = False  # whether the prompt's own log-probs are wanted
    read_top: int = 0
    targets: Ints | None = None  # (P - 1, K), -1 where nothing is asked
    last: int | None = None  # positions of the prompt to read, from its end
    draws: int = 0  # tokens to draw in the place of each token of the prompt but the first
    empty: bool = False  # whether no token is to be sampled
    trained: Tenant | None = None  # the model whose newest weights are meant, in place of the sampler's
    answer: Callable[[Sequence[Sampled], Read | None], None] = lambda sampled, read: None
    refuse: Callable[[BaseException], None] = lambda error: None


class Decoders:
    """The wishes of all clients, and the weights that they are decoded with; one thread calls it."""

    def __init__(self, models: Mapping[str, Model], registry: Registry, checkpoints: Checkpoints) -> None:
        self.models, self.registry, self.checkpoints = models, registry, checkpoints
        self.decoders = {id(model): model.decoding() for model in models.values()}  # a model may have two names
        self.newest: Callable[[Tenant], Weights] = lambda tenant: self.models[tenant.base].base
        self._queue: deque[Wish] = deque()
        self._running: dict[str, tuple[Wish, Read | None]] = {}
        self._weights: OrderedDict[str, Weights] = OrderedDict()

    def __len__(self) -> int:
        """Return the number of wishes that are not fulfilled."""
        return len(self._queue) + len(self._running)

    def add(self, wish: Wish) -> None:
        """Take in a wish."""
        self._queue.append(wish)

    def cancel(self, key: str) -> None:
        """Forget a wish."""
        self._queue = deque(wish for wish in self._queue if wish.key != key)
        if (found := self._running.pop(key, None)) is not None:
            self._decoder(found[0]).cancel(key)

    def turn(self) -> None:
        """Admit what has come, at most one prompt to be read among it, and decode one step further."""
        while self._queue:
            wish = self._queue.popleft()
            reads = wish.read or wish.read_top > 0 or wish.targets is not None or wish.draws > 0
            try:
                self._admit(wish, reads)
            except Exception as error:  # noqa: BLE001 - a wish that fails, however it does, must not end the others
                wish.refuse(error)
            if reads:
                break
        for decoder in self.decoders.values():
            if not len(decoder):
                continue
            try:
                ended = decoder.step()
            except Exception as error:  # noqa: BLE001 - what was decoded together fails together, and its clients hear why
                for key in [key for key, (wish, _) in self._running.items() if self._decoder(wish) is decoder]:
                    decoder.cancel(key)
                    self._running.pop(key)[0].refuse(error)
                continue
            for key, sampled in ended.items():
                if (found := self._running.pop(key, None)) is None:
                    continue
                if isinstance(sampled, NotFiniteError):
                    found[0].refuse(sampled)
                else:
                    found[0].answer(sampled, found[1])

    def _decoder(self, wish: Wish) -> Decoding:
        return self.decoders[id(self.models[wish.sampler.base])]

    def _admit(self, wish: Wish, reads: bool) -> None:
        """Read the prompt, if that was asked for, and queue its completions. Raises UserError."""
        model = self.models[wish.sampler.base]
        weights = self._weights_of(wish.sampler) if wish.trained is None else self.newest(wish.trained)
        prompt = token_ids(wish.prompt, model.vocabulary)
        if not len(prompt):
            raise UserError("the prompt is empty; send at least one token")
        if model.context is not None and len(prompt) > model.context:
            raise UserError(
                f"the prompt has {len(prompt)} tokens, and the model reads at most {model.context}; shorten it"
            )
        read = None
        if reads:
            last: Bools | None = None
            if wish.last is not None:
                last = np.arange(len(prompt)) >= len(prompt) - wish.last
            read = model.read(
                weights, prompt, top=wish.read_top, targets=wish.targets, last=last, draws=wish.draws,
                sampling=wish.settings,
            )  # fmt: skip
        if wish.empty:
            nothing = Completion(np.zeros(0, np.int32), np.zeros(0, np.float32), None, True)
            wish.answer([Sampled(nothing)] * wish.n, read)
            return
        stop = model.stop if wish.stop is None else wish.stop
        asked = Request(weights, prompt, wish.n, wish.settings, stop, wish.strings, wish.top)
        self._decoder(wish).admit(wish.key, asked)
        self._running[wish.key] = wish, read

    def _weights_of(self, sampler: Sampler) -> Weights:
        """Return the weights of a sampler, from memory or disk. Raises UserError."""
        if sampler.base not in self.models:
            raise UserError(f"this server does not serve {sampler.base!r}; start it with that model")
        model = self.models[sampler.base]
        if sampler.follows is not None:
            published = [s for s in self.registry.samplers.values() if s.follows == sampler.follows]
            sampler = max(published, key=lambda s: s.created)
        if sampler.path is not None:
            folder, about = self.checkpoints.found(sampler.path)
            key = f"{folder} {about.job}"
        elif sampler.snapshot is not None:
            folder, key = Path(sampler.snapshot), sampler.snapshot
        else:
            return model.base
        if key not in self._weights:
            self._weights[key] = model.sampler(folder)
        self._weights.move_to_end(key)
        while len(self._weights) > IN_MEMORY:
            self._weights.popitem(last=False)
        return self._weights[key]


def limit_of(asked: int | None, model: Model, prompt: int) -> int:
    """Return the most tokens of a completion: those ``asked`` for, as far as the model has room for them."""
    room = UNBOUNDED if model.context is None else max(model.context - prompt, 0)
    return room if asked is None else asked if model.context is None else min(asked, room)


def read_wish(asked: requests.Sample, key: str, sampler: Sampler, model: Model) -> Wish:
    """Return the wish in a request of the Tinker API. Raises UserError for one that cannot be."""
    if other := {chunk.type for chunk in asked.prompt.chunks} - {"encoded_text"}:
        raise UserError(
            f"the prompt has a chunk of type {min(other)!r}; this server reads text alone: send encoded_text"
        )
    tokens = [token for chunk in asked.prompt.chunks for token in chunk.tokens]
    prompt, p = token_ids(tokens, model.vocabulary), asked.sampling_params
    limit = limit_of(p.max_tokens, model, len(prompt))
    settings = Settings(
        max_tokens=max(limit, 1),
        temperature=p.temperature,
        top_p=p.top_p,
        top_k=max(p.top_k, 0),
        seed=(p.seed or 0) % 2**63,
    )
    stops = [p.stop] if isinstance(p.stop, str) else p.stop
    strings = tuple(s for s in stops or () if isinstance(s, str))
    stop = None if stops is None or strings else frozenset(s for s in stops if isinstance(s, int))
    targets = asked.target_prompt_logprobs
    return Wish(
        key=key, sampler=sampler, prompt=prompt, n=asked.num_samples, settings=settings, stop=stop, strings=strings,
        top=asked.topk_sample_logprobs, read=bool(asked.prompt_logprobs), read_top=asked.topk_prompt_logprobs,
        targets=None if targets is None else messages.read_json_tensor(targets, "target_prompt_logprobs"),
        last=asked.prompt_logprobs_last_n, draws=asked.prompt_alt_tokens_k, empty=limit == 0,
    )  # fmt: skip
