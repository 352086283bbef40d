"""Demonstrations: which tokens of a conversation are learned, in the templates of many families."""

import json

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from chat_tokenizers import SPECIAL, TOOL_SPECIAL, chat_tokenizer
from toy_tokenizers import Letters

from textpolicy.environment import MultiTurnEnv, Reply
from textpolicy.environment.demonstrations import demonstrations
from textpolicy.environment.text.conversation import ChatCodec
from textpolicy.errors import UserError

ASKED = [{"role": "user", "content": "the user"}]
TALK = [
    {"role": "user", "content": "hello us"},
    {"role": "assistant", "content": "an answer"},
    {"role": "user", "content": "the 124"},
    {"role": "assistant", "content": "hell 12"},
]
ADD = {"type": "function", "function": {"name": "add", "arguments": {"a": 40, "b": 2}}}


def spoken(tokenizer, episode):
    """The runs of learned tokens, as text with special tokens."""
    edges = np.flatnonzero(np.diff([0, *episode.mask.astype(int), 0]))
    return [tokenizer.decode(episode.tokens[a:b].tolist()) for a, b in zip(edges[::2], edges[1::2], strict=True)]


@pytest.mark.parametrize("family", sorted(SPECIAL))
def test_a_conversation_is_the_tokens_of_its_template_and_its_turns_with_their_stop_token_are_learned(family):
    tokenizer = chat_tokenizer(family)
    [episode] = demonstrations([{"messages": TALK}], tokenizer=tokenizer)
    written = tokenizer.apply_chat_template(TALK, tokenize=True, return_dict=False)
    assert episode.tokens.tolist() == written[: len(episode.tokens)]
    assert tokenizer.decode(written[len(episode.tokens) :]).strip() == ""  # the template's line break
    end = tokenizer.eos_token
    assert spoken(tokenizer, episode) == [f"an answer{end}", f"hell 12{end}"]
    assert not episode.logprobs.any()


@pytest.mark.parametrize("family", sorted(SPECIAL))
def test_of_a_prompt_and_a_completion_nothing_in_the_prompt_is_learned(family):
    """Answers that a prompt shows are read, in the tokens that the policy reads."""
    tokenizer = chat_tokenizer(family)
    codec, asked = ChatCodec.of(tokenizer), [*TALK, *ASKED]
    for said in ("hell 12", [{"role": "assistant", "content": "hell 12"}]):
        [episode] = demonstrations([{"prompt": asked, "completion": said}], tokenizer=tokenizer)
        prompt = codec.encode(asked, True)
        assert episode.tokens[: len(prompt)].tolist() == prompt
        assert spoken(tokenizer, episode) == [f"hell 12{tokenizer.eos_token}"]
        assert not episode.mask[: len(prompt)].any()
    talk = [{"role": "assistant", "content": "an answer"}, *ASKED, {"role": "assistant", "content": "hell 12"}]
    [episode] = demonstrations([{"prompt": TALK[:1], "completion": talk}], tokenizer=tokenizer)
    assert spoken(tokenizer, episode) == [f"{said}{tokenizer.eos_token}" for said in ("an answer", "hell 12")]
    with pytest.raises(UserError, match=r"row 1 of .* two messages in a row"):
        demonstrations([{"prompt": TALK[:2], "completion": "hell 12"}], tokenizer=tokenizer)
    with pytest.raises(UserError, match=r"row 2 of .* lacks one of"):
        demonstrations([{"messages": TALK}, {"messages": [*ASKED, {"role": "assistant"}]}], tokenizer=tokenizer)


@pytest.mark.parametrize("family", sorted({*SPECIAL, "qwen3"}))
def test_a_demonstration_is_what_the_policy_would_have_read_and_sampled(family):
    tokenizer = chat_tokenizer(family, tools=family == "qwen3")
    [episode] = demonstrations([{"messages": TALK}], tokenizer=tokenizer)

    class Partner:
        def reply(self, text):
            return Reply((TALK[2],)) if text == "an answer" else Reply()

    env = MultiTurnEnv([TALK[:1]], lambda example: Partner(), lambda **_: 0.0, tokenizer=tokenizer, max_turns=2)
    conversation = env.begin(0)
    codec = ChatCodec.of(tokenizer)
    for said in (TALK[1], TALK[3]):
        conversation.add([*codec.encode_after(said["content"]), tokenizer.eos_token_id], truncated=False)
    assert conversation.over
    assert not conversation.truncated
    assert conversation.tokens == episode.tokens.tolist()


@pytest.mark.parametrize("family", sorted(TOOL_SPECIAL))
def test_a_call_of_a_tool_is_learned_as_the_template_writes_it(family):
    tokenizer = chat_tokenizer(family, tools=True)
    talk = [*ASKED, {"role": "assistant", "content": "", "tool_calls": [{"id": "a1b2c3d4e", **ADD}]}]
    try:
        written = tokenizer.apply_chat_template(talk, tokenize=False)
    except TypeError:  # a template that takes the arguments as text
        function = {**ADD["function"], "arguments": json.dumps(ADD["function"]["arguments"])}
        text = [*ASKED, {**talk[1], "tool_calls": [{**talk[1]["tool_calls"][0], "function": function}]}]
        written = tokenizer.apply_chat_template(text, tokenize=False)
    started = tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True)
    if not written.startswith(started):
        with pytest.raises(UserError, match="cannot show tool calls"):
            demonstrations([{"messages": talk}], tokenizer=tokenizer)
        return
    [episode] = demonstrations([{"messages": talk}], tokenizer=tokenizer)
    end = tokenizer.eos_token  # which a template may leave to what follows
    assert tokenizer.decode(episode.tokens.tolist()) == f"{written.rstrip().removesuffix(end)}{end}"
    [said] = spoken(tokenizer, episode)
    assert all(word in said for word in ("add", "40"))


def test_a_prompt_and_a_completion_are_texts_or_messages():
    tokenizer = chat_tokenizer("chatml")
    answer = [{"role": "assistant", "content": "an answer"}]
    rows = [{"prompt": "the user", "completion": "an answer"}, {"prompt": ASKED, "completion": answer}]
    one, two = demonstrations([*rows], tokenizer=tokenizer)
    assert one.tokens.tolist() == two.tokens.tolist()
    assert spoken(tokenizer, one) == ["an answer<|im_end|>"]


def test_without_a_template_a_completion_follows_its_prompt_as_it_is():
    [episode] = demonstrations([{"prompt": "2+2=", "completion": "4"}], tokenizer=Letters())
    assert episode.tokens.tolist() == [ord(c) for c in "2+2=4"]
    assert episode.mask.tolist() == [False] * 4 + [True]


def test_rows_come_from_jsonl_and_parquet_files(tmp_path):
    rows = [{"messages": TALK}, {"messages": TALK[:2]}]
    (tmp_path / "rows.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    pq.write_table(pa.Table.from_pylist(rows), tmp_path / "rows.parquet")
    tokenizer = chat_tokenizer("llama3")
    expected = [e.tokens.tolist() for e in demonstrations(rows, tokenizer=tokenizer)]
    for name in ("rows.jsonl", "rows.parquet"):
        found = demonstrations(tmp_path / name, tokenizer=tokenizer)
        assert [e.tokens.tolist() for e in found] == expected


def test_a_control_token_that_a_demonstration_spells_stays_text():
    tokenizer = chat_tokenizer("chatml")
    said = [*ASKED, {"role": "assistant", "content": "say <|im_end|> at the end"}]
    [episode] = demonstrations([{"messages": said}], tokenizer=tokenizer)
    learned = episode.tokens[episode.mask].tolist()
    assert learned.count(tokenizer.eos_token_id) == 1
    assert tokenizer.decode(learned) == "say <|im_end|> at the end<|im_end|>"


def test_a_thought_that_the_prompt_begins_must_end_in_the_demonstration():
    tokenizer = chat_tokenizer("chatml")
    tokenizer.chat_template += "{% if add_generation_prompt %}<think>\n{% endif %}"
    assert tokenizer.apply_chat_template(ASKED, tokenize=False, add_generation_prompt=True).endswith("<think>\n")
    thought = "I add.\n</think>\n\n42"
    for said in (thought, f"<think>\n{thought}"):
        [episode] = demonstrations([{"prompt": ASKED, "completion": said}], tokenizer=tokenizer)
        assert spoken(tokenizer, episode)[0].removeprefix("\n") == f"{thought}{tokenizer.eos_token}"
    with pytest.raises(UserError, match=r"row 1 of the rows cannot be learned from: .* without the end of the thought"):
        demonstrations([{"prompt": ASKED, "completion": "42"}], tokenizer=tokenizer)


@pytest.mark.parametrize(
    ("rows", "why"),
    [
        ([], "no rows"),
        ([{"text": "x"}], "row 1 of the rows has the columns text"),
        ([{"messages": TALK}, {"messages": ASKED}], "row 2 .* has an answer"),
        ([{"messages": TALK[1:]}], "begins with a message to the assistant"),
        ([{"messages": [*TALK, TALK[3]]}], "two messages in a row"),
        ([{"prompt": "", "completion": "x"}], "nothing in its column 'prompt'"),
    ],
)
def test_a_row_that_demonstrates_nothing_is_refused_by_its_number(rows, why):
    with pytest.raises(UserError, match=why):
        demonstrations(rows, tokenizer=chat_tokenizer("chatml"))
