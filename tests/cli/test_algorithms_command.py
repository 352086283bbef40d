"""``textpolicy algorithms``: a table of the recipes, and each of them in full, read from the recipes themselves."""

import re
import shlex
from dataclasses import fields, replace

import pytest

from textpolicy.algorithms import ALGORITHMS
from textpolicy.algorithms.top_entropy import KeepTopEntropy
from textpolicy.cli.describe import Setting, overview, parts, settings_of
from textpolicy.cli.main import main
from textpolicy.config.flags import parse
from textpolicy.config.recipe import configure
from textpolicy.config.settings import Config
from textpolicy.errors import UserError

ESCAPES = re.compile(r"\x1b\[[0-9;]*m")
SAMPLES = {  # a value for every setting under [algorithm]
    "scale_rewards": "batch", "aggregation": "token-sum", "ratio": "sequence", "clip_low": 0.1, "clip_high": 0.3,
    "delta": 4.0, "dual_clip": 3.0, "weight_low": 0.5, "weight_high": 4.0, "tau_pos": 2.0, "tau_neg": 2.0,
    "off_policy_limit": 0.1, "signal": "correctness", "mask_truncated": True, "overlong_cache": 0.1, "resample": 2,
    "uncertainty": "entropy", "entropy_beta": 0.2, "hicra_alpha": 0.3, "alpha_1": 0.9, "alpha_2": 0.2,
    "reward_threshold": 0.4, "normalisation": "separate", "top_entropy": 0.5, "grams": None, "kl.coefficient": 0.1,
    "kl.importance_weighted": False, "correction.low": 0.5, "correction.high": 2.0, "sepa.steps": 10,
    "sepa.schedule": "auto", "sepa.delay_steps": 1, "sepa.correct_rate_gate": 0.2, "kl.place": "reward",
    "kl.estimator": "k2", "correction.level": "token", "correction.how": "truncate",
}  # fmt: skip


def piped(capsys, *arguments):
    assert main(["algorithms", *arguments]) == 0
    return capsys.readouterr().out


def on_a_terminal(capsys, monkeypatch, *arguments, width=100):
    monkeypatch.setenv("FORCE_COLOR", "1")
    monkeypatch.setenv("COLUMNS", str(width))
    return ESCAPES.sub("", piped(capsys, *arguments))


def listed(text):
    """The settings of a recipe in full: name -> value, as printed."""
    rows = re.findall(r"^--algorithm\.(\S+) +(\S+(?: \S+)*)", text, re.MULTILINE)
    return {flag.replace("-", "_"): value for flag, value in rows}


def test_what_is_piped_is_plain_and_has_one_line_per_recipe(capsys):
    out = piped(capsys)
    assert "\x1b" not in out
    heading, *rows = out.splitlines()
    assert heading.split() == ["recipe", "baseline", "stages", "ratio", "objective", "aggregation", "paper"]
    assert [row.split()[0] for row in rows] == list(ALGORITHMS)


@pytest.mark.parametrize(
    ("name", "cells"),
    [
        ("grpo", ["group relative", "token", "clip 0.2/0.2", "seq-mean-token-mean", "2402.03300"]),
        ("dr_grpo", ["group relative, scale_rewards none", "token", "clip 0.2/0.2", "seq-mean-token-sum-norm"]),
        ("gspo", ["group relative", "sequence", "clip 0.0003/0.0004", "seq-mean-token-mean", "2507.18071"]),
        ("cispo", ["group relative", "token", "clipped weight none/5", "token-mean", "2506.13585"]),
        ("sapo", ["group relative", "token", "soft gate 1/1.05", "seq-mean-token-mean", "2511.20347"]),
        ("bnpo", ["group relative", "token", "clip 0.2/0.2", "token-mean", "TRL 1.16"]),
        ("reinforce++", ["no baseline", "return to go -> whiten", "token", "clip 0.2/0.2", "token-mean"]),
        ("full", ["mean normalized", "pooling -> weight by uncertainty -> amplify planning", "token", "clip 0.2/0.28"]),
    ],
)
def test_a_row_says_what_the_recipe_is_made_of(capsys, name, cells):
    row = next(line for line in piped(capsys).splitlines() if line.split()[0] == name)
    assert re.split(r" {2,}", row.strip())[1 : 1 + len(cells)] == cells


@pytest.mark.parametrize("name", [(), *((name,) for name in ALGORITHMS)])
def test_a_terminal_of_100_columns_is_wide_enough(capsys, monkeypatch, name):
    out = on_a_terminal(capsys, monkeypatch, *name)
    example = [line for line in out.splitlines() if line.startswith("example:")]
    assert max(len(line) for line in out.splitlines() if line not in example) <= 100
    assert len(example) == len(name)


def test_the_table_loses_nothing_on_a_terminal(capsys, monkeypatch):
    def letters(text):
        return sorted(re.sub(r"\s", "", text))

    wide = piped(capsys)
    narrow = on_a_terminal(capsys, monkeypatch).split("\n\n")[0]
    assert letters(narrow) == letters(wide)


@pytest.mark.parametrize("name", ALGORITHMS)
def test_a_recipe_in_full_names_every_part_with_its_formula_and_settings(capsys, name):
    recipe = ALGORITHMS[name]
    out = piped(capsys, name)
    assert out.startswith(f"{name}: {recipe.summary}\n")
    assert recipe.paper in out
    for part in filter(None, [recipe.baseline, recipe.pooling, *recipe.stages, recipe.surrogate.objective]):
        assert type(part).__doc__.splitlines()[0].replace("``", "") in out
        assert [field.name for field in fields(part) if f"{field.name} " not in out] == []


def test_a_recipe_in_full_states_the_values_it_has(capsys):
    out = piped(capsys, "sepa")
    for line in (
        "baseline   group relative: A_i = (r_i - mean r) / (std r + eps), mean over the completions of one prompt.",
        "           scale_rewards none, std_eps 1e-06, ddof 1",
        "stage 1    pooling: ",
        "           sepa_steps 500, sepa_schedule linear, sepa_delay_steps 50, sepa_correct_rate_gate 0.1,",
        "stage 2    weight by uncertainty: A_t <- w_t A_t",
        "           entropy_beta 0.1",
        "objective  clip: J = min(r A, clip(r, 1 - low, 1 + high) A)",
        "           clip_low 0.2, clip_high 0.28, delta none, dual_clip none",
    ):
        assert any(found.startswith(line) for found in out.splitlines()), line
    settings = listed(out)
    expected = {
        "ratio": "token", "aggregation": "token-mean", "signal": "reward", "uncertainty": "surprisal",
        "mask_truncated": "false", "resample": "0", "overlong_cache": "0", "grams": "18 phrases",
        "sepa.steps": "500", "entropy_beta": "0.1", "kl.coefficient": "0", "correction.level": "none",
    }  # fmt: skip
    assert {name: settings[name] for name in expected} == expected


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_settings_listed_are_exactly_those_that_a_run_takes(capsys, name, tmp_path):
    (tmp_path / "grams.json").write_text('["let me see"]')
    samples = {**SAMPLES, "grams": tmp_path / "grams.json"}

    def takes(setting):
        section, _, key = setting.rpartition(".")
        values = {section: {key: samples[setting]}} if section else {key: samples[setting]}
        try:
            configure(Config.model_validate({"algorithm": {"name": name, **values}}))
        except UserError:
            return False
        return True

    assert set(listed(piped(capsys, name))) == {setting for setting in samples if takes(setting)}


@pytest.mark.parametrize("name", ALGORITHMS)
def test_the_example_is_a_command_that_changes_nothing(capsys, name):
    example = piped(capsys, name).splitlines()[-1].removeprefix("example: ")
    command, *flags = shlex.split(example)[1:]
    assert command == "train"
    assert len(flags) == 4
    plain = Config.model_validate({"algorithm": {"name": name}})
    assert configure(parse(Config, flags, command)) == configure(plain)


def test_an_unknown_recipe_is_one_sentence_with_the_near_one_and_exit_code_2(capsys):
    assert main(["algorithms", "gsop"]) == 2
    out, err = capsys.readouterr()
    assert out == ""
    assert err.startswith("textpolicy: there is no algorithm 'gsop'; did you mean 'gspo'?")
    assert err.count("\n") == 1


def test_plain_functions_are_parts_too():
    def best_only(rewards):
        """A_i = 1 for the best."""

    def halved(credit):
        pass

    recipe = replace(ALGORITHMS["grpo"], baseline=best_only, stages=(halved, KeepTopEntropy(0.5)))
    assert overview("mine", recipe).baseline == "best only"
    assert [(p.role, p.name, p.formula, p.values) for p in parts(recipe)[:2]] == [
        ("baseline", "best only", "A_i = 1 for the best.", ""),
        ("stage 1", "halved", "", ""),
    ]
    known = [Setting("scale_rewards", None, ""), Setting("top_entropy", None, "")]
    assert settings_of(recipe, known) == [Setting("top_entropy", 0.5, "")]
