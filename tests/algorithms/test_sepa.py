"""SEPA: what pooling keeps and changes, and a controller that ramps, gates, watches the variance and resumes."""

import json
from dataclasses import replace

import numpy as np
import pytest
from conftest import random_episodes
from made_credit import make_credit, random_lengths

from textpolicy.algorithms import ALGORITHMS
from textpolicy.algorithms.sepa import Pooling, SEPAController, pool_execution
from textpolicy.errors import UserError

NARROW, WIDE = np.array([0.9, 1.1]), np.array([0.0, 2.0])  # variances of 0.01 and 1


def test_execution_tokens_move_towards_their_completions_mean():
    uncertainty = np.array([1.0, 9.0, 5.0, 2.0])
    planning = np.array([False, True, False, False])
    row = np.array([0, 0, 0, 1])
    assert pool_execution(uncertainty, planning, row, 0.5).tolist() == [2.0, 9.0, 4.0, 2.0]
    assert pool_execution(uncertainty, planning, row, 1.0).tolist() == [3.0, 9.0, 3.0, 2.0]


def random_tokens(seed):
    rng = np.random.default_rng(seed)
    credit = make_credit(random_lengths(rng, 20))
    tokens = len(credit.row)
    planning = (rng.random(tokens) < 0.3) | (credit.row == 4)  # completion 4 has no execution token
    return rng.exponential(size=tokens), planning, credit.row


@pytest.mark.parametrize("strength", [0.25, 0.7, 1.0])
def test_the_sum_stays_and_the_variance_shrinks_by_the_square(strength):
    uncertainty, planning, row = random_tokens(0)
    pooled = pool_execution(uncertainty, planning, row, strength)
    for r in np.unique(row):
        mine = (row == r) & ~planning
        assert pooled[mine].sum() == pytest.approx(uncertainty[mine].sum())
        if mine.any():
            assert pooled[mine].var() == pytest.approx(uncertainty[mine].var() * (1 - strength) ** 2, abs=1e-15)


def test_planning_tokens_keep_their_bits_and_so_does_everything_at_strength_0():
    uncertainty, planning, row = random_tokens(1)
    assert np.array_equal(pool_execution(uncertainty, planning, row, 0.3)[planning], uncertainty[planning])
    assert np.array_equal(pool_execution(uncertainty, planning, row, 0.0), uncertainty)


def test_a_strength_outside_0_to_1_is_clipped():
    tokens = random_tokens(2)
    assert np.array_equal(pool_execution(*tokens, 1.7), pool_execution(*tokens, 1.0))
    assert np.array_equal(pool_execution(*tokens, -0.3), tokens[0])


def test_a_step_without_tokens_pools_nothing():
    assert pool_execution(np.zeros(0), np.zeros(0, bool), np.zeros(0, int), 0.5).shape == (0,)


def test_a_strength_that_is_not_a_number_is_refused():
    with pytest.raises(UserError, match="the strength of pooling is nan"):
        pool_execution(np.ones(1), np.zeros(1, bool), np.zeros(1, int), np.nan)


def test_the_ramp_waits_for_its_delay_and_ends_at_1():
    ramp = SEPAController(sepa_steps=4, sepa_delay_steps=2)
    assert [ramp.resolve_lambda(s) for s in (0, 2, 3, 4.5, 6, 99)] == [0, 0, 0.25, 0.625, 1, 1]


def test_the_ramp_of_training_starts_where_the_gate_opens():
    controller = SEPAController(sepa_steps=4, sepa_delay_steps=1, sepa_correct_rate_gate=0.5)
    rates = [0.0, None, 0.4, float("nan"), 0.5, 0.0, 0.0, 0.0]
    strengths = [controller.advance(rate, WIDE) for rate in rates]
    assert strengths == [0, 0, 0, 0, 0, 0, 0.25, 0.5]  # 0 at the opening, 0 for the delay, then no jump


def test_the_gate_opens_at_its_rate_and_never_closes():
    controller = SEPAController(sepa_steps=1, sepa_correct_rate_gate=0.3)
    seen = []
    for rate in (0.29, float("inf"), None, 0.3, 0.0):
        controller.observe_correct_rate(rate)
        seen.append((controller.gate_open, controller.resolve_lambda(5)))
    assert seen == [(False, 0.0)] * 3 + [(True, 1.0)] * 2


def test_a_gate_of_0_is_open_from_the_start():
    assert SEPAController().gate_open
    assert not SEPAController(sepa_correct_rate_gate=0.01).gate_open


def auto(**settings):
    return SEPAController(sepa_schedule="auto", sepa_ema_decay=0.0, sepa_var_threshold=0.5, sepa_warmup=2, **settings)


def test_auto_pools_more_as_the_variance_falls_and_less_as_it_rises():
    controller = auto()
    assert [controller.advance(None, x) for x in (WIDE, WIDE, NARROW, WIDE)] == pytest.approx([0, 0, 0.98, 0])


def test_auto_never_falls_below_the_ramp():
    controller = auto(sepa_steps=4)
    assert [controller.advance(None, x) for x in (WIDE, WIDE, WIDE, NARROW)] == pytest.approx([0, 0.25, 0.5, 0.98])


def test_a_warm_up_without_variance_pools_fully_until_some_appears():
    controller = auto()
    assert [controller.advance(None, x) for x in (np.ones(3), np.ones(3), np.ones(3), NARROW)] == [0, 1, 1, 0]


def test_a_step_is_one_observation_however_many_tokens_it_has():
    controller = auto()
    controller.advance(None, np.tile(WIDE, 1000))
    assert controller.state_dict()["warmup_seen"] == 1


@pytest.mark.parametrize("observation", [[], [np.nan, 1.0], [np.inf]])
def test_an_empty_or_non_finite_observation_is_ignored(observation):
    controller = auto()
    controller.update_auto_state(WIDE.tolist())
    before = controller.state_dict()
    controller.update_auto_state(observation)
    assert controller.state_dict() == before


def test_the_variance_is_watched_while_the_gate_is_closed():
    controller = auto(sepa_correct_rate_gate=0.5)
    assert [controller.advance(0.0, x) for x in (WIDE, WIDE, NARROW)] == [0, 0, 0]
    assert controller.advance(0.5, NARROW) == pytest.approx(0.98)


def test_strength_is_that_of_the_last_step():
    controller = SEPAController(sepa_steps=2)
    assert controller.strength == 0.0
    assert [(controller.advance(None, WIDE), controller.strength) for _ in range(3)] == [(0, 0), (0.5, 0.5), (1, 1)]


@pytest.mark.parametrize("cut", range(8))
def test_a_controller_saved_at_any_step_resumes_bit_for_bit(cut):
    ramp = {"sepa_steps": 20, "sepa_correct_rate_gate": 0.4}
    settings = {**ramp, "sepa_schedule": "auto", "sepa_ema_decay": 0.7, "sepa_warmup": 3}
    rng = np.random.default_rng(0)
    steps = [(rate, rng.normal(size=6) / (1 + i)) for i, rate in enumerate([0.0, 0.1, 0.5, 0.2, 0.0, 0.1, 0.9, 0.3])]
    whole, first, second = SEPAController(**settings), SEPAController(**settings), SEPAController()
    expected = [whole.advance(*s) for s in steps]
    before = [first.advance(*s) for s in steps[:cut]]
    second.load_state_dict(json.loads(json.dumps(first.state_dict())))
    assert before + [second.advance(*s) for s in steps[cut:]] == expected
    assert second.state_dict() == whole.state_dict()


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("var_ema", -1.0),
        ("var_ema", float("nan")),
        ("var_0", 0.0),
        ("var_0", float("inf")),
        ("warmup_seen", -1),
        ("steps_open", -1),
        ("strength", 1.5),
        ("gate_open", None),
        ("eps", 0.0),
        ("sepa_steps", -2),
    ],
)
def test_a_broken_state_is_refused_by_name_and_changes_nothing(name, value):
    controller = auto()
    controller.advance(None, WIDE)
    before = controller.state_dict()
    with pytest.raises(UserError, match=f"{name} is"):
        controller.load_state_dict({**before, name: value})
    assert controller.state_dict() == before


def test_a_state_with_other_keys_is_refused():
    state = SEPAController().state_dict()
    del state["var_0"]
    with pytest.raises(UserError, match="missing or unknown entries, more, var_0"):
        SEPAController().load_state_dict({**state, "more": 1})


@pytest.mark.parametrize(
    ("name", "value"),
    [
        ("sepa_steps", -1),
        ("sepa_steps", float("inf")),
        ("sepa_delay_steps", -1),
        ("sepa_correct_rate_gate", 1.01),
        ("sepa_correct_rate_gate", -0.1),
        ("sepa_ema_decay", 1.1),
        ("sepa_ema_decay", float("nan")),
        ("sepa_var_threshold", 0.0),
        ("sepa_warmup", 0),
        ("eps", 0.0),
    ],
)
def test_a_setting_that_cannot_work_is_refused_by_name(name, value):
    with pytest.raises(UserError, match=f"{name} is {value}; set it"):
        SEPAController(**{name: value})


def test_a_schedule_is_read_without_case_and_a_wrong_one_names_the_nearest():
    assert Pooling(sepa_schedule="  AUTO ").sepa_schedule == "auto"
    with pytest.raises(UserError, match="did you mean 'linear'"):
        SEPAController(sepa_schedule="linaer")


def test_pooling_is_enabled_by_a_ramp_or_by_auto():
    settings = [{}, {"sepa_steps": 5}, {"sepa_schedule": "auto"}]
    assert [SEPAController(**s).enabled for s in settings] == [False, True, True]


def test_the_settings_of_a_recipe_reach_its_controller():
    controller = Pooling(sepa_steps=2, sepa_delay_steps=0, sepa_correct_rate_gate=0.0).controller()
    assert [controller.advance(None, WIDE) for _ in range(3)] == [0.0, 0.5, 1.0]


def test_a_recipe_pools_the_uncertainty_that_its_weights_read():
    pooling = Pooling(sepa_steps=1, sepa_delay_steps=0, sepa_correct_rate_gate=0.0)
    recipe = replace(ALGORITHMS["sepa"], pooling=pooling, grams=ALGORITHMS["gtpo"].grams)
    episodes = random_episodes(np.random.default_rng(1))
    controller = recipe.controller()
    gtpo = ALGORITHMS["gtpo"].tokens(episodes).advantage
    assert np.array_equal(recipe.tokens(episodes, controller).advantage, gtpo)  # lam = 0
    pooled = recipe.tokens(episodes, controller)  # lam = 1, and no token plans: all weights of a completion agree
    assert np.array_equal(pooled.advantage != 0, gtpo != 0)
    assert all(np.ptp(pooled.advantage[pooled.row == i]) < 1e-12 for i in np.unique(pooled.row))
