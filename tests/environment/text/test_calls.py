"""Tool calls in the grammars of many families: a template's own writing is read back, and what is no call is none."""

import importlib
import json
import time
from pathlib import Path

import pytest
from chat_tokenizers import TOOL_SPECIAL, chat_tokenizer
from hypothesis import given
from hypothesis import strategies as st

from textpolicy.environment import ToolCall, ToolEnv
from textpolicy.environment.text.calls import GRAMMARS, HERMES, CallReader, grammar_of
from textpolicy.environment.text.conversation import ChatCodec
from textpolicy.errors import UserError

FAMILIES = {  # of the templates in data/templates/tools, and what their grammars are called
    "qwen3": "Hermes JSON (Qwen3)",
    "qwen3_coder": "Qwen3-Coder XML",
    "glm": "GLM",
    "mistral": "Mistral",
    "mistral_args": "Mistral [ARGS]",
    "llama3": "Llama 3",
    "deepseek_r1": "DeepSeek V3",
    "deepseek_v31": "DeepSeek V3.1",
    "gpt_oss": "gpt-oss",
    "lfm2": "LFM2",
}
GRAMMAR = {g.name: g for g in GRAMMARS}
USER = {"role": "user", "content": "?"}
SCHEMA = {
    "type": "object",
    "properties": {
        "text": {"type": "string"},
        "n": {"type": "integer"},
        "x": {"type": "number"},
        "flag": {"type": "boolean"},
        "items": {"type": "array", "items": {"type": "string"}},
        "about": {"type": "object"},
        "maybe": {"anyOf": [{"type": "string"}, {"type": "null"}]},
    },
}
TOOLS = [
    {"type": "function", "function": {"name": n, "description": "Do.", "parameters": SCHEMA}} for n in ("act", "do")
]


def reader(family):
    return CallReader.of(GRAMMAR[FAMILIES[family]], TOOLS)


def written(tokenizer, *calls, texts=False):
    """The template's own writing of calls, (name, arguments) each."""
    tool_calls = [
        {
            "id": f"call{n:05d}",
            "type": "function",
            "function": {"name": name, "arguments": json.dumps(given) if texts else given},
        }
        for n, (name, given) in enumerate(calls)
    ]
    messages = [USER, {"role": "assistant", "content": "", "tool_calls": tool_calls}]
    whole = tokenizer.apply_chat_template(messages, tools=TOOLS, tokenize=False)
    plain = tokenizer.apply_chat_template(
        [USER, {"role": "assistant", "content": "\u2042"}], tools=TOOLS, tokenize=False
    )
    before, _, after = plain.partition("\u2042")
    if FAMILY_OF_CHANNELS in before:  # whose calls begin with the role
        before, after = before.rpartition("<|channel|>final")[0], "<|call|>"
    return whole.removeprefix(before).removesuffix(after)


FAMILY_OF_CHANNELS = "<|channel|>final"


# ---- which grammar


@pytest.mark.parametrize("family", FAMILIES)
def test_a_template_says_in_which_grammar_tools_are_called(family):
    tokenizer = chat_tokenizer(family, tools=True)
    assert grammar_of(ChatCodec.of(tokenizer), tokenizer).name == FAMILIES[family]


def test_every_grammar_has_a_template_here():
    assert {*FAMILIES.values()} == {*GRAMMAR}
    assert {*FAMILIES} == {*TOOL_SPECIAL}


def test_the_docs_list_the_grammars_and_their_forms():
    page = (Path(__file__).parents[3] / "docs" / "04_environments.md").read_text(encoding="utf-8")
    table = page.split("| Grammar | A call |\n|---|---|\n")[1].split("\n\n")[0]
    rows = [row.strip("| ").split(" | ") for row in table.replace("\\|", "|").splitlines()]
    assert [(name, form.removeprefix("`").removesuffix("`").strip("`")) for name, form in rows] == [
        (g.name, " ".join(g.form.split())) for g in GRAMMARS
    ]


FOREIGN = """{% if tools %}{{ tools | tojson }}{% endif %}
{%- for m in messages %}{{ '<|im_start|>' + m.role + m.content }}
{%- for c in m.tool_calls or [] %}{{ '<|tool_calls_section_begin|>' if loop.first else '' }}
{{- '<|tool_call_begin|>functions.' + c.function.name + ':0<|tool_call_argument_begin|>' }}
{{- c.function.arguments | tojson + '<|tool_call_end|>' }}
{{- '<|tool_calls_section_end|>' if loop.last else '' }}
{%- endfor %}{{ '<|im_end|>' }}{% endfor %}"""


def test_another_grammar_is_read_by_the_parser_of_an_mlx_lm_tokenizer_or_refused():
    plain = chat_tokenizer("qwen3", tools=True)
    plain.chat_template = FOREIGN
    with pytest.raises(UserError, match=r"a way of calling tools that is none of .*; pass parse"):
        grammar_of(ChatCodec.of(plain), plain)
    parts = importlib.import_module("mlx_lm.tool_parsers.kimi_k2")
    wrapped = importlib.import_module("mlx_lm.tokenizer_utils").TokenizerWrapper(
        plain,
        tool_parser=parts.parse_tool_call,
        tool_call_start=parts.tool_call_start,
        tool_call_end=parts.tool_call_end,
    )
    grammar = grammar_of(ChatCodec.of(wrapped), wrapped)
    read = CallReader.of(grammar, TOOLS)
    for arguments in ({"n": 1}, {"text": "a <|tool_calls_section_end|> b"}):
        text = written(plain, ("act", arguments), ("do", {}))
        for said in ("", "So: ", f"<think>{text}</think>"):
            assert read(said + text) == [ToolCall("act", arguments), ToolCall("do")]
    [bad] = read("<|tool_calls_section_begin|>act(1)<|tool_calls_section_end|>")
    assert bad.mistake.startswith("the call cannot be read")


BARE = "{% for m in messages %}{{ m.role + ': ' + m.content + '\n' }}{% endfor %}"
SHOWN = "{% if tools %}{{ tools | tojson + '\n' }}EXPLAINED{% endif %}" + BARE


@pytest.mark.parametrize(
    ("template", "name"),
    [
        (BARE, HERMES.name),
        (SHOWN.replace("EXPLAINED", ""), None),
        (SHOWN.replace("EXPLAINED", "Begin with Action: and the name."), None),
        (SHOWN.replace("EXPLAINED", '<tool_call>{"name": ..., "arguments": ...}</tool_call>'), HERMES.name),
        (SHOWN.replace("EXPLAINED", "<tool_call>\n<function=NAME>"), "Qwen3-Coder XML"),
        (SHOWN.replace("EXPLAINED", "<tool_call>NAME\n<arg_key>KEY</arg_key>"), "GLM"),
        (SHOWN.replace("EXPLAINED", 'Answer {"name": function name, "parameters": its arguments}'), "Llama 3"),
        (SHOWN.replace("EXPLAINED", 'Answer {"name": "NAME", "arguments": {"key": "value"}}'), "Llama 3"),
        (SHOWN.replace("EXPLAINED", "<|tool_call_start|>[f(x=1)]<|tool_call_end|>"), "LFM2"),
        (BARE.replace("m.role", "'<|channel|>' + m.role"), "gpt-oss"),
        ("{% if tools %}{{ '[AVAILABLE_TOOLS]' + tools | tojson }}{% endif %}" + BARE, "Mistral"),
        # what it writes counts more than what it says
        (SHOWN.replace("EXPLAINED", "<tool_call>") + "{{ messages[-1].tool_calls }}", None),
    ],
)
def test_the_grammar_of_a_template_that_writes_no_calls_is_the_one_it_explains(template, name):
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = template
    codec = ChatCodec.of(tokenizer)
    if name:
        assert grammar_of(codec, tokenizer).name == name
    else:
        with pytest.raises(UserError, match="pass parse"):
            grammar_of(codec, tokenizer)
        own = ToolEnv(["?"], [act], lambda **_: 0.0, tokenizer=tokenizer, parse=lambda text: [])
        assert len(own) == 1  # nothing is inferred


def act(n: int) -> int:
    """Do it."""
    return n


# ---- round trips

VALUES = [
    {"text": "Rome", "n": 3},
    {},
    {"text": ""},
    {"text": "end with </tool_call> here", "n": 1},
    {"text": "a </parameter> b </arg_value> c </function> d", "n": -7},
    {"text": "<tool_call>[TOOL_CALLS]<|tool_call_start|><|python_tag|>", "n": 0},
    {"text": "]<|tool_call_end|> and <\uff5ctool▁call▁end\uff5c> and <|end|> and <|call|>"},
    {"text": "one\ntwo\n\n  three", "items": ["a\nb"]},
    {"text": "</think> and <think> and <|channel|>analysis<|message|>"},
    {"text": 'say "hi"', "flag": True},
    {"text": "it's", "maybe": "yours"},
    {"text": "007", "maybe": "08"},
    {"text": "null", "maybe": None},
    {"text": "true", "flag": False},
    {"text": '{"name": "do", "arguments": {}}'},
    {"text": "naïve 東京 😀", "x": 0.1},
    {"n": 12345678901234567890123, "x": -1e-09},
    {"items": [], "about": {}},
    {"items": ["x, y", "it"], "about": {"a": [1, {"b": None}], "c": "d", "e": True}},
]


@pytest.mark.parametrize("arguments", VALUES, ids=lambda v: json.dumps(v)[:40])
@pytest.mark.parametrize("family", FAMILIES)
def test_what_a_template_writes_is_read_back_as_the_same_call(family, arguments):
    tokenizer = chat_tokenizer(family, tools=True)
    text = written(tokenizer, ("act", arguments), texts=family == "deepseek_v31")
    calls = reader(family)(text)
    assert calls == [ToolCall("act", arguments)], text
    for name, value in calls[0].arguments.items():
        assert type(value) is type(arguments[name])


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("llama3", "gpt_oss")])  # which refuse several
def test_several_calls_are_read_in_order(family):
    tokenizer = chat_tokenizer(family, tools=True)
    calls = [("act", {"text": "a"}), ("do", {"n": 1}), ("act", {})]
    text = written(tokenizer, *calls, texts=family == "deepseek_v31")
    assert reader(family)(text) == [ToolCall(*call) for call in calls]
    assert reader(family)("I will do that.\n" + text + "\n") == [ToolCall(*call) for call in calls]


TEXTS = st.text(st.characters(exclude_categories=["Cs", "Cc"], include_characters="\n\t"))


@given(TEXTS, st.lists(TEXTS), st.integers(), st.booleans())
@pytest.mark.parametrize("family", sorted(FAMILIES))
def test_any_argument_comes_back(family, text, items, n, flag):
    if family == "lfm2" and {*"\\'"} & {*text, *"".join(items)}:
        return  # this template does not escape them
    arguments = {"text": text, "items": items, "n": n, "flag": flag}
    tokenizer = TOKENIZERS.setdefault(family, chat_tokenizer(family, tools=True))
    assert reader(family)(written(tokenizer, ("act", arguments), texts=family == "deepseek_v31")) == [
        ToolCall("act", arguments)
    ]


TOKENIZERS = {}
MLX = {"qwen3": "json_tools", "qwen3_coder": "qwen3_coder", "glm": "glm47", "mistral": "mistral", "lfm2": "pythonic"}
FAULTS = ["a </parameter> b </arg_value> c </function> d", "null", "it's"]  # texts that those parsers read otherwise


@pytest.mark.parametrize("family", MLX)
def test_the_parsers_of_mlx_lm_read_the_same(family):
    parts = importlib.import_module(f"mlx_lm.tool_parsers.{MLX[family]}")
    tokenizer, read = chat_tokenizer(family, tools=True), reader(family)
    for arguments in [v for v in VALUES if v.get("text") not in FAULTS and v.get("n", 0) < 2**53]:
        text = written(tokenizer, ("act", arguments)).strip()
        inside = text.removeprefix(parts.tool_call_start).removesuffix(parts.tool_call_end)
        other = parts.parse_tool_call(inside, TOOLS)
        assert [(c.name, c.arguments) for c in read(text)] == [(other["name"], other["arguments"])]


# ---- other spellings of calls

BARS = {"calls": "calls▁begin", "call": "call▁begin", "sep": "sep", "end": "call▁end", "ends": "calls▁end"}
D = {name: f"<\uff5ctool▁{word}\uff5c>" for name, word in BARS.items()}  # the special tokens of DeepSeek
ONE, TWO = ToolCall("act", {"n": 1}), ToolCall("do", {"n": 2})
JSON_ONE, JSON_TWO = '{"name": "act", "arguments": {"n": 1}}', '{"name": "do", "arguments": {"n": 2}}'


@pytest.mark.parametrize(
    ("family", "text", "calls"),
    [
        ("qwen3", f"<tool_call>[{JSON_ONE}, {JSON_TWO}]</tool_call>", [ONE, TWO]),
        ("qwen3", f"<tool_call>{JSON_ONE}\n{JSON_TWO}</tool_call>", [ONE, TWO]),
        ("qwen3", f"<tool_call>{JSON_ONE}</tool_call><tool_call>{JSON_TWO}", [ONE, TWO]),
        ("qwen3", f"<tool_call>{JSON_ONE}<tool_call>{JSON_TWO}</tool_call>", [ONE, TWO]),
        ("qwen3", '<tool_call>{"name": "act", "arguments": "{\\"n\\": 1}"}</tool_call>', [ONE]),
        ("qwen3", '<tool_call>{"name": "act", "parameters": {"n": 1}}</tool_call>', [ONE]),
        ("qwen3", '<tool_call>{"type": "function", "function": {"name": "act", "arguments": {"n": 1}}}', [ONE]),
        ("qwen3", '<tool_call>{"name": "act", "arguments": null}</tool_call>', [ToolCall("act")]),
        ("qwen3", '<tool_call>{"name": "act", "arguments": ""}</tool_call>', [ToolCall("act")]),
        ("qwen3", '<tool_call>{"name": "act", "arguments": " "}</tool_call>', [ToolCall("act")]),
        ("qwen3", '<tool_call>{"name": "act"}</tool_call>', [ToolCall("act")]),
        (
            "qwen3",
            '<tool_call>{"name": "act", "arguments": {"text": "a\nb\tc"}}',
            [ToolCall("act", {"text": "a\nb\tc"})],
        ),
        ("qwen3_coder", "<function=act><parameter=n>1</parameter></function>", [ONE]),
        ("qwen3_coder", "<tool_call><function=act><parameter=n>1</parameter></function>", [ONE]),
        (
            "qwen3_coder",
            "<tool_call>\n<function=act>\n<parameter=n>\n1\n</parameter>\n</function>\n"
            "<function=do>\n<parameter=n>\n2\n</parameter>\n</function>\n</tool_call>",
            [ONE, TWO],
        ),
        ("qwen3_coder", "<tool_call><function=act></function></tool_call>", [ToolCall("act")]),
        (
            "qwen3_coder",
            "<function=act>\n<parameter=flag>\nTrue\n</parameter>\n</function>",
            [ToolCall("act", {"flag": True})],
        ),
        (
            "qwen3_coder",
            "<function=act><parameter=items>['a']</parameter></function>",
            [ToolCall("act", {"items": ["a"]})],
        ),
        ("glm", "<tool_call>act<arg_key>n</arg_key><arg_value>1</arg_value></tool_call>", [ONE]),
        ("glm", "<tool_call>act</tool_call>", [ToolCall("act")]),
        ("glm", "<tool_call>act\n<arg_key>n</arg_key>\n<arg_value>1</arg_value>", [ONE]),
        ("mistral", f"[TOOL_CALLS] {JSON_ONE}", [ONE]),
        ("mistral", f"[TOOL_CALLS] [{JSON_ONE}]\n[TOOL_CALLS] [{JSON_TWO}]", [ONE, TWO]),
        ("mistral", '[TOOL_CALLS]act[ARGS]{"n": 1}[TOOL_CALLS]do[ARGS]{"n": 2}', [ONE, TWO]),
        ("mistral_args", '[TOOL_CALLS]act[CALL_ID]a1B2c3D4e[ARGS]{"n": 1}', [ONE]),
        ("mistral_args", '[TOOL_CALLS]act[ARGS]{"n": 1}do[ARGS]{"n": 2}', [ONE, TWO]),
        ("mistral_args", f"[TOOL_CALLS] [{JSON_ONE}, {JSON_TWO}]", [ONE, TWO]),
        ("llama3", f"{JSON_ONE}; {JSON_TWO}", [ONE, TWO]),
        ("llama3", f"\n{JSON_ONE};\n", [ONE]),
        ("llama3", f"[{JSON_ONE}, {JSON_TWO}]", [ONE, TWO]),
        ("llama3", f"<|python_tag|>{JSON_ONE}; {JSON_TWO}<|eom_id|>", [ONE, TWO]),
        ("llama3", '<|python_tag|>{"name": "act"}', [ToolCall("act")]),
        (
            "deepseek_v31",
            f'{D["calls"]}{D["call"]}act{D["sep"]}{{"n": 1}}{D["end"]}\n{D["call"]}do{D["sep"]}{{"n": 2}}',
            [ONE, TWO],
        ),
        ("deepseek_r1", f'{D["call"]}function{D["sep"]}act\n```json\n{{"n": 1}}\n```{D["end"]}{D["ends"]}', [ONE]),
        ("deepseek_r1", f'{D["calls"]}{D["call"]}act{D["sep"]}{{"n": 1}}{D["end"]}{D["ends"]}', [ONE]),
        ("gpt_oss", '<|channel|>commentary to=functions.act <|constrain|>json<|message|>{"n": 1}<|call|>', [ONE]),
        ("gpt_oss", ' to=functions.act<|channel|>commentary<|message|>{"n": 1}', [ONE]),
        ("gpt_oss", "<|channel|>commentary to=functions.act<|message|>", [ToolCall("act")]),
        (
            "gpt_oss",
            "<|channel|>analysis<|message|>I call functions.act to=functions.do<|end|><|start|>assistant<|channel|>"
            "commentary<|message|>One moment.<|end|><|start|>assistant<|channel|>commentary to=functions.act<|message|>"
            '{"n": 1}<|call|><|start|>assistant<|channel|>commentary to=functions.do json<|message|>{"n": 2}<|call|>',
            [ONE, TWO],
        ),
        ("lfm2", "<|tool_call_start|>[act(n=1), do(n=2)]<|tool_call_end|>", [ONE, TWO]),
        ("lfm2", "<|tool_call_start|>act(n=1)<|tool_call_end|>Now I wait.", [ONE]),
        ("lfm2", f"<|tool_call_start|>[{JSON_ONE}, {JSON_TWO}]<|tool_call_end|>", [ONE, TWO]),
        (
            "lfm2",
            '<|tool_call_start|>[act(about={"a": [null, true]})]',
            [ToolCall("act", {"about": {"a": [None, True]}})],
        ),
        (
            "lfm2",
            "<|tool_call_start|>[act(text='it's', n=1), do(n=2)]",
            [ToolCall("act", {"text": "it's", "n": 1}), TWO],
        ),
    ],
)
def test_other_spellings_of_the_same_calls(family, text, calls):
    assert reader(family)(text) == calls


TYPES = {
    "$defs": {
        "Size": {"enum": ["1", "2"], "type": "string"},
        "Box": {"type": "object"},
        "Loop": {"$ref": "#/$defs/Loop"},
    },
    "properties": {
        "size": {"$ref": "#/$defs/Size"},
        "box": {"anyOf": [{"$ref": "#/$defs/Box"}, {"type": "null"}]},
        "loop": {"$ref": "#/$defs/Loop"},
        "one": {"const": 1},
        "word": {"enum": ["a", "b"]},
        "either": {"type": ["string", "array"]},
        "number": {"anyOf": [{"type": "number"}, {"type": "string", "pattern": "..."}]},
        "anything": True,
        "nothing": None,
    },
    "additionalProperties": {"type": "string"},
}


@pytest.mark.parametrize(
    ("name", "text", "value"),
    [
        ("size", "1", "1"),
        ("box", '{"a": 1}', {"a": 1}),
        ("box", "{'a': True}", {"a": True}),
        ("box", "null", None),
        ("box", "None", None),
        ("box", "a box", "a box"),
        ("loop", "1", 1),
        ("one", "1", 1),
        ("word", "a", "a"),
        ("either", "[1]", [1]),
        ("either", "1", "1"),
        ("number", "0.10", "0.10"),  # which a Decimal keeps
        ("anything", "1,000", "1,000"),
        ("anything", "007", "007"),
        ("anything", "[1, null]", [1, None]),
        ("nothing", "false", False),
        ("unknown", "5", "5"),
    ],
)
def test_the_schema_decides_what_an_argument_without_quotes_is(name, text, value):
    text = f"<tool_call>act<arg_key>{name}</arg_key><arg_value>{text}</arg_value></tool_call>"
    for parameters in (TYPES, {**TYPES, "properties": {name: TYPES["properties"].get(name, {"type": "string"})}}):
        assert CallReader(GRAMMAR["GLM"], {"act": parameters})(text) == [ToolCall("act", {name: value})]
    assert CallReader(GRAMMAR["GLM"], {"act": {"properties": None}})(text)[0].name == "act"


# ---- what is no call

ATTEMPTS = {  # at the end of a turn or alone on a line
    "qwen3": [
        "<tool_call>act(1)</tool_call>",
        '<tool_call>{"name": "act", "arguments": {"n": 1}</tool_call>',
        '<tool_call>{"name": "act", "arguments": 3}',
        '<tool_call>{"name": "act", "arguments": "{} {}"}',
        '<tool_call>{"name": "act", "arguments": {"n": 1}} please </tool_call>',
        '<tool_call>{"n": 1}</tool_call>',
        "<tool_call>[]</tool_call>",
        "<tool_call>",
        "<tool_call>" + "[" * 9000,
    ],
    "qwen3_coder": [
        '<tool_call>{"name": "act", "arguments": {"n": 1}}</tool_call>',
        "<tool_call>\n<function=act>\n<parameter=n>\n1",
        "<tool_call><function=act><parameter=n>1</function></tool_call>",
        "<tool_call><function=act><parameter=text>1\n<parameter=n>1</parameter></function></tool_call>",
        "<tool_call></tool_call>",
    ],
    "glm": [
        '<tool_call>{"name": "act", "arguments": {"n": 1}}</tool_call>',
        "<tool_call>fly</tool_call>",
        "<tool_call>act<arg_key>n</arg_key><arg_value>1</tool_call>",
    ],
    "mistral": [
        "[TOOL_CALLS]",
        "[TOOL_CALLS] []",
        '[TOOL_CALLS] [{"name": "act", "arguments": {"n": 1}',
        "[TOOL_CALLS]act[ARGS]n=1",
    ],
    "llama3": [
        "<|python_tag|>act(n=1)",
        '{"name": "act", "parameters": {"n": 1}} }',
        '{"name": "act", "parameters": 3}',
        '{"name": "act", "parameters": {"n": 1}}\n\nThis does it.',
        '{"name": "act", "parameters": {"n": ',
        '[{"name": "act", "parameters": {"n": 1}}, ',
    ],
    "deepseek_v31": [
        f"{D['calls']}act",
        f"{D['calls']}{D['call']}act{D['sep']}n=1{D['end']}{D['ends']}",
        f'{D["call"]}{{"n": 1}}{D["end"]}',
    ],
    "gpt_oss": [
        "<|channel|>commentary to=functions.act<|message|>n=1<|call|>",
        '<|channel|>commentary to=act<|message|>{"n": 1}}',
        "<|channel|>commentary to=functions.act<|message|>[1]",
    ],
    "lfm2": [
        "<|tool_call_start|>[act(1)]<|tool_call_end|>",
        "<|tool_call_start|>[act(n=1]<|tool_call_end|>",
        "<|tool_call_start|>[act(n=open('x'))]<|tool_call_end|>",
        "<|tool_call_start|>[act(about={'a': {1, 2}})]<|tool_call_end|>",
        "<|tool_call_start|>[act(x=1j)]<|tool_call_end|>",
        "<|tool_call_start|>[(lambda: 0)()]<|tool_call_end|>",
        "<|tool_call_start|>[]",
        "<|tool_call_start|>" + "[" * 9000,
        "<|tool_call_start|>act(n=" + "-" * 90000,
    ],
}


@pytest.mark.parametrize(("family", "text"), [(f, text) for f, texts in ATTEMPTS.items() for text in texts])
def test_a_malformed_call_is_a_mistake_that_says_how_calls_are_written(family, text):
    [call] = reader(family)(text)
    assert "call" in call.mistake
    assert call.mistake.endswith(f"; write it as {GRAMMAR[FAMILIES[family]].form}")
    said = "\n" if family == "gpt_oss" else "Let me see.\n"
    assert (family == "llama3" and text[0] in "[{") or len(reader(family)(said + text + "\n")) == 1


PROSE = [
    "",
    "42",
    '{"name": "Alice", "age": 30}',
    '{"name": "Alice", "arguments": ["for", "against"]}',
    '[{"name": "Bob"}]',
    '```json\n{"name": "act", "arguments": {"n": 1}}\n```',
    'I would call {"name": "act", "arguments": {"n": 1}} but 42 it is.',
    "act(n=1)",
    "to=functions.act",
    "A call begins with <tool_call> and ends with </tool_call>; the answer is 42.",
    "<tool_call> is the tag that begins a call.\nThe answer is 42.",
    "The tags are <tool_call> and </tool_call>",
    "In XML it is <function=name>, a [TOOL_CALLS] list or <|tool_call_start|> for others. 42",
    "[TOOL_CALLS] stands before a list of calls, as <|tool_call_start|> does.",
    f"{D['calls']} is a token, and {D['call']} another.",
    "x <arg_key> y <parameter=z> < > { [ (",
]


@pytest.mark.parametrize("text", PROSE)
@pytest.mark.parametrize("family", FAMILIES)
def test_an_answer_is_no_call(family, text):
    assert reader(family)(text) == []


@pytest.mark.parametrize("other", FAMILIES)
@pytest.mark.parametrize("family", FAMILIES)
def test_calls_of_one_grammar_are_none_in_another(family, other):
    """Those that share a tag say what is wrong, and no text is a call and an answer."""
    tokenizer = chat_tokenizer(other, tools=True)
    text = written(tokenizer, ("act", {"n": 1}), texts=other == "deepseek_v31")
    calls = reader(family)(text)
    same = family == other or {family, other} in ({"mistral", "mistral_args"}, {"deepseek_r1", "deepseek_v31"})
    assert calls == [ONE] if same else all(call.mistake for call in calls)


THOUGHTS = ["<think>{}</think>\n\n", "{}\n</think>\n", "<think>\n{}\n</think>Then ", "<thinking>{}</thinking>"]


@pytest.mark.parametrize("thought", THOUGHTS)
@pytest.mark.parametrize("family", [f for f in FAMILIES if f != "gpt_oss"])  # whose thoughts are in a channel
def test_a_call_in_a_thought_is_none(family, thought):
    tokenizer = chat_tokenizer(family, tools=True)
    one, two = (written(tokenizer, c, texts=family == "deepseek_v31") for c in (("act", {"n": 1}), ("do", {"n": 2})))
    if family == "llama3":
        thought = thought.replace("Then ", "")
    halves = [one[: len(one) // 2]] if "<think" in thought else []  # else an argument may go on after the mark
    for inside in (one, f"I could write {one} or so", f"{one}\n{two}", *halves):
        assert reader(family)(thought.format(inside) + two) == [TWO], inside
        assert reader(family)(thought.format(inside) + "The answer is 42.") == [], inside
        assert reader(family)("<think>" + inside) == []


@pytest.mark.parametrize("family", FAMILIES)
def test_no_text_makes_a_reader_raise_or_wait(family):
    read, grammar = reader(family), GRAMMAR[FAMILIES[family]]
    pieces = [grammar.form, grammar.form[:20], "<tool_call>", "[TOOL_CALLS]", '{"a": "', "<function=a><parameter=b>"]
    pieces += [
        "<|channel|>x to=y<|message|>",
        "<|tool_call_start|>[a(b='",
        D["call"],
        "<tool_call>a<arg_key>b</arg_key><arg_value>",
    ]
    started = time.perf_counter()
    for piece in pieces:
        read(piece * 400)
    assert time.perf_counter() - started < 5


PIECES = (
    "<tool_call> </tool_call> <function=act> </function> <parameter=n> </parameter> <arg_key>n</arg_key> <arg_value>"
)
PIECES += " </arg_value> [TOOL_CALLS] [ARGS] <|channel|> <|message|> <|tool_call_start|> <|tool_call_end|> to=act"
PIECES += """ act [act(n=1)] {"n":1} {"name":"act","arguments":{}} <think> </think> <|python_tag|> ' \\ """


@given(st.lists(st.sampled_from([*PIECES.split(), *D.values(), "\n", " ", "\x00"])).map("".join))
def test_no_pieces_of_calls_make_a_reader_raise(text):
    for family in FAMILIES:
        for call in reader(family)(text):
            assert call.mistake or json.dumps(dict(call.arguments))
            assert 0 <= call.span[0] < call.span[1] <= len(text)
