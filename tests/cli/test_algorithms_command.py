"""``textpolicy algorithms``: a list of the recipes, and each of them in full, read from the recipes themselves."""

import re
import shlex
from dataclasses import fields, replace

from textpolicy.algorithms import ALGORITHMS
from textpolicy.algorithms.top_entropy import KeepTopEntropy
from textpolicy.cli.describe import describe
from textpolicy.cli.main import main
from textpolicy.config.flags import parse
from textpolicy.config.recipe import configure
from textpolicy.config.settings import Config
from textpolicy.errors import UserError

SAMPLES = {  # a value for every setting under [algorithm]
    "scale_rewards": "batch", "aggregation": "token-sum", "ratio": "sequence", "clip_low": 0.1, "clip_high": 0.3,
    "delta": 4.0, "dual_clip": 3.0, "weight_low": 0.5, "weight_high": 4.0, "tau_pos": 2.0, "tau_neg": 2.0,
    "divergence": "kl", "divergence_low": 0.3, "divergence_high": 0.3, "drift": 0.2, "echo": 0.2,
    "off_policy_limit": 0.1, "signal": "correctness", "mask_truncated": True, "overlong_cache": 0.1, "resample": 2,
    "uncertainty": "entropy", "entropy_beta": 0.2, "hicra_alpha": 0.3, "alpha_1": 0.9, "alpha_2": 0.2,
    "reward_threshold": 0.4, "normalisation": "separate", "top_entropy": 0.5, "grams": None, "kl.coefficient": 0.1,
    "kl.importance_weighted": False, "correction.low": 0.5, "correction.high": 2.0, "sepa.steps": 10,
    "sepa.schedule": "auto", "sepa.delay_steps": 1, "sepa.correct_rate_gate": 0.2, "kl.place": "reward",
    "kl.estimator": "k2", "correction.level": "token", "correction.how": "truncate",
    "entropy_bonus": 0.001, "entropy_target": 0.5, "entropy_step": 0.0002,
}  # fmt: skip


def printed(capsys, *arguments):
    assert main(["algorithms", *arguments]) == 0
    return capsys.readouterr().out


def listed(text):
    """The settings of a recipe in full: name -> value, as printed."""
    rows = re.findall(r"^--algorithm\.(\S+) +(\S+(?: \S+)*)", text, re.MULTILINE)
    return {flag.replace("-", "_"): value for flag, value in rows}


def test_every_recipe_has_one_line_with_its_summary_and_its_paper(capsys):
    out = printed(capsys)
    assert "\x1b" not in out
    lines = out.split("\n\n")[0].splitlines()
    assert [line.split()[0] for line in lines] == list(ALGORITHMS)
    for line, recipe in zip(lines, ALGORITHMS.values(), strict=True):
        assert recipe.summary in line
        assert line.endswith(f"({recipe.paper})")


def test_a_recipe_in_full_names_every_part_with_its_formula_and_settings(capsys):
    for name, recipe in ALGORITHMS.items():
        out = printed(capsys, name)
        assert out.startswith(f"{name}: {recipe.summary}\n")
        assert recipe.paper in out
        for part in filter(None, [recipe.baseline, recipe.pooling, *recipe.stages, recipe.surrogate.objective]):
            assert type(part).__doc__.splitlines()[0].replace("``", "") in out
            assert [field.name for field in fields(part) if f"{field.name} " not in out] == []


def test_a_recipe_in_full_states_the_values_it_has(capsys):
    out = printed(capsys, "sepa")
    for line in (
        "baseline   group relative: Compute A_i = (r_i - mean r) / (std r + eps), with the mean over "
        "the completions of one prompt.",
        "           scale_rewards none, std_eps 1e-06, ddof 1",
        "stage 1    pooling: ",
        "           sepa_steps 500, sepa_schedule linear, sepa_delay_steps 50, sepa_correct_rate_gate 0.1,",
        "stage 2    weight by uncertainty: Set A_t <- w_t A_t",
        "           entropy_beta 0.1",
        "objective  clip: Maximise J = min(r A, clip(r, 1 - low, 1 + high) A)",
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


def test_a_recipe_shown_in_full_lists_its_parts(capsys):
    """The parts, the ratio, the aggregation and the bounds of recipes that differ in them."""
    for name, parts, settings in (
        (
            "grpo",
            ["group relative", "clip"],
            {"ratio": "token", "aggregation": "seq-mean-token-mean", "clip_high": "0.2"},
        ),
        ("dr_grpo", ["group relative", "clip"], {"scale_rewards": "none", "aggregation": "seq-mean-token-sum-norm"}),
        ("gspo", ["group relative", "clip"], {"ratio": "sequence", "clip_low": "0.0003", "clip_high": "0.0004"}),
        ("cispo", ["group relative", "clipped weight"], {"weight_low": "none", "weight_high": "5"}),
        ("sapo", ["group relative", "soft gate"], {"tau_pos": "1", "tau_neg": "1.05"}),
        ("bnpo", ["group relative", "clip"], {"aggregation": "token-mean"}),
        ("reinforce++", ["no baseline", "return to go", "whiten", "clip"], {"aggregation": "token-mean"}),
        (
            "full",
            ["mean normalized", "pooling", "weight by uncertainty", "amplify planning", "clip"],
            {"ratio": "token"},
        ),
    ):
        out = printed(capsys, name)
        assert re.findall(r"^(?:baseline|stage \d|objective) +([^:\n]*)", out, re.MULTILINE) == parts
        shown = listed(out)
        assert {setting: shown[setting] for setting in settings} == settings


def test_the_settings_listed_are_exactly_those_that_a_run_takes(capsys, tmp_path):
    (tmp_path / "grams.json").write_text('["let me see"]')
    samples = {**SAMPLES, "grams": tmp_path / "grams.json"}

    def takes(name, setting):
        section, _, key = setting.rpartition(".")
        values = {section: {key: samples[setting]}} if section else {key: samples[setting]}
        try:
            configure(Config.model_validate({"algorithm": {"name": name, **values}}))
        except UserError:
            return False
        return True

    for name in ALGORITHMS:
        assert set(listed(printed(capsys, name))) == {setting for setting in samples if takes(name, setting)}


def test_the_example_is_a_command_that_changes_nothing(capsys):
    for name in ALGORITHMS:
        example = printed(capsys, name).splitlines()[-1].removeprefix("example: ")
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


def test_plain_functions_may_be_parts():
    def best_only(rewards):
        """A_i = 1 for the best."""

    def halved(credit):
        pass

    recipe = replace(ALGORITHMS["grpo"], baseline=best_only, stages=(halved, KeepTopEntropy(0.5)))
    lines = describe("mine", recipe).splitlines()
    assert lines[3:5] == ["baseline   best only: A_i = 1 for the best.", "stage 1    halved"]
    settings = listed("\n".join(lines))
    assert settings["top_entropy"] == "0.5"
    assert "scale_rewards" not in settings
