"""Tools: their schemas, the calls in what a policy writes, and an episode that uses them."""

import asyncio
import json
import sys
import time
from concurrent.futures import Future, ThreadPoolExecutor
from functools import lru_cache, partial, wraps
from typing import Annotated, Literal

import pytest
from chat_tokenizers import CALLS, SPECIAL, TOOL_SPECIAL, ScriptedEngine, chat_tokenizer
from hypothesis import given
from hypothesis import strategies as st
from pydantic import Field
from toy_tokenizers import Letters

from textpolicy.engine import Sampling
from textpolicy.environment import Tool, ToolCall, ToolEnv, parse_calls
from textpolicy.errors import UserError
from textpolicy.loop.collect import collect

FAMILIES = sorted(SPECIAL)


def add(a: int, b: Annotated[int, Field(description="the second")] = 1) -> int:
    """Add two
    numbers.

    This paragraph is for people.
    """
    return a + b


def shout(text: str, how: Literal["loud", "louder"] = "loud") -> str:
    """Say it louder."""
    return text.upper()


def answered(prompt, completion, example, **kwargs):
    return float(completion == "answer"), completion == "answer"


def call(name, family="chatml", **arguments):
    written = json.dumps({"name": name, "arguments": arguments})
    return written if family == "llama3" else f"<tool_call>{written}</tool_call>"


def play(tokenizer, *texts, tools=(add, shout), **settings):
    """An episode in which the policy writes ``texts``, and the engine that wrote them."""
    turns = [([*tokenizer.encode(t, add_special_tokens=False), tokenizer.eos_token_id], True) for t in texts]
    engine = ScriptedEngine(*turns)
    env = ToolEnv(["the user"], list(tools), answered, 500, tokenizer=tokenizer, **settings)
    return collect(engine, env, [0], 1, Sampling(500))[0], engine


def results(episode):
    """The results of the tools, as the policy reads them."""
    return [line for line in episode.text.splitlines() if line.startswith(("[tool]", "[user]"))]


# ---- schemas


def test_a_schema_holds_name_first_paragraph_types_defaults_and_descriptions():
    assert Tool.of(add).schema == {
        "type": "function",
        "function": {
            "name": "add",
            "description": "Add two numbers.",
            "parameters": {
                "type": "object",
                "properties": {
                    "a": {"type": "integer"},
                    "b": {"type": "integer", "default": 1, "description": "the second"},
                },
                "required": ["a"],
                "additionalProperties": False,
            },
        },
    }


def test_a_parameter_may_be_called_title():
    def book(title: str) -> str:
        """Find a book."""
        return title

    assert Tool.of(book).schema["function"]["parameters"]["properties"] == {"title": {"type": "string"}}


def untyped(a):
    """Add."""


def undescribed(a: int):
    return a


def gathers(*numbers: int):
    """Add."""


def takes_a_function(fn: type(lambda: 0)):
    """Call it."""


class Point:
    """A point."""


class Adder:
    """Add to what was there."""

    total = 0

    def __call__(self, a: int) -> int:
        self.total += a
        return self.total

    def add(self, a: int) -> int:
        """Add without changing anything."""
        return self.total + a

    async def later(self, a: int) -> int:
        """Add later."""
        await asyncio.sleep(0)
        return self.total + a

    @staticmethod
    def double(a: int) -> int:
        """Double it."""
        return 2 * a


def search(place: str, *, key: str, n: int = 3) -> str:
    """Search."""
    return f"{place} {key} {n}"


async def fetch(url: str) -> "NotFound":  # noqa: F821
    """Fetch a page."""
    await asyncio.sleep(0.001)
    if url == "nowhere":
        raise OSError("no such page")
    return {"page": url}


def fetches(url: str):
    """Fetch it later."""
    return fetch(url)


async def waits():
    """Wait."""
    await asyncio.sleep(60)


def counts(n: int):
    """Count."""
    yield from range(n)


def speaks(n: int):
    """Say it word by word."""
    for i in range(n):
        yield f"{i} "
    if n > 2:
        raise ValueError("too much")


def in_a_thread(url: str):
    """Fetch a page in another thread."""
    with ThreadPoolExecutor() as pool:
        return pool.submit(str, url)


def forgets(url: str):
    """Fetch pages, and forget to wait for them."""
    return {url: Future()}


async def counts_later(n: int):
    """Count one by one."""
    for i in range(n):
        yield i


def endless():
    """Go on and on."""
    while True:
        yield 1


async def endless_later():
    """Go on and on."""
    while True:
        yield 1


@lru_cache
def cached(a: int) -> int:
    """Remember."""
    return a


@wraps(cached)
def wrapped(*args, **kwargs):
    return f"<{cached(*args, **kwargs)}>"


def odd_things():
    """Return things that JSON has no word for."""
    return {"set": {"b", "a", "c"}, "map": map(str, [1]), "point": Point(), "none": None}


def fails():
    """Fail with an object."""
    raise ValueError(Point())


def options(a: int, **more: int):
    """Set options."""
    return sorted(more.items())


@pytest.mark.parametrize(
    ("fn", "name", "parameters", "arguments", "result"),
    [
        (Adder(), "Adder", ["a"], {"a": 1}, "1"),
        (Adder().add, "add", ["a"], {"a": "1"}, "1"),
        (Adder().later, "later", ["a"], {"a": 1}, "1"),
        (Adder.double, "double", ["a"], {"a": 1}, "2"),
        (partial(search, key="secret"), "search", ["place", "n"], {"place": "Rome"}, "Rome secret 3"),
        (partial(search, "Rome", key="secret"), "search", ["n"], {"n": 1}, "Rome secret 1"),
        (partial(Adder(), a=3), "Adder", [], {}, "3"),
        (fetch, "fetch", ["url"], {"url": "u"}, '{"page": "u"}'),
        (fetch, "fetch", ["url"], {"url": "nowhere"}, "Error: fetch raised OSError: no such page"),
        (fetches, "fetches", ["url"], {"url": "u"}, '{"page": "u"}'),
        (partial(fetch, url="u"), "fetch", [], {}, '{"page": "u"}'),
        (in_a_thread, "in_a_thread", ["url"], {"url": "u"}, "u"),
        (forgets, "forgets", ["url"], {"url": "u"}, "Error: forgets raised TypeError: its result was never awaited"),
        (counts, "counts", ["n"], {"n": 3}, "[0, 1, 2]"),
        (counts, "counts", ["n"], {"n": 0}, "[]"),
        (speaks, "speaks", ["n"], {"n": 2}, "0 1 "),
        (speaks, "speaks", ["n"], {"n": 3}, "Error: speaks raised ValueError: too much"),
        (counts_later, "counts_later", ["n"], {"n": 2}, "[0, 1]"),
        (cached, "cached", ["a"], {"a": 1}, "1"),
        (wrapped, "cached", ["a"], {"a": 1}, "<1>"),
        (options, "options", ["a"], {"a": 1, "b": 2}, '[["b", 2]]'),
        (
            odd_things,
            "odd_things",
            [],
            {},
            '{"set": ["a", "b", "c"], "map": ["1"], "point": "<test_tools.Point object>", "none": null}',
        ),
        (fails, "fails", [], {}, "Error: fails raised ValueError: <test_tools.Point object>"),
    ],
)
def test_whatever_can_be_called_with_typed_keywords_is_a_tool(fn, name, parameters, arguments, result):
    tool = Tool.of(fn)
    assert (tool.name, [*tool.schema["function"]["parameters"].get("properties", {})]) == (name, parameters)
    assert tool.run(arguments, 5.0) == result


def test_what_an_object_that_can_be_called_is_for_is_said_by_its_class():
    assert Tool.of(Adder()).schema["function"]["description"] == "Add to what was there."


def test_what_a_partial_has_been_given_is_hidden_from_the_model():
    tool = Tool.of(partial(search, key="secret"))
    assert "secret" not in json.dumps(tool.schema)
    assert tool.run({"place": "Rome", "key": "other"}, 5.0).endswith("key: Unexpected keyword argument")


def test_what_is_awaited_has_the_time_limit_too_and_what_has_no_end_is_cut():
    started = time.perf_counter()
    assert Tool.of(waits).run({}, 0.1) == "Error: waits took longer than 0.1 s and was given up"
    for tool in (endless, endless_later):
        assert Tool.of(tool).run({}, 5.0).startswith("[1, 1, 1")
    assert time.perf_counter() - started < 3


def takes_anything(**options):
    """Set options."""


def by_place(a: int, /):
    """Add one."""


def of_a_type_nobody_knows(a: "Nowhere"):  # noqa: F821
    """Go there."""


@pytest.mark.parametrize(
    ("fn", "sentence"),
    [
        (untyped, "parameter 'a' of tool 'untyped'"),
        (undescribed, "tool 'undescribed' has no docstring"),
        (gathers, "parameter 'numbers' of tool 'gathers'"),
        (takes_a_function, "'takes_a_function' has a parameter that JSON cannot carry"),
        (takes_anything, "parameter 'options' of tool 'takes_anything'"),
        (by_place, "parameter 'a' of tool 'by_place'"),
        (of_a_type_nobody_knows, "'of_a_type_nobody_knows' has a parameter that JSON cannot carry .*'Nowhere'"),
        (lambda a: a, "a tool is <function <lambda>"),
        (Point, "a tool is <class '.*Point'>"),
        (Adder.add, "parameter 'self' of tool 'add'"),
        (len, "parameter 'obj' of tool 'len'"),
        (3, "a tool is 3"),
    ],
)
def test_a_function_that_a_model_could_not_call_is_refused(fn, sentence):
    with pytest.raises(UserError, match=sentence):
        Tool.of(fn)


# ---- running one


@pytest.mark.parametrize(
    ("arguments", "result"),
    [
        ({"a": 2, "b": 40}, "42"),
        ({"a": 2}, "3"),
        ({"a": "2"}, "3"),
        ({"b": 2}, "Error: add was called with wrong arguments: a: Missing required argument"),
        ({"a": "two"}, "Error: add was called with wrong arguments: a: Input should be a valid integer"),
        ({"a": 1, "c": 2}, "Error: add was called with wrong arguments: c: Unexpected keyword argument"),
    ],
)
def test_arguments_are_checked_before_a_tool_runs(arguments, result):
    assert Tool.of(add).run(arguments, 5.0).startswith(result)


def deep():
    return [deep()]


def test_an_error_of_a_tool_comes_back_as_text():
    def divide(a: int, b: int) -> float:
        """Divide."""
        return a / b

    assert Tool.of(divide).run({"a": 1, "b": 0}, 5.0) == "Error: divide raised ZeroDivisionError: division by zero"


@pytest.mark.parametrize(
    ("works", "kind"),
    [(lambda: {(1, 2): 3}, "TypeError"), (lambda: sys.exit(3), "SystemExit"), (deep, "RecursionError")],
)
def test_a_result_that_json_cannot_write_and_an_exit_are_reported_at_once(works, kind):
    def tool() -> dict:
        """Do something."""
        return works()

    started = time.perf_counter()
    assert Tool.of(tool).run({}, 5.0).startswith(f"Error: tool raised {kind}: ")
    assert time.perf_counter() - started < 3


def test_a_tool_that_takes_too_long_is_given_up():
    def wait(seconds: float) -> str:
        """Wait."""
        time.sleep(seconds)
        return "done"

    started = time.perf_counter()
    assert Tool.of(wait).run({"seconds": 3}, 0.1) == "Error: wait took longer than 0.1 s and was given up"
    assert time.perf_counter() - started < 1
    assert Tool.of(wait).run({"seconds": 0}, 5.0) == "done"


def test_a_long_result_is_cut_and_ends_with_its_length():
    def many(n: int) -> list[int]:
        """Count."""
        return list(range(n))

    text = Tool.of(many).run({"n": 1000}, 5.0)
    assert text.startswith("[0, 1, 2")
    assert text.endswith("... (4890 characters in all)")
    assert len(text) < 2100


# ---- finding calls


@pytest.mark.parametrize(
    ("text", "calls"),
    [
        ("the answer is 42", []),
        ("", []),
        ('a<tool_call>\n{"name": "add", "arguments": {"a": 1}}\n</tool_call>', [ToolCall("add", {"a": 1})]),
        (
            call("add", a=1) + "\n" + call("shout", text="x"),
            [ToolCall("add", {"a": 1}), ToolCall("shout", {"text": "x"})],
        ),
        ('<tool_call>{"name": "add", "arguments": {"a": 1}}', [ToolCall("add", {"a": 1})]),
        ('{"name": "add", "parameters": {"a": 1}}', [ToolCall("add", {"a": 1})]),
        ('<|python_tag|>{"name": "add"}', [ToolCall("add")]),
        ('{"type": "function", "function": {"name": "add", "arguments": {"a": 1}}}', [ToolCall("add", {"a": 1})]),
        ('<tool_call>{"name": "add", "id": "1", "type": "function"}</tool_call>', [ToolCall("add")]),
        ('{"total": 3}', []),
        ('{"function": 3, "arguments": {}}', []),
    ],
)
def test_calls_are_found_in_tags_or_as_the_whole_turn(text, calls):
    assert parse_calls(text) == calls


@pytest.mark.parametrize(
    "text",
    [
        "<tool_call>add(1)</tool_call>",
        "<tool_call>[1]</tool_call>",
        '<tool_call>{"name": "add", "arguments": 3}',
        '<tool_call>{"name": "add", "args": {"a": 1}}</tool_call>',
        '<tool_call>{"name": "add", "a": 1}</tool_call>',
        "<tool_call>",
    ],
)
def test_a_tag_without_a_valid_call_becomes_a_call_with_a_mistake(text):
    [bad] = parse_calls(text)
    assert "call" in bad.mistake


@given(st.text() | st.text().map(lambda text: f"<tool_call>{text}</tool_call>"))
def test_no_text_makes_the_parser_raise(text):
    parse_calls(text)
    parse_calls("<tool_call>" + "[" * 5000 + text)


# ---- episodes


@pytest.mark.parametrize("family", FAMILIES)
def test_a_tool_answers_and_the_turn_without_a_call_is_the_answer(family):
    tokenizer = chat_tokenizer(family)
    episode, engine = play(tokenizer, call("add", family, a=40, b=2), "answer")
    role = {"chatml": "tool", "llama3": "tool", "gemma": "user"}[family]
    assert results(episode) == [f"[{role}] 42"]
    assert (episode.reward, episode.is_correct, episode.truncated) == (1.0, True, False)
    read = tokenizer.decode(engine.seen[1][len(engine.seen[0]) :])
    assert "42" in read.split("}")[-1]
    assert not episode.mask[len(engine.seen[1]) - 1]
    assert episode.mask[len(engine.seen[1]) :].all()


@pytest.mark.parametrize("family", FAMILIES)
def test_the_policy_reads_the_schema_once_wherever_the_template_puts_it(family):
    tokenizer = chat_tokenizer(family)
    env = ToolEnv(["the user"], [add, shout], answered, tokenizer=tokenizer)
    text = tokenizer.decode(env.prompt_ids(0))
    assert text.count('"Add two numbers."') == 1
    assert text.count('"the second"') == 1
    written_by_us = "<tool_call>" in text
    assert written_by_us is (family == "gemma")  # the template that knows no tools


def test_a_system_message_and_the_tools_share_one_message():
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = tokenizer.chat_template.replace("if tools", "if false")
    prompt = [{"role": "system", "content": "Be brief."}, {"role": "user", "content": "the user"}]
    env = ToolEnv([prompt, "the user"], [add], answered, tokenizer=tokenizer)
    with_system, without = (tokenizer.decode(env.prompt_ids(i)) for i in (0, 1))
    assert with_system.count("system") == without.count("system") == 1
    assert "Be brief." in with_system
    assert "<tool_call>" in with_system
    assert "<tool_call>" in without
    assert env.prompt_text(0) == env.prompt_text(1) == "the user"


def test_without_a_chat_template_the_tools_stand_in_front_of_the_prompt():
    env = ToolEnv(["the user"], [add], answered, tokenizer=Letters())
    text = Letters().decode(env.prompt_ids(0))
    assert text.count('"Add two numbers."') == 1
    assert "<tool_call>" in text
    assert text.endswith("\n\nthe user")


def test_without_chat_the_template_counts_for_nothing():
    tokenizer = chat_tokenizer("mistral", tools=True)
    env = ToolEnv(["the user"], [add], answered, tokenizer=tokenizer, chat=False)
    text = tokenizer.decode(env.prompt_ids(0))
    assert text.startswith("You can call these functions:")
    assert text.endswith("\n\nthe user")
    env.reset()
    result = env.step(call("add", a=40, b=2))
    assert tokenizer.decode(result["observation"])[len(text) + len(call("add", a=40, b=2)) :] == "42"


def test_a_way_of_calling_of_ones_own_is_described_in_ones_own_words_or_not_at_all():
    tokenizer = chat_tokenizer("gemma")
    words = {"describe": lambda schemas: f"Write +n for {schemas[0]['function']['name']}."}
    texts = [
        tokenizer.decode(ToolEnv(["the user"], [add], answered, tokenizer=tokenizer, **given).prompt_ids(0))
        for given in (words, {"describe": lambda schemas: ""})
    ]
    assert "Write +n for add.\n\nthe user" in texts[0]
    assert texts[1] == "<bos><start_of_turn>user\nthe user<end_of_turn>\n<start_of_turn>model\n"


def test_mistakes_are_answered_and_the_policy_may_try_again():
    tokenizer = chat_tokenizer("chatml")
    episode, _ = play(
        tokenizer,
        "<tool_call>add 1 and 2</tool_call>",
        call("subtract", a=1),
        call("add", b=1),
        call("add", a=1) + call("shout", text="hi"),
        "answer",
    )
    bad, unknown, wrong, right, loud = results(episode)
    assert "the call is no JSON" in bad
    assert "there is no tool 'subtract'; the tools are add, shout" in unknown
    assert "a: Missing required argument" in wrong
    assert (right, loud) == ("[tool] 2", "[tool] HI")
    assert episode.reward == 1.0


@pytest.mark.parametrize("family", FAMILIES)
def test_half_a_character_that_a_call_spells_comes_back_as_a_question_mark(family):
    """JSON can escape one, and neither a tokenizer nor a file takes it."""

    def echo(text: str) -> str:
        """Say it again."""
        return text

    tokenizer = chat_tokenizer(family)
    half = call("echo", family, text="a\ud800b")
    episode, _ = play(tokenizer, half, "answer", tools=[echo])
    assert [line.split("] ")[1] for line in results(episode)] == ["a?b"]
    assert episode.text.encode()


RESULTS = [
    'say "hi"\nline 2 \\ back',
    "",
    "   ",
    "<|im_end|><|call|></s>",
    '{"a": "b"}',
    "x" * 3000,
    "naïve 東京",
    "</tool_call>",
]


@pytest.mark.parametrize("family", TOOL_SPECIAL)
@pytest.mark.parametrize("result", RESULTS, ids=lambda r: repr(r[:12]))
def test_whatever_a_tool_returns_comes_back_in_the_role_of_the_template(family, result):
    def add(a: int, b: int) -> str:
        """Add."""
        return result

    tokenizer = chat_tokenizer(family, tools=True)
    episode, engine = play(tokenizer, CALLS[family], CALLS[family], "answer", tools=[add])
    assert episode.reward == 1.0
    assert [line.split()[0] for line in results(episode)] == ["[tool]", "[tool]"]
    first, second, third = (tokenizer.decode(prompt) for prompt in engine.seen)
    assert second.startswith(first + CALLS[family])
    added, again = second[len(first + CALLS[family]) :], third[len(second + CALLS[family]) :]
    shown = result[:2000].strip()
    assert shown in again or json.dumps(shown, ensure_ascii=False)[1:-1] in again
    assert added == again or family == "gpt_oss"  # nothing depends on the turns before


INSIDE = """{% for m in messages if m.role != 'tool' %}{{ '<|im_start|>' + m.role + '\n' }}
{%- for c in m.tool_calls or [] %}{{ '<tool_call>' + c.function | tojson + '</tool_call>' }}{% endfor %}
{%- if m.tool_calls %}{% for r in messages[loop.index:] if r.role == 'tool' %}{{ r.content }}{% endfor %}{% endif %}
{{- m.content + '<|im_end|>\n' }}{% endfor %}{% if add_generation_prompt %}{{ '<|im_start|>assistant\n' }}{% endif %}"""


def test_a_result_that_a_template_would_write_before_the_turn_goes_back_in_the_users_role():
    """Gemma 4 has results within the turn of the call, in front of its text."""
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template = INSIDE
    episode, engine = play(tokenizer, call("add", a=40, b=2), "answer")
    assert results(episode) == ["[user] 42"]
    assert tokenizer.decode(engine.seen[1]).endswith("<|im_start|>user\n42<|im_end|>\n<|im_start|>assistant\n")


@pytest.mark.parametrize(
    ("turn", "result"),
    [
        ("maybe {0} no</think>\n\n{1}", "[tool] 2"),
        ("<think>maybe {0}</think>{1}", "[tool] 2"),
        ("{0}", None),
        ("maybe {0} and {1}", None),
        ("{0}</think>", None),
    ],
)
def test_a_call_in_a_thought_that_the_prompt_opened_is_none(turn, result):
    tokenizer = chat_tokenizer("qwen3", tools=True)
    tokenizer.chat_template += "{% if add_generation_prompt %}{{ '<think>\n' }}{% endif %}"
    turns = [turn.format(call("add", a=0), call("add", a=1)), "</think>answer"]
    episode, engine = play(tokenizer, *turns)
    assert results(episode) == ([result] if result else [])
    assert engine.calls == (2 if result else 1)


def test_calls_without_end_are_truncated():
    episode, engine = play(chat_tokenizer("chatml"), *[call("add", a=1)] * 3, max_turns=3)
    assert episode.truncated
    assert engine.calls == 3
    assert results(episode) == ["[tool] 2"] * 2  # the last answer would never have been read


def test_other_ways_of_calling_can_be_read():
    def parse(text):
        return [ToolCall("add", {"a": int(text[1:])})] if text.startswith("+") else []

    episode, _ = play(chat_tokenizer("chatml"), "+12", "answer", parse=parse)
    assert results(episode) == ["[tool] 13"]


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"tools": []}, r"the tools are \[\]"),
        ({"tools": [add, add]}, r"the tools are \['add', 'add'\]"),
        ({"tool_seconds": 0}, "tool_seconds is 0"),
        ({"tokenizer": None}, "no tokenizer"),
    ],
)
def test_an_environment_that_cannot_work_is_refused(settings, sentence):
    arguments = {"tools": [add], "tokenizer": chat_tokenizer("chatml"), **settings}
    with pytest.raises(UserError, match=sentence):
        ToolEnv(["the user"], arguments.pop("tools"), answered, **arguments)
