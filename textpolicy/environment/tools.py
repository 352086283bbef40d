"""The tools of a policy: typed Python functions, their schemas, and the parser of calls."""

from __future__ import annotations

import inspect
import json
import queue
import re
import threading
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any, Self

from pydantic import PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import ArgsKwargs

from ..errors import UserError
from .text.conversation import Message, Reply, Schema

LONGEST_RESULT = 2000  # characters of a result that the policy sees


@dataclass(frozen=True, slots=True)
class ToolCall:
    """The call of a tool as the policy wrote it."""

    name: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    mistake: str = ""  # why the text is not a call, for the policy to read; "" if it is one


ParseCalls = Callable[[str], Sequence[ToolCall]]  # the text of a turn -> the calls in it, [] for none


@dataclass(frozen=True, slots=True)
class Tool:
    """The tool of one function, with the schema that the chat template writes."""

    schema: Schema
    adapter: TypeAdapter[Any]

    @classmethod
    def of(cls, fn: Callable[..., Any]) -> Self:
        """Return the tool of ``fn``: its name, the first paragraph of its docstring, its typed parameters.

        ``Annotated[int, Field(description="...")]`` describes a parameter. Raises UserError for a function
        without a docstring, a parameter without a type, or a type that JSON cannot carry.
        """
        for parameter in inspect.signature(fn).parameters.values():
            if parameter.annotation is parameter.empty or parameter.kind in (
                parameter.VAR_POSITIONAL,
                parameter.POSITIONAL_ONLY,
            ):
                raise UserError(
                    f"the parameter {parameter.name!r} of tool {fn.__name__!r} is not a typed keyword; give it a type"
                )
        if not (described := inspect.getdoc(fn)):
            raise UserError(f"the tool {fn.__name__!r} has no docstring; write one, for the model to read")
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(fn)  # type: ignore[arg-type]  # pydantic takes functions too
            parameters = _without_titles(adapter.json_schema())
        except PydanticUserError as error:
            why = str(error).split(". ")[0].rstrip(".")
            raise UserError(
                f"the tool {fn.__name__!r} has a parameter that JSON cannot carry ({why}); change it"
            ) from error
        about = {
            "name": fn.__name__,
            "description": " ".join(described.split("\n\n")[0].split()),
            "parameters": parameters,
        }
        return cls({"type": "function", "function": about}, adapter)

    @property
    def name(self) -> str:
        """The function's name."""
        return self.schema["function"]["name"]

    def run(self, arguments: Mapping[str, Any], seconds: float) -> str:
        """Call the tool and return its result as text; an error or ``seconds`` running out becomes text too.

        The tool runs in a thread of this process, which cannot be ended: one that takes too long is abandoned.
        """
        answers: queue.SimpleQueue[str] = queue.SimpleQueue()
        threading.Thread(target=lambda: answers.put(self._call(arguments)), daemon=True).start()
        try:
            text = answers.get(timeout=seconds)
        except queue.Empty:
            return f"Error: {self.name} took longer than {seconds:g} s and was given up"
        return text if len(text) <= LONGEST_RESULT else f"{text[:LONGEST_RESULT]} ... ({len(text)} characters in all)"

    def _call(self, arguments: Mapping[str, Any]) -> str:
        """Call the function in the current thread and return its result or error as text."""
        try:
            result = self.adapter.validate_python(ArgsKwargs((), dict(arguments)))
            return result if isinstance(result, str) else json.dumps(result, default=str, ensure_ascii=False)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]
            return f"Error: {self.name} was called with wrong arguments: {'; '.join(wrong)}"
        except BaseException as error:  # noqa: BLE001 - whatever a tool raises, exit() too, is for the policy to read
            return f"Error: {self.name} raised {type(error).__name__}: {error}"


@dataclass(frozen=True, slots=True)
class ToolPartner:
    """The partner that answers the calls in a turn; a turn without a call ends the episode."""

    tools: Mapping[str, Tool]
    parse: ParseCalls
    role: str  # of the messages that carry results
    seconds: float  # for one call

    def reply(self, text: str) -> Reply:
        """Run the calls in ``text`` and return a message with the result of each, in order."""
        messages: list[Message] = []
        for call in self.parse(text):
            if call.mistake:
                content = f"Error: {call.mistake}"
            elif call.name not in self.tools:
                content = f"Error: there is no tool {call.name!r}; the tools are {', '.join(self.tools)}"
            else:
                content = self.tools[call.name].run(call.arguments, self.seconds)
            named = {"name": call.name} if call.name and self.role == "tool" else {}
            messages.append({"role": self.role, **named, "content": content})
        return Reply(tuple(messages))


# ---- calls in a text

_TAGGED = re.compile(r"<tool_call>(.*?)(?:</tool_call>|\Z)", re.DOTALL)


def parse_calls(text: str) -> list[ToolCall]:
    """Return the calls in a turn: JSON in <tool_call> tags (Hermes, Qwen), or a turn that is a JSON object (Llama 3).

    The object has a "name" and "arguments" (or "parameters"). A tag whose content is not a call
    becomes a ``ToolCall`` with a ``mistake`` for the policy to read.
    """
    if tagged := _TAGGED.findall(text):
        return [_call(content) for content in tagged]
    bare = text.strip().removeprefix("<|python_tag|>")
    return [_call(bare)] if bare.startswith("{") and bare.endswith("}") and '"name"' in bare else []


def _call(content: str) -> ToolCall:
    """Return the call that ``content`` encodes in JSON, or one with a ``mistake``."""
    try:
        read = json.loads(content)
    except (ValueError, RecursionError) as error:
        return ToolCall(mistake=f'the call is no JSON ({error}); write an object with "name" and "arguments"')
    match read:
        case {"name": str(name), "arguments": dict(arguments)} | {"name": str(name), "parameters": dict(arguments)}:
            return ToolCall(name, arguments)
        case {"name": str(name)} if not {"arguments", "parameters"} & {*read}:
            return ToolCall(name)
        case _:
            return ToolCall(mistake='the call is not an object with "name" and "arguments"; write it as one')


def describe_tools(tools: Sequence[Schema]) -> str:
    """Return instructions for calling the tools, for a chat template that does not write them itself."""
    listed = "\n".join(json.dumps(t["function"], ensure_ascii=False) for t in tools)
    return (
        f"You can call these functions:\n{listed}\n"
        'To call one, write <tool_call>{"name": "...", "arguments": {...}}</tool_call> and stop; '
        "its result comes back in the next message."
    )


def _without_titles(schema: Any) -> Any:
    """Return a JSON schema without the titles that pydantic makes of names, which would only cost tokens."""
    if isinstance(schema, list):
        return [_without_titles(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {k: _without_titles(v) for k, v in schema.items() if not (k == "title" and isinstance(v, str))}
