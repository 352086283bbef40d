"""Rewards: the registry, the one call, the built-in formulas worked by hand, the verifiers."""

import inspect
import logging
import subprocess
import sys
from types import SimpleNamespace

import numpy as np
import pandas as pd
import pytest
from toy_tokenizers import Letters

from textpolicy.environment import TextGenerationEnv
from textpolicy.errors import RewardError, UserError
from textpolicy.rewards import (
    REWARD_REGISTRY,
    VERIFIER_REGISTRY,
    Request,
    RewardConfig,
    Scored,
    Scorer,
    accuracy_reward,
    apply_verifiers_to_reward,
    call_reward,
    clear_registries,
    coherence_verifier,
    contains_keywords,
    create_configured_reward_function,
    factual_verifier,
    get_reward_function,
    get_verifier_function,
    has_greeting,
    keyword_reward,
    length_reward,
    length_verifier,
    list_registered_functions,
    no_empty_response,
    perplexity_reward,
    reward,
    toxicity_verifier,
    verifier,
)
from textpolicy.rewards.contract import BoundReward
from textpolicy.rewards.length import plateau

pytestmark = pytest.mark.usefixtures("registries")


def fixed(result):
    def scorer(prompt, completion, example):
        return result

    return scorer


def scored(result):
    return call_reward(fixed(result), "p", "c", {})


# ---- registry


@pytest.mark.parametrize("register", [reward, verifier])
@pytest.mark.parametrize(
    ("form", "name"),
    [
        (lambda register: register, "mine"),
        (lambda register: register(), "mine"),
        (lambda register: register("x"), "x"),
        (lambda register: register(name="x"), "x"),
        (lambda register: lambda fn: register(fn, name="x"), "x"),
    ],
)
def test_every_form_of_the_decorator_registers_and_returns_the_function_itself(register, form, name):
    def mine(prompt, completion, example):
        return 1.0

    assert form(register)(mine) is mine
    registry = REWARD_REGISTRY if register is reward else VERIFIER_REGISTRY
    assert registry[name] is mine


def test_a_decorator_argument_that_is_no_name_is_refused():
    with pytest.raises(UserError, match="@reward got 3"):
        reward(3)


def test_registering_a_name_again_warns_and_replaces(caplog):
    @reward(name="length_reward")
    def mine(prompt, completion, example):
        return 0.0

    assert "'length_reward' was already registered" in caplog.text
    assert get_reward_function("length_reward") is mine


def test_a_function_that_does_not_take_the_three_parameters_by_name_is_registered_with_a_warning(caplog):
    @reward
    def short(prompt, completion):
        return 0.0

    @reward
    def renamed(question, answer, row):
        return 0.0

    @reward
    def batched(prompts, completions, examples):
        return [0.0 for _ in prompts]

    assert "reward 'short' cannot score completions: 'short' does not take example" in caplog.text
    assert "'renamed' does not take completion, example, prompt" in caplog.text
    assert "batched" not in caplog.text
    assert [get_reward_function(name) for name in ("short", "renamed")] == [short, renamed]


def test_an_unknown_name_gives_none_and_logs_the_known_ones(caplog):
    with caplog.at_level(logging.ERROR):
        assert get_reward_function("length") is None
        assert get_verifier_function("nope") is None
    assert "length_reward" in caplog.text
    assert "no_empty_response" in caplog.text


def test_the_built_in_functions_are_listed_in_order():
    listed = list_registered_functions()
    built_in = ["length_reward", "keyword_reward", "perplexity_reward", "accuracy_reward"]
    assert [name for name in listed["rewards"] if name in built_in] == built_in
    assert listed["verifiers"] == [
        "length_verifier",
        "toxicity_verifier",
        "coherence_verifier",
        "factual_verifier",
        "has_greeting",
        "no_empty_response",
        "contains_keywords",
    ]


def test_clearing_empties_both_registries():
    clear_registries()
    assert list_registered_functions() == {"rewards": [], "verifiers": []}


def test_importing_rewards_environment_buffer_and_rollout_does_not_import_mlx():
    modules = "textpolicy.rewards, textpolicy.environment, textpolicy.buffer, textpolicy.rollout"
    script = f"import sys, {modules}; assert not any(m.startswith('mlx') for m in sys.modules)"
    subprocess.run([sys.executable, "-c", script], check=True)


# ---- the call


@pytest.mark.parametrize(
    ("result", "expected"),
    [
        (1, Scored(1.0)),
        (0.25, Scored(0.25)),
        (True, Scored(1.0)),
        (np.float32(0.5), Scored(0.5)),
        (np.array(2), Scored(2.0)),
        ({"reward": 0.5}, Scored(0.5)),
        ({"reward": 0.5, "is_correct": True}, Scored(0.5, True)),
        ((0.5, np.bool_(False)), Scored(0.5, False)),
        ((0.5, None), Scored(0.5)),
        ([1, True], Scored(1.0, True)),
        ({"reward": 1, "is_correct": 0}, Scored(1.0, False)),
    ],
)
def test_a_result_may_be_a_number_a_dict_or_a_pair(result, expected):
    assert scored(result) == expected


@pytest.mark.parametrize("result", [None, float("nan"), {"reward": None}, (None, None), np.float32("nan")])
def test_none_and_nan_mean_that_a_completion_could_not_be_scored(result):
    scored = call_reward(lambda **_: result, "p", "c", {})
    assert np.isnan(scored.reward)
    assert scored.is_correct is None


@pytest.mark.parametrize(
    "result",
    [
        "1.0",
        float("inf"),
        10**400,
        {},
        {"is_correct": True},
        (1, 2, 3),
        np.ones(2),
        (1, "yes"),
        (0.5, 0.7),
        (1, 1),
        [1.0, 0.0],
        (np.float32(0.5), np.float32(1)),
        {"reward": 1, "is_correct": 0.5},
        {"reward": (1, True)},
        (1, [True]),
    ],
)
def test_a_result_that_is_no_finite_number_is_an_error(result):
    with pytest.raises(RewardError, match=r"reward 'scorer' returned .* prompt 'p' and completion 'c'") as caught:
        scored(result)
    assert isinstance(caught.value, ValueError)


def test_a_reward_that_raises_is_an_error_that_names_it_and_keeps_the_cause():
    def broken(prompt, completion, example):
        raise KeyError("label")

    with pytest.raises(RewardError, match="reward 'broken' raised KeyError") as caught:
        call_reward(broken, "p" * 500, "c", {})
    assert isinstance(caught.value.__cause__, KeyError)
    assert len(str(caught.value)) < 300


def test_a_bound_reward_gets_only_the_keywords_it_takes():
    def plain(prompt, completion, example):
        return 1.0

    def curious(prompt, completion, example, *, truncated):
        return float(truncated)

    def greedy(prompt, completion, example, **kwargs):
        return len(kwargs)

    extra = {"tokenizer": object(), "truncated": True}
    assert [call_reward(BoundReward.of(f), "p", "c", {}, **extra).reward for f in (plain, curious, greedy)] == [
        1,
        1,
        2,
    ]


def test_a_function_without_the_three_arguments_cannot_be_a_reward():
    def score(prompt):
        return 1.0

    with pytest.raises(UserError, match="'score' does not take completion, example"):
        BoundReward.of(score)


@pytest.mark.parametrize(
    ("fn", "missing"),
    [
        (lambda completions, answer, **kwargs: [1.0], "examples, prompts"),  # TRL
        (lambda prompts, completions, **kwargs: [1.0], "examples"),
        (lambda prompts=None, completions=None, **kwargs: [1.0], "examples"),
        (lambda completions, ground_truth: [1.0], "examples, prompts"),
        (lambda data_source, solution_str, ground_truth, extra_info=None: 1.0, "completion, example, prompt"),  # verl
    ],
)
def test_a_reward_of_another_library_is_refused_with_the_ways_to_write_one(fn, missing):
    ways = r"fn\(prompt, completion, example, \*\*kwargs\), or for lists as fn\(prompts, completions, examples,"
    with pytest.raises(UserError, match=f"does not take {missing}; write it as {ways}"):
        Scorer([fn])


@pytest.mark.parametrize(
    ("fn", "lacking"),
    [
        (lambda completion, answer, **kwargs: 1.0, "answer"),
        (lambda solution_str, ground_truth, **kwargs: 1.0, "ground_truth, solution_str"),
        (lambda prompts, completions, examples, answer: [1.0], "answer"),
        (lambda prompt, completion, example, *, turns: 1.0, "turns"),
    ],
)
def test_a_reward_that_needs_what_no_completion_comes_with_is_told_where_to_find_it(fn, lacking):
    with pytest.raises(RewardError, match=f"takes {lacking}, which no completion comes with; read what it needs from"):
        Scorer([fn])("p", "c", {"answer": "5"})
    more = dict.fromkeys(lacking.split(", "), "5")
    assert Scorer([fn]).score([Request("p", "c", {}, extra=more)])[0].reward == 1


def test_a_reward_may_leave_its_arguments_to_keywords():
    for fn in (lambda **kwargs: 1.0, lambda completion, **kwargs: 1.0, lambda example, turns=3, **kwargs: 1.0):
        assert Scorer(fn)("p", "c", {}).reward == 1


def test_an_object_with_a_call_method_can_be_a_reward():
    class Judge:
        def __call__(self, prompt, completion, example):
            return "bad"

    with pytest.raises(RewardError, match="reward 'Judge'"):
        call_reward(BoundReward.of(Judge()), "p", "c", {})


# ---- built-in rewards


@pytest.mark.parametrize(
    ("words", "target", "tolerance", "expected"),
    [
        (10, 10, 0.2, 1.0),
        (12, 10, 0.2, 1.0),  # d = 0.2, at the tolerance
        (4, 10, 0.2, 0.5),  # d = 0.6: 1 - 0.4 / 0.8
        (30, 10, 0.2, 0.0),  # d = 2
        (0, 10, 0.2, 0.0),
        (3, 0, 0.2, 0.0),
        (15, 10, 1.0, 1.0),
        (30, 10, 1.0, 0.0),
        (1, 50, 0.2, 0.025),  # d = 0.98: 1 - 0.78 / 0.8
    ],
)
def test_length_reward_falls_linearly_beyond_the_tolerance(words, target, tolerance, expected):
    completion = " ".join(["w"] * words)
    given = length_reward("p", completion, {}, target_length=target, tolerance=tolerance)
    assert given == pytest.approx(expected, abs=1e-12)


def test_keyword_reward_adds_a_bonus_for_keywords_that_the_prompt_lacks():
    example = {"keywords": ["Sun", "moon", "star", "sky"]}
    # two of four occur; of the three absent from the prompt one does
    assert keyword_reward("the sun", "SUNNY moonlight", example) == pytest.approx(2 / 4 + 1 / 3)
    assert keyword_reward("the sun", "SUNNY moonlight", example, bonus_multiplier=0.3) == pytest.approx(0.6)
    assert keyword_reward("p", "sun moon", {}, keywords=["sun", "moon"]) == 1.0  # 2, capped
    assert keyword_reward("sun", "sun", {}, keywords=["sun", "moon"]) == 0.5


def test_keyword_reward_is_zero_for_a_blank_completion_or_no_keywords():
    assert keyword_reward("p", "  ", {"keywords": ["a"]}) == 0.0
    assert keyword_reward("p", "text", {}) == 0.0
    assert keyword_reward("p", "text", {"keywords": ["a"]}, keywords=[]) == 0.0


@pytest.mark.parametrize(
    ("completion", "expected"),
    [
        ("", 0.0),
        ("two words", 0.2),
        ("one two three", 1.0),
        ("a a b b", 0.5),
        ("abcdefghij " * 3, 1 / 3 * 0.8),  # mean length 10
        ("a b c d e f g h i j", 0.8),  # ten words, no full stop
        ("a b c d e f g h i j.", 1.0),
        (" ".join(c * 30 for c in "abc"), 0.3),  # long words reach the floor
    ],
)
def test_perplexity_reward_is_distinct_words_times_two_discounts(completion, expected):
    assert perplexity_reward("p", completion, {}) == pytest.approx(expected)


def test_accuracy_reward_is_the_share_of_reference_words_over_the_threshold():
    assert accuracy_reward("p", "It is Paris", {"ground_truth": "paris"}) == 1.0
    assert accuracy_reward("p", "a b", {"label": "a b c d"}) == pytest.approx(0.5 / 0.7)
    assert accuracy_reward("p", "a", {"ground_truth": "z"}, ground_truth="a") == 1.0
    assert accuracy_reward("p", "it is 42", {"label": 42}) == 1.0
    assert accuracy_reward("p", "a", {"label": "z"}, similarity_threshold=0) == 1.0


def test_accuracy_reward_takes_the_nearest_of_several_references_and_any_entry_that_holds_one():
    assert accuracy_reward("p", "New York!", {"label": ["NYC", "new york"]}) == 1.0
    assert accuracy_reward("p", "Berlin", {"answer": "Paris"}) == 0.0
    assert accuracy_reward("p", "It's Paris.", {"label": None, "answer": "Paris"}) == 1.0
    assert accuracy_reward("p", " ", {"label": "x"}) == 0.0


NOTHING = [None, float("nan"), np.float32("nan"), pd.NA, pd.NaT, "", " \n", [], [None, float("nan")], np.array([])]


@pytest.mark.parametrize("value", [*NOTHING, {"text": "Paris"}, [["Paris"]], b"Paris", pd.Series(["a", "b"])], ids=str)
@pytest.mark.parametrize("name", ["accuracy_reward", "f1_score", "math_accuracy"])
def test_a_reference_that_is_none_is_refused_before_a_run(name, value):
    for example in ({"answer": value}, {"question": "?", "ground_truth": value}, {"solution": "5"}):
        with pytest.raises(UserError, match=r"^the .* correct answer|^the reference .* is a") as refused:
            REWARD_REGISTRY[name]("p", "Paris", example)
        assert "\n" not in str(refused.value)
        with pytest.raises(UserError, match=f"reward '{name}' cannot judge by the example of prompt 1: "):
            TextGenerationEnv(["p", "q"], Scorer(name), tokenizer=Letters(), examples=[{"answer": "5"}, example])
        with pytest.raises(RewardError, match=rf"\(reward '{name}' for prompt 'p' and completion 'x'\)$"):
            Scorer(name)("p", "x", example)
    unsure = Scorer(name, on_failure="unscorable")
    assert np.isnan(
        TextGenerationEnv(["p"], unsure, tokenizer=Letters(), examples=[example]).score(0, [65], False).reward
    )


@pytest.mark.parametrize(
    ("answer", "right", "wrong"),
    [
        (7.0, "7", "70"),  # whole numbers in a column with a cell missing, as pandas reads them
        (np.int64(7), "7", "8"),
        ([7, None], "7", "None"),
        (("2", "two"), "two", "three"),
        (np.array(["2", "two"]), "2", "1"),
        ({"5"}, "5", "6"),
        ([0.5, "half"], "0.5", "5"),
    ],
)
@pytest.mark.parametrize("name", ["accuracy_reward", "f1_score", "math_accuracy"])
def test_of_a_list_of_references_one_is_enough(name, answer, right, wrong):
    score = Scorer(RewardConfig(name, params={"extract_box": False} if name == "math_accuracy" else {}))
    assert score("p", right, {"answer": answer}).reward == 1
    assert score("p", wrong, {"answer": answer}).reward == 0


@pytest.mark.parametrize("value", ["sun, moon", "['sun']", "s", ["sun", 3], ["sun", ""], {"sun": 1}, 7], ids=str)
def test_keywords_that_are_no_list_of_texts_are_refused(value):
    with pytest.raises(UserError, match=r"^keywords is .*; give a list of texts"):
        keyword_reward("p", "c", {"keywords": value})
    with pytest.raises(UserError, match="cannot judge by the example of prompt 0: keywords is"):
        TextGenerationEnv(["p"], keyword_reward, tokenizer=Letters(), examples=[{"keywords": value}])
    with pytest.raises(UserError, match="cannot judge by the example of prompt 0: keywords is"):
        TextGenerationEnv(["p"], RewardConfig("keyword_reward", params={"keywords": value}), tokenizer=Letters())
    with pytest.raises(UserError, match="required_keywords is"):
        contains_keywords("p", "c", {}, required_keywords=value)
    with pytest.raises(UserError, match="toxic_patterns is"):
        toxicity_verifier("p", "c", {"toxic_patterns": value})


def test_keywords_may_be_in_any_container_and_missing_ones_are_none():
    for value in (("sun",), {"sun"}, np.array(["sun"])):
        assert keyword_reward("p", "The sun.", {"keywords": value}) == 1
    for value in NOTHING[:5]:
        assert keyword_reward("p", "The sun.", {"keywords": value}) == 0


@pytest.mark.parametrize(
    ("name", "params", "example"),
    [
        ("f1_score", {}, {"answer": "Paris"}),
        ("accuracy_reward", {}, {"answer": "Paris"}),
        ("keyword_reward", {"keywords": ["paris"]}, {}),
    ],
)
def test_rewards_of_words_read_what_follows_the_thought(name, params, example):
    score = Scorer(RewardConfig(name, params=params))
    assert score("p", "<think>Rome?</think>\nParis.", example).reward == 1
    for thought in ("<think>Paris", "<think>Paris</think>Rome", "<think>Paris</think>", "[THINK]Paris"):
        assert score("p", thought, example).reward == 0
    assert score.score([Request("p", "Paris", example, extra={"thinking": "<think>"})])[0].reward == 0
    assert score("p", "Paris", example, truncated=True).reward == (name == "keyword_reward")


def test_rewards_of_form_read_the_whole_completion():
    assert length_reward("p", "<think>a b</think> c", {}, target_length=3) == 1
    assert perplexity_reward("p", "<think>a b c</think>", {}) == 1


# ---- verifiers


@pytest.mark.parametrize(
    ("check", "completion", "settings", "expected"),
    [
        (length_verifier, "w " * 10, {}, True),
        (length_verifier, "w " * 9, {}, False),
        (length_verifier, "w " * 501, {}, False),
        (toxicity_verifier, "You are an IDIOT", {}, False),
        (toxicity_verifier, "a skillful answer", {}, True),
        (coherence_verifier, "It rained because it was cold, however we went.", {}, True),  # (1 + 1) / 2
        (coherence_verifier, "Yes. No.", {}, False),  # (0 + 0.5) / 2
        (coherence_verifier, "", {}, False),
        (factual_verifier, "Water is wet.", {}, True),
        (factual_verifier, "maybe perhaps", {}, True),  # u = 2: 0.6
        (factual_verifier, "maybe perhaps possibly", {}, False),  # u = 3
        (factual_verifier, "yes and no, true and false", {}, False),  # c = 2: 0.4
        (has_greeting, "Hello there", {}, True),
        (has_greeting, "Hello there", {"required_greeting": "Dear"}, False),
        (no_empty_response, " \n", {}, False),
        (contains_keywords, "anything", {}, True),
        (contains_keywords, "Sun and moon", {"required_keywords": ["sun", "star"]}, False),
    ],
)
def test_built_in_verifiers(check, completion, settings, expected):
    assert check("p", completion, {}, **settings) is expected


def test_an_example_may_override_a_verifier():
    assert length_verifier("p", "two words", {"min_length": 2})
    assert not toxicity_verifier("p", "a banana", {"toxic_patterns": ["banana"]})
    assert coherence_verifier("p", "Yes. No.", {"min_coherence_score": 0.2})
    assert not factual_verifier("p", "Maybe it is wet.", {"max_uncertainty_count": 0})
    assert not factual_verifier("p", "Maybe it is wet.", {"min_factual_score": 0.9})
    assert not has_greeting("p", "Hello there", {"required_greeting": "Dear"})
    assert not contains_keywords("p", "Sun and moon", {"required_keywords": ["sun", "star"]})


# ---- rewards put together


def test_params_are_keyword_arguments_and_those_of_the_call_win():
    configured = create_configured_reward_function(RewardConfig("length_reward", params={"target_length": 2}))
    assert configured("p", "two words", {}) == 1.0
    assert configured(prompt="p", completion="two words", example={}, target_length=200) < 0.1


def test_a_configured_reward_is_bound_like_the_function_it_names():
    @reward
    def strict(prompt, completion, example, scale):
        return scale

    configured = create_configured_reward_function(RewardConfig("strict", params={"scale": 3}))
    assert call_reward(BoundReward.of(configured), "p", "c", {}, tokenizer=None, truncated=False) == Scored(3.0)


def test_an_unknown_reward_verifier_or_parameter_is_named_with_a_near_match():
    @reward
    def strict(prompt, completion, example, scale=1):
        return scale

    with pytest.raises(UserError, match="no reward 'lenght_reward'; did you mean 'length_reward'"):
        create_configured_reward_function(RewardConfig("lenght_reward"))
    with pytest.raises(ValueError, match="no verifier 'has_greting'; did you mean 'has_greeting'"):
        create_configured_reward_function(RewardConfig("length_reward", verifiers=["has_greting"]))
    with pytest.raises(UserError, match="called 'scal'; did you mean 'scale'"):
        create_configured_reward_function(RewardConfig("strict", params={"scal": 2}))


def test_the_first_refusal_gives_the_penalty_and_nothing_else_is_called():
    called = []
    verifier(name="no")(lambda prompt, completion, example: called.append("no") or False)
    verifier(name="later")(lambda prompt, completion, example: called.append("later") or True)
    guarded = apply_verifiers_to_reward(fixed(1 / 3), ["no_empty_response", "no", "later"], -0.5)
    assert guarded("p", "text", {}, truncated=True) == -0.5
    assert called == ["no"]
    assert guarded.__name__ == "scorer_verified_by_no_empty_response_and_no_and_later"


def test_a_verified_reward_keeps_its_verdict_and_its_errors():
    config = RewardConfig("judge", verifiers=["no_empty_response"], verifier_penalty=-1)
    reward(name="judge")(fixed({"reward": 1, "is_correct": True}))
    guarded = create_configured_reward_function(config)
    assert call_reward(guarded, "p", "text", {}, tokenizer=None) == Scored(1.0, True)
    assert call_reward(guarded, "p", "", {}) == Scored(-1.0)

    @verifier(name="broken")
    def broken(prompt, completion, example):
        raise OSError("no dictionary")

    with pytest.raises(RewardError, match="OSError"):
        call_reward(apply_verifiers_to_reward(fixed(1), ["broken"]), "p", "c", {})


def test_a_number_of_another_array_library_is_read_through_float():
    number = type("Scalar", (SimpleNamespace,), {"__float__": lambda self: 0.75})()
    assert scored(number) == Scored(0.75)


# ---- for the number of words


def test_a_plateau_falls_by_a_share_for_each_word_too_few_or_too_many():
    assert [plateau(n, 3, 5, 0.5) for n in (0, 1, 2, 3, 5, 6, 8)] == [0, 0.25, 0.5, 1, 1, 0.5, 0.125]
    assert (plateau(0, low=0), plateau(15), plateau(25)) == (0, 1, 1)
    assert plateau(26) == plateau(14) == 0.95


# ---- functions without a signature


def test_a_function_without_a_signature_gets_all_keywords():
    with pytest.raises(ValueError, match="no signature"):
        inspect.signature(getattr)
    bound = BoundReward.of(getattr)
    assert (bound.keywords, bound.batched, bound.is_async) == (None, False, False)
    assert bound.select({"prompt": "p", "scale": 2}) == {"prompt": "p", "scale": 2}
