"""The conversation of one episode, token by token: chat templates and their token ids, turns, replies, and its end.

How messages are tokenised, and that earlier turns are never tokenised again, is decided here alone.
"""

from __future__ import annotations

import logging
import re
from collections.abc import Callable, Collection, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from functools import partial
from itertools import groupby, takewhile, zip_longest
from typing import Any, Protocol, Self

import numpy as np

from ...engine import stop_tokens
from ...errors import UserError
from ...rewards.answer import answered, opened_thought, thought_marks
from ...rewards.contract import accepted_keywords
from .pieces import spoken, text_decode
from .template import ChatTemplate, Message, Schema, TemplateRefusalError, plain, says, unused

logger = logging.getLogger(__name__)

Prompt = str | Sequence[Message]

LONGEST_MARK = 64  # tokens of the mark of a thought, each of them a byte
TURN = "turn-of-the-policy"  # begins the mark that stands for a turn, so that the turn is never tokenised again


@dataclass(frozen=True, slots=True)
class ChatCodec:
    """The functions of a tokenizer that environments use, looked up once."""

    encode_text: Callable[[str], Sequence[int]]
    encode_more: Callable[[str], Sequence[int]]  # as encode_text, without a token that begins a text
    encode_after: Callable[[str], Sequence[int]]  # as encode_more, without the space that some put in front of a text
    template: ChatTemplate | None  # None: the tokenizer has no chat template
    decode: Callable[[list[int]], str]
    decode_all: Callable[[list[int]], str]  # with special tokens
    stop: frozenset[int]
    special: Mapping[int, str]  # special tokens by id
    controls: re.Pattern[str] | None  # finds the control tokens that a text spells

    @classmethod
    def of(cls, tokenizer: Any, template_args: Mapping[str, Any] | None = None, day: date | None = None) -> Self:
        """Return the codec of a tokenizer from transformers, mlx-lm, or with encode and decode alone.

        ``template_args`` are arguments for its chat template, and ``day`` is what that writes as today's date.
        Raises UserError.
        """
        keywords = accepted_keywords(tokenizer.encode)
        chooses = keywords is None or "add_special_tokens" in keywords
        encode_more = partial(tokenizer.encode, add_special_tokens=False) if chooses else tokenizer.encode
        puts_space = chooses and encode_more("\na")[len(encode_more("\n")) :] != encode_more("a")
        special = dict(zip(*(getattr(tokenizer, f"all_special_{kind}", ()) for kind in ("ids", "tokens")), strict=True))
        special |= {i: t.content for i, t in getattr(tokenizer, "added_tokens_decoder", {}).items() if t.special}
        template = ChatTemplate.of(tokenizer, template_args, day)
        return cls(
            encode_text=tokenizer.encode,
            encode_more=encode_more,
            encode_after=partial(_encode_after, encode_more) if puts_space else encode_more,
            template=template,
            decode=text_decode(tokenizer),
            decode_all=text_decode(tokenizer, special=True),
            stop=stop_tokens(tokenizer, needed=False),
            special=special,
            controls=_controls(tokenizer, special.values(), template),
        )

    def encode(self, prompt: Prompt, chat: bool | None, tools: Sequence[Schema] = ()) -> Sequence[int]:
        """Return the token ids of a prompt, in the chat template if ``chat``, or if None where there is one.

        A last message of the assistant is one that the policy continues. Raises UserError.
        """
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
        messages = [plain(m) for m in prompt]
        if self.template.simple:
            ids = self.template.render(messages, tools, tokenize=True)
            return ids["input_ids"] if isinstance(ids, Mapping) else ids  # of transformers 5, of mlx-lm
        return self._written(messages, tools)

    def continuation(
        self, messages: Sequence[Message], replies: Sequence[Message], last: int | None, tools: Sequence[Schema] = ()
    ) -> list[int]:
        """Return the token ids after a turn of the policy: its end, the ``replies``, and the start of its next turn.

        ``messages`` are those before the turn, ``last`` its last token (None: it has none). The turn is
        neither decoded nor encoded: a mark stands for it in the template, and what the template writes after the
        mark is kept, without the end of the turn if ``last`` is that. Where the template refuses messages of one role
        in a row, they are joined; where it refuses a tool's result without a call before it, one is put there. Without
        a template the replies' contents are encoded as they are, and those of tools as text. Raises
        TemplateRefusalError for a template that does not write a turn verbatim, or not the replies.
        """
        if self.template is None:
            cut = unused("cut", replies)
            results = [
                self._cut(m["content"], cut) if m["role"] == "tool" else m["content"] for m in map(plain, replies)
            ]
            return self._pieces(self.encode_after, "".join(results), cut)
        mark = unused(TURN, (messages, replies))
        before = [{**m, "content": m["content"] or "..."} for m in map(plain, messages)]  # which is not tokenised
        turn, after = {"role": "assistant", "content": mark}, [plain(m) for m in replies]
        refusals: list[TemplateRefusalError] = []
        once, every = [*_joined([*before, turn], {"assistant"}), *after], {m["role"] for m in (*before, turn, *after)}
        for said in once, [*_joined([*before, turn], every), *_joined(after, every)], _called(once, mark):
            try:
                ids = self._written(said, tools, mark)
                return ids[1:] if ids and ids[0] == last else ids
            except TemplateRefusalError as refusal:
                refusals.append(refusal)
        with suppress(TemplateRefusalError):  # the mark in a call, behind which the turn goes on up to its end
            ids = self._written(_called(once, mark, inside=True), tools, mark)
            ids = ids[next((n for n, token in enumerate(ids) if token in self.stop), len(ids)) :]
            if all(says(self.decode_all(ids), m["content"]) for m in after):
                return ids[1:] if ids and ids[0] == last else ids
        raise refusals[0]

    def turn(self, messages: Sequence[Message], tools: Sequence[Schema] = ()) -> list[int]:
        """Return the token ids of the last message, the assistant's, as the policy would have sampled them.

        They are what the template writes from the start of the turn on, calls of tools included, up to its stop token;
        or the content with a stop token, where the template writes the turn otherwise than it begins one. Raises
        TemplateRefusalError for calls that it leaves out, and a thought that it begins and the message does not end.
        """
        cut = unused("cut", (messages, tools))
        messages, tools = self._cut(([plain(m) for m in messages], tools), cut)
        said, text = messages[-1], None if self.template is None else self.template.turn(messages, tools)
        if text is None and self.template is not None:
            mark = opened_thought(self.decode_all(list(self.encode(messages[:-1], True, tools))[-LONGEST_MARK:]))
            text = said["content"].removeprefix(mark.strip()) if mark else said["content"]
            if said.get("tool_calls") or (mark and answered(text, mark) is None):
                what = "tool calls" if said.get("tool_calls") else f"a turn without the end of the thought {mark!r}"
                raise TemplateRefusalError(
                    f"the chat template of {self.template.model} cannot show {what} as the policy would say it; write "
                    "it in the content, or set prompt.template_args"
                )
        ids = self._pieces(self.encode_after, said["content"] if text is None else text, cut)
        end = next((n for n, token in enumerate(ids) if token in self.stop), len(ids))
        return [*ids[:end], *(ids[end : end + 1] or sorted(self.stop)[:1])]

    def _written(self, messages: Sequence[Message], tools: Sequence[Schema], mark: str = "") -> list[int]:
        """Return the token ids of what the template writes of ``messages``, after the ``mark`` that one of them is.

        A control token that a message spells is cut in two, so that it stays text. Raises TemplateRefusalError.
        """
        assert self.template is not None
        cut = unused("cut", (messages, tools))
        messages, tools = self._cut((messages, tools), cut)
        since = next((n for n, m in enumerate(messages, 1) if mark and mark in repr(m)), 0)
        text = self.template.write(messages, tools, since)
        if mark:
            _, found, text = text.partition(mark)
            if not found or mark in text or not all(says(text, m["content"].strip()) for m in messages[since:]):
                raise TemplateRefusalError(
                    f"the chat template of {self.template.model} changes or leaves out the assistant's messages, so a "
                    "conversation cannot be continued token by token; give the tokenizer one that writes them verbatim"
                )
        return self._pieces(self.encode_after if mark else self.encode_more, text, cut)

    def _cut(self, data: Any, cut: str) -> Any:
        """Return ``data`` with ``cut`` in each control token that its texts spell."""
        spelled = self.controls
        if spelled is None or not spelled.search(repr(data)):
            return data
        return each_text(data, lambda text: spelled.sub(lambda control: control[0] + cut, text))

    def _pieces(self, encode: Callable[[str], Sequence[int]], text: str, cut: str) -> list[int]:
        """Return the token ids of the pieces of ``text`` between the ``cut``s, the first of them from ``encode``."""
        first, *more = text.split(cut)
        return [*encode(first), *(t for piece in more for t in self.encode_after(piece))]

    def shows_tools(self, tools: Sequence[Schema]) -> bool:
        """Return whether the template writes the ``tools`` it is given."""
        user = {"role": "user", "content": "?"}
        return self.template is not None and self.template.shows([user], tools, [t["function"]["name"] for t in tools])

    def takes_role(self, role: str) -> bool:
        """Return whether the template writes a message of ``role``: "system" first, another after the assistant's."""
        of_call = {"name": "tool", "tool_call_id": "call00000"} if role == "tool" else {}
        message, user = {"role": role, "content": TURN, **of_call}, {"role": "user", "content": "?"}
        if self.template is None:
            return True
        try:
            if role == "system":
                return bool(self.template.write([message, user]))
            return bool(self.continuation([user, {"role": "assistant", "content": "!"}, message], [message], None))
        except TemplateRefusalError:
            return False

    def text(self, tokens: list[int], special: bool = False) -> str:
        """Return a turn's text without its stop token, outer whitespace and (unless ``special``) special tokens.

        Of special tokens those that mark a thought stay. Of a turn in channels (gpt-oss) the final one is the text.
        """
        written = tokens[:-1] if tokens and tokens[-1] in self.stop else tokens
        if special or self.special.keys().isdisjoint(written):
            return (self.decode_all if special else self.decode)(written).strip() if written else ""
        runs = groupby(written, lambda t: t in self.special)
        parts = [(s, [[t] for t in run] if s else [[*run]]) for s, run in runs]
        return spoken([(s, self.decode_all(ids)) for s, several in parts for ids in several]).strip()

    def thinking(self, tokens: Sequence[int], begun: str = "") -> dict[str, str]:
        """Return {"thinking": the mark of a thought} for rewards, if the ``tokens`` before a turn end with one.

        ``begun`` is what the prompt lets the assistant say; it may end inside a thought.
        """
        mark = opened_thought(self.decode_all(list(tokens[-LONGEST_MARK:])), begun)
        return {"thinking": mark} if mark else {}


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
        said = self.codec.text(list(tokens)) if text is None else text
        heard = said
        if self.special:  # a thought that the prompt opened is one for the partner too
            heard = self.codec.text(list(tokens), special=True) if text is None else text
            started = begun(self.prompt_messages) if not self.turns else ""
            last = self.added[-1] if self.added else self.prompt
            heard = self.codec.thinking(last, started).get("thinking", "") + heard
        before = [*self.prompt_messages, *self.messages]
        self.turns.append(list(tokens))
        self.messages.append({"role": "assistant", "content": said})
        if truncated:
            self.over = self.truncated = True
            return
        reply = Reply() if self.partner is None else self.partner.reply(heard)
        self.replies.append(reply)
        if not reply.messages:
            self.over, self.truncated = True, reply.truncated
            return
        if len(self.turns) < self.limits.turns:
            replies = [each_text(plain(m), whole) for m in reply.messages]
            try:
                added = self.codec.continuation(before, replies, tokens[-1] if tokens else None, self.tools)
            except TemplateRefusalError as refusal:  # of what the partner sent: it ends this episode alone
                logger.warning("an episode ended, truncated, at a reply that cannot be shown: %s", refusal)
                self.over = self.truncated = True
                return
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


def read_prompt(i: int, prompt: Any) -> tuple[Prompt, str]:
    """Return prompt ``i`` with text as the content of its messages, and the text that rewards get.

    That is the string, or the last message that is not the assistant's. Raises UserError for anything else.
    """
    contents = [prompt]
    if not isinstance(prompt, str):
        if not isinstance(prompt, Sequence) or not prompt or not all(isinstance(m, Mapping) for m in prompt):
            raise UserError(f"prompt {i} is {prompt!r}; give a string or a list of {{'role', 'content'}} messages")
        try:
            prompt = [plain(m) for m in prompt]
        except UserError as error:
            raise UserError(f"prompt {i} is {prompt!r:.200}: {error}") from error
        contents = [m["content"] for m in prompt]
    asked = [m["content"] for m in as_messages(prompt) if m["role"] != "assistant"] or contents
    if not asked[-1].strip():
        raise UserError(f"prompt {i} is blank; give it some text")
    if any("\ud800" <= c <= "\udfff" for text in contents for c in text):
        raise UserError(f"prompt {i} contains half a character ({asked[-1]!a:.60}); read its text as UTF-8")
    return prompt, asked[-1]


def begun(messages: Sequence[Message]) -> str:
    """Return what the assistant has begun to say at the end of a prompt's ``messages``, or ""."""
    return messages[-1]["content"] if messages[-1]["role"] == "assistant" else ""


def whole(text: str) -> str:
    """Return ``text`` with ? for each half of a character, which JSON can carry and tokenizers and files cannot."""
    return text.encode("utf-8", "replace").decode()


def as_messages(prompt: Prompt) -> list[Message]:
    """Return the prompt as messages; a string becomes a user's."""
    return [{"role": "user", "content": prompt}] if isinstance(prompt, str) else list(prompt)


def _joined(messages: Sequence[Message], roles: Collection[str]) -> list[Message]:
    """Return the messages with those of one of the ``roles`` in a row as one, unless they have calls."""
    joined: list[Message] = []
    for m in messages:
        before = joined[-1] if joined else {}
        if (
            m["role"] in roles
            and before.get("role") == m["role"]
            and not (before.get("tool_calls") or m.get("tool_calls"))
        ):
            between = "" if m["role"] == "assistant" else "\n\n"  # a turn continues what the prompt began
            joined[-1] = {**before, "content": f"{before['content']}{between}{m['content']}"}
        else:
            joined.append(m)
    return joined


def _called(messages: Sequence[Message], mark: str, inside: bool = False) -> list[Message]:
    """Return the messages with a call before each tool's result: in the assistant's message before it.

    The message with the ``mark`` has calls only to take the mark ``inside`` one of them.
    """
    called = list(messages)
    for n, m in enumerate(messages):
        results = takewhile(lambda r: r["role"] == "tool", messages[n + 1 :])
        calls = [(r.get("tool_call_id", "call00000"), r.get("name", "tool")) for r in results]
        marked = mark in m["content"]
        if calls and m["role"] == "assistant" and not m.get("tool_calls") and (inside or not marked):
            functions = [{"name": name, "arguments": {"turn": mark} if marked else {}} for _, name in calls[-1:]]
            functions = [*({"name": name, "arguments": {}} for _, name in calls[:-1]), *functions]
            tool_calls = [
                {"id": i, "type": "function", "function": f} for (i, _), f in zip(calls, functions, strict=True)
            ]
            called[n] = {**m, "content": m["content"].replace(mark, ""), "tool_calls": tool_calls}
    return called


def each_text(data: Any, change: Callable[[str], str]) -> Any:
    """Return ``data`` with each text in it changed."""
    if isinstance(data, str):
        return change(data)
    if isinstance(data, Mapping):
        return {each_text(key, change): each_text(value, change) for key, value in data.items()}
    return [each_text(value, change) for value in data] if isinstance(data, list | tuple) else data


def _encode_after(encode: Callable[[str], Sequence[int]], text: str) -> Sequence[int]:
    """Return the ids of ``text`` behind other text, without the space that ``encode`` puts in front of it."""
    front, ids = list(encode("\n")), list(encode(f"\n{text}"))
    return ids[len(front) :] if ids[: len(front)] == front else encode(text)


def _controls(tokenizer: Any, special: Collection[str], template: ChatTemplate | None) -> re.Pattern[str] | None:
    """Return the pattern of the first letter of a control token: a ``special`` one, or one that frames messages."""
    framed, added = "", {t.content for t in getattr(tokenizer, "added_tokens_decoder", {}).values()}
    if template is not None and not template.simple and added - {*special}:
        talk = [{"role": role, "content": "?"} for role in ("user", "assistant", "user")]
        with suppress(TemplateRefusalError):  # which is reported where messages are written
            framed = template.render(talk, start=False)
    frames = {t for t in added if t in framed and not t.isalnum()}
    if not (tokens := {t for t in frames.union(special) if len(t.strip()) > 1 and not thought_marks(t)}):
        return None
    first = "".join(sorted({t[0] for t in tokens}))
    return re.compile(f"(?=[{re.escape(first)}])(?={'|'.join(map(re.escape, sorted(tokens)))}).", re.DOTALL)
