"""The tool calls in what a policy writes: the grammars that chat templates explain, and how each is read.

A template's grammar is known by the call that it writes for an assistant's message, or by marks in what it writes.
The forms are those of the chat templates of the families named in ``GRAMMARS``.
"""

from __future__ import annotations

import ast
import json
import re
import warnings
from collections.abc import Callable, Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from itertools import islice
from typing import Any

from ...errors import UserError
from ...rewards.answer import answered
from .conversation import ChatCodec, Message, Schema
from .template import TemplateRefusalError


@dataclass(frozen=True, slots=True)
class ToolCall:
    """The call of a tool as the policy wrote it."""

    name: str = ""
    arguments: Mapping[str, Any] = field(default_factory=dict)
    mistake: str = ""  # why the text is not a call, for the policy to read; "" if it is one
    span: tuple[int, int] | None = field(default=None, compare=False, repr=False)  # where the text has it, if known


ParseCalls = Callable[[str], Sequence[ToolCall]]  # the text of a turn -> the calls in it, [] for none
Known = Mapping[str, Mapping[str, Any]]  # the name of a tool -> the JSON schema of its parameters
Find = Callable[[str, Known], list[ToolCall]]
Body = Callable[[str, int, Known], tuple[list[ToolCall], int]]  # the calls that begin at an index, and their end


@dataclass(frozen=True, slots=True)
class Grammar:
    """The way of writing calls that a family of chat templates explains."""

    name: str
    marks: str  # a pattern in what such a template writes
    form: str  # a call, as the policy is told to write it
    find: Find  # every call outside of a thought, and every mistake


@dataclass(frozen=True, slots=True)
class CallReader:
    """The parser of the calls of some tools, in the grammar that a chat template explains."""

    grammar: Grammar
    known: Known

    @classmethod
    def of(cls, grammar: Grammar, schemas: Sequence[Schema]) -> CallReader:
        """Return the parser for the tools of ``schemas``."""
        return cls(grammar, {s["function"]["name"]: s["function"].get("parameters") or {} for s in schemas})

    def __call__(self, text: str) -> list[ToolCall]:
        """Return the calls in a turn, whose ``text`` has its special tokens; a mistake ends with the right form."""
        calls = self.grammar.find(text, self.known)
        form = self.grammar.form
        return [replace(c, mistake=f"{c.mistake}; write it as {form}") if c.mistake else c for c in calls]


# ---- where calls stand


def _after_thought(find: Find) -> Find:
    """Return ``find`` without the calls in thoughts, whose marks do not count inside of calls."""

    def found(text: str, known: Known) -> list[ToolCall]:
        calls, outside = find(text, known), text
        for start, end in (c.span for c in calls if c.span and not c.mistake):
            outside = outside[:start] + "x" * (end - start) + outside[end:]
        if (rest := answered(outside)) is None:  # a call that was begun in a thought may have run over its end
            outside, rest = text, answered(text)
        if rest is None:
            return []
        begin = outside.rfind(rest)
        spoken = [c for c in calls if c.span and c.span[0] >= begin]
        if spoken or not begin:
            return spoken
        return [replace(c, span=(c.span[0] + begin, c.span[1] + begin)) for c in find(text[begin:], known) if c.span]

    return found


_FIRST_WORD = re.compile(r"\s*([\w.:-]+)")
_ATTEMPT = re.compile(r"\s*(?:[\[{<]|[\w.:-]+\s*>?\s*[(\[{<])")  # how the content of a call begins


def _tagged(opens: str, closes: str, body: Body) -> Find:
    """Return what finds calls between two tags, which are patterns; ``closes`` is "" where there is no closing tag.

    The last closing tag may be missing. What stands in tags without being a call is a mistake if two of these
    hold: it begins a line, it begins as a call does, nothing comes after it. Otherwise the text is about the tag.
    """
    opening, tag = re.compile(opens), re.compile(rf"{opens}|(?P<closing>{closes})" if closes else opens)
    closing = re.compile(rf"\s*(?:{closes}|(?={opens})|\Z)" if closes else "")
    nothing = re.compile(rf"\s*(?:{opens}|\Z)")

    def find(text: str, known: Known) -> list[ToolCall]:
        calls: list[ToolCall] = []
        at = 0
        while first := opening.search(text, at):
            start, begin = first.span()
            try:
                read, end = body(text, begin, known)
                if (closed := closing.match(text, end)) is None:
                    raise ValueError("the call goes on where it should end")
                calls += [replace(call, span=(start, closed.end())) for call in read]
                at = closed.end()
            except (ValueError, RecursionError) as error:
                second = tag.search(text, begin)
                edge = second.start() if second else len(text)
                closed = second if second and second.lastgroup == "closing" else None
                end = closed.end() if closed else edge
                begins_line = not text[max(at, text.rfind("\n", 0, start)) : start].strip()
                word = _FIRST_WORD.match(text, begin, edge)
                attempt = _ATTEMPT.match(text, begin, edge) is not None or (word is not None and word[1] in known)
                ends = nothing.match(text, end) is not None and (
                    closed is not None or attempt or not text[begin:edge].strip()
                )
                if begins_line + attempt + ends >= 2:
                    calls.append(ToolCall(mistake=str(error), span=(start, end)))
                at = end
        return calls

    return _after_thought(find)


# ---- JSON

_DECODER = json.JSONDecoder(strict=False)  # line breaks may stand in a string
_OPENS = re.compile(r"\{|\[(?![A-Z])")  # begins a JSON object or list, but not a tag such as [TOOL_CALLS]
_SPACE, _BETWEEN = re.compile(r"\s*"), re.compile(r"[\s,;]*")


def _json(text: str, at: int) -> tuple[Any, int]:
    """Return the JSON value that begins at an index, and its end. Raises ValueError."""
    try:
        return _DECODER.raw_decode(text, at)
    except (ValueError, RecursionError) as error:
        raise ValueError(f"the call is no JSON ({error})") from error


def _objects(text: str, at: int) -> tuple[list[Any], int]:
    """Return the JSON values from an index on, joined by , or ; or in lists, and their end. Raises ValueError."""
    values: list[Any] = []
    end, at = at, _skip(_BETWEEN, text, at)
    while not values or _OPENS.match(text, at):
        value, end = _json(text, at)
        values += value if isinstance(value, list) else [value]
        at = _skip(_BETWEEN, text, end)
        if not values:
            raise ValueError("there is no call in the list")
    return values, end


def _skip(pattern: re.Pattern[str], text: str, at: int) -> int:
    """Return the index after what ``pattern`` matches at ``at``, or ``at``."""
    found = pattern.match(text, at)
    return at if found is None else found.end()


def _json_calls(text: str, at: int, known: Known) -> tuple[list[ToolCall], int]:
    """Read calls as JSON objects."""
    values, end = _objects(text, at)
    return [_call(value) for value in values], end


def _call(value: Any) -> ToolCall:
    """Return the call that a JSON value is. Raises ValueError."""
    match value:
        case {"function": dict(inner)}:
            value = inner
    match value:
        case {"name": str(name)} if name and (
            {"arguments", "parameters"} & {*value} or {*value} <= {"name", "id", "type"}
        ):
            return ToolCall(name, _arguments(value.get("arguments", value.get("parameters"))))
    raise ValueError("the call is not an object with a name and arguments")


def _arguments(given: Any) -> Mapping[str, Any]:
    """Return the arguments that are given as an object, as JSON text, or as null for none. Raises ValueError."""
    if isinstance(given, str):
        text = given.strip() or "null"
        value, end = _json(text, 0)
        given = value if end == len(text) else text
    if given is not None and not isinstance(given, dict):
        raise ValueError("the arguments of the call are no object")
    return given or {}


def _named_json(name: str, end: str) -> Body:
    """Return what reads a name, which a pattern finds, and its arguments in JSON, up to another pattern."""
    names, ends = re.compile(name), re.compile(end)

    def body(text: str, at: int, known: Known) -> tuple[list[ToolCall], int]:
        if (found := names.match(text, at)) is None:
            raise ValueError("the call has no name")
        value, stop = _json(text, found.end())
        return [ToolCall(found[1], _arguments(value))], _skip(ends, text, stop)

    return body


_NAME = re.compile(r'"name"\s*:\s*"([^"]*)"')


def _bare(text: str, known: Known) -> list[ToolCall]:
    """Return the calls of a turn that is JSON, or of what follows <|python_tag|>.

    Without that tag, the objects of a turn are calls if all have the name of a tool and arguments, else an answer;
    a turn that begins so and goes on in another way is a mistake.
    """
    text = text.removesuffix("<|eom_id|>").removesuffix("<|eot_id|>")
    tag = -1 if text.lstrip().startswith(("{", "[")) else text.find("<|python_tag|>")
    written = text if tag < 0 else text[tag + len("<|python_tag|>") :]
    span = (max(tag, 0), len(text))
    try:
        values, end = _objects(written, 0)
        if _skip(_BETWEEN, written, end) < len(written):
            raise ValueError("the call goes on where it should end")
        functions = [v.get("function", v) if isinstance(v, dict) else v for v in values]
        meant = all(
            isinstance(f, dict) and {"parameters", "arguments"} & {*f} and (not known or f.get("name") in known)
            for f in functions
        )
        return [replace(_call(v), span=span) for v in values] if tag >= 0 or meant else []
    except (ValueError, RecursionError) as error:
        name = _NAME.search(written) if written.lstrip().startswith(("{", "[")) else None
        meant = name is not None and name[1] in known and ('"parameters"' in written or '"arguments"' in written)
        return [ToolCall(mistake=str(error), span=span)] if tag >= 0 or meant else []


# ---- tags around each argument


def _parameters(text: str, at: int, schema: Mapping[str, Any], key: str, end: str) -> tuple[dict[str, Any], int]:
    """Return arguments, each after a ``key`` and up to an ``end``, which are patterns, and the index after them.

    Raises ValueError for one that does not end.
    """
    keys, ends, at = re.compile(key), re.compile(end), _skip(_SPACE, text, at)
    properties, others = schema.get("properties") or {}, schema.get("additionalProperties")
    arguments: dict[str, Any] = {}
    while found := keys.match(text, at):
        if (stop := ends.search(text, found.end())) is None:
            raise ValueError(f"the argument {found[1]} of the call does not end")
        value = text[found.end() : stop.start()]
        if any(key[1] in properties and key[1] not in arguments for key in keys.finditer(value)):
            raise ValueError(f"the argument {found[1]} of the call does not end")
        arguments[found[1]] = _typed(value, properties.get(found[1], others), schema.get("$defs", {}))
        at = _skip(_SPACE, text, stop.end())
    return arguments, at


def _functions(text: str, at: int, known: Known) -> tuple[list[ToolCall], int]:
    """Read calls after "<function=", as Qwen3-Coder writes them."""
    calls: list[ToolCall] = []
    function, name, over = re.compile(r"\s*<function="), re.compile(r"\s*([\w.:-]+)\s*>"), re.compile(r"\s*</function>")
    if not text.endswith("<function=", 0, at):
        raise ValueError("the call has no <function=...>")
    while True:
        if (named := name.match(text, at)) is None:
            raise ValueError("the call has no name")
        key = r"<parameter=\s*([^\s<>]+)\s*>\n?"
        end = r"\n?</parameter>(?=\s*(?:<parameter=|</function>\s*(?:</?tool_call>|<function=|\Z)|</tool_call>|\Z))"
        arguments, at = _parameters(text, named.end(), known.get(named[1], {}), key, end)
        calls.append(ToolCall(named[1], arguments))
        at = _skip(over, text, at)
        if (another := function.match(text, at)) is None:
            return calls, at
        at = another.end()


def _keys_and_values(text: str, at: int, known: Known) -> tuple[list[ToolCall], int]:
    """Read a call with keys and values in tags of their own, as GLM writes it."""
    if (named := re.compile(r"\s*([\w.:-]+)\s*").match(text, at)) is None:
        raise ValueError("the call has no name")
    key = r"<arg_key>\s*([^\s<>]*)\s*</arg_key>\s*<arg_value>"
    end = r"</arg_value>(?=\s*(?:<arg_key>|</tool_call>|\Z))"
    arguments, end_at = _parameters(text, named.end(), known.get(named[1], {}), key, end)
    if not arguments and named[1] not in known:
        raise ValueError("the call does not name a tool")
    return [ToolCall(named[1], arguments)], end_at


def _typed(text: str, schema: Any, types: Mapping[str, Any]) -> Any:
    """Return the value of an argument that is written without quotes: the text itself if it may be one.

    ``types`` are the definitions that a schema refers to. What is neither JSON nor Python stays text.
    """
    kinds = {*_kinds(schema, types)}
    if kinds == {"string"}:
        return text
    for read in (_DECODER.decode, _python):
        try:
            value = read(text.strip())
        except (ValueError, RecursionError):
            continue
        nested = isinstance(value, (list, dict))
        if "string" not in kinds or (value is None and "null" in kinds) or (nested and kinds & {"array", "object"}):
            return value
    return text


def _kinds(schema: Any, types: Mapping[str, Any]) -> Iterator[str]:
    """Yield the JSON types that a schema allows; none for any."""
    if not isinstance(schema, Mapping):  # true and false are schemas too
        return
    if "$ref" in schema:
        name = schema["$ref"].rpartition("/")[2]
        yield from _kinds(types.get(name, {}), {n: t for n, t in types.items() if n != name})
    kind = schema.get("type", ())
    yield from [kind] if isinstance(kind, str) else kind
    if not kind:
        values = schema.get("enum", [schema["const"]] if "const" in schema else ())
        yield from ("string" if isinstance(v, str) else "null" if v is None else "number" for v in values)
    for choices in ("anyOf", "oneOf", "allOf"):
        for choice in schema.get(choices, ()):
            yield from _kinds(choice, types)


# ---- Python


def _python(source: str) -> Any:
    """Return the list, dict, truth value or None that is written in Python. Raises ValueError."""
    node = _expression(source)
    if not isinstance(node, ast.List | ast.Dict) and source not in ("True", "False", "None"):
        raise ValueError(f"{source:.60} is not written in Python alone")
    return _literal(node)


def _expression(source: str) -> ast.expr:
    """Return the syntax tree of an expression. Raises ValueError."""
    try:
        with warnings.catch_warnings():
            warnings.simplefilter("ignore")  # escapes that Python does not know stay as they are
            return ast.parse(source.strip(), mode="eval").body
    except (SyntaxError, RecursionError, MemoryError) as error:
        raise ValueError(f"the call is no Python ({error})") from error


def _literal(node: ast.expr) -> Any:
    """Return the value of a literal that JSON has too, true, false and null among them. Raises ValueError."""
    match node:
        case ast.Constant(value=str() | int() | float() | None as value):
            return value
        case ast.UnaryOp(op=ast.USub(), operand=ast.Constant(value=int() | float() as value)):
            return -value
        case ast.Name(id="true" | "false" | "null" as name):
            return {"true": True, "false": False, "null": None}[name]
        case ast.List() | ast.Tuple():
            return [_literal(part) for part in node.elts]
        case ast.Dict():
            pairs = zip(node.keys, node.values, strict=True)
            return {key.value: _literal(value) for key, value in pairs if isinstance(key, ast.Constant)}
    raise ValueError(f"the call has an argument that is no value ({ast.unparse(node):.60})")


def _python_calls(text: str, at: int, known: Known) -> tuple[list[ToolCall], int]:
    """Read a list of calls up to <|tool_call_end|>, as LFM2 writes it: in Python, or in JSON."""
    if re.compile(r"\s*\[?\s*\{").match(text, at):
        return _json_calls(text, at, known)
    errors: list[Exception] = []
    for edge in _edges(text, at, "<|tool_call_start|>", "<|tool_call_end|>"):
        for read in (_strict, _loose):
            try:
                return read(text[at:edge], known), edge
            except (ValueError, RecursionError) as error:
                errors.append(error)
    raise errors[0]


def _edges(text: str, at: int, opens: str, closes: str) -> Iterator[int]:
    """Yield where what begins at an index may end: before the next few closing tags, or without any the next call."""
    closing = re.finditer(re.escape(closes), text[at:]) if closes else ()
    ends = [at + tag.start() for tag in islice(closing, 9)]
    yield from ends or [found if (found := text.find(opens, at)) >= 0 else len(text)]


def _strict(source: str, known: Known) -> list[ToolCall]:
    """Return the calls in a Python expression. Raises ValueError."""
    tree = _expression(source)
    calls = []
    for node in tree.elts if isinstance(tree, (ast.List, ast.Tuple)) else [tree]:
        named = isinstance(node, ast.Call) and isinstance(node.func, ast.Name | ast.Attribute)
        if not isinstance(node, ast.Call) or not named or node.args or not all(k.arg for k in node.keywords):
            raise ValueError("the call is not a function's name and its arguments by name")
        calls.append(ToolCall(ast.unparse(node.func), {str(k.arg): _literal(k.value) for k in node.keywords}))
    if not calls:
        raise ValueError("there is no call in the list")
    return calls


def _loose(source: str, known: Known) -> list[ToolCall]:
    """Return the calls in a list whose strings are not escaped, as some templates write them. Raises ValueError."""
    names = "|".join(map(re.escape, known))
    inner = re.fullmatch(r"\s*\[(.*)\)\s*\]\s*", source, re.DOTALL)
    calls = []
    for part in re.split(rf"\)\s*,\s*(?=(?:{names})\()", inner[1]) if inner else ():
        name, _, rest = part.strip().partition("(")
        schema = known.get(name, {})
        keys = "|".join(map(re.escape, schema.get("properties") or {}))
        first, *pairs = re.split(rf"(?:\A|,)\s*({keys})\s*=\s*", rest.strip()) if keys else [rest]
        arguments = {}
        for key, value in zip(pairs[::2], pairs[1::2], strict=True):
            quoted = re.fullmatch(r"(['\"])(.*)\1\s*", value, re.DOTALL)
            arguments[key] = quoted[2] if quoted else _literal(_expression(value))
        if name not in known or first:
            break
        calls.append(ToolCall(name, arguments))
    else:
        if calls:
            return calls
    raise ValueError("the call is no Python")


# ---- channels

_RECIPIENT = re.compile(r"\bto=(?:functions\.)?([\w.:-]+)")
_MESSAGE_ENDS = re.compile(r"<\|(?:end|call|return|start)\|>|(?=<\|channel\|>)|\Z")


def _channels(text: str, known: Known) -> list[ToolCall]:
    """Return the calls of gpt-oss: messages with a recipient in their header, in whatever channel."""
    calls: list[ToolCall] = []
    at = 0
    while (header := text.find("<|message|>", at)) >= 0:
        to, begin = _RECIPIENT.search(text, at, header), _skip(_SPACE, text, header + len("<|message|>"))
        end = next(_MESSAGE_ENDS.finditer(text, begin)).end()
        if to and to[1] != "assistant":
            try:
                value, stop = ({}, begin) if _MESSAGE_ENDS.match(text, begin) else _json(text, begin)
                if (ended := _MESSAGE_ENDS.match(text, _skip(_SPACE, text, stop))) is None:
                    raise ValueError("the call goes on where it should end")
                call, end = ToolCall(to[1], _arguments(value)), ended.end()
            except ValueError as error:
                call = ToolCall(mistake=str(error))
            calls.append(replace(call, span=(at, end)))
        at = end
    return calls


# ---- the grammars


def _mistral(text: str, at: int, known: Known) -> tuple[list[ToolCall], int]:
    """Read calls as Mistral writes them: a list in JSON, or names before [ARGS] and arguments."""
    if re.compile(r"\s*[\[{]").match(text, at):
        return _json_calls(text, at, known)
    calls: list[ToolCall] = []
    while not calls or re.compile(r"\s*[\w.:-]+\s*(?:\[CALL_ID\][^\[]*)?\[ARGS\]").match(text, at):
        read, at = _BEFORE_ARGS(text, at, known)
        calls += read
    return calls, at


_BEFORE_ARGS = _named_json(r"\s*([\w.:-]+)\s*(?:\[CALL_ID\]\s*[\w-]*\s*)?(?:\[ARGS\]\s*)?", "")
_CALLS, _NEXT, _SEP, _ENDS, _ALL_END = (  # the special tokens of DeepSeek
    f"<\uff5ctool\u2581{name}\uff5c>" for name in ("calls▁begin", "call▁begin", "sep", "call▁end", "calls▁end")
)
_DEEPSEEK = _tagged(
    rf"{_CALLS}\s*(?:{_NEXT})?|{_NEXT}",
    rf"{_ENDS}(?:\s*{_ALL_END})?",
    _named_json(rf"\s*(?:function\s*{_SEP}\s*)?([\w.:-]+)\s*(?:{_SEP})?\s*(?:```(?:json)?\s*)?", r"\s*```"),
)
HERMES = Grammar(
    "Hermes JSON (Qwen3)",
    "<tool_call>|<tool_response>",
    '<tool_call>{"name": "...", "arguments": {...}}</tool_call>',
    _tagged("<tool_call>", "</tool_call>", _json_calls),
)
GRAMMARS = (  # of a template with the marks of several, the first counts
    Grammar(
        "Qwen3-Coder XML",
        "<function=",
        "<tool_call>\n<function=NAME>\n<parameter=KEY>\nVALUE\n</parameter>\n</function>\n</tool_call>",
        _tagged(r"<tool_call>(?:\s*<function=)?|<function=", "</tool_call>", _functions),
    ),
    Grammar(
        "GLM",
        "<arg_key>",
        "<tool_call>NAME\n<arg_key>KEY</arg_key>\n<arg_value>VALUE</arg_value>\n</tool_call>",
        _tagged("<tool_call>", "</tool_call>", _keys_and_values),
    ),
    Grammar("Mistral [ARGS]", r"\[ARGS\]", "[TOOL_CALLS]NAME[ARGS]{...}", _tagged(r"\[TOOL_CALLS\]", "", _mistral)),
    Grammar(
        "Mistral",
        r"\[(?:TOOL_CALLS|AVAILABLE_TOOLS|TOOL_RESULTS)\]",
        '[TOOL_CALLS][{"name": "...", "arguments": {...}}]',
        _tagged(r"\[TOOL_CALLS\]", "", _mistral),
    ),
    Grammar(
        "DeepSeek V3",
        f"function{_SEP}|<\uff5ctool▁outputs▁begin",
        f"{_CALLS}{_NEXT}function{_SEP}NAME\n```json\n{{...}}\n```{_ENDS}{_ALL_END}",
        _DEEPSEEK,
    ),
    Grammar("DeepSeek V3.1", "<\uff5ctool▁", f"{_CALLS}{_NEXT}NAME{_SEP}{{...}}{_ENDS}{_ALL_END}", _DEEPSEEK),
    Grammar(
        "gpt-oss",
        r"<\|channel\|>",
        "<|channel|>commentary to=functions.NAME <|constrain|>json<|message|>{...}<|call|>",
        _channels,
    ),
    Grammar(
        "LFM2",
        r"<\|tool_(?:call|list|response)_start\|>",
        "<|tool_call_start|>[NAME(KEY=VALUE)]<|tool_call_end|>",
        _tagged(r"<\|tool_call_start\|>", r"<\|tool_call_end\|>", _python_calls),
    ),
    HERMES,
    Grammar(
        "Llama 3",
        r'<\|python_tag\|>|<\|start_header_id\|>ipython|\{"name":(?! ?"look_up")[^{}]{1,99}"(?:parameters|arguments)":',
        '{"name": "...", "parameters": {...}}',
        _after_thought(_bare),
    ),
)
_LLAMA = GRAMMARS[-1]


def parse_calls(text: str) -> list[ToolCall]:
    """Return the calls in a turn: JSON in <tool_call> tags (Hermes, Qwen3), or else a turn that is JSON (Llama 3).

    The objects have a "name" and "arguments" (or "parameters"). What stands in tags and is no call becomes a
    ``ToolCall`` with a ``mistake`` for the policy to read. Calls in thoughts are left out.
    """
    return CallReader(HERMES, {})(text) or CallReader(_LLAMA, {})(text)


# ---- which of them a template explains

_LOOK_UP: Schema = {
    "type": "function",
    "function": {
        "name": "look_up",
        "description": "Look up a word.",
        "parameters": {
            "type": "object",
            "properties": {"word": {"type": "string", "description": "the word"}, "count": {"type": "integer"}},
            "required": ["word", "count"],
        },
    },
}
_ASKED = ToolCall("look_up", {"word": "tree", "count": 3})
_SAID = "\u2042"  # begins as no call does


def grammar_of(codec: ChatCodec, tokenizer: Any) -> Grammar:
    """Return the grammar that the chat template explains; Hermes JSON, for us to explain, where it shows no tools.

    It is the one in which the template's own writing of a call is read, or whose marks the template writes, or
    what the ``tool_parser`` of an mlx-lm tokenizer reads. Raises UserError for a template with tools and none of these.
    """
    shows = codec.shows_tools([_LOOK_UP])
    everything, call = _written(codec)
    foreign = _of_mlx(tokenizer)
    if _ASKED.name in call:
        reading = [g for g in (*GRAMMARS, *foreign) if CallReader.of(g, [_LOOK_UP])(call) == [_ASKED]]
        marked = [g for g in reading if re.search(g.marks, everything)]
        if reading:
            return (marked or reading)[0]
    else:
        added = "".join(getattr(tokenizer, "get_added_vocab", dict)()) if shows else ""
        for text in (everything, added):
            if marked := [g for g in (*GRAMMARS, *foreign) if re.search(g.marks, text)]:
                return marked[0]
    if shows:
        raise UserError(
            "the chat template of this tokenizer explains a way of calling tools that is none of "
            f"{', '.join(g.name for g in GRAMMARS)}; pass parse, a function that returns the ToolCalls in a turn's text"
        )
    return HERMES


def _written(codec: ChatCodec) -> tuple[str, str]:
    """Return what the template writes around tools, and the part of it that is an assistant's call, if any."""

    def render(*messages: Message, start: bool = False) -> str:
        try:
            return "" if codec.template is None else codec.template.render(messages, [_LOOK_UP], start)
        except TemplateRefusalError:  # of messages that it does not take
            return ""

    asked, said = {"role": "user", "content": "?"}, {"role": "assistant", "content": _SAID}
    plain, call = render(asked, said), ""
    result = {"role": "tool", "name": _ASKED.name, "tool_call_id": "call00001", "content": "4"}
    texts = [plain, render(asked, start=True), render(asked, said, result)]
    arguments = dict(_ASKED.arguments)
    for given in (arguments, json.dumps(arguments)):  # templates take the one or the other
        function = {"name": _ASKED.name, "arguments": given}
        calls = [{"id": "call00001", "type": "function", "function": function}]
        message = {"role": "assistant", "content": "", "tool_calls": calls}
        called = render(asked, message)
        shared = next((n for n, (a, b) in enumerate(zip(plain, called, strict=False)) if a != b), 0)
        written = called[shared:].removesuffix(plain.partition(_SAID)[2])
        if plain and not call and _ASKED.name in written:
            call = written
            texts += [called, render(asked, message, result)]
    return "".join(texts), call


def _of_mlx(tokenizer: Any) -> list[Grammar]:
    """Return the grammar of the ``tool_parser`` that an mlx-lm tokenizer carries, if it does."""
    parser = getattr(tokenizer, "tool_parser", None)
    opens, closes = (getattr(tokenizer, f"tool_call_{end}", None) or "" for end in ("start", "end"))
    if parser is None or not opens:
        return []

    def body(text: str, at: int, known: Known) -> tuple[list[ToolCall], int]:
        schemas = [{"type": "function", "function": {"name": n, "parameters": p}} for n, p in known.items()]
        errors: list[Exception] = []
        for edge in _edges(text, at, opens, closes):
            try:
                read = parser(text[at:edge], schemas)
                return [_call(value) for value in (read if isinstance(read, list) else [read])], edge
            except (ValueError, LookupError, TypeError, AttributeError, SyntaxError, RecursionError) as error:
                errors.append(error)
        raise ValueError(f"the call cannot be read ({errors[0]})") from errors[0]

    marks, form = re.escape(opens), f"{opens}...{closes}, as the tools are explained"
    return [Grammar("mlx-lm", marks, form, _tagged(marks, re.escape(closes), body))]
