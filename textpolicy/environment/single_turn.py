"""``TextGenerationEnv``: prompts, tokenised once, and a reward for what is written after them."""

from __future__ import annotations

import copy
from collections.abc import Mapping, Sequence
from typing import Any, ClassVar, Self

import numpy as np

from ..errors import UserError
from ..rewards.contract import Request, RewardFunction, Scored
from ..rewards.scoring import Scorer
from .base import Environment
from .text.chat import ChatCodec, Prompt, Schema, as_messages, question, token_ids
from .text.conversation import Conversation, Limits, Partner, Silent
from .text.pieces import Pieces


class TextGenerationEnv(Environment):
    """One prompt, one completion, one reward; episodes go through the prompts in order.

    Every prompt is tokenised at construction, and a chat template is applied here and nowhere
    else: what ``reset`` returns is exactly what a policy continues and a learner scores.
    Episode e belongs to group e // group_size, whose prompt is number group % len(prompts).
    """

    observation_space = "token ids of a prompt, int32, (P,)"
    action_space = "token ids of a completion, or its text"
    single_turn: ClassVar[bool] = True  # every episode is one completion, so many can be collected at once
    schemas: Sequence[Schema] = ()  # of the tools that the chat template is given

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
    ) -> None:
        """Tokenise the prompts.

        A prompt is a string or a list of chat messages. ``reward_fn`` follows the contract of
        ``textpolicy.reward``; ``examples[i]`` is passed to it with prompt i. ``max_tokens`` is the
        length from which a completion without a stop token counts as truncated. ``seed`` is kept,
        and unused: nothing here is random. ``tokenizer`` needs encode(text) -> list of ids and
        decode(ids) -> text. ``chat`` says whether string prompts become a user's turn in the
        tokenizer's chat template; None means wherever it has one. Raises UserError.
        """
        _refuse_unusable(prompts, max_tokens, tokenizer, examples, group_size)
        self.prompts = list(prompts)
        self.examples = [{} for _ in prompts] if examples is None else list(examples)
        self.reward_fn, self.tokenizer = reward_fn, tokenizer
        self.max_tokens, self.group_size, self.seed = max_tokens, group_size, seed
        self._scorer = Scorer.of(reward_fn)
        self._codec = ChatCodec.of(tokenizer)
        self._pieces = Pieces(self._codec.decode)
        self._texts = [question(i, prompt) for i, prompt in enumerate(self.prompts)]
        self._ids = [self._tokenise(i, chat) for i in range(len(self.prompts))]
        self._episode = 0  # of the pending prompt, or of the next one
        self._open: Conversation | None = None

    def __len__(self) -> int:
        """The number of prompts."""
        return len(self.prompts)

    def reset(self) -> tuple[np.ndarray, dict[str, Any]]:
        """The prompt of the current episode, (P,) int32; only a finished episode moves on to the next.

        The info dict holds episode, prompt_index, group, max_tokens and prompt_text.
        """
        i = self._prompt_index(self._episode)
        self._open = self.begin(i)
        info = {
            "episode": self._episode,
            "prompt_index": i,
            "group": self._group(self._episode),
            "max_tokens": self.max_tokens,
            "prompt_text": self._texts[i],
        }
        return self._ids[i], info

    def step(self, action: Any, truncated: bool = False) -> dict[str, Any]:
        """Score a completion, given as text, a list of token ids or any array of them.

        ``truncated`` says that a limit of the policy's own cut it off. In the result it is also True when there
        are max_tokens tokens or more and the last is no stop token; a text never is. ``observation`` is
        empty; ``info`` holds response, reward, prompt, episode, group and, if the reward says it,
        is_correct. Raises ValueError before ``reset``, RewardError when the reward function fails.
        """
        if self._open is None:
            raise ValueError("step() needs a prompt to answer; call reset() before each step()")
        conversation = self._open
        tokens, text, too_long = self._read(action)
        conversation.answer(tokens, text, too_long or truncated)
        if not conversation.over:
            return _unfinished(conversation, self._told(conversation))
        [scored] = self.judge([conversation])
        info = {**self._told(conversation), "reward": scored.reward}
        if scored.is_correct is not None:
            info["is_correct"] = scored.is_correct
        self._episode, self._open = self._episode + 1, None
        return {
            "observation": np.zeros(0, np.int32),
            "reward": scored.reward,
            "terminated": True,
            "truncated": conversation.truncated,
            "info": info,
        }

    def clone(self) -> Self:
        """A copy that begins at its first prompt; the tokenizer, reward and prompt ids are shared."""
        clone = copy.copy(self)
        clone._episode, clone._open = 0, None
        return clone

    # ---- for batched collection and the training loop

    @property
    def episode_tokens(self) -> int:
        """The most tokens of an episode after its prompt."""
        return self.max_tokens

    def prompt_ids(self, i: int) -> np.ndarray:
        """Token ids of prompt ``i``, (P,) int32, read-only."""
        return self._ids[i]

    def prompt_text(self, i: int) -> str:
        """Prompt ``i`` as a person reads it; of chat messages, the last one's content."""
        return self._texts[i]

    def upcoming(self, n: int) -> list[np.ndarray]:
        """Prompt ids of the next ``n`` episodes, a pending one first; nothing advances."""
        return [self._ids[self._prompt_index(self._episode + k)] for k in range(n)]

    def text(self, tokens: Any) -> str:
        """The text of a completion's token ids, without special tokens and outer whitespace."""
        return self._codec.text(token_ids(tokens))

    def pieces(self, tokens: Any) -> tuple[str, ...]:
        """The text of each token of a completion, "" for special ones."""
        return self._pieces(token_ids(tokens))

    def score(self, i: int, tokens: Any, truncated: bool) -> Scored:
        """The reward of ``tokens`` as a completion of prompt ``i``. Raises RewardError."""
        return self.scores([(i, tokens, truncated)])[0]

    def scores(self, completed: Sequence[tuple[int, Any, bool]]) -> list[Scored]:
        """The rewards of many (prompt, tokens, truncated), in order. Raises RewardError."""
        return self._scored([self._request(i, self.text(tokens), truncated) for i, tokens, truncated in completed])

    def begin(self, i: int) -> Conversation:
        """A new episode of prompt ``i``."""
        asked, limits = as_messages(self.prompts[i]), self._limits()
        return Conversation(i, self._ids[i].tolist(), asked, self._partner(i), self._codec, limits, self.schemas)

    def judge(self, conversations: Sequence[Conversation]) -> list[Scored]:
        """The rewards of finished episodes, in order. Raises RewardError."""
        return self._scored([self._request(c.index, c.text, c.truncated, self._more(c)) for c in conversations])

    # ---- what environments of more than one turn have of their own

    def _partner(self, i: int) -> Partner:
        return Silent()

    def _limits(self) -> Limits:
        return Limits(self.max_tokens)

    def _more(self, conversation: Conversation) -> Mapping[str, Any]:
        """Further keywords for the reward."""
        return {}

    # ---- private

    def _group(self, episode: int) -> int:
        return episode // self.group_size

    def _prompt_index(self, episode: int) -> int:
        return self._group(episode) % len(self.prompts)

    def _read(self, action: Any) -> tuple[list[int], str, bool]:
        """Tokens and text of an action, and whether it was cut off."""
        if isinstance(action, str):
            return list(self._codec.encode_more(action)), action, False
        tokens = token_ids(action)
        stopped = bool(tokens) and tokens[-1] in self._codec.stop
        return tokens, self._codec.text(tokens), len(tokens) >= self.max_tokens and not stopped

    def _told(self, conversation: Conversation) -> dict[str, Any]:
        return {
            "response": conversation.text,
            "prompt": self._texts[conversation.index],
            "episode": self._episode,
            "group": self._group(self._episode),
        }

    def _request(self, i: int, text: str, truncated: bool, extra: Mapping[str, Any] | None = None) -> Request:
        return Request(self._texts[i], text, self.examples[i], truncated, extra or {})

    def _scored(self, requests: Sequence[Request]) -> list[Scored]:
        return self._scorer.score(requests, tokenizer=self.tokenizer)

    def _tokenise(self, i: int, chat: bool | None) -> np.ndarray:
        prompt = self.prompts[i]
        ids = np.array(self._codec.encode(prompt, chat, self.schemas), np.int32)
        if not ids.size:
            raise UserError(f"the tokenizer makes no tokens of prompt {i} ({self._texts[i]!r}); change either")
        ids.flags.writeable = False  # handed out without a copy
        return ids


def _unfinished(conversation: Conversation, info: dict[str, Any]) -> dict[str, Any]:
    """The result of a step after which the policy has another turn; the observation is all that it continues."""
    return {
        "observation": np.array(conversation.tokens, np.int32),
        "reward": 0.0,
        "terminated": False,
        "truncated": False,
        "info": {**info, "reward": 0.0},
    }


def _refuse_unusable(
    prompts: Sequence[Prompt],
    max_tokens: int,
    tokenizer: Any,
    examples: Sequence[Mapping[str, Any]] | None,
    group_size: int,
) -> None:
    if tokenizer is None:
        raise UserError("TextGenerationEnv has no tokenizer; pass the one that load_model returned")
    if isinstance(prompts, str) or not prompts:
        raise UserError(f"prompts is {prompts!r}; give a list with at least one prompt")
    if examples is not None and len(examples) != len(prompts):
        raise UserError(f"examples length ({len(examples)}) must match prompts length ({len(prompts)}); give one each")
    if group_size < 1:
        raise UserError(f"group_size is {group_size}; set it to 1 or more")
    if max_tokens < 1:
        raise UserError(f"max_tokens is {max_tokens}; set it to 1 or more")
