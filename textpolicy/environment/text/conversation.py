"""One episode in progress, token by token: what the policy said, what the environment answered, and when it ends."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import zip_longest
from typing import Protocol

from .chat import ChatCodec, Message, Schema, whole


@dataclass(frozen=True, slots=True)
class Reply:
    """What an environment answers to a turn of the policy."""

    messages: tuple[Message, ...] = ()  # for the policy to read before its next turn; none ends the episode
    reward: float = 0.0  # of this turn
    is_correct: bool | None = None  # whether the episode succeeded, where the environment can say so
    truncated: bool = False  # a limit of the environment's own ended it


class Partner(Protocol):
    """The other side of one episode: tools, a game, a user."""

    def reply(self, text: str) -> Reply:
        """The answer to what the policy wrote in its turn, without special tokens and outer whitespace."""


class Silent:
    """The other side of a single-turn episode: it says nothing, and the episode ends."""

    def reply(self, text: str) -> Reply:
        return Reply()


def joined(turns: Sequence[Sequence[int]], added: Sequence[Sequence[int]]) -> list[int]:
    """The tokens since the prompt: each turn and what was ``added`` after it, which the last may lack."""
    return [token for turn, more in zip_longest(turns, added, fillvalue=()) for token in (*turn, *more)]


@dataclass(frozen=True, slots=True)
class Limits:
    """How long an episode may get; one that meets a limit is truncated."""

    turn_tokens: int  # of one turn of the policy
    turns: int = 1  # of the policy
    tokens: int | None = None  # of all turns and replies together; None is no limit


@dataclass(eq=False, slots=True)
class Conversation:
    """An episode of prompt ``index``. Tokens are only ever appended, so what the policy saw is what is scored."""

    index: int
    prompt: Sequence[int]
    asked: Sequence[Message]  # the prompt
    partner: Partner
    codec: ChatCodec
    limits: Limits
    tools: Sequence[Schema] = ()
    said: list[Message] = field(default_factory=list)  # after the prompt, by policy and environment
    turns: list[list[int]] = field(default_factory=list)  # tokens of the policy
    added: list[list[int]] = field(default_factory=list)  # tokens of the environment, after each turn but the last
    replies: list[Reply] = field(default_factory=list)
    over: bool = False
    truncated: bool = False

    @property
    def tokens(self) -> list[int]:
        """All tokens so far: what the policy continues."""
        return [*self.prompt, *joined(self.turns, self.added)]

    @property
    def text(self) -> str:
        """What the policy wrote in its last turn."""
        return [m["content"] for m in self.said if m["role"] == "assistant"][-1]

    @property
    def transcript(self) -> str:
        """Everything after the prompt, for people to read; the text itself where there is one turn."""
        if len(self.turns) == 1:
            return self.text
        return "\n".join(f"[{m['role']}] {m['content']}" for m in self.said)

    def add(self, tokens: Sequence[int], truncated: bool, text: str | None = None) -> None:
        """Add a turn of the policy and the environment's reply to it.

        A ``truncated`` turn, one that was cut off, gets no reply and ends the episode. ``text`` is what the tokens
        spell, where the caller knows.
        """
        text = self.codec.text(list(tokens)) if text is None else text
        before = [*self.asked, *self.said]
        self.turns.append(list(tokens))
        self.said.append({"role": "assistant", "content": text})
        if truncated:
            self.over = self.truncated = True
            return
        reply = self.partner.reply(text)
        self.replies.append(reply)
        if not reply.messages:
            self.over, self.truncated = True, reply.truncated
            return
        if len(self.turns) < self.limits.turns:
            messages = [{k: whole(v) if isinstance(v, str) else v for k, v in m.items()} for m in reply.messages]
            added = self.codec.continuation(before, messages, tokens[-1] if tokens else None, self.tools)
            needed = len(joined(self.turns, self.added)) + len(added) + self.limits.turn_tokens
            if self.limits.tokens is None or needed <= self.limits.tokens:
                self.said += messages
                self.added.append(added)
                return
        self.over = self.truncated = True  # the next turn would pass a limit
