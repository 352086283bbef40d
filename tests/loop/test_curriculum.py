"""Curricula: what is drawn follows what was solved, from the seed alone, and survives a stop."""

import json
from collections import Counter

import numpy as np
import pytest
from conftest import make_tiny_engine
from toy_tokenizers import Numbers

from textpolicy.algorithms import algorithm
from textpolicy.engine import Sampling
from textpolicy.environment import TextGenerationEnv
from textpolicy.errors import UserError
from textpolicy.loop.curriculum import EveryPrompt, PassRateCurriculum
from textpolicy.loop.train import Schedule, Session, train


def test_estimates_worked_by_hand():
    c = PassRateCurriculum(3, memory=0.5)
    assert c.pass_rates.tolist() == [0.5] * 3
    c.observe([(0, True), (0, True), (1, False)])
    assert c.pass_rates.tolist() == [3 / 4, 1 / 3, 1 / 2]
    c.observe([(0, False), (0, False)])  # 2 right of 2 count as 1 of 1 now
    assert c.pass_rates.tolist() == [2 / 5, 1 / 3, 1 / 2]
    assert c.row == {"curriculum_seen": 2 / 3, "curriculum_pass_rate": pytest.approx((2 / 5 + 1 / 3) / 2)}


def test_prompts_are_drawn_as_often_as_the_formula_predicts():
    c = PassRateCurriculum(3, floor=0.02, memory=1.0)
    c.observe([(0, True)] * 98 + [(1, True), (1, False)] * 49 + [(2, False)] * 98)
    p = np.array([99 / 100, 1 / 2, 1 / 100])
    expected = (p * (1 - p) + 0.02) / (p * (1 - p) + 0.02).sum()
    drawn = Counter(c.draw(step, 1)[0] for step in range(4000))
    np.testing.assert_allclose([drawn[i] / 4000 for i in range(3)], expected, atol=0.03)


def test_a_step_draws_different_prompts_as_long_as_there_are_enough():
    c = PassRateCurriculum(5, seed=1)
    assert sorted(c.draw(0, 5)) == list(range(5))
    assert Counter(c.draw(0, 12)).most_common()[-1][1] == 2
    assert len(set(c.draw(3, 4))) == 4


def test_draws_depend_only_on_seed_step_draw_number_and_past_outcomes():
    one, two = PassRateCurriculum(50, seed=3), PassRateCurriculum(50, seed=3)
    assert one.draw(7, 8) == two.draw(7, 8)
    different = [one.draw(8, 8), one.draw(7, 8, draw=1), PassRateCurriculum(50, seed=4).draw(7, 8)]
    assert one.draw(7, 8) not in different
    one.observe([(i, True) for i in range(25)] * 9)
    assert one.draw(7, 8) != two.draw(7, 8)
    two.load_state_dict(json.loads(json.dumps(one.state_dict())))
    assert one.draw(7, 8) == two.draw(7, 8)
    with pytest.raises(UserError, match="of 50 prompts and there are 2"):
        PassRateCurriculum(2).load_state_dict(one.state_dict())


@pytest.mark.parametrize(
    ("settings", "sentence"), [({"total": 0}, "0 prompts"), ({"floor": 0}, "floor is 0"), ({"memory": 2}, "memory 2")]
)
def test_impossible_settings_of_a_curriculum_are_refused(settings, sentence):
    with pytest.raises(UserError, match=sentence):
        PassRateCurriculum(**{"total": 4, **settings})


def test_training_with_a_curriculum_draws_prompts_that_can_be_learned():
    """Prompt 0 is always solved, 1 never, 2 now and then: soon most draws are of 2."""

    def reward(prompt, completion, example):
        even = bool(completion) and int(completion.split()[0]) % 2 == 0
        solved = {"always": True, "never": False, "sometimes": even}
        return float(solved[example["kind"]]), solved[example["kind"]]

    kinds = ["always", "never", "sometimes"]
    env = TextGenerationEnv(
        ["1 2", "3", "4 5"], reward, max_tokens=2, tokenizer=Numbers(), examples=[{"kind": k} for k in kinds]
    )
    curriculum = PassRateCurriculum(3, seed=0)
    drawn, rows = [], []
    train(
        make_tiny_engine(vocabulary=16),
        env,
        algorithm("grpo"),
        schedule=Schedule(1e-6, steps=30),
        prompts_per_step=1,
        group_size=8,
        sampling=Sampling(2, seed=1),
        session=Session(curriculum=curriculum),
        on_step=lambda step, row, episodes: (drawn.append(episodes[0].prompt), rows.append(row)),
    )
    assert Counter(drawn[5:]).most_common(1)[0][0] == "4 5"
    assert curriculum.pass_rates[0] > 0.9
    assert curriculum.pass_rates[1] < 0.1
    assert rows[-1]["curriculum_seen"] == 1.0


def one_step(reward):
    """A curriculum of one prompt, after a step whose completions were scored by ``reward``."""
    curriculum = PassRateCurriculum(1)
    train(
        make_tiny_engine(vocabulary=16),
        TextGenerationEnv(["1 2"], reward, max_tokens=2, tokenizer=Numbers()),
        algorithm("grpo"),
        schedule=Schedule(1e-3, steps=1),
        prompts_per_step=1,
        group_size=2,
        sampling=Sampling(2),
        session=Session(curriculum=curriculum),
    )
    return curriculum


def test_a_curriculum_refuses_a_reward_that_does_not_report_correctness():
    with pytest.raises(UserError, match="the reward never says so"):
        one_step(lambda prompt, completion, example: 1.0)


def test_a_step_without_scores_does_not_change_a_curriculum():
    assert one_step(lambda prompt, completion, example: None).seen.sum() == 0


def test_the_default_curriculum_has_no_state_and_ignores_that_of_another():
    c = EveryPrompt(5, seed=2)
    drawn = [c.draw(step, 3) for step in range(4)]
    c.observe([(0, True)])
    c.load_state_dict(PassRateCurriculum(5).state_dict())
    assert (c.state_dict(), c.row) == (None, {})
    assert [c.draw(step, 3) for step in range(4)] == drawn
