"""The environment of single completions: prompts, tokenised once, and a reward for each completion."""

from __future__ import annotations

import copy
from collections.abc import Callable, Iterable, Mapping, Sequence
from datetime import date
from typing import Any, ClassVar, Self

import numpy as np

from ..errors import UserError, refuse_outside
from ..rewards.contract import Request, RewardFunction, Scored
from ..rewards.scoring import Scorer
from .base import Environment
from .text.conversation import (
    ChatCodec,
    Conversation,
    Limits,
    Partner,
    Prompt,
    Schema,
    as_messages,
    begun,
    read_prompt,
    token_ids,
)
from .text.pieces import Pieces
from .text.template import TemplateRefusalError

PartnerFactory = Callable[[Mapping[str, Any]], Partner]  # the example of a prompt -> the other side of one episode


class TextGenerationEnv(Environment):
    """The environment of one prompt, one completion, one reward; episodes go through the prompts in order.

    Every prompt is tokenised at construction, and a chat template is applied here and nowhere
    else: a policy continues, and a learner scores, exactly the tokens that ``reset`` returns.
    Episode e belongs to group e // group_size, whose prompt is number group % len(prompts).
    """

    observation_space = "token ids of a prompt, int32, (P,)"
    action_space = "token ids of a completion, or its text"
    single_turn: ClassVar[bool] = True  # every episode is one completion, so many can be collected at once
    schemas: Sequence[Schema] = ()  # of the tools that the chat template is given
    partner_fn: PartnerFactory | None = None  # makes the partner of an episode of several turns
    max_turns: int = 1
    max_episode_tokens: int | None = None
    special: ClassVar[bool] = False  # whether partners read the special tokens of a turn too

    def __init__(
        self,
        prompts: Sequence[Prompt],
        reward_fn: RewardFunction,
        max_tokens: int = 25,
        seed: int = 42,
        tokenizer: Any = None,
        examples: Sequence[Mapping[str, Any]] | None = None,
        group_size: int = 1,
        chat: bool | None = None,
        template_args: Mapping[str, Any] | None = None,
        day: date | None = None,
    ) -> None:
        """Tokenise the prompts.

        A prompt is a string or a list of chat messages. ``reward_fn`` follows the contract of
        ``textpolicy.reward``; ``examples[i]`` is passed to it with prompt i. A completion of ``max_tokens`` or more
        without a stop token counts as truncated. ``seed`` is stored and unused: nothing here is random.
        ``tokenizer`` needs encode(text) -> list of ids and decode(ids) -> text. ``chat`` decides whether string
        prompts become a user's turn in the tokenizer's chat template; None: if it has one. ``template_args`` are
        further arguments for the template, ``day`` what it writes as today's date (None: 1 January 2025). Raises
        UserError, also for a message that the template refuses or leaves out.
        """
        if tokenizer is None:
            raise UserError("TextGenerationEnv has no tokenizer; pass the one that load_model returned")
        prompts = items("prompts", prompts)
        examples = [{} for _ in prompts] if examples is None else items("examples", examples, Mapping)
        if len(examples) != len(prompts):
            raise UserError(
                f"examples length ({len(examples)}) must match prompts length ({len(prompts)}); give one each"
            )
        refuse_outside("group_size", group_size, 1, whole=True)
        refuse_outside("max_tokens", max_tokens, 1, whole=True)
        self.examples, self.reward_fn, self.tokenizer = examples, reward_fn, tokenizer
        self.max_tokens, self.group_size, self.seed = max_tokens, group_size, seed
        self._scorer = Scorer.of(reward_fn)
        self._scorer.refuse(self.examples)
        self._codec, self._chat = ChatCodec.of(tokenizer, template_args, day), chat
        self._pieces = Pieces(self._codec.decode)
        read = [read_prompt(i, prompt) for i, prompt in enumerate(prompts)]
        self.prompts, self._texts = [prompt for prompt, _ in read], [text for _, text in read]
        self._ids: list[np.ndarray] = []
        for i, prompt in enumerate(self.prompts):
            try:
                ids = np.array(self._codec.encode(prompt, chat, self.schemas), np.int32)
            except TemplateRefusalError as refusal:
                raise UserError(f"prompt {i} ({self._texts[i]!r:.60}) cannot be asked: {refusal}") from refusal
            if not ids.size:
                raise UserError(f"the tokenizer makes no tokens of prompt {i} ({self._texts[i]!r}); change either")
            ids.flags.writeable = False  # callers get it without a copy
            self._ids.append(ids)
        self._episode = 0  # of the pending prompt, or of the next one
        self._open: Conversation | None = None

    def __len__(self) -> int:
        """The number of prompts."""
        return len(self.prompts)

    def reset(self) -> tuple[np.ndarray, dict[str, Any]]:
        """Return the prompt of the current episode, (P,) int32; the next one comes only after an episode is finished.

        The info dict holds episode, prompt_index, group, max_tokens and prompt_text.
        """
        i = self._prompt_index(self._episode)
        self._open = self.begin(i)
        return self._ids[i], {
            "episode": self._episode,
            "prompt_index": i,
            "group": self._episode // self.group_size,
            "max_tokens": self.max_tokens,
            "prompt_text": self._texts[i],
        }

    def step(self, action: Any, truncated: bool = False) -> dict[str, Any]:
        """Score a completion, given as text, a list of token ids or any array of them.

        ``truncated`` means that a limit of the policy's own cut it off. In the result it is also True when there
        are max_tokens tokens or more and the last is not a stop token, but never for a text. ``observation`` is
        empty, or all tokens so far if the policy has another turn; ``info`` holds response, reward, prompt, episode,
        group and, if the reward reports it, is_correct. Raises ValueError before ``reset``, RewardError when the
        reward function fails.
        """
        if self._open is None:
            raise ValueError("step() needs a prompt to answer; call reset() before each step()")
        conversation = self._open
        text = action if isinstance(action, str) else None
        if text is not None:
            tokens = list(self._codec.encode_more(text))
        else:
            tokens = token_ids(action)
            stopped = bool(tokens) and tokens[-1] in self._codec.stop
            truncated = truncated or (len(tokens) >= self.max_tokens and not stopped)
        conversation.add(tokens, truncated, text)
        info: dict[str, Any] = {
            "response": conversation.text,
            "prompt": self._texts[conversation.index],
            "episode": self._episode,
            "group": self._episode // self.group_size,
            "reward": 0.0,
        }
        observation = np.array([] if conversation.over else conversation.tokens, np.int32)
        if conversation.over:
            [scored] = self.judge([conversation])
            info["reward"] = scored.reward
            if scored.is_correct is not None:
                info["is_correct"] = scored.is_correct
            self._episode, self._open = self._episode + 1, None
        return {
            "observation": observation,
            "reward": info["reward"],
            "terminated": conversation.over,
            "truncated": conversation.truncated,
            "info": info,
        }

    def clone(self) -> Self:
        """Return a copy that begins at its first prompt; it shares the tokenizer, reward and prompt ids."""
        clone = copy.copy(self)
        clone._episode, clone._open = 0, None
        return clone

    # ---- for batched collection and the training loop

    @property
    def episode_tokens(self) -> int:
        """The most tokens of an episode after its prompt; without a limit those of the turns, as an estimate."""
        return self.max_episode_tokens or self.max_turns * self.max_tokens

    def prompt_ids(self, i: int) -> np.ndarray:
        """Return the token ids of prompt ``i``, (P,) int32, read-only."""
        return self._ids[i]

    def told(self, i: int, more: str) -> Sequence[int]:
        """Return the token ids of prompt ``i`` with ``more`` text at the end of what is asked, for a teacher."""
        prompt: Prompt = self.prompts[i]
        if isinstance(prompt, str):
            return self._codec.encode(f"{prompt}\n\n{more}", self._chat, self.schemas)
        last = max(n for n, m in enumerate(prompt) if m["role"] != "assistant" or n == 0)
        asked = {**prompt[last], "content": f"{prompt[last]['content']}\n\n{more}"}
        return self._codec.encode([*prompt[:last], asked, *prompt[last + 1 :]], self._chat, self.schemas)

    def prompt_text(self, i: int) -> str:
        """Return prompt ``i`` as a person reads it; of chat messages, the last one that is not the assistant's."""
        return self._texts[i]

    def upcoming(self, n: int) -> list[np.ndarray]:
        """Return the prompt ids of the next ``n`` episodes, a pending one first, without advancing."""
        return [self._ids[self._prompt_index(self._episode + k)] for k in range(n)]

    def text(self, tokens: Any) -> str:
        """Return the text of a completion's token ids, without special tokens and outer whitespace."""
        return self._codec.text(token_ids(tokens))

    def pieces(self, tokens: Any) -> tuple[str, ...]:
        """Return the text of each token of a completion, "" for special ones."""
        return self._pieces(token_ids(tokens))

    def score(self, i: int, tokens: Any, truncated: bool) -> Scored:
        """Return the reward of ``tokens`` as a completion of prompt ``i``. Raises RewardError."""
        more = self._codec.thinking(self._ids[i].tolist(), begun(as_messages(self.prompts[i])))
        request = Request(self._texts[i], self.text(tokens), self.examples[i], truncated, more)
        return self._scorer.score([request], tokenizer=self.tokenizer)[0]

    def begin(self, i: int) -> Conversation:
        """Return a new episode of prompt ``i``."""
        partner = None if self.partner_fn is None else self.partner_fn(self.examples[i])
        limits = Limits(self.max_tokens, self.max_turns, self.max_episode_tokens)
        asked = as_messages(self.prompts[i])
        return Conversation(i, self._ids[i].tolist(), asked, partner, self._codec, limits, self.schemas, self.special)

    def judge(self, conversations: Sequence[Conversation]) -> list[Scored]:
        """Return the rewards of finished episodes, in order. Raises RewardError."""
        requests = []
        for c in conversations:
            said = begun(c.prompt_messages)
            more: dict[str, Any] = self._codec.thinking(*((c.added[-1],) if c.added else (c.prompt, said)))
            if not self.single_turn:
                more |= {"messages": [*c.prompt_messages, *c.messages], "replies": tuple(c.replies)}
            requests.append(Request(self._texts[c.index], c.text, self.examples[c.index], c.truncated, more))
        return self._scorer.score(requests, tokenizer=self.tokenizer)

    def _prompt_index(self, episode: int) -> int:
        """Return the index of the prompt of an episode."""
        return episode // self.group_size % len(self.prompts)


def items(name: str, values: Any, kind: type = object) -> list[Any]:
    """Return what is in a list, tuple or array. Raises UserError for none, or items of another kind."""
    found = values.tolist() if isinstance(values, np.ndarray) else values
    listed = Sequence if kind is object else Iterable  # a data set is no sequence, but has mappings
    if isinstance(found, str | bytes | Mapping) or not isinstance(found, listed) or not (found := list(found)):
        shown = " ".join(repr(values).split())
        raise UserError(f"{name} is {shown:.80} (a {type(values).__name__}); give a list with at least one of them")
    for i, item in enumerate(found):
        if not isinstance(item, kind):
            raise UserError(f"{name} has a {type(item).__name__} at place {i}; give a {kind.__name__}")
    return found
