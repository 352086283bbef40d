"""The tools of a policy: typed Python functions, their schemas, and the partner that runs the calls of a turn."""

from __future__ import annotations

import asyncio
import functools
import inspect
import json
import queue
import re
import threading
from collections.abc import Callable, Iterator, Mapping, Sequence, Set
from concurrent.futures import Future
from dataclasses import dataclass
from itertools import islice
from typing import Any, Self, get_type_hints

from pydantic import PydanticUserError, TypeAdapter, ValidationError
from pydantic_core import ArgsKwargs

from ..errors import UserError
from .text.calls import HERMES, ParseCalls
from .text.calls import ToolCall as ToolCall
from .text.calls import parse_calls as parse_calls
from .text.conversation import Message, Reply, Schema

LONGEST_RESULT = 2000  # characters of a result that the policy sees, and parts of one that come one by one


@dataclass(frozen=True, slots=True)
class Tool:
    """The tool of one function, with the schema that the chat template writes."""

    schema: Schema
    adapter: TypeAdapter[Any]

    @classmethod
    def of(cls, fn: Callable[..., Any]) -> Self:
        """Return the tool of ``fn``: its name, the first paragraph of its docstring, its typed parameters.

        ``fn`` is a function (an async one is awaited, what a generator yields is joined), a method, a callable
        object or a ``functools.partial``, whose own arguments the model does not see. ``Annotated[int,
        Field(description="...")]`` describes a parameter. Raises UserError for a function without a name or a
        docstring, a parameter that is no typed keyword, or a type that JSON cannot carry.
        """
        inner = inspect.unwrap(fn.func if isinstance(fn, functools.partial) else fn)
        name = getattr(inner, "__name__", type(inner).__name__)
        if not callable(inner) or isinstance(inner, type) or not name.isidentifier():
            raise UserError(f"a tool is {fn!r}; give a function that has a name")
        routine = inner if inspect.isroutine(inner) else type(inner).__call__
        if not (described := inspect.getdoc(routine if routine is inner or routine.__doc__ else type(inner))):
            raise UserError(f"the tool {name!r} has no docstring; write one, for the model to read")
        try:
            adapter: TypeAdapter[Any] = TypeAdapter(_typed_keywords(fn, name, routine))  # type: ignore[arg-type]
            parameters = _without_titles(adapter.json_schema())
        except (PydanticUserError, NameError) as error:
            why = str(error).split(". ")[0].splitlines()[0].rstrip(".")
            raise UserError(
                f"the tool {name!r} has a parameter that JSON cannot carry ({why}); change its type"
            ) from error
        about = {"name": name, "description": " ".join(described.split("\n\n")[0].split()), "parameters": parameters}
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
            if isinstance(result, Future):
                result = result.result()
            if inspect.isawaitable(result) or inspect.isasyncgen(result):
                result = asyncio.run(_awaited(result))
            if isinstance(result, Iterator):
                result = [*islice(result, LONGEST_RESULT)]
                result = "".join(result) if result and all(isinstance(part, str) for part in result) else result
            return result if isinstance(result, str) else json.dumps(result, default=_plain, ensure_ascii=False)
        except ValidationError as error:
            wrong = [f"{'.'.join(map(str, e['loc']))}: {e['msg']}" for e in error.errors(include_url=False)]
            return f"Error: {self.name} was called with wrong arguments: {'; '.join(wrong)}"
        except BaseException as error:  # noqa: BLE001 - whatever a tool raises, exit() too, is for the policy to read
            return f"Error: {self.name} raised {type(error).__name__}: {_without_address(error)}"


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
        for n, call in enumerate(self.parse(text)):
            if call.mistake:
                content = f"Error: {call.mistake}"
            elif call.name not in self.tools:
                content = f"Error: there is no tool {call.name!r}; the tools are {', '.join(self.tools)}"
            else:
                content = self.tools[call.name].run(call.arguments, self.seconds)
            of_call = {"name": call.name or "unknown", "tool_call_id": f"call{n:05d}"} if self.role == "tool" else {}
            messages.append({"role": self.role, **of_call, "content": content})
        return Reply(tuple(messages))


def describe_tools(tools: Sequence[Schema], form: str = HERMES.form) -> str:
    """Return instructions for calling the tools, for a chat template that does not write them itself.

    ``form`` is a call as the policy has to write it.
    """
    listed = "\n".join(json.dumps(t["function"], ensure_ascii=False) for t in tools)
    return (
        f"You can call these functions:\n{listed}\n"
        f"To call one, write {form} and stop; its result comes back in the next message."
    )


async def _awaited(result: Any) -> Any:
    """Return what is awaited, or an iterator of what an asynchronous generator yields."""
    if not inspect.isasyncgen(result):
        return await result
    parts = []
    async for part in result:
        parts.append(part)
        if len(parts) == LONGEST_RESULT:
            break
    return iter(parts)


def _plain(value: Any) -> Any:
    """Return what JSON carries of another object, the same in every run."""
    if isinstance(value, Iterator):
        return [*islice(value, LONGEST_RESULT)]
    if inspect.isawaitable(value) or isinstance(value, Future):
        raise TypeError("its result was never awaited")
    return sorted(value, key=repr) if isinstance(value, Set) else _without_address(value)


def _without_address(value: Any) -> str:
    """Return the text of an object without its place in memory, which differs in every run."""
    return re.sub(r" at 0x[0-9a-fA-F]+", "", str(value))


def _typed_keywords(fn: Callable[..., Any], name: str, routine: Callable[..., Any]) -> Callable[..., Any]:
    """Return ``fn`` as a function whose parameters are those that a call may give, with the types of ``routine``.

    Raises UserError for one that is no typed keyword, NameError for a type that cannot be found.
    """

    def call(*args: Any, **kwargs: Any) -> Any:
        return fn(*args, **kwargs)

    given = fn.keywords if isinstance(fn, functools.partial) else {}
    try:
        parameters = [p for p in inspect.signature(fn).parameters.values() if p.name not in given]
    except (TypeError, ValueError) as error:
        raise UserError(
            f"the tool {name!r} does not say what its parameters are ({error}); wrap it in a function"
        ) from error
    for p in parameters:
        if p.annotation is p.empty or p.kind in (p.VAR_POSITIONAL, p.POSITIONAL_ONLY):
            raise UserError(f"the parameter {p.name!r} of tool {name!r} is not a typed keyword; give it a type")
    call.__annotations__ = {p.name: p.annotation for p in parameters}
    call.__annotations__ = get_type_hints(call, getattr(routine, "__globals__", None), include_extras=True)
    call.__signature__ = inspect.Signature(parameters)  # type: ignore[attr-defined]
    return call


def _without_titles(schema: Any) -> Any:
    """Return a JSON schema without the titles that pydantic makes of names, which would only cost tokens."""
    if isinstance(schema, list):
        return [_without_titles(part) for part in schema]
    if not isinstance(schema, dict):
        return schema
    return {k: _without_titles(v) for k, v in schema.items() if not (k == "title" and isinstance(v, str))}
