"""Chat templates in the shapes of real families: everything that is asked stands in the prompt, or is refused."""

import datetime
import json

import numpy as np
import pytest
from hypothesis import given
from hypothesis import strategies as st
from template_shapes import SPECIAL, shaped
from transformers.utils import chat_template_utils

from textpolicy.environment import MultiTurnEnv, Reply, TextGenerationEnv, ToolEnv
from textpolicy.environment.text.conversation import TURN, ChatCodec
from textpolicy.errors import UserError
from textpolicy.rewards.answer import answered

FAMILIES = sorted(SPECIAL)
USER, SYSTEM = {"role": "user", "content": "What is 2 + 2?"}, {"role": "system", "content": "Be brief."}
SAID, AGAIN = {"role": "assistant", "content": "It is four."}, {"role": "user", "content": "And 3 + 3?"}


def nothing(prompt, completion, example, **kwargs):
    return 0.0


def four(prompt, completion, example, thinking="", truncated=False, **kwargs):
    return float("4" in (answered(completion, thinking, truncated) or ""))


def part(*texts):
    return [{"type": "text", "text": text} for text in texts]


def called(arguments, content=None):
    call = {"id": "1", "type": "function", "function": {"name": "find", "arguments": arguments}}
    return [
        USER,
        {"role": "assistant", "content": content, "tool_calls": [call]},
        {"role": "tool", "content": "found it"},
    ]


def prompt_of(prompt, family="qwen3", reward=nothing, **settings):
    """The prompt as the model reads it."""
    tokenizer = shaped(family) if isinstance(family, str) else family
    env = TextGenerationEnv([prompt], reward, 64, tokenizer=tokenizer, **settings)
    return tokenizer.decode(env.prompt_ids(0))


class Says:
    """A partner that sends the messages it was given, turn after turn."""

    def __init__(self, *messages):
        self.messages = messages

    def reply(self, text):
        return Reply(self.messages)


def talk(family, *messages, prompt=USER["content"], **settings):
    return MultiTurnEnv([prompt], lambda example: Says(*messages), nothing, 64, tokenizer=shaped(family), **settings)


def read_after(env, *turns):
    """What the model reads after each of the ``turns``."""
    env.reset()
    return [env.tokenizer.decode(env.step(turn)["observation"]) for turn in turns]


# ---- what is asked stands in the prompt, or is refused


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("prompt", [[USER], [USER, SAID, AGAIN], [SYSTEM, USER], [SYSTEM, USER, SAID, AGAIN]])
def test_ordinary_messages_have_the_ids_that_the_tokenizer_gives_them(family, prompt):
    if family == "gemma" and prompt[0] is SYSTEM:
        with pytest.raises(UserError, match=r"models/gemma refuses messages of the roles system, user.*no system role"):
            prompt_of(prompt, family)
        return
    tokenizer = shaped(family)
    given = [{**m, "content": part(m["content"])} for m in prompt] if family == "parts" else prompt
    day = tokenizer.apply_chat_template(given, add_generation_prompt=True, tokenize=False)
    fixed = day.replace(f"{datetime.date.today():%d %b %Y}", "01 Jan 2025").replace(
        f"{datetime.date.today()}", "2025-01-01"
    )
    expected = tokenizer.encode(fixed, add_special_tokens=False)
    env = TextGenerationEnv([prompt], nothing, tokenizer=tokenizer)
    assert env.prompt_ids(0).tolist() == expected


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("content", [part("What is 2 + 2?"), part("What is ", "2 + 2?"), ["What is 2", " + 2?"]])
def test_a_content_of_parts_is_asked_and_rewarded_as_its_text(family, content):
    seen = []

    def look(prompt, completion, example):
        seen.append(prompt)
        return 0.0

    tokenizer = shaped(family)
    env = TextGenerationEnv([[{"role": "user", "content": content}]], look, tokenizer=tokenizer)
    assert tokenizer.decode(env.prompt_ids(0)) == prompt_of("What is 2 + 2?", family)
    env.reset()
    env.step("4")
    assert seen == ["What is 2 + 2?"]


@pytest.mark.parametrize(
    ("family", "prompt", "sentence"),
    [
        (
            "qwen3",
            [{"role": "developer", "content": "In French."}, USER],
            "models/qwen3 leaves out .*'developer' .In Fr",
        ),
        ("qwen3", [USER, SAID, {"role": "function", "content": "7"}, USER], "leaves out .*'function'"),
        ("llama32", [USER, {"role": "critic", "content": "No."}], "models/llama32 leaves out .*'critic'"),
        ("cohere", [USER, {"role": "developer", "content": "In French."}], "leaves out or changes .*'developer'"),
        ("mistral", [USER, USER], "models/mistral refuses messages of the roles user, user .*must alternate"),
        ("gemma", [USER, SAID, SAID, AGAIN], "refuses messages of the roles user, assistant, assistant, user"),
        ("llama32", called({"a": 1})[:1] + 2 * called({"a": 1})[1:2] + called({"a": 1})[2:], None),
        ("chatml", called({"a": 1}), "leaves out or changes the tool calls of the role 'assistant'"),
        ("qwen3", [{"role": "user", "content": [{"type": "image", "image": "x.png"}, *part("?")]}], "holds 'image'"),
        ("qwen3", [{"role": "user", "content": [{"type": "image_url", "image_url": {}}]}], "'user' holds 'image_url'"),
        ("qwen3", [{"role": "user", "content": 7}], "'user' holds 'int'"),
        ("qwen3", [{"role": "user", "content": None}], "lacks one of {'role', 'content'}"),
        ("qwen3", [{"content": "?"}], "lacks one of {'role', 'content'}"),
        ("qwen3", [{"role": None, "content": "?"}], "lacks one of {'role', 'content'}"),
        ("qwen3", called("not JSON"), "has no name, or arguments that are no JSON object"),
        ("qwen3", [USER, {**SAID, "tool_calls": 5}, AGAIN], "has no name, or arguments that are no JSON object"),
        ("qwen3", called({})[:2], "tool calls"),
        ("qwen3", [{"role": "user", "content": part(" ")}], "prompt 0 is blank"),
        ("qwen3", [{"role": "system", "content": "a\ud800"}, USER], "half a character"),
    ],
)
def test_what_a_template_refuses_or_leaves_out_is_refused_in_a_sentence(family, prompt, sentence):
    if sentence is None:  # two calls, one after the other, is all that this template takes
        assert prompt_of(prompt, family).count("find") == 2
        return
    with pytest.raises(UserError, match=sentence) as caught:
        prompt_of(prompt, family)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "why"),
    [
        ("{{ messages[0].content.nothing.more }}", "has no attribute"),
        ("{{ 1 + messages[0].content }}", "unsupported operand"),
        ("{% for m in messages %}{{ m.content }", "unexpected"),
        ("{{ raise_exception('only\ntext') }}", "only text"),
        ("{{ 1 // 0 }}", "zero"),
        ("{{ messages[0].content | from_json }}", "from_json"),
        ("{{ messages[7].content + '' }}", "refuses messages of the roles user"),
    ],
)
def test_whatever_a_template_raises_is_one_sentence(template, why):
    with pytest.raises(UserError, match=r"prompt 0 .*the chat template of models/qwen3 refuses") as caught:
        prompt_of("What?", shaped("qwen3", chat_template=template))
    assert why in str(caught.value)
    assert "\n" not in str(caught.value)


@pytest.mark.parametrize(
    ("template", "left_out"),
    [
        ("{{ messages[-1].content }}", "Be brief."),  # only the last
        ("{{ messages[0].content }}", "What is 2"),  # only the first
        ("{% for m in messages %}{{ m.content[:9] }}{% endfor %}", "What is 2"),  # cut short
        ("{% for m in messages %}{{ m.content | upper }}{% endfor %}", "Be brief."),
        ("{% for m in messages %}{{ m.content.split(' ')[0] }}{% endfor %}", "Be brief."),
        ("Be brief. {{ messages[1].content }}", "Be brief."),  # what it says anyway
        ("{% for m in messages %}{{ m.role }}{% endfor %}", "Be brief."),
        ("What?", "Be brief."),
        ("{{ messages | length }}", "Be brief."),
    ],
)
def test_what_any_template_leaves_out_is_found(template, left_out):
    with pytest.raises(UserError, match="leaves out or changes the message") as caught:
        prompt_of([SYSTEM, USER], shaped("qwen3", chat_template=template))
    assert left_out in str(caught.value)


def test_what_a_template_does_to_one_content_alone_is_found_too():
    template = "{% for m in messages %}{{ m.content.split('###')[0] }}{% endfor %}"
    assert prompt_of([USER], shaped("qwen3", chat_template=template)) == USER["content"]
    prompts = [[USER], [{"role": "user", "content": "Sum it up: ### one ### two"}]]
    with pytest.raises(UserError, match=r"prompt 1 .*leaves out or changes"):
        TextGenerationEnv(prompts, nothing, tokenizer=shaped("qwen3", chat_template=template))


@pytest.mark.parametrize("arguments", [{"text": "a {b}"}, '{"text": "a {b}"}'])
@pytest.mark.parametrize(
    ("family", "shown"), [("qwen3", None), ("llama32", None), ("deepseek", '{"text": "a {b}"}</tool>')]
)
def test_calls_of_earlier_turns_are_shown_in_the_form_that_the_template_wants(family, shown, arguments):
    text = prompt_of([*called(arguments), SAID, AGAIN], family)
    assert (shown or '": {"text": "a {b}"}') in text.replace('parameters": ', '": ').replace('arguments": ', '": ')
    assert text.index("find") < text.index("found it") < text.index("It is four.")


@pytest.mark.parametrize("result", ['{"x": "say \\"hi\\""}', "two\nlines\t\u00e9 \U0001f600", '"', "\\", "  "])
@pytest.mark.parametrize("family", ["qwen3", "llama32", "harmony", "deepseek"])
def test_a_result_may_be_written_as_json(family, result):
    [text] = read_after(talk(family, {"role": "tool", "content": result}), "turn")
    assert (result.strip() in text) or (json.dumps(result, ensure_ascii=False) in text)


def test_several_templates_and_mappings_are_read_as_they_come():
    llama, one = shaped("llama32"), {"role": "user", "content": {"type": "text", "text": "Q?"}}
    llama.chat_template = {"default": "{{ raise_exception('no tools here') if tools }}" + llama.chat_template}
    assert prompt_of([one], llama) == prompt_of("Q?", "llama32")
    llama.chat_template = {"rag": "never"}
    with pytest.raises(UserError, match=r"models/llama32 refuses .*no default"):
        prompt_of([one], llama)


def test_thoughts_of_earlier_turns_may_be_left_out():
    thought = {"role": "assistant", "content": "<think>\nhm\n</think>\n\nIt is four."}
    for family in ("qwen3", "deepseek"):
        text = prompt_of([USER, thought, AGAIN], family)
        assert "hm" not in text
        assert "It is four." in text


# ---- a prompt that ends with the assistant's words


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("begun", ["Let me think", "The answer is ", "```python\n", "Sure:\n\n1."])
def test_a_prompt_that_ends_with_the_assistants_words_is_continued(family, begun):
    prompt = [USER, {"role": "assistant", "content": begun}]
    assert prompt_of(prompt, family).endswith(begun)
    env = talk(family, AGAIN, prompt=prompt)
    assert env.prompt_text(0) == USER["content"]
    env.reset()
    first, second = (env.tokenizer.decode(env.step(turn)["observation"]) for turn in (" it over", "done"))
    for text in first, second:
        assert f"{begun} it over" in text
    assert second.count(AGAIN["content"]) == 2
    asked = [*prompt[:1], {"role": "assistant", "content": f"{begun} it over"}, AGAIN]
    if family not in ("qwen3", "llama32", "gemma"):  # which trim, or tell a last turn from others
        assert first == prompt_of(asked, family)


def test_a_begun_answer_that_the_template_leaves_out_is_refused():
    prompt = [USER, {"role": "assistant", "content": "<think>hm</think>"}]
    with pytest.raises(UserError, match="leaves out or changes the message of the role 'assistant'"):
        prompt_of(prompt, "deepseek")
    assert prompt_of(prompt, "qwen3").endswith("<think>\nhm\n</think>\n\n")


# ---- replies


@pytest.mark.parametrize("family", FAMILIES)
def test_two_messages_in_a_row_are_joined_where_roles_take_turns(family):
    first, second = read_after(
        talk(family, {"role": "user", "content": "one"}, {"role": "user", "content": "two"}), "x", "y"
    )
    assert first.index("one") < first.index("two")
    assert first == second[: len(first)]
    assert second.count("one") == second.count("two") == 2
    assert ("one\n\ntwo" in first) is (family in ("gemma", "mistral"))


@pytest.mark.parametrize("family", [f for f in FAMILIES if f not in ("parts", "chatml")])
def test_a_policy_that_writes_two_calls_in_a_turn_ends_no_run(family):
    def add(a: int, b: int) -> int:
        """Add two numbers."""
        return a + b

    def parse(text):
        from textpolicy.environment import ToolCall

        return [ToolCall("add", json.loads(line)) for line in text.splitlines() if line.startswith("{")]

    settings = {"parse": parse, "describe": lambda schemas: "Add what you will."}
    env = ToolEnv(["Q?"], [add], nothing, 64, tokenizer=shaped(family), **settings)
    first, second = read_after(env, *['{"a": 40, "b": 2}\n{"a": 1, "b": 6}'] * 2)
    assert first.rindex("42") < first.rindex("7")
    assert second.startswith(first)


@pytest.mark.parametrize("role", ["developer", "system", "", "tool"])
def test_a_reply_that_cannot_be_shown_ends_its_episode_alone(role, caplog):
    env = talk("mistral", {"role": role or "user", "content": "one" if role else "[/INST]</s>"})
    env.reset()
    result = env.step("turn")
    assert result["terminated"] is result["truncated"] is bool(role)
    assert ("an episode ended" in caplog.text) is bool(role)
    assert env.reset()[1]["episode"] == bool(role)


def test_a_partner_may_begin_the_policys_next_turn():
    begun, again = {"role": "assistant", "content": "So: "}, {"role": "user", "content": "Why?"}
    first, second = read_after(talk("gemma", again, begun), "x", "y")
    assert first.endswith("x<end_of_turn>\n<start_of_turn>user\nWhy?<end_of_turn>\n<start_of_turn>model\nSo: ")
    assert second.startswith(f"{first}y<end_of_turn>\n")
    env = talk("gemma", begun)
    env.reset()
    assert env.step("x")["truncated"]  # two turns of the model in a row


def test_an_empty_turn_ends_no_conversation():
    content = "{{ raise_exception('an assistant has something to say') if m.role == 'assistant' and not m.content }}"
    template = "{% for m in messages %}" + content + "<|im_start|>{{ m.role ~ m.content }}<|im_end|>{% endfor %}"
    env = MultiTurnEnv(["Q"], lambda e: Says(AGAIN), nothing, tokenizer=shaped("chatml", chat_template=template))
    assert read_after(env, "", "", "x")[2].endswith(f"x<|im_end|><|im_start|>user{AGAIN['content']}<|im_end|>")


@pytest.mark.parametrize("said", ["/no_think", "Be brief. /no_think", "/think Be brief.", "Be /no_think brief."])
def test_switches_of_thinking_may_be_left_out(said):
    content = "{{ m.content | replace('/no_think', '') | replace('/think', '') | trim }}"
    template = "{% for m in messages %}" + content + "{% endfor %}"
    prompt = [{"role": "system", "content": said}, USER]
    brief = "Be  brief." if said[3] == "/" else "Be brief." * ("brief" in said)
    assert prompt_of(prompt, shaped("chatml", chat_template=template)) == f"{brief}{USER['content']}"


def test_a_partner_that_sends_no_message_is_a_mistake_of_its_author():
    env = talk("chatml", {"role": "user", "content": [{"type": "audio"}]})
    env.reset()
    with pytest.raises(UserError, match="holds 'audio'"):
        env.step("turn")


@pytest.mark.parametrize("family", FAMILIES)
@pytest.mark.parametrize("text", [TURN, f"{TURN}-0.", f"{TURN}-0.{TURN}-1.", f"x{TURN}-0", "cut-0.", "text-0.0.0."])
def test_turns_and_replies_may_quote_the_marks(family, text):
    first, second = read_after(talk(family, {"role": "user", "content": f"a{text}b"}, prompt=text), text, "two")
    assert first.count(f"a{text}b") == 1
    assert second == first + second[len(first) :]
    assert second[len(first) :].startswith("two")
    assert second.count(f"a{text}b") == 2


# ---- control tokens


@pytest.mark.parametrize("family", FAMILIES)
def test_control_tokens_spelled_in_messages_are_text(family):
    tokenizer = shaped(family)
    controls = [
        tokenizer.convert_tokens_to_ids(t) for t in (*SPECIAL[family], "<\uff5cUser\uff5c>", "<\uff5cAssistant\uff5c>")
    ]

    def counted(text):
        env = talk(
            family, {"role": "user", "content": f"reply {text}"}, prompt=[{"role": "user", "content": f"ask {text}"}]
        )
        env.reset()
        ids = env.step("turn")["observation"].tolist()
        assert tokenizer.decode(ids).count(f"ask {text}") == tokenizer.decode(ids).count(f"reply {text}") == 1
        return [ids.count(i) for i in controls if i is not None]

    plain = counted("xyz")
    for spelled in (
        "".join(SPECIAL[family]),
        f"<<{SPECIAL[family][0] * 2}>",
        "<\uff5cUser\uff5c>",
        f"a {SPECIAL[family][-1]}\n",
    ):
        assert counted(spelled.strip()) == plain, spelled


def test_without_a_template_the_results_of_tools_are_text_and_replies_are_as_they_are():
    tokenizer = shaped("chatml", chat_template=None)
    for role, count in (("tool", 0), ("user", 1)):
        result = {"role": role, "content": "a <|im_end|> b"}
        env = MultiTurnEnv(["Q?"], lambda example, r=result: Says(r), nothing, 64, tokenizer=tokenizer)
        env.reset()
        ids = env.step("turn ")["observation"].tolist()
        assert tokenizer.decode(ids) == "Q?turn a <|im_end|> b"
        assert ids.count(tokenizer.eos_token_id) == count


def test_marks_of_thoughts_and_calls_in_messages_stay_the_tokens_they_are():
    tokenizer = shaped("qwen3")
    env = TextGenerationEnv(["Think in <think> tags.</think>"], nothing, tokenizer=tokenizer)
    ids = env.prompt_ids(0).tolist()
    assert tokenizer.convert_tokens_to_ids("<think>") in ids
    assert tokenizer.convert_tokens_to_ids("</think>") in ids


@given(
    st.lists(
        st.sampled_from([*SPECIAL["qwen3"], TURN, "-0.", "cut-0.", "<think>", "<", "|im_end|>", " a ", "\n", "\u00e9"])
    )
)
def test_any_text_is_asked_as_it_is(pieces):
    tokenizer, text = shaped("qwen3"), "".join(pieces)
    if not text.strip():
        return
    ids = ChatCodec.of(tokenizer).encode(text, None)
    assert tokenizer.decode(ids) == f"<|im_start|>user\n{text}<|im_end|>\n<|im_start|>assistant\n"
    assert ids.count(tokenizer.eos_token_id) == 1


# ---- arguments, and the day


@pytest.mark.parametrize(("family", "day"), [("llama32", "01 Jan 2025"), ("harmony", "2025-01-01")])
def test_a_template_with_a_date_writes_the_same_on_every_day(family, day, monkeypatch):
    def moved(days):
        class Clock(datetime.datetime):
            @classmethod
            def now(cls, tz=None):
                return datetime.datetime(2026, 1, 1) + datetime.timedelta(days=days)

        monkeypatch.setattr(chat_template_utils, "datetime", Clock)
        env = talk(family, AGAIN)
        return [env.prompt_ids(0).tolist(), *read_after(env, "turn")]

    before = moved(0)
    assert before == moved(1) == moved(400)
    assert day in shaped(family).decode(before[0])
    chosen = prompt_of("Q?", family, day=datetime.date(2031, 12, 9))
    assert ("09 Dec 2031" if family == "llama32" else "2031-12-09") in chosen


def test_every_format_of_a_date_is_written():
    day, formats = datetime.date(2027, 3, 4), "%A %d %B %Y, %a %-d %b %y %m %j %H:%M %U %x %%d"
    template = "\n{{ strftime_now('" + formats + "') }}{% for m in messages %}{{ m.content }}{% endfor %}"
    assert prompt_of("Q?", shaped("chatml", chat_template=template), day=day) == f"\n{day.strftime(formats)}Q?"


@pytest.mark.parametrize("thinking", [True, False])
def test_thinking_is_turned_on_and_off(thinking):
    empty = "<think>\n\n</think>\n\n"
    env = talk("qwen3", AGAIN, template_args={"enable_thinking": thinking})
    env.reset()
    prompt = env.tokenizer.decode(env.prompt_ids(0))
    assert prompt.endswith("<|im_start|>assistant\n" + ("" if thinking else empty))
    turn = "<think>\nhm\n</think>\n\n4" if thinking else "4"
    ids = env.tokenizer.encode(f"{turn}<|im_end|>", add_special_tokens=False)
    text = env.tokenizer.decode(env.step(ids)["observation"])
    question = f"<|im_start|>user\n{AGAIN['content']}<|im_end|>\n<|im_start|>assistant\n"
    assert text == f"{prompt}{turn}<|im_end|>\n{question}" + ("" if thinking else empty)


@pytest.mark.parametrize(
    ("thinking", "turn", "reward"),
    [
        (True, "<think>\nIt is 5.\n</think>\n\n4", 1.0),
        (True, "<think>\n4\n</think>\n\nIt is five: 5", 0.0),
        (True, "<think>\n4", 0.0),
        (False, "4", 1.0),
        (False, "5", 0.0),
    ],
)
@pytest.mark.parametrize("family", ["qwen3", "deepseek"])
def test_answers_are_read_behind_thoughts_that_the_template_opens_or_not(family, thinking, turn, reward):
    args = {"template_args": {"enable_thinking": thinking}} if family == "qwen3" else {}
    turn = turn.removeprefix("<think>\n") if family == "deepseek" else turn
    tokenizer = shaped(family)
    env = TextGenerationEnv(["2 + 2?"], four, 64, tokenizer=tokenizer, **args)
    env.reset()
    tokens = tokenizer.encode(turn, add_special_tokens=False)
    if not thinking and family == "deepseek":
        tokens = tokenizer.encode("</think>" + turn, add_special_tokens=False)
    assert env.step([*tokens, tokenizer.eos_token_id])["reward"] == reward


@pytest.mark.parametrize(("begun", "reward"), [("<think>\nSo it", 0.0), ("<think>\nSo</think>\nIt", 1.0), ("It", 1.0)])
def test_a_begun_thought_is_no_answer_until_it_ends(begun, reward):
    prompt = [USER, {"role": "assistant", "content": begun}]
    env = TextGenerationEnv([prompt], four, 64, tokenizer=shaped("chatml"))
    env.reset()
    assert env.step(" is 4")["reward"] == env.score(0, env.tokenizer.encode(" is 4"), truncated=False).reward == reward
    env.reset()
    assert env.step(" is 5.</think>4")["reward"] == 1.0


@pytest.mark.parametrize(
    ("family", "given", "sentence"),
    [
        (
            "qwen3",
            {"enable_thinkng": False},
            "models/qwen3 does not read 'enable_thinkng' of template_args; did you mean 'enable_",
        ),
        ("chatml", {"enable_thinking": False}, "models/chatml does not read 'enable_thinking'"),
        ("qwen3", {"enable_thinking": "false"}, "the text 'false' as enable_thinking; write false without quotes"),
        ("harmony", {"reasoning_effort": datetime.date(2026, 1, 1)}, "has a date as reasoning_effort; give a text"),
        ("qwen3", {"messages": []}, "has 'messages', which the prompt decides"),
        ("qwen3", {"add_generation_prompt": False}, "has 'add_generation_prompt', which the prompt decides"),
        ("harmony", {"padding": True}, "does not read 'padding'"),
        ("qwen3", {"m": 1}, "does not read 'm'"),
        (None, {"enable_thinking": True}, "no chat template"),
    ],
)
def test_arguments_that_the_template_does_not_read_are_refused_by_name(family, given, sentence):
    tokenizer = shaped(family) if family else shaped("chatml", chat_template=None)
    with pytest.raises(UserError, match=sentence):
        prompt_of("Q?", tokenizer, template_args=given)


def test_arguments_reach_every_rendering():
    for effort in ("low", "high"):
        env = talk("harmony", AGAIN, template_args={"reasoning_effort": effort})
        assert f"Reasoning: {effort}" in env.tokenizer.decode(env.prompt_ids(0))
    assert "Today Date: never" in prompt_of("Q?", "llama32", template_args={"date_string": "never"})
    template = "{{ '[' ~ voice ~ ']' }}{% for m in messages %}{{ m.content ~ voice }}{% endfor %}"
    env = MultiTurnEnv(
        ["Q?"], lambda e: Says(AGAIN), nothing, tokenizer=shaped("chatml", chat_template=template),
        template_args={"voice": " (softly)"},
    )  # fmt: skip
    assert read_after(env, "turn") == [f"[ (softly)]Q? (softly)turn (softly){AGAIN['content']} (softly)"]


# ---- channels, and marks of thoughts that are special tokens


@pytest.mark.parametrize(
    ("said", "text"),
    [
        ("{analysis}it is even<|end|>{start}{final}4<|return|>", "4"),
        ("{final} 4 \n<|return|>", "4"),
        ("{analysis}it is 4", ""),
        ("{analysis}it is 4<|return|>", ""),
        ("{analysis}a<|end|>{start}<|channel|>commentary to=functions.f <|constrain|>json<|message|>{{}}<|call|>", ""),
        ("{final}3<|end|>{start}{final}4<|return|>", "4"),
        ("4<|return|>", "4"),
        ("{analysis}a{final}4<|return|>", "4"),
    ],
)
def test_of_channels_the_final_one_is_the_text(said, text):
    env = TextGenerationEnv(["2 + 2?"], nothing, 640, tokenizer=shaped("harmony"))
    channels = {name: f"<|channel|>{name}<|message|>" for name in ("analysis", "final")}
    tokens = env.tokenizer.encode(said.format(**channels, start="<|start|>assistant"), add_special_tokens=False)
    assert env.text(tokens) == text


def test_a_channel_that_is_only_spelled_is_none():
    env = TextGenerationEnv(["2 + 2?"], nothing, 640, tokenizer=shaped("harmony"))
    spelled = [i for c in "<|channel|>final<|message|>4" for i in env.tokenizer.encode(c, add_special_tokens=False)]
    thought = env.tokenizer.encode("<|channel|>analysis<|message|>", add_special_tokens=False)
    assert env.text([*thought, *spelled]) == ""


@pytest.mark.parametrize(
    ("opens", "closes"),
    [
        ("<think>", "</think>"),
        ("[THINK]", "[/THINK]"),
        ("<|START_THINKING|>", "<|END_THINKING|>"),
        ("<seed:think>", "</seed:think>"),
    ],
)
def test_thoughts_between_special_tokens_are_told_from_the_answer(opens, closes):
    tokenizer = shaped("chatml", extra_special_tokens=[opens, closes, "<|other|>"])
    env = TextGenerationEnv(["2 + 2?"], four, 640, tokenizer=tokenizer)
    for said, reward in (
        (f"{opens}a{closes}<|other|>4", 1.0),
        (f"{opens}4{closes}5", 0.0),
        (f"{opens}4", 0.0),
    ):
        tokens = tokenizer.encode(f"{said}<|im_end|>", add_special_tokens=False)
        assert env.text(tokens) == said.replace("<|other|>", "")
        env.reset()
        assert env.step(tokens)["reward"] == reward


# ---- without a template


@pytest.mark.parametrize("prepend", [True, False])
def test_a_reply_without_a_template_follows_the_turn_without_a_space(prepend):
    from tokenizers import AddedToken, Tokenizer, decoders, models, normalizers
    from transformers import PreTrainedTokenizerFast

    words = ["<unk>", "<s>", "</s>", *(f"<0x{i:02X}>" for i in range(256)), "\u2581", *map(chr, range(ord("!"), 127))]
    core = Tokenizer(models.BPE({w: i for i, w in enumerate(words)}, [], unk_token="<unk>", byte_fallback=True))
    front = [normalizers.Prepend("\u2581")] if prepend else []
    core.normalizer = normalizers.Sequence([*front, normalizers.Replace(" ", "\u2581")])
    core.decoder = decoders.Sequence([decoders.Replace("\u2581", " "), decoders.ByteFallback(), decoders.Fuse()])
    core.add_special_tokens([AddedToken("<s>"), AddedToken("</s>")])
    tokenizer = PreTrainedTokenizerFast(tokenizer_object=core, eos_token="</s>", bos_token="<s>", unk_token="<unk>")
    for reply in ("42", " 42", "\n42", "\u00e9", "a b"):
        env = MultiTurnEnv(
            ["What "], lambda e, r=reply: Says({"role": "user", "content": r}), nothing, 9, tokenizer=tokenizer
        )
        env.reset()
        said = tokenizer.convert_tokens_to_ids(["i", "s"])
        ids = env.step(np.array(said))["observation"].tolist()
        assert tokenizer.decode(ids).endswith(f"What is{reply}")
