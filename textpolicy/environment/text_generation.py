"""``TextGenerationEnv``: prompts, tokenised once, and a reward for what is written after them."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np

from ..errors import UserError
from ..rewards.contract import Request, RewardFunction, Scored
from ..rewards.scoring import Scorer
from .base import Environment
from .pieces import Pieces, text_decode

Message = Mapping[str, str]  # {"role": "user", "content": "..."}
Prompt = str | Sequence[Message]


class TextGenerationEnv(Environment):
    """One prompt, one completion, one reward; episodes go through the prompts in order.

    Every prompt is tokenised at construction, and a chat template is applied here and nowhere
    else: what ``reset`` returns is exactly what a policy continues and a learner scores.
    Episode e belongs to group e // group_size, whose prompt is number group % len(prompts).
    """

    observation_space = "token ids of a prompt, int32, (P,)"
    action_space = "token ids of a completion, or its text"

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
        self._codec = _Codec.of(tokenizer)
        self._pieces = Pieces(self._codec.decode)
        self._texts = [_question(i, prompt) for i, prompt in enumerate(self.prompts)]
        self._ids = [self._tokenise(i, chat) for i in range(len(self.prompts))]
        self._episode = 0  # of the pending prompt, or of the next one
        self._pending = False

    def __len__(self) -> int:
        """The number of prompts."""
        return len(self.prompts)

    def reset(self) -> tuple[np.ndarray, dict[str, Any]]:
        """The prompt of the current episode, (P,) int32; only ``step`` moves on to the next episode.

        The info dict holds episode, prompt_index, group, max_tokens and prompt_text.
        """
        self._pending = True
        i = self._prompt_index(self._episode)
        info = {
            "episode": self._episode,
            "prompt_index": i,
            "group": self._group(self._episode),
            "max_tokens": self.max_tokens,
            "prompt_text": self._texts[i],
        }
        return self._ids[i], info

    def step(self, action: Any) -> dict[str, Any]:
        """Score a completion, given as text, a list of token ids or any array of them.

        ``truncated`` is True when there are max_tokens tokens or more and the last is no stop
        token; a text never is. ``observation`` is empty; ``info`` holds response, reward, prompt,
        episode, group and, if the reward says it, is_correct. Raises ValueError before ``reset``,
        RewardError when the reward function fails.
        """
        if not self._pending:
            raise ValueError("step() needs a prompt to answer; call reset() before each step()")
        i = self._prompt_index(self._episode)
        response, truncated = self._read(action)
        [scored] = self._scored([(i, response, truncated)])
        info: dict[str, Any] = {
            "response": response,
            "reward": scored.reward,
            "prompt": self._texts[i],
            "episode": self._episode,
            "group": self._group(self._episode),
        }
        if scored.is_correct is not None:
            info["is_correct"] = scored.is_correct
        self._episode, self._pending = self._episode + 1, False
        return {
            "observation": np.zeros(0, np.int32),
            "reward": scored.reward,
            "terminated": True,
            "truncated": truncated,
            "info": info,
        }

    def clone(self) -> Self:
        """A copy that begins at its first prompt; the tokenizer, reward and prompt ids are shared."""
        clone = copy.copy(self)
        clone._episode, clone._pending = 0, False
        return clone

    # ---- for batched collection and the training loop

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
        return self._codec.text(_token_ids(tokens))

    def pieces(self, tokens: Any) -> tuple[str, ...]:
        """The text of each token of a completion, "" for special ones."""
        return self._pieces(_token_ids(tokens))

    def score(self, i: int, tokens: Any, truncated: bool) -> Scored:
        """The reward of ``tokens`` as a completion of prompt ``i``. Raises RewardError."""
        return self.scores([(i, tokens, truncated)])[0]

    def scores(self, completed: Sequence[tuple[int, Any, bool]]) -> list[Scored]:
        """The rewards of many (prompt, tokens, truncated), in order. Raises RewardError."""
        return self._scored([(i, self.text(tokens), truncated) for i, tokens, truncated in completed])

    # ---- private

    def _group(self, episode: int) -> int:
        return episode // self.group_size

    def _prompt_index(self, episode: int) -> int:
        return self._group(episode) % len(self.prompts)

    def _read(self, action: Any) -> tuple[str, bool]:
        if isinstance(action, str):
            return action, False
        tokens = _token_ids(action)
        stopped = bool(tokens) and tokens[-1] in self._codec.stop
        return self._codec.text(tokens), len(tokens) >= self.max_tokens and not stopped

    def _scored(self, completed: Sequence[tuple[int, str, bool]]) -> list[Scored]:
        requests = [Request(self._texts[i], text, self.examples[i], truncated) for i, text, truncated in completed]
        return self._scorer.score(requests, tokenizer=self.tokenizer)

    def _tokenise(self, i: int, chat: bool | None) -> np.ndarray:
        prompt = self.prompts[i]
        ids = np.array(self._codec.encode(prompt, chat), np.int32)
        if not ids.size:
            raise UserError(f"the tokenizer makes no tokens of prompt {i} ({self._texts[i]!r}); change either")
        ids.flags.writeable = False  # handed out without a copy
        return ids


@dataclass(frozen=True, slots=True)
class _Codec:
    """The four things this file asks of a tokenizer, decided once."""

    encode_text: Callable[[str], Sequence[int]]
    encode_chat: Callable[[Sequence[Message]], Sequence[int]] | None  # None: no chat template
    decode: Callable[[list[int]], str]
    stop: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        return cls(
            encode_text=tokenizer.encode,
            encode_chat=partial(_render, tokenizer) if _has_template(tokenizer) else None,
            decode=text_decode(tokenizer),
            stop=_stop_tokens(tokenizer),
        )

    def encode(self, prompt: Prompt, chat: bool | None) -> Sequence[int]:
        """Token ids of a prompt, in the chat template where ``chat`` asks for it."""
        if isinstance(prompt, str):
            if chat is False or (chat is None and self.encode_chat is None):
                return self.encode_text(prompt)
            prompt = [{"role": "user", "content": prompt}]
        if chat is False:
            raise UserError("chat is False and a prompt is a list of messages; leave chat out")
        if self.encode_chat is None:
            raise UserError(
                "this tokenizer has no chat template, which prompts made of messages need; "
                "use an instruction-tuned model, or plain strings as prompts"
            )
        return self.encode_chat(prompt)

    def text(self, tokens: list[int]) -> str:
        """What the policy wrote: no stop token, special token or outer whitespace."""
        written = tokens[:-1] if tokens and tokens[-1] in self.stop else tokens
        return self.decode(written).strip() if written else ""


def _has_template(tokenizer: Any) -> bool:
    """transformers leaves chat_template None without one; mlx-lm also knows templates that are code."""
    declared = getattr(tokenizer, "has_chat_template", getattr(tokenizer, "chat_template", True))
    return hasattr(tokenizer, "apply_chat_template") and bool(declared)


def _render(tokenizer: Any, messages: Sequence[Message]) -> Sequence[int]:
    """Token ids; transformers 5 returns them in a mapping, mlx-lm as a list."""
    rendered = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True)
    return rendered["input_ids"] if isinstance(rendered, Mapping) else rendered


def _stop_tokens(tokenizer: Any) -> frozenset[int]:
    named = (getattr(tokenizer, "eos_token_id", None), getattr(tokenizer, "eos_token_ids", None))
    return frozenset(t for ids in named if ids is not None for t in ([ids] if isinstance(ids, int) else ids))


def _token_ids(action: Any) -> list[int]:
    tokens = np.asarray(action).reshape(-1)
    if tokens.size and tokens.dtype.kind not in "iu":
        raise UserError(f"an action is {tokens.dtype} data; give text, or the token ids of a completion")
    return tokens.tolist()


def _question(i: int, prompt: Prompt) -> str:
    """What a reward sees as the prompt: the string, or the last message."""
    if not isinstance(prompt, str) and not _are_messages(prompt):
        raise UserError(f"prompt {i} is {prompt!r}; give a string or a list of {{'role', 'content'}} messages")
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    if not text.strip():
        raise UserError(f"prompt {i} is blank; give it some text")
    return text


def _are_messages(prompt: Any) -> bool:
    wanted = {"role", "content"}
    listed = isinstance(prompt, Sequence) and bool(prompt)
    return listed and all(isinstance(message, Mapping) and wanted <= {*message} for message in prompt)


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
