"""What environments ask of a tokenizer: prompts and replies as token ids, in its chat template, and text of ids."""

from __future__ import annotations

import json
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from typing import Any, Self

import numpy as np

from ...errors import UserError
from ...rewards.contract import accepted_keywords
from .pieces import text_decode

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}
Prompt = str | Sequence[Message]
Schema = Mapping[str, Any]  # a tool, as {"type": "function", "function": {...}}

TURN = "\u2042turn of the policy\u2042"  # stands for a turn in the template, so that it is never written again


@dataclass(frozen=True, slots=True)
class ChatCodec:
    """The six things an environment asks of a tokenizer, decided once."""

    encode_text: Callable[[str], Sequence[int]]
    encode_chat: Callable[..., Sequence[int]] | None  # (messages, tools) -> ids; None: no chat template
    render_chat: Callable[..., str] | None  # (messages, tools) -> text
    encode_more: Callable[[str], Sequence[int]]  # as encode_text, without a token that begins a text
    decode: Callable[[list[int]], str]
    stop: frozenset[int]

    @classmethod
    def of(cls, tokenizer: Any) -> Self:
        template = _has_template(tokenizer)
        return cls(
            encode_text=tokenizer.encode,
            encode_chat=partial(_encode, tokenizer) if template else None,
            render_chat=partial(_render, tokenizer) if template else None,
            encode_more=_without_specials(tokenizer),
            decode=text_decode(tokenizer),
            stop=_stop_tokens(tokenizer),
        )

    def encode(self, prompt: Prompt, chat: bool | None, tools: Sequence[Schema] = ()) -> Sequence[int]:
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
        return self.encode_chat(prompt, tools)

    def continuation(
        self, messages: Sequence[Message], replies: Sequence[Message], last: int | None, tools: Sequence[Schema] = ()
    ) -> list[int]:
        """Token ids that follow a turn of the policy: its end, the ``replies``, and the opening of its next turn.

        ``messages`` are those before the turn, ``last`` its last token (None: it has none). The turn is
        neither decoded nor encoded: a mark stands for it in the template, and what the template writes after the
        mark is kept, without the end of the turn if ``last`` is that. Without a template the replies' contents
        are taken as they are. Raises UserError for a template that does not write a turn as it is.
        """
        if self.render_chat is None:
            return list(self.encode_more("".join(m["content"] for m in replies)))
        marked = [*messages, {"role": "assistant", "content": TURN}, *replies]
        _, found, after = self.render_chat(marked, tools).partition(TURN)
        if not found or TURN in after:
            raise UserError(
                "the chat template changes or leaves out what the assistant said, so a conversation cannot be "
                "continued token by token; give the tokenizer a template that writes it as it is"
            )
        ids = list(self.encode_more(after))
        return ids[1:] if ids and ids[0] == last else ids

    def shows_tools(self, tools: Sequence[Schema]) -> bool:
        """Whether the template writes the ``tools`` it is given."""
        if self.render_chat is None:
            return False
        asked = [{"role": "user", "content": "?"}]
        return all(t["function"]["name"] in self.render_chat(asked, tools) for t in tools)

    def takes_role(self, role: str) -> bool:
        """Whether the template writes a message of ``role``: "system" first, another as an answer to the assistant."""
        said = {"role": role, "content": TURN}
        asked, answered = {"role": "user", "content": "?"}, {"role": "assistant", "content": "!"}
        return self._writes([said, asked] if role == "system" else [asked, answered, said])

    def _writes(self, messages: Sequence[Message]) -> bool:
        if self.render_chat is None:
            return True
        from jinja2 import TemplateError  # a template is here, so jinja2 is

        try:
            return TURN in self.render_chat(messages, ())
        except TemplateError:  # what templates raise for a role or an order they do not know
            return False

    def text(self, tokens: list[int]) -> str:
        """What the policy wrote: no stop token, special token or outer whitespace."""
        written = tokens[:-1] if tokens and tokens[-1] in self.stop else tokens
        return self.decode(written).strip() if written else ""


def token_ids(action: Any) -> list[int]:
    """The ids of an action given as a list or any array of them. Raises UserError for other data."""
    tokens = np.asarray(action).reshape(-1)
    if tokens.size and tokens.dtype.kind not in "iu":
        raise UserError(f"an action is {tokens.dtype} data; give text, or the token ids of a completion")
    return tokens.tolist()


def question(i: int, prompt: Any) -> str:
    """What a reward sees as prompt ``i``: the string, or the last message. Raises UserError for anything else."""
    if not isinstance(prompt, str) and not _are_messages(prompt):
        raise UserError(f"prompt {i} is {prompt!r}; give a string or a list of {{'role', 'content'}} messages")
    text = prompt if isinstance(prompt, str) else str(prompt[-1]["content"])
    if not text.strip():
        raise UserError(f"prompt {i} is blank; give it some text")
    if any("\ud800" <= c <= "\udfff" for c in text):
        raise UserError(f"prompt {i} holds half a character ({text!a:.60}); read its text as UTF-8")
    return text


def whole(text: str) -> str:
    """``text`` with ? for each half of a character, which JSON can carry and no tokenizer or file takes."""
    return text.encode("utf-8", "replace").decode()


def as_messages(prompt: Prompt) -> list[Message]:
    """The prompt as messages; a string is a user's."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _are_messages(prompt: Any) -> bool:
    wanted = {"role", "content"}
    listed = isinstance(prompt, Sequence) and bool(prompt)
    return listed and all(isinstance(message, Mapping) and wanted <= {*message} for message in prompt)


def _has_template(tokenizer: Any) -> bool:
    """transformers leaves chat_template None without one; mlx-lm also knows templates that are code."""
    declared = getattr(tokenizer, "has_chat_template", getattr(tokenizer, "chat_template", True))
    return hasattr(tokenizer, "apply_chat_template") and bool(declared)


def _encode(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Schema] = ()) -> Sequence[int]:
    """Token ids; transformers 5 returns them in a mapping, mlx-lm as a list."""
    rendered = tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=True, **_given(tools))
    return rendered["input_ids"] if isinstance(rendered, Mapping) else rendered


def _render(tokenizer: Any, messages: Sequence[Message], tools: Sequence[Schema] = ()) -> str:
    return tokenizer.apply_chat_template(list(messages), add_generation_prompt=True, tokenize=False, **_given(tools))


def _given(tools: Sequence[Schema]) -> dict[str, Any]:
    return {"tools": json.loads(json.dumps(list(tools)))} if tools else {}  # a copy: templates may change them


def _without_specials(tokenizer: Any) -> Callable[[str], Sequence[int]]:
    keywords = accepted_keywords(tokenizer.encode)
    takes = keywords is None or "add_special_tokens" in keywords
    return partial(tokenizer.encode, add_special_tokens=False) if takes else tokenizer.encode


def _stop_tokens(tokenizer: Any) -> frozenset[int]:
    named = (getattr(tokenizer, "eos_token_id", None), getattr(tokenizer, "eos_token_ids", None))
    return frozenset(t for ids in named if ids is not None for t in ([ids] if isinstance(ids, int) else ids))
