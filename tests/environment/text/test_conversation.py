"""The codec of a tokenizer: the texts of turns, and how messages become tokens in the templates of many families."""

import pytest
from chat_tokenizers import SPECIAL, chat_tokenizer

from textpolicy.environment import MultiTurnEnv, Reply
from textpolicy.environment.text.conversation import ChatCodec


@pytest.mark.parametrize("family", sorted(SPECIAL))
def test_the_text_of_a_turn_has_its_special_tokens_where_they_are_wanted(family):
    tokenizer = chat_tokenizer(family)
    codec, first, end = ChatCodec.of(tokenizer), SPECIAL[family][0], tokenizer.eos_token
    tokens = tokenizer.encode(f" {first}the{first} user\n{end}", add_special_tokens=False)
    assert codec.text(tokens, special=True) == f"{first}the{first} user"
    assert codec.text(tokens) == "the user"
    assert codec.text(tokenizer.encode(end, add_special_tokens=False), special=True) == ""


def test_a_partner_may_read_special_tokens_and_the_reward_does_not():
    class Listener:
        def reply(self, text):
            heard.append(text)
            return Reply()

    class Env(MultiTurnEnv):
        special = True

    heard, tokenizer = [], chat_tokenizer("llama3")
    for kind in (Env, MultiTurnEnv):
        env = kind(["the user"], lambda example: Listener(), lambda **_: 0.0, tokenizer=tokenizer)
        env.reset()
        said = tokenizer.encode("<|start_header_id|>the<|eot_id|>", add_special_tokens=False)
        assert env.step(said)["info"]["response"] == "the"
    assert heard == ["<|start_header_id|>the", "the"]
