"""The conversation of one episode, token by token: chat templates and their token ids, turns, replies, and its end.

How messages are tokenised, and that earlier turns are never tokenised again, is decided here alone.
"""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from functools import partial
from itertools import zip_longest
from typing import Any, Protocol, Self

import numpy as np

from ...engine import stop_tokens
from ...errors import UserError
from ...rewards.answer import opened_thought
from ...rewards.contract import accepted_keywords
from .pieces import text_decode

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}
Prompt = str | Sequence[Message]
Schema = Mapping[str, Any]  # a tool, as {"type": "function", "function": {...}}

LONGEST_MARK = 64  # tokens of the mark of a thought, each of them a byte
TURN = "\u2042turn of the policy\u2042"  # stands for a turn in the template, so that the turn is never tokenised again


@dataclass(frozen=True, slots=True)
class ChatCodec:
    """The functions of a tokenizer that environments use, looked up once."""

    encode_text: Callable[[str], Sequence[int]]
    encode_more: Callable[[str], Sequence[int]]  # as encode_text, without a token that begins a text
    template: Callable[..., Any] | None  # apply_chat_template; None: the tokenizer has no chat template
    decode: Callable[[list[int]], str]
    decode_all: Callable[[list[int]], str]  # with special tokens
    stop: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        """Return the codec of a tokenizer from transformers, mlx-lm, or with encode and decode alone."""
        # transformers leaves chat_template None without one; mlx-lm also has templates that are code
        declared = getattr(tokenizer, "has_chat_template", getattr(tokenizer, "chat_template", True))
        keywords = accepted_keywords(tokenizer.encode)
        special = keywords is None or "add_special_tokens" in keywords
        return cls(
            encode_text=tokenizer.encode,
            encode_more=partial(tokenizer.encode, add_special_tokens=False) if special else tokenizer.encode,
            template=getattr(tokenizer, "apply_chat_template", None) if declared else None,
            decode=text_decode(tokenizer),
            decode_all=text_decode(tokenizer, special=True),
            stop=stop_tokens(tokenizer, needed=False),
        )

    def encode(self, prompt: Prompt, chat: bool | None, tools: Sequence[Schema] = ()) -> Sequence[int]:
        """Return the token ids of a prompt, in the chat template if ``chat``, or if None where there is one."""
        if isinstance(prompt, str):
            if chat is False or (chat is None and self.template is None):
                return self.encode_text(prompt)
            prompt = [{"role": "user", "content": prompt}]
        if chat is False:
            raise UserError("chat is False and a prompt is a list of messages; leave chat out")
        if self.template is None:
            raise UserError(
                "this tokenizer has no chat template, which prompts made of messages need; "
                "use an instruction-tuned model, or plain strings as prompts"
            )
        ids = self._render(prompt, tools, tokenize=True)
        return ids["input_ids"] if isinstance(ids, Mapping) else ids  # of transformers 5, of mlx-lm

    def continuation(
        self, messages: Sequence[Message], replies: Sequence[Message], last: int | None, tools: Sequence[Schema] = ()
    ) -> list[int]:
        """Return the token ids after a turn of the policy: its end, the ``replies``, and the start of its next turn.

        ``messages`` are those before the turn, ``last`` its last token (None: it has none). The turn is
        neither decoded nor encoded: a mark stands for it in the template, and what the template writes after the
        mark is kept, without the end of the turn if ``last`` is that. Without a template the replies' contents
        are encoded as they are. Raises UserError for a template that does not write a turn verbatim.
        """
        if self.template is None:
            return list(self.encode_more("".join(m["content"] for m in replies)))
        marked = [*messages, {"role": "assistant", "content": TURN}, *replies]
        _, found, after = self._render(marked, tools).partition(TURN)
        if not found or TURN in after:
            raise UserError(
                "the chat template changes or leaves out the assistant's messages, so a conversation cannot be "
                "continued token by token; give the tokenizer a template that writes them verbatim"
            )
        ids = list(self.encode_more(after))
        return ids[1:] if ids and ids[0] == last else ids

    def shows_tools(self, tools: Sequence[Schema]) -> bool:
        """Return whether the template writes the ``tools`` it is given."""
        if self.template is None:
            return False
        written = self._render([{"role": "user", "content": "?"}], tools)
        return all(t["function"]["name"] in written for t in tools)

    def takes_role(self, role: str) -> bool:
        """Return whether the template writes a message of ``role``: "system" first, another after the assistant's."""
        if self.template is None:
            return True
        from jinja2 import TemplateError  # installed wherever there is a template

        message, user = {"role": role, "content": TURN}, {"role": "user", "content": "?"}
        answered = [user, {"role": "assistant", "content": "!"}, message]
        try:
            return TURN in self._render([message, user] if role == "system" else answered)
        except TemplateError:  # raised by templates for an unknown role or order
            return False

    def text(self, tokens: list[int], special: bool = False) -> str:
        """Return a turn's text without its stop token, outer whitespace and (unless ``special``) special tokens."""
        written = tokens[:-1] if tokens and tokens[-1] in self.stop else tokens
        return (self.decode_all if special else self.decode)(written).strip() if written else ""

    def thinking(self, tokens: Sequence[int]) -> dict[str, str]:
        """Return {"thinking": the mark of a thought} for rewards, if the ``tokens`` before a turn end with one."""
        mark = opened_thought(self.decode_all(list(tokens[-LONGEST_MARK:])))
        return {"thinking": mark} if mark else {}

    def _render(self, messages: Sequence[Message], tools: Sequence[Schema] = (), tokenize: bool = False) -> Any:
        assert self.template is not None
        given = {"tools": json.loads(json.dumps(list(tools)))} if tools else {}  # a copy: templates may change them
        return self.template(list(messages), add_generation_prompt=True, tokenize=tokenize, **given)


@dataclass(frozen=True, slots=True)
class Reply:
    """The answer of an environment to a turn of the policy."""

    messages: tuple[Message, ...] = ()  # for the policy to read before its next turn; without any the episode ends
    reward: float = 0.0  # of this turn
    is_correct: bool | None = None  # whether the episode succeeded, where the environment knows
    truncated: bool = False  # a limit of the environment's own ended it


class Partner(Protocol):
    """The other side of one episode: tools, a game, a user."""

    def reply(self, text: str) -> Reply:
        """Answer the policy's turn, whose ``text`` is without special tokens and outer whitespace."""


@dataclass(frozen=True, slots=True)
class Limits:
    """The limits of an episode; one that meets a limit is truncated."""

    turn_tokens: int  # of one turn of the policy
    turns: int = 1  # of the policy
    tokens: int | None = None  # of all turns and replies together; None: no limit


@dataclass(eq=False, slots=True)
class Conversation:
    """The episode of prompt ``index``. Tokens are only ever appended, so the tokens that are scored were the input."""

    index: int
    prompt: Sequence[int]
    prompt_messages: Sequence[Message]
    partner: Partner | None  # None: the episode ends after one turn
    codec: ChatCodec
    limits: Limits
    tools: Sequence[Schema] = ()
    special: bool = False  # whether the partner reads the special tokens of a turn too
    messages: list[Message] = field(default_factory=list)  # after the prompt, by policy and environment
    turns: list[list[int]] = field(default_factory=list)  # tokens of the policy
    added: list[list[int]] = field(default_factory=list)  # tokens of the environment, after each turn but the last
    replies: list[Reply] = field(default_factory=list)
    over: bool = False
    truncated: bool = False

    @property
    def tokens(self) -> list[int]:
        """The tokens of the prompt, turns and replies so far, which the policy continues."""
        return [*self.prompt, *joined(self.turns, self.added)]

    @property
    def text(self) -> str:
        """The text of the policy's last turn."""
        return [m["content"] for m in self.messages if m["role"] == "assistant"][-1]

    def add(self, tokens: Sequence[int], truncated: bool, text: str | None = None) -> None:
        """Add a turn of the policy and the environment's reply to it.

        A ``truncated`` turn, one that was cut off, gets no reply and ends the episode. ``text`` is what ``tokens``
        were made of, where the policy wrote text.
        """
        heard = self.codec.text(list(tokens), self.special) if text is None else text
        text = self.codec.text(list(tokens)) if text is None else text
        before = [*self.prompt_messages, *self.messages]
        self.turns.append(list(tokens))
        self.messages.append({"role": "assistant", "content": text})
        if truncated:
            self.over = self.truncated = True
            return
        reply = Reply() if self.partner is None else self.partner.reply(heard)
        self.replies.append(reply)
        if not reply.messages:
            self.over, self.truncated = True, reply.truncated
            return
        if len(self.turns) < self.limits.turns:
            replies = [{k: whole(v) if isinstance(v, str) else v for k, v in m.items()} for m in reply.messages]
            added = self.codec.continuation(before, replies, tokens[-1] if tokens else None, self.tools)
            needed = len(joined(self.turns, self.added)) + len(added) + self.limits.turn_tokens
            if self.limits.tokens is None or needed <= self.limits.tokens:
                self.messages += replies
                self.added.append(added)
                return
        self.over = self.truncated = True  # the next turn would pass a limit


def joined(turns: Sequence[Sequence[int]], added: Sequence[Sequence[int]]) -> list[int]:
    """Return the tokens since the prompt: each turn and the tokens ``added`` after it, which the last may lack."""
    return [token for turn, more in zip_longest(turns, added, fillvalue=()) for token in (*turn, *more)]


def token_ids(action: Any) -> list[int]:
    """Return the ids of an action, a list or any array of them. Raises UserError for other data."""
    tokens = np.asarray(action).reshape(-1)
    if tokens.size and tokens.dtype.kind not in "iu":
        raise UserError(f"an action is {tokens.dtype} data; give text, or the token ids of a completion")
    return tokens.tolist()


def question(i: int, prompt: Any) -> str:
    """Return prompt ``i`` as rewards get it: the string, or the last message. Raises UserError for anything else."""
    if not isinstance(prompt, str) and not (
        isinstance(prompt, Sequence)
        and prompt
        and all(isinstance(m, Mapping) and {"role", "content"} <= {*m} for m in prompt)
    ):
        raise UserError(f"prompt {i} is {prompt!r}; give a string or a list of {{'role', 'content'}} messages")
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    if not text.strip():
        raise UserError(f"prompt {i} is blank; give it some text")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"prompt {i} contains half a character ({text!a:.60}); read its text as UTF-8")
    return text


def whole(text: str) -> str:
    """Return ``text`` with ? for each half of a character, which JSON can carry and tokenizers and files cannot."""
    return text.encode("utf-8", "replace").decode()


def as_messages(prompt: Prompt) -> list[Message]:
    """Return the prompt as messages; a string becomes a user's."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)
