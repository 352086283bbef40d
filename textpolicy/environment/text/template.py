"""The chat template of a tokenizer: what it writes of messages, compared with what it was given.

A template is a program that comes with a model. It may refuse messages, pass over some, and ask for today's date.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Callable, Iterable, Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass, field
from datetime import date
from string import ascii_letters
from typing import Any, Self

from ...errors import UserError
from ...rewards.answer import answered
from ...rewards.contract import accepted_keywords

Message = Mapping[str, Any]  # {"role": "user", "content": "..."}
Schema = Mapping[str, Any]  # a tool, as {"type": "function", "function": {...}}

DATE = date(2025, 1, 1)  # the day that templates with today's date write, unless another is chosen
KNOWN_ROLES = ("system", "user", "assistant")
_TEXTS = ("text", "input_text", "output_text")  # types of the parts of a content that are text
_OWN = ("messages", "tools", "tokenize", "add_generation_prompt", "continue_final_message", "chat_template")
_FORMAT = re.compile(r"%-?[A-Za-z]")  # of strftime
_SWITCH = re.compile(r"(?<!<)/(?:no_?)?think\b")  # turns thinking on and off in a message, and may be removed
_GENERATION = re.compile(r"\{%-?\s*(?:end)?generation\s*-?%\}")  # a tag of transformers' own
# The formats of strftime are replaced by the words of one day; the line break behind the macro is not written.
_ON_ONE_DAY = (
    "{% macro strftime_now(format) %}{% set it = namespace(text=format) %}{% for code, word in one_day.items() %}"
    "{% set it.text = it.text | replace(code, word) %}{% endfor %}{{ it.text }}{% endmacro %}\n"
)


class TemplateRefusalError(UserError):
    """The error of messages that a chat template refuses or does not write. Within an episode it ends that alone."""


@dataclass(frozen=True, slots=True)
class ChatTemplate:
    """The chat template of one tokenizer with its arguments."""

    apply: Callable[..., Any]  # apply_chat_template of the tokenizer
    model: str  # that it belongs to, for errors
    given: Mapping[str, Any]  # arguments for every call
    dated: Callable[..., str] | None  # get_chat_template, where the template asks for today's date
    simple: bool  # takes nothing but messages and returns token ids: what it writes is not compared
    forms: dict[Any, Callable[[Message], Message]] = field(default_factory=dict)  # by the shape of the messages

    @classmethod
    def of(cls, tokenizer: Any, given: Mapping[str, Any] | None = None, day: date | None = None) -> Self | None:
        """Return the template of a tokenizer, None if it has none. ``given`` are arguments for the template.

        ``day`` is what it writes as today's date. Raises UserError for arguments that it does not read.
        """
        # transformers leaves chat_template None without one; mlx-lm also has templates that are code
        declared = getattr(tokenizer, "has_chat_template", getattr(tokenizer, "chat_template", True))
        apply = getattr(tokenizer, "apply_chat_template", None) if declared else None
        model, source = (
            getattr(tokenizer, "name_or_path", "") or "this model",
            getattr(tokenizer, "chat_template", None),
        )
        texts = [source] if isinstance(source, str) else list(source.values()) if isinstance(source, dict) else []
        keywords = None if apply is None else accepted_keywords(apply)
        simple, arguments, dated = keywords is not None, dict(given or {}), None
        if given and not simple and texts:
            keywords = frozenset().union(*map(_variables, texts))
        for name, value in arguments.items():
            if apply is None:
                raise UserError(f"template_args has {name!r} and {model} has no chat template; leave it out")
            if name in _OWN:
                raise UserError(f"template_args has {name!r}, which the prompt decides; leave it out")
            if keywords is not None and name not in keywords:
                near = difflib.get_close_matches(name, keywords, n=1)
                hint = f"did you mean {near[0]!r}?" if near else "leave it out"
                raise UserError(f"the chat template of {model} does not read {name!r} of template_args; {hint}")
            if not isinstance(value, str | int | float | list | dict | None):
                kind = type(value).__name__
                raise UserError(
                    f"template_args has a {kind} as {name}; give a text, a number, or a list or dict of them"
                )
            if isinstance(value, str) and value.lower() in ("true", "false"):
                raise UserError(f"template_args has the text {value!r} as {name}; write {value.lower()} without quotes")
        if apply is None:
            return None
        if any("strftime_now" in text for text in texts):
            formats = _FORMAT.findall("".join(texts)) or [f"%{letter}" for letter in ascii_letters]
            words = {code: (day or DATE).strftime(code) for code in formats}
            arguments["one_day"], dated = {"%%": "\0", **words, "\0": "%"}, tokenizer.get_chat_template
        return cls(apply, model, arguments, dated, simple)

    def write(self, messages: Sequence[Message], tools: Sequence[Schema] = (), since: int = 0) -> str:
        """Return what the template writes of ``messages``, up to where the policy goes on.

        That is after the start of an assistant's turn, or within the last message if that is the assistant's. Raises
        TemplateRefusalError if the template refuses the messages, leaves out or changes one from ``since`` on.
        """
        shape = (*((m["role"], bool(m["content"]), bool(m.get("tool_calls"))) for m in messages), bool(tools), since)
        if shape not in self.forms:
            self.forms[shape] = self._form(messages, tools, since)
        text = self._until_policy(messages, tools, self.forms[shape])
        for m in messages[since:]:
            said = m["content"].strip()
            if m["role"] == "assistant" and m is not messages[-1]:
                said = (answered(said) or "").strip()  # thoughts of earlier turns may be left out
            if not says(text, said):
                raise self._left_out(m)
        return text

    def turn(self, messages: Sequence[Message], tools: Sequence[Schema] = ()) -> str | None:
        """Return what the template writes of the last message, the assistant's, behind the start of its turn.

        None where it writes the message otherwise than as the continuation of such a start. Raises
        TemplateRefusalError for messages before it that the template refuses.
        """
        if self.simple:
            return None
        before, said = self.write(messages[:-1], tools), messages[-1]["content"].strip()
        for form in _FORMS:
            with suppress(TemplateRefusalError):
                text = self.render([form(m) for m in messages], tools, start=False)
                if text.startswith(before) and says(text[len(before) :], said):
                    return str(text[len(before) :])
        return None

    def shows(self, messages: Sequence[Message], tools: Sequence[Schema], words: Iterable[str]) -> bool:
        """Return whether the template takes ``messages`` and ``tools`` and writes all the ``words``."""
        try:
            text = self.render(messages, tools)
        except TemplateRefusalError:
            return False
        return all(word in text for word in words)

    def render(
        self, messages: Sequence[Message], tools: Sequence[Schema] = (), start: bool = True, tokenize: bool = False
    ) -> Any:
        """Return the text (or token ids) of ``messages``, with the ``start`` of the assistant's turn.

        Raises TemplateRefusalError for whatever the template raises.
        """
        arguments = {"add_generation_prompt": start, "tokenize": tokenize, **self.given}
        if tools:
            arguments["tools"] = json.loads(json.dumps(list(tools)))  # a copy: templates may change them
        try:
            if self.dated is not None:
                arguments["chat_template"] = _ON_ONE_DAY + self.dated(tools=arguments.get("tools"))
            return self.apply(list(messages), **arguments)
        except Exception as error:
            roles, why = ", ".join(m["role"] for m in messages), " ".join(str(error).split()) or type(error).__name__
            raise TemplateRefusalError(
                f"the chat template of {self.model} refuses messages of the roles {roles} ({why:.200}); "
                "change their roles or order, or use another model"
            ) from error

    def _until_policy(
        self, messages: Sequence[Message], tools: Sequence[Schema], form: Callable[[Message], Message]
    ) -> str:
        """Return what the template writes of ``messages`` in a ``form``, up to where the policy goes on."""
        last = messages[-1]
        if last["role"] != "assistant":
            return self.render([form(m) for m in messages], tools)
        mark = unused("end-of-the-words", messages)
        opened = [*messages[:-1], {**last, "content": last["content"] + mark}]
        text, found, _ = self.render([form(m) for m in opened], tools, start=False).rpartition(mark)
        if not found or last.get("tool_calls"):
            raise self._left_out(last)
        return text

    def _form(self, messages: Sequence[Message], tools: Sequence[Schema], since: int) -> Callable[[Message], Message]:
        """Return the form in which the template writes messages of this shape, found with a mark in place of each text.

        Raises TemplateRefusalError if it does in none, or passes off a message of another role as the assistant's.
        """
        word = unused("text", messages)
        marked = [_marked(m, f"{word}{n}.") for n, m in enumerate(messages)]
        refusals: list[TemplateRefusalError] = []
        for form in _FORMS:
            if refusals and all(form(m) == m for m in marked):
                continue
            try:
                text = self._until_policy(marked, tools, form)
            except TemplateRefusalError as refusal:
                refusals.append(refusal)
                continue
            for n, m in enumerate(marked[since:], since):
                other = [form(o) for o in (*marked[:n], {**m, "role": "assistant"}, *marked[n + 1 :])]
                as_assistant = m["role"] not in KNOWN_ROLES and self.shows(other, tools, [text])
                in_python = form is _with_parts and any(f"{q}type{q}: {q}text{q}" in text for q in "'\"")
                if as_assistant or in_python or any(f"{word}{n}.{k}." not in text for k in _texts_in(m)):
                    refusals.append(self._left_out(messages[n]))
                    break
            else:
                return form
        raise refusals[0]

    def _left_out(self, message: Message) -> TemplateRefusalError:
        if message.get("tool_calls"):
            what, advice = "the tool calls", "write them in its content, or leave them out"
        else:
            what, advice = "the message", "write it in another role, or leave it out"
        return TemplateRefusalError(
            f"the chat template of {self.model} leaves out or changes {what} of the role {message['role']!r} "
            f"({' '.join(message['content'].split()):.60}); {advice}"
        )


# ---- messages


def plain(message: Message) -> dict[str, Any]:
    """Return a message with text as its content and mappings as the arguments of its calls. Raises UserError.

    The content may be a text, a list of parts that are text, or with calls None.
    """
    role, content, calls = message.get("role"), message.get("content"), message.get("tool_calls")
    if calls is None:  # the older format has one call
        calls = [call] if (call := message.get("function_call")) else []
    calls = [_plain_call(call) for call in (calls if isinstance(calls, Iterable) else [calls])]
    if not isinstance(role, str) or not role or (content is None and not calls):
        raise UserError(f"the message {str(message)!a:.200} lacks one of {{'role', 'content'}}; give it both, as text")
    parts, texts = [] if content is None else [content], []
    if isinstance(content, Iterable) and not isinstance(content, str | bytes | Mapping):
        parts = list(content)
    for part in parts:
        kind = part.get("type", "text") if isinstance(part, Mapping) else type(part).__name__
        text = part.get("text") if isinstance(part, Mapping) and kind in _TEXTS else part
        if not isinstance(text, str):
            raise UserError(f"a message of the role {role!r} holds {kind!r} and the policy reads text; leave it out")
        texts.append(text)
    kept = {key: value for key, value in message.items() if key not in ("tool_calls", "function_call")}
    return {**kept, "content": "".join(texts), **({"tool_calls": calls} if calls else {})}


def _plain_call(call: Any) -> dict[str, Any]:
    """Return a call of a tool with a mapping as its arguments. Raises UserError."""
    match call:
        case {"function": {"name": str(name)} as function} | ({"name": str(name)} as function):
            arguments = function.get("arguments")
            try:
                read = json.loads(arguments) if isinstance(arguments, str) and arguments else arguments or {}
            except ValueError:
                read = arguments
            if isinstance(read, Mapping):
                above = call if "function" in call else {"type": "function"}
                return {**above, "function": {**function, "name": name, "arguments": dict(read)}}
    raise UserError(f"the tool call {str(call)!a:.200} has no name, or arguments that are no JSON object; fix it")


def says(text: str, said: str) -> bool:
    """Return whether ``text`` has what was ``said``: in other white space, as a string in JSON, or without switches."""
    if said in text:
        return True
    forms = (said, _SWITCH.sub("", said), *(json.dumps(said, ensure_ascii=only)[1:-1] for only in (False, True)))
    bare = "".join(text.split())
    return any("".join(form.split()) in bare for form in forms)


def unused(name: str, data: Any) -> str:
    """Return a mark that occurs nowhere in ``data``, made of ``name``; copies of it cannot overlap."""
    text, n = repr(data), 0
    while f"{name}-{n}." in text:
        n += 1
    return f"{name}-{n}."


def _marked(message: Message, mark: str) -> dict[str, Any]:
    """Return a message with the ``mark`` and a number in place of its content (0) and each call's argument."""
    marked = {**message, "content": f"{mark}0." if message["content"] else ""}
    if calls := message.get("tool_calls"):
        given = [{"argument": f"{mark}{k}."} for k in range(1, len(calls) + 1)]
        renamed = [{**c, "function": {**c["function"], "arguments": g}} for c, g in zip(calls, given, strict=True)]
        marked["tool_calls"] = renamed
    return marked


def _texts_in(message: Message) -> range:
    """Return the numbers of the marks in a message."""
    return range(0 if message["content"] else 1, 1 + len(message.get("tool_calls") or ()))


def _with_text_arguments(message: Message) -> Message:
    """Return the message with the arguments of its calls as JSON, which some templates expect."""
    calls = [dict(call) for call in message.get("tool_calls") or ()]
    for call in calls:
        arguments = json.dumps(call["function"]["arguments"], ensure_ascii=False)
        call["function"] = {**call["function"], "arguments": arguments}
    return {**message, "tool_calls": calls} if calls else message


def _with_parts(message: Message) -> Message:
    """Return the message with a list of parts as its content, which some templates expect."""
    return {**message, "content": [{"type": "text", "text": message["content"]}] if message["content"] else []}


_FORMS: tuple[Callable[[Message], Message], ...] = (dict, _with_text_arguments, _with_parts)


def _variables(template: str) -> frozenset[str]:
    """Return the names that a template reads. Raises UserError for one that is no template."""
    from jinja2 import Environment, TemplateError, meta  # installed wherever there is a template

    try:
        parsed = Environment(extensions=["jinja2.ext.loopcontrols"]).parse(_GENERATION.sub("", template))
    except TemplateError as error:
        raise UserError(f"the chat template of the model cannot be read ({error}); fix it") from error
    return frozenset(meta.find_undeclared_variables(parsed))
