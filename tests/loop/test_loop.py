"""The loop: the schedule, the order of prompts, and a tiny model that learns a tiny thing."""

from collections import Counter

import numpy as np
import pytest
from conftest import make_tiny_engine, recipe
from hypothesis import given
from hypothesis import strategies as st

from textpolicy.algorithms import ALGORITHMS
from textpolicy.engine import Sampling
from textpolicy.environment.single_turn import TextGenerationEnv
from textpolicy.loop.collect import collect
from textpolicy.loop.curriculum import EveryPrompt
from textpolicy.loop.train import Schedule, train


class Numbers:
    """A tokenizer whose text is the ids themselves."""

    def encode(self, text):
        return [int(word) for word in text.split()]

    def decode(self, ids):
        return " ".join(str(i) for i in ids)


def share_of_seven(prompt, completion, example):
    words = completion.split()
    return words.count("7") / max(len(words), 1)


def starts_with_seven(prompt, completion, example):
    return float(completion.startswith("7"))


def train_to_say_seven(name, steps):
    """Train a tiny model with a recipe and return the rows of its steps."""
    reward = starts_with_seven if name == "gtpo_paper" else share_of_seven  # the paper's outcomes are two
    rows = []
    train(
        make_tiny_engine(vocabulary=16),
        TextGenerationEnv(["1 2", "3", "4 5 6", "2 2"], reward, max_tokens=6, tokenizer=Numbers()),
        recipe(name),
        schedule=Schedule(0.05, steps, final=0.1),
        prompts_per_step=4,
        group_size=16,
        sampling=Sampling(max_tokens=6, seed=1),
        on_step=lambda step, row, episodes: rows.append(row),
    )
    assert [row["step"] for row in rows] == list(range(steps)), name
    return rows


LEARNERS = ["grpo", "cispo", "sapo", "dppo", "dro", "opo"]  # one recipe for each objective


@pytest.mark.parametrize("name", LEARNERS)
def test_a_tiny_model_learns_to_say_seven(name):
    rows = train_to_say_seven(name, steps=24)
    assert rows[0]["reward_mean"] < 0.2
    assert np.mean([row["reward_mean"] for row in rows[-3:]]) > 0.85
    assert max(row["logprob_gap_max"] for row in rows if row["updated"]) < 3e-3  # logits are large by then


def test_the_recipes_that_learn_have_every_objective():
    objectives = {type(made.surrogate.objective) for made in ALGORITHMS.values()}
    assert {type(ALGORITHMS[name].surrogate.objective) for name in LEARNERS} == objectives


def test_every_recipe_makes_a_step_whose_row_is_finite():
    for name in ALGORITHMS:
        [row] = train_to_say_seven(name, steps=1)
        assert row["updated"] == 1, name
        assert row["grad_norm"] > 0, name
        assert row["logprob_gap_max"] < 1e-3, name
        assert all(np.isfinite(value) for value in row.values()), (name, row)


def test_the_same_seed_gives_the_same_run(tiny_engine):
    env = TextGenerationEnv(["1 2", "3"], share_of_seven, max_tokens=6, tokenizer=Numbers())
    again = [collect(tiny_engine, env, [0, 1], 3, Sampling(6, seed=5)) for _ in range(2)]
    assert [e.text for e in again[0]] == [e.text for e in again[1]]
    other = collect(tiny_engine, env, [0, 1], 3, Sampling(6, seed=6))
    assert [e.text for e in again[0]] != [e.text for e in other]


def test_a_prompt_drawn_twice_has_two_groups(tiny_engine):
    env = TextGenerationEnv(["1 2", "3"], share_of_seven, max_tokens=6, tokenizer=Numbers())
    episodes = collect(tiny_engine, env, [1, 1, 0], 2, Sampling(3))
    assert [e.group for e in episodes] == [0, 0, 1, 1, 2, 2]
    assert [e.prompt for e in episodes] == ["3"] * 4 + ["1 2"] * 2


def test_the_schedule_warms_up_and_decays_in_straight_lines():
    rate = Schedule(1.0, steps=7, warmup=2, final=0.2)
    assert [rate(s) for s in range(7)] == pytest.approx([0.5, 1.0, 1.0, 0.8, 0.6, 0.4, 0.2])
    assert Schedule(3.0, steps=1)(0) == 3.0


@given(st.integers(1, 9), st.integers(1, 40), st.integers(0, 99))
def test_every_prompt_is_drawn_once_before_any_is_drawn_again(count, total, seed):
    drawn = [i for step in range(-(-3 * total // count)) for i in EveryPrompt(total, seed).draw(step, count)]
    for epoch in range(3):
        assert Counter(drawn[epoch * total : (epoch + 1) * total]) == Counter(range(total))
