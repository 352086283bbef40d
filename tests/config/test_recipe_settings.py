"""The part of a recipe that each setting changes, the recipes that refuse it, and settings through TOML and JSON."""

import json
import re
from dataclasses import replace
from pathlib import Path

import pytest

from textpolicy.algorithms import ALGORITHMS
from textpolicy.algorithms.planning import PlanningGrams
from textpolicy.algorithms.top_entropy import KeepTopEntropy
from textpolicy.config.recipe import configure
from textpolicy.config.settings import (
    AlgorithmSettings,
    Config,
    CorrectionSettings,
    KLSettings,
    SEPASettings,
    read_config,
)
from textpolicy.errors import UserError
from textpolicy.losses import KL, Correction


def configured(name="grpo", **settings):
    """The recipe of a run with these settings of its algorithm."""
    return configure(Config.model_validate({"algorithm": {"name": name, **settings}}))


def stage(kind):
    """Reads a stage of a recipe by the name of its class."""
    return lambda recipe: next(s for s in recipe.stages if type(s).__name__ == kind)


# setting: (a recipe with a use for it, a value, where it lands, a recipe without one)
LANDS = {
    "scale_rewards": ("grpo", "batch", lambda r: r.baseline.scale_rewards, "rloo"),
    "aggregation": ("grpo", "token-sum", lambda r: r.aggregation, None),
    "ratio": ("dapo", "sequence", lambda r: r.surrogate.ratio, None),
    "clip_low": ("gspo", 0.11, lambda r: r.surrogate.objective.clip_low, "cispo"),
    "clip_high": ("dapo", 0.31, lambda r: r.surrogate.objective.clip_high, "sapo"),
    "delta": ("grpo", 4.0, lambda r: r.surrogate.objective.delta, "cispo"),
    "dual_clip": ("grpo", 3.0, lambda r: r.surrogate.objective.dual_clip, "sapo"),
    "weight_low": ("cispo", 0.5, lambda r: r.surrogate.objective.weight_low, "grpo"),
    "weight_high": ("cispo", 2.0, lambda r: r.surrogate.objective.weight_high, "grpo"),
    "divergence": ("dppo", "kl", lambda r: r.surrogate.objective.divergence, "grpo"),
    "divergence_low": ("dppo_kl", 0.07, lambda r: r.surrogate.objective.divergence_low, "grpo"),
    "divergence_high": ("ipo", 0.3, lambda r: r.surrogate.objective.divergence_high, "cispo"),
    "drift": ("dppo", 2e-3, lambda r: r.surrogate.drift, None),
    "tau_pos": ("sapo", 2.0, lambda r: r.surrogate.objective.tau_pos, "grpo"),
    "tau_neg": ("sapo", 5.0, lambda r: r.surrogate.objective.tau_neg, "cispo"),
    "off_policy_limit": ("grpo", 0.3, lambda r: r.surrogate.off_policy_limit, None),
    "signal": ("maxrl", "correctness", lambda r: r.signal, None),
    "mask_truncated": ("grpo", True, lambda r: r.mask_truncated, None),
    "overlong_cache": ("grpo", 0.5, lambda r: r.overlong_cache, None),
    "echo": ("grpo", 0.2, lambda r: r.echo, None),
    "entropy_bonus": ("grpo", 0.01, lambda r: r.entropy_bonus, None),
    "entropy_target": ("dapo", 0.4, lambda r: r.entropy_target, None),
    "entropy_step": ("grpo", 0.01, lambda r: r.entropy_step, None),
    "resample": ("grpo", 3, lambda r: r.resample, None),
    "uncertainty": ("gtpo", "entropy", lambda r: r.uncertainty, None),
    "entropy_beta": ("full", 0.4, lambda r: stage("WeightByUncertainty")(r).entropy_beta, "hicra"),
    "hicra_alpha": ("full", 0.5, lambda r: stage("AmplifyPlanning")(r).hicra_alpha, "sepa"),
    "alpha_1": ("gtpo_paper", 0.9, lambda r: stage("ShapeByEntropy")(r).alpha_1, "gtpo"),
    "alpha_2": ("gtpo_paper", 0.3, lambda r: stage("ShapeByEntropy")(r).alpha_2, "gtpo"),
    "reward_threshold": ("gtpo_paper", 0.2, lambda r: stage("ShapeByEntropy")(r).reward_threshold, "maxrl"),
    "normalisation": ("gtpo_paper", "separate", lambda r: stage("ShapeByEntropy")(r).normalisation, "grpo"),
    "top_entropy": ("grpo", 0.2, lambda r: stage("KeepTopEntropy")(r).top_entropy, None),
}
SECTIONS = {"name", "grams", "kl", "correction", "sepa"}  # of which the tests below speak


def test_every_setting_is_spoken_of_here():
    assert set(AlgorithmSettings.model_fields) == {*LANDS, *SECTIONS}


def test_without_settings_every_recipe_is_that_of_the_table_with_the_runs_length():
    for name, plain in ALGORITHMS.items():
        assert configured(name) == replace(plain, length=8.0), name
        longer = configure(Config.model_validate({"algorithm": {"name": name}, "rollout": {"max_tokens": 33}}))
        assert longer.length == 33.0, name


@pytest.mark.parametrize("setting", LANDS)
def test_a_setting_lands_in_its_part_and_changes_nothing_else(setting):
    name, value, read, _ = LANDS[setting]
    recipe, plain = configured(name, **{setting: value}), configured(name)
    assert read(recipe) == value
    assert recipe != plain
    if setting != "top_entropy":  # which adds a stage
        assert read(plain) != value
        assert str(recipe).replace(f"{setting}={value!r}", "") == str(plain).replace(f"{setting}={read(plain)!r}", "")


@pytest.mark.parametrize("setting", [s for s, (*_, without) in LANDS.items() if without])
def test_a_setting_the_recipe_has_no_use_for_is_one_sentence(setting):
    _, value, _, without = LANDS[setting]
    with pytest.raises(UserError) as error:
        configured(without, **{setting: value})
    assert str(error.value).startswith(f"the recipe {without} does not use {setting}; leave it out, or choose")
    assert "\n" not in str(error.value)


def test_several_settings_without_use_are_all_named():
    with pytest.raises(UserError, match="the recipe grpo does not use tau_neg, tau_pos;"):
        configured(tau_pos=2.0, tau_neg=3.0)


PENALTIES = [{"overlong_cache": 0.2}, {"kl": {"coefficient": 0.1, "place": "reward"}}]


@pytest.mark.parametrize("penalty", PENALTIES, ids=str)
@pytest.mark.parametrize(
    ("name", "why"), [("gtpo_paper", "no effect"), ("maxrl", "negative"), ("full", "negative"), ("gdpo", "each")]
)
def test_a_recipe_whose_credit_is_made_of_outcomes_refuses_a_penalty_in_the_reward(name, why, penalty):
    with pytest.raises(UserError) as error:
        configured(name, **penalty)
    assert why in str(error.value)
    assert str(error.value).endswith("leave overlong_cache at 0 and put the KL into the loss")


def test_uncertainty_is_refused_by_every_recipe_without_a_stage_that_reads_it():
    for name in {*ALGORITHMS} - {"gtpo", "sepa", "full"}:
        with pytest.raises(UserError, match=f"the recipe {re.escape(name)} does not use uncertainty; leave it out"):
            configured(name, uncertainty="entropy")


def test_the_paper_form_of_gtpo_has_no_rewards_to_scale():
    with pytest.raises(UserError, match="the recipe gtpo_paper does not use scale_rewards"):
        configured("gtpo_paper", scale_rewards="group")


def test_a_setting_out_of_its_parts_range_is_refused_by_the_part():
    with pytest.raises(UserError, match=r"delta is 1\.1; set it above 1 \+ clip_high"):
        configured(delta=1.1)
    with pytest.raises(UserError, match=r"dual_clip is 0\.5; set it above 1"):
        configured(dual_clip=0.5)
    with pytest.raises(UserError, match=r"the weight range is \[6.0, 5.0\]"):
        configured("cispo", weight_low=6.0)


def test_top_entropy_comes_after_the_recipes_own_stages():
    stages = configured("full", top_entropy=0.3).stages
    assert stages == (*ALGORITHMS["full"].stages, KeepTopEntropy(0.3))


# ---- KL


def test_a_kl_in_the_loss_joins_the_surrogate_of_every_recipe():
    kl = {"coefficient": 0.04, "estimator": "k2", "importance_weighted": False}
    for name, plain in ALGORITHMS.items():
        recipe = configured(name, kl=kl)
        assert recipe.surrogate == replace(plain.surrogate, kl=KL(0.04, "k2", False)), name
        assert recipe.reward_kl == 0.0, name


@pytest.mark.parametrize("name", ["rloo", "reinforce++", "grpo"])
def test_a_kl_in_the_reward_is_the_recipes_and_not_the_engines(name):
    recipe = configured(name, kl={"coefficient": 0.05, "place": "reward"})
    assert recipe.reward_kl == 0.05
    assert recipe.surrogate == ALGORITHMS[name].surrogate


@pytest.mark.parametrize("place", ["loss", "reward"])
def test_a_coefficient_of_0_is_no_kl_anywhere(place):
    assert configured(kl={"coefficient": 0.0, "place": place}) == configured()


# ---- corrections


@pytest.mark.parametrize(
    ("section", "correction"),
    [
        ({"level": "none"}, None),
        ({"level": "token", "how": "truncate", "high": 2.0}, Correction("token", "truncate", None, 2.0)),
        ({"level": "sequence"}, Correction()),
        ({"level": "geometric", "low": 0.999, "high": 1.001}, Correction("geometric", "mask", 0.999, 1.001)),
    ],
)
def test_a_correction_joins_the_surrogate_of_every_recipe(section, correction):
    for name, plain in ALGORITHMS.items():
        recipe = configured(name, correction=section)
        assert recipe.surrogate == replace(plain.surrogate, correction=correction), name


def test_a_correction_that_cannot_work_is_refused():
    with pytest.raises(UserError, match="a geometric correction rejects sequences and cannot truncate"):
        configured(correction={"level": "geometric", "how": "truncate"})
    with pytest.raises(UserError, match=r"the correction keeps \[4.0, 3.0\]"):
        configured(correction={"level": "token", "low": 4.0})


# ---- SEPA


@pytest.mark.parametrize("name", ["sepa", "full"])
def test_the_sepa_section_sets_the_pooling_and_keeps_the_rest(name):
    section = {"steps": 20, "schedule": "auto", "delay_steps": 3, "correct_rate_gate": 0.4}
    assert set(section) == set(SEPASettings.model_fields)
    pooling = configured(name, sepa=section).pooling
    expected = replace(
        ALGORITHMS[name].pooling, sepa_steps=20, sepa_schedule="auto", sepa_delay_steps=3, sepa_correct_rate_gate=0.4
    )
    assert pooling == expected
    assert configured(name, sepa={"steps": 0}).pooling == replace(ALGORITHMS[name].pooling, sepa_steps=0)


def test_a_recipe_that_does_not_pool_refuses_the_section_by_the_name_that_was_written():
    with pytest.raises(UserError, match=r"the recipe gtpo does not use sepa\.steps"):
        configured("gtpo", sepa={"steps": 5})


# ---- grams


@pytest.mark.parametrize("name", ["hicra", "sepa", "full"])
def test_grams_of_a_file_take_the_place_of_the_built_in_ones(name, tmp_path):
    path = tmp_path / "grams.json"
    path.write_text(json.dumps({"grams": ["so far", "the trick"], "source": "by hand"}))
    assert configured(name, grams=str(path)).grams == PlanningGrams(("so far", "the trick"))


def test_grams_that_cannot_be_used_are_one_sentence(tmp_path):
    (tmp_path / "bad.json").write_text("{")
    with pytest.raises(UserError, match="the recipe grpo does not use grams; leave them out, or choose hicra"):
        configured(grams=str(tmp_path / "bad.json"))
    with pytest.raises(UserError, match=r"none.json cannot be read \(No such file or directory\); check the path"):
        configured("hicra", grams=str(tmp_path / "none.json"))
    with pytest.raises(UserError, match=r"bad.json are not JSON"):
        configured("hicra", grams=str(tmp_path / "bad.json"))


# ---- files


TOML = """
task = "addition"
steps = 12

[algorithm]
name = "sepa"
clip_high = 0.3
mask_truncated = true
uncertainty = "entropy"
top_entropy = 0.5
{grams}

[algorithm.kl]
coefficient = 0.02
estimator = "k3+"

[algorithm.correction]
level = "sequence"
how = "truncate"
high = 2.5

[algorithm.sepa]
steps = 9
schedule = "auto"

[rollout]
max_tokens = 21

[optimizer]
updates_per_step = 4
"""


def test_a_toml_file_with_every_section_gives_its_recipe_and_survives_json(tmp_path):
    (tmp_path / "grams.json").write_text('["so far"]')
    (tmp_path / "run.toml").write_text(TOML.format(grams=f"grams = '{tmp_path / 'grams.json'}'"))
    config = read_config(tmp_path / "run.toml")
    again = Config.model_validate_json(config.model_dump_json())
    assert again == config
    assert again.algorithm.grams == Path(tmp_path / "grams.json")
    assert configure(again) == configure(config)
    table = ALGORITHMS["sepa"]
    assert configure(config) == replace(
        table,
        stages=(*table.stages, KeepTopEntropy(0.5)),
        surrogate=replace(
            table.surrogate,
            objective=replace(table.surrogate.objective, clip_high=0.3),
            kl=KL(0.02, "k3+", True),
            correction=Correction("sequence", "truncate", None, 2.5),
        ),
        length=21.0,
        pooling=replace(table.pooling, sepa_steps=9, sepa_schedule="auto"),
        grams=PlanningGrams(("so far",)),
        uncertainty="entropy",
        mask_truncated=True,
    )


def test_the_sections_defaults_are_those_of_the_values_they_make():
    kl, correction = KLSettings(coefficient=1.0), CorrectionSettings(level="sequence")
    assert KL(kl.coefficient, kl.estimator, kl.importance_weighted) == KL(1.0)
    assert Correction(correction.level, correction.how, correction.low, correction.high) == Correction()


@pytest.mark.parametrize(
    ("text", "sentence"),
    [
        ('estimator = "k4"', "algorithm.kl.estimator is k4; input should be 'k1', 'k2'"),
        ("coefficient = -1", "algorithm.kl.coefficient is -1; input should be greater than or equal to 0"),
        ('place = "both"', "algorithm.kl.place is both; input should be 'loss' or 'reward'"),
        ("coeficient = 1", "there is no setting 'algorithm.kl.coeficient'; did you mean 'coefficient'?"),
    ],
)
def test_a_mistake_in_a_section_is_one_sentence_with_its_path(tmp_path, text, sentence):
    (tmp_path / "run.toml").write_text(f"[algorithm.kl]\n{text}\n")
    with pytest.raises(UserError) as error:
        read_config(tmp_path / "run.toml")
    assert sentence in str(error.value)
    assert "\n" not in str(error.value)
