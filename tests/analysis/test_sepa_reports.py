"""Two arms with emergence logs: significance over runs, the litmus thresholds, and the files they read."""

import json
from math import isnan

import numpy as np
import pytest

from textpolicy import analysis
from textpolicy.analysis.intervals import cluster_design_effect
from textpolicy.errors import UserError


def write_log(folder, rate, prompts=10, copies=4, steps=8, delta=0.02, correctness=True):
    """``steps`` steps with mean reward ``rate``; the first ``rate`` of the prompts are always answered correctly."""
    right, log = round(rate * prompts), folder / "emergence"
    log.mkdir(parents=True)
    step_rows = [{"step": s, "mean_reward": rate} for s in range(steps)]
    rows = [
        {
            "step": 0,
            "prompt": f"p{i}",
            "reward": float(i < right),
            "gram_entropy_delta": delta,
            "metadata": {"correctness": i < right} if correctness else {},
        }
        for i in range(prompts)
        for _ in range(copies)
    ]
    for name, some in (("steps", step_rows), ("generations", rows)):
        (log / f"{name}.jsonl").write_text("".join(json.dumps(row) + "\n" for row in some))
    return folder


def arm(tmp_path, name, rates, **more):
    return [write_log(tmp_path / f"{name}{i}", rate, **more) for i, rate in enumerate(rates)]


LOW, HIGH = [0.1, 0.2, 0.3, 0.2], [0.6, 0.7, 0.8, 0.9]


def test_four_runs_that_are_all_better_are_an_improvement(tmp_path):
    report = analysis.evaluate_sepa_significance(arm(tmp_path, "a", LOW), arm(tmp_path, "b", HIGH))
    assert report.recommendation == "statistically_significant_improvement"
    reward = report.mean_tests[0]
    assert (reward.metric, reward.p_value) == ("step_mean_reward", 2 / 70)
    assert reward.difference == pytest.approx(0.55)
    assert [t.metric for t in report.mean_tests][1:] == ["gen_reward", "gen_gram_entropy_delta", "gen_correct_rate"]


def test_the_other_way_round_is_a_decline(tmp_path):
    report = analysis.evaluate_sepa_significance(arm(tmp_path, "a", HIGH), arm(tmp_path, "b", LOW))
    assert report.recommendation == "statistically_significant_decline"


def test_one_run_per_arm_is_not_evidence_however_many_completions(tmp_path):
    a, b = write_log(tmp_path / "a", 0.2, copies=500), write_log(tmp_path / "b", 0.9, copies=500)
    report = analysis.evaluate_sepa_significance([a], [b])
    assert report.recommendation == "insufficient_statistical_evidence"
    assert report.mean_tests[0].p_value == 1.0
    assert report.pooled_correct_rate.fisher_p < 1e-100
    assert report.pooled_correct_rate.design_effect == pytest.approx(500 * 10 / 9)  # 10 prompts, and copies of them
    assert "One run per arm" in analysis.build_sepa_significance_markdown(report)


def test_paired_runs_are_tested_by_their_signs(tmp_path):
    rates = [0.1, 0.2, 0.3, 0.4, 0.5, 0.6]
    a, b = arm(tmp_path, "a", rates), arm(tmp_path, "b", [rate + 0.1 for rate in rates])
    paired = analysis.evaluate_sepa_significance(a, b, paired=True)
    assert paired.mean_tests[0].p_value == 2 / 64
    assert analysis.evaluate_sepa_significance(a, b).mean_tests[0].p_value > 0.3
    with pytest.raises(UserError, match="the same seeds to both"):
        analysis.evaluate_sepa_significance(a, b[:5], paired=True)


def test_correctness_is_a_reward_of_nearly_1_where_the_log_has_none(tmp_path):
    run = analysis.load_emergence_run_stats(write_log(tmp_path / "a", 0.3, correctness=False))
    assert (run.correct, run.generations, run.gen_correct_rate) == (12, 40, 0.3)


def test_a_run_without_files_counts_as_empty(tmp_path):
    report = analysis.evaluate_sepa_significance([tmp_path / "none"], [write_log(tmp_path / "b", 0.5)])
    assert report.recommendation == "insufficient_statistical_evidence"
    assert report.pooled_correct_rate is None
    with pytest.raises(UserError, match="has no step"):
        analysis.load_emergence_run_stats(tmp_path / "none")


def test_a_line_cut_off_by_a_kill_is_left_out_and_an_invalid_one_is_named(tmp_path):
    folder = write_log(tmp_path / "a", 0.5)
    path = folder / "emergence" / "steps.jsonl"
    path.write_text(path.read_text() + '{"step": 8, "mean_re')
    assert analysis.load_emergence_run_stats(folder).steps == 8
    path.write_text("nonsense\n" + path.read_text())
    with pytest.raises(UserError, match="line 1 of"):
        analysis.load_emergence_run_stats(folder)


def test_rewards_that_could_not_be_scored_are_left_out(tmp_path):
    folder = write_log(tmp_path / "a", 0.5)
    path = folder / "emergence" / "generations.jsonl"
    path.write_text(path.read_text() + '{"step": 0, "prompt": "p", "reward": null, "gram_entropy_delta": null}\n')
    run = analysis.load_emergence_run_stats(folder)
    assert (run.gen_reward, run.generations, run.gram_pairs) == (0.5, 41, 40)


def test_a_report_is_json_and_a_page_with_its_headings(tmp_path):
    report = analysis.evaluate_sepa_significance(arm(tmp_path, "a", LOW), arm(tmp_path, "b", HIGH[:1]))
    values = json.loads(json.dumps(report.to_dict(), allow_nan=False))
    assert values["recommendation"] == report.recommendation
    assert values["mean_tests"][0]["ci_low"] is None  # of one run there is no interval
    page = analysis.build_sepa_significance_markdown(report)
    assert all(f"\n## {heading}\n" in page for heading in ("Mean tests", "Correctness test", "Sample sizes"))
    assert "Descriptive only" in page


@pytest.mark.parametrize(
    ("options", "message"), [({"num_resamples": 99}, "num_resamples is 99"), ({"alpha": 0}, "alpha is 0")]
)
def test_settings_that_cannot_be_evaluated_are_refused(tmp_path, options, message):
    with pytest.raises(UserError, match=message):
        analysis.evaluate_sepa_significance([tmp_path], [tmp_path], **options)
    with pytest.raises(UserError, match="no run folder"):
        analysis.evaluate_sepa_significance([], [tmp_path])


def test_clusters_that_agree_within_are_worth_one_answer_each():
    assert cluster_design_effect([[True] * 5, [False] * 5, [True] * 5, [False] * 5]) == pytest.approx(5 * 4 / 3)
    rng = np.random.default_rng(0)
    assert cluster_design_effect(rng.integers(0, 2, (2000, 8)).tolist()) == pytest.approx(1, abs=0.1)
    assert cluster_design_effect([[True], [True]]) == 1


# ---- litmus


def test_gains_above_the_thresholds_are_confirmed_and_below_failed(tmp_path):
    low, high = arm(tmp_path, "a", [0.2], delta=0.0), arm(tmp_path, "b", [0.5], delta=0.1)
    assert analysis.evaluate_sepa_litmus(low, high).status == "CONFIRMED"
    failed = analysis.evaluate_sepa_litmus(high, low)
    assert failed.status == "FAILED"
    assert len(failed.reasons) == 3


def test_too_little_logged_is_inconclusive(tmp_path):
    low, high = arm(tmp_path, "a", [0.2], steps=3), arm(tmp_path, "b", [0.5])
    result = analysis.evaluate_sepa_litmus(low, high)
    assert result.status == "INCONCLUSIVE"
    assert result.reasons == ("3 steps in the smaller arm, and 8 are needed",)
    page = analysis.build_litmus_markdown(result)
    assert "INCONCLUSIVE" in page
    assert json.dumps(result.to_dict(), allow_nan=False)


def test_profiles_go_by_name():
    official = analysis.get_sepa_litmus_profile("official_v1")
    assert official == analysis.get_sepa_litmus_profile("official") == analysis.get_sepa_litmus_profile("default")
    assert (official.thresholds.reward, official.thresholds.correct_rate) == (0.01, 0.005)
    assert official.thresholds.gram_entropy_delta == 0.005 < analysis.SEPALitmusThresholds().gram_entropy_delta
    assert (official.evidence.run_pairs, official.evidence.steps, official.evidence.generations) == (1, 8, 32)
    with pytest.raises(UserError, match="did you mean 'official'"):
        analysis.get_sepa_litmus_profile("offical")


def test_an_arm_has_runs_of_the_same_weight(tmp_path):
    runs = [analysis.load_emergence_run_stats(d) for d in arm(tmp_path, "a", [0.2, 0.4], delta=None)]
    found = analysis.aggregate_group_stats(runs)
    assert (found.runs, found.generations, found.gen_correct_rate) == (2, 80, pytest.approx(0.3))
    assert isnan(found.gen_gram_entropy_delta)


def test_an_arm_without_a_run_is_refused():
    with pytest.raises(UserError, match="there is no run to aggregate; give at least one"):
        analysis.aggregate_group_stats([])


@pytest.mark.parametrize(
    ("line", "sentence"),
    [
        ('{"step": 1, "mean_reward": Infinity}', "has a mean_reward of inf, which is no number"),
        ('{"step": 1, "mean_reward": "high"}', "has a mean_reward of high, which is no number"),
        ('{"step": 1, "mean_reward": [1]}', "which is no number"),
        ('{"step": 1, "mean_reward": true}', "which is no number"),
        ('{"step": 1, "mean_reward": 1' + "0" * 400 + "}", "which is no number"),
        ("[1]", "is not a JSON object"),
        ("7", "is not a JSON object"),
        ('{"a": ' * 9000, "is not JSON"),
    ],
)
def test_a_line_of_a_log_that_is_no_step_is_named(tmp_path, line, sentence):
    (tmp_path / "emergence").mkdir()
    path = tmp_path / "emergence" / "steps.jsonl"
    path.write_text(f'{{"step": 0, "mean_reward": 0.5}}\n{line}\n{{"step": 2, "mean_reward": 0.25}}\n')
    with pytest.raises(UserError, match=f"^line 2 of {path} ") as caught:
        analysis.load_emergence_run_stats(tmp_path)
    assert sentence in str(caught.value)


def test_a_step_whose_reward_is_not_known_is_left_out_of_the_mean(tmp_path):
    (tmp_path / "emergence").mkdir()
    rows = [
        '{"step": 0, "mean_reward": 0.5}',
        '{"step": 1, "mean_reward": NaN}',
        '{"step": 2}',
        '{"mean_reward": null}',
    ]
    (tmp_path / "emergence" / "steps.jsonl").write_text("".join(f"{row}\n" for row in rows))
    found = analysis.load_emergence_run_stats(tmp_path)
    assert (found.steps, found.step_mean_reward) == (4, 0.5)
