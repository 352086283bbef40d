"""Task suites: the registry, the scores, and a model judged before and after."""

import numpy as np
import pytest

from textpolicy.environment import (
    TextGenerationEnvironment,
    TextGenerationTask,
    get_task_suite,
    list_task_suites,
    register_task_suite,
)
from textpolicy.errors import UserError
from textpolicy.generation.suites import SUITES, coherence_score, keyword_score, length_score, task_score
from textpolicy.rollout.base import STEP_KEYS, checked_step


class Letters:
    eos_token_ids = frozenset({0})

    def encode(self, text):
        return [ord(c) for c in text]

    def decode(self, ids):
        return "".join(map(chr, ids))


@pytest.fixture
def fruit(monkeypatch):
    """A registered suite of two tasks."""
    monkeypatch.setattr("textpolicy.generation.suites.SUITES", dict(SUITES))
    tasks = [
        TextGenerationTask("Apples?", ["red", "Green"], (2, 4), 0.1, "round"),
        TextGenerationTask("Bananas?", ["yellow"], (1, 1), 0.9, "bent", {"keyword": 1.0}),
    ]
    register_task_suite("fruit", lambda: tasks)
    return tasks


def task(words=(2, 4), keywords=("red", "Green"), **criteria):
    return TextGenerationTask("?", keywords, words, evaluation_criteria=criteria or {"length": 1.0})


# ---- the registry


def test_two_suites_are_there_from_the_start():
    assert {"basic", "challenging"} <= set(list_task_suites())
    assert (len(get_task_suite("basic")), len(get_task_suite("challenging"))) == (5, 2)


def test_a_loader_is_called_every_time_and_an_unknown_name_is_none(fruit):
    calls = []
    register_task_suite("counted", lambda: calls.append(1) or fruit)
    assert get_task_suite("counted") == get_task_suite("counted") == fruit
    assert len(calls) == 2
    assert get_task_suite("vegetables") is None
    assert list_task_suites() == ["basic", "challenging", "counted", "fruit"]


def test_a_loader_that_is_not_callable_is_refused():
    with pytest.raises(TypeError, match="'fruit' is \\[\\]; give a function"):
        register_task_suite("fruit", [])


# ---- scores, worked out by hand


@pytest.mark.parametrize(
    ("words", "score"), [(0, 1 / 3), (1, 2 / 3), (2, 1.0), (4, 1.0), (5, 2 / 3), (6, 1 / 3), (9, 0.0)]
)
def test_length_falls_with_the_distance_in_midpoints(words, score):
    assert length_score("word " * words, task()) == pytest.approx(score)


def test_keywords_count_in_any_case_and_inside_words():
    assert keyword_score("REDDISH", task()) == 0.5
    assert keyword_score("red and green", task()) == 1.0
    assert keyword_score("anything", task(keywords=())) == 1.0


@pytest.mark.parametrize(
    ("text", "score"),
    [
        ("", 0.0),
        ("One sentence", 0.5),
        ("One. Two.", (0 + 2 / 3) / 2),
        ("First this. Then that. Finally the end.", 1.0),
        ("This is so because it is. And that.", (1 / 2 + 2 / 3) / 2),
    ],
)
def test_coherence_counts_connectives_and_sentences(text, score):
    assert coherence_score(text, task()) == pytest.approx(score)


def test_a_tasks_score_is_the_weighted_sum():
    weights = {"length": 0.5, "keyword": 0.25, "coherence": 0.25}
    assert task_score("red red red", task(**weights)) == pytest.approx(0.5 * 1 + 0.25 * 0.5 + 0.25 * 0.5)


@pytest.mark.parametrize(
    "weights",
    [
        {"keyword_weight": 0.4, "length_weight": 0.6},
        {"keyword_weight": 0.3, "length_weight": 0.2, "coherence_weight": 0.5},
        {"coherence_weight": 1},
        {"keyword": 0.5, "length_weight": 0.5},
        {"length_weight": 0},
        {},
    ],
)
def test_the_weights_have_the_names_of_the_earlier_version_too(weights, fruit):
    """As 0.1.11 computed it: what has no weight does not count, and positions are those of its dataclass."""
    text, spelt = (
        "red words. They are red because red.",
        TextGenerationTask("?", ["red", "blue"], (2, 4), 0.3, "x", weights),
    )
    parts = {"length": length_score(text, spelt), "keyword": 0.5, "coherence": coherence_score(text, spelt)}
    expected = sum(weight * parts[name.removesuffix("_weight")] for name, weight in weights.items())
    assert task_score(text, spelt) == pytest.approx(expected)
    register_task_suite("spelt", lambda: [spelt])
    env = TextGenerationEnvironment(object(), Letters(), "spelt")
    env.reset()
    assert env.step(text)["reward"] == pytest.approx(expected)


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"words": (4, 2)}, "range is"),
        ({"words": (0, 0)}, "range is"),
        ({"lenght": 1.0}, "did you mean 'length'"),
        ({"lenght_weight": 1.0}, "did you mean 'length'"),
        ({"length": 0.5, "length_weight": 0.5}, "both 'length' and 'length_weight'; give one"),
        ({"keyword_weight": "0.5"}, "the weight of 'keyword' in evaluation_criteria is '0.5'; give a number"),
        ({"coherence": float("nan")}, "the weight of 'coherence' in evaluation_criteria is nan"),
        ({"keywords": "red"}, "target_keywords is 'red'; give a list of texts"),
        ({"coherence": None}, "the weight of 'coherence' in evaluation_criteria is None"),
    ],
)
def test_a_task_that_cannot_be_scored_is_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        task(**settings)


# ---- the environment


def test_the_info_of_an_episode_lists_target_and_found_keywords(fruit):
    env = TextGenerationEnvironment(object(), Letters(), "fruit")
    observation, info = env.reset()
    assert "".join(map(chr, observation)) == "Apples?"
    wanted = ("task_category", "difficulty", "target_keywords", "target_length_range")
    assert [info[key] for key in wanted] == ["round", 0.1, ["red", "Green"], (2, 4)]
    result = checked_step(env, "red as red")
    assert set(result) == set(STEP_KEYS)
    info = result["info"]
    assert (info["response"], info["target_keywords_found"], info["response_length"]) == ("red as red", ["red"], 3)
    assert result["reward"] == info["reward_score"] == pytest.approx(0.3 * 1 + 0.4 * 0.5 + 0.3 * 0.5)
    assert env.reset()[1]["task_category"] == "bent"
    env.step("yellow")
    assert env.reset()[1]["task_category"] == "round"


@pytest.mark.parametrize(
    ("settings", "sentence"),
    [
        ({"model": None}, "no model"),
        ({"tokenizer": None}, "no tokenizer"),
        ({"num_episodes": 0}, "num_episodes is 0"),
        ({"task_suite": "basics"}, "did you mean 'basic'"),
    ],
)
def test_an_environment_that_cannot_work_is_a_value_error(settings, sentence):
    with pytest.raises(ValueError, match=sentence):
        TextGenerationEnvironment(**{"model": object(), "tokenizer": Letters(), **settings})


def test_a_model_is_judged_before_and_after(tiny_engine, fruit):
    class Words:
        """Tokens 1 to 9 are a wanted word, others are not."""

        eos_token_ids = frozenset({0})

        def encode(self, text):
            return [1 + ord(c) % 200 for c in text]

        def decode(self, ids):
            return " ".join("red green yellow" if i < 10 else "x" for i in ids)

    import mlx.core as mx

    settings = {"max_tokens": 3, "temperature": 1.0, "top_p": 1.0}
    env = TextGenerationEnvironment(tiny_engine.model, Words(), "fruit", 7, settings)
    first = env.evaluate_model()
    assert set(first) == {"mean_score", "std_score", "num_episodes", "category_breakdown"}
    assert (first["num_episodes"], set(first["category_breakdown"])) == (7, {"round", "bent"})
    means = first["category_breakdown"]
    assert first["mean_score"] == pytest.approx((4 * means["round"] + 3 * means["bent"]) / 7)
    assert env.evaluate_model("baseline") == first  # the same seeds, the same texts
    head = tiny_engine.model.model.embed_tokens
    weights = np.array(head.weight)
    weights[5] = 100 * np.sign(weights.mean(axis=0)) + weights[5]
    head.weight = mx.array(weights)
    after = env.evaluate_model("current")
    assert after["baseline_score"] == first["mean_score"]
    assert after["improvement"] == pytest.approx(after["mean_score"] - first["mean_score"])
    with pytest.raises(UserError, match="did you mean 'current'"):
        env.evaluate_model("currant")
