"""From finished run folders, made by hand, to findings, a verdict and pages."""

import dataclasses
import json
import re
import shlex
from html.parser import HTMLParser

import numpy as np
import pytest
from made_runs import write_run

from textpolicy.campaign.figures import figures
from textpolicy.campaign.findings import curve_of, find, pooled, same_models
from textpolicy.campaign.plan import jobs_of, write_plan
from textpolicy.campaign.report import markdown, write_report
from textpolicy.campaign.settings import check_campaign
from textpolicy.cli.campaign import enough
from textpolicy.cli.main import main
from textpolicy.errors import UserError

GAINS = [0.1, 0.2, 0.1, 0.3, 0.2, 0.1]


def made(root, gains=GAINS, seeds=6, **changes):
    """A campaign with a run for every gain: the candidate is better by it."""
    settings = check_campaign({"seeds": list(range(seeds)), "arms": {"old": {}, "new": {}}, **changes}, "here")
    write_plan(settings, root)
    for seed, gain in enumerate(gains):
        write_run(root / "runs" / "old" / f"seed{seed}", [0.1, 0.3, 0.4], solved="1111000000")
        marks = "1" * round(10 * (0.4 + gain))
        write_run(root / "runs" / "new" / f"seed{seed}", [0.1, 0.5, 0.4 + gain], solved=marks.ljust(10, "0"), test=0.9)
    return settings


def found_in(root, settings):
    return find(settings, root, jobs_of(settings, root))


def test_six_pairs_that_all_gain_are_an_improvement_in_words(tmp_path):
    settings = made(tmp_path / "c")
    found = found_in(tmp_path / "c", settings)
    assert found.recommendation == "statistically_significant_improvement"
    assert found.verdict == (
        "new scored 16.7 points above old in accuracy on the held-out validation problems at the last step, over 6 "
        "paired seeds (exact 95% interval +10.0 to +30.0 points; exact permutation of signs, p = 0.0312). That is more "
        "than the luck of seeds explains. Recommendation: statistically_significant_improvement."
    )


def test_too_few_seeds_are_reported_with_the_number_that_is_missing(tmp_path):
    settings = made(tmp_path / "c", [0.1, -0.1, 0.3], seeds=3)
    verdict = found_in(tmp_path / "c", settings).verdict
    assert "3 seeds cannot find a difference of any size" in verdict
    needed = found_in(tmp_path / "c", settings).contrasts[0].comparison.runs_needed
    assert f"you need {needed - 3} more, as a new campaign of {needed}" in verdict
    assert verdict.endswith("Recommendation: insufficient_statistical_evidence.")


def test_enough_seeds_without_evidence_report_the_difference_that_they_could_find(tmp_path):
    settings = made(tmp_path / "c", [0.1, -0.1, 0.2, -0.2, 0.1, 0.0])
    found = found_in(tmp_path / "c", settings)
    detectable = found.contrasts[0].comparison.detectable
    assert f"6 seeds find a difference of {100 * detectable:.1f} points 80% of the time." in found.verdict
    assert found.recommendation == "insufficient_statistical_evidence"


def test_an_anytime_campaign_may_add_the_missing_seeds(tmp_path):
    settings = made(tmp_path / "c", [0.1, -0.1, 0.3], seeds=3, stopping="anytime")
    found = found_in(tmp_path / "c", settings)
    further = found.contrasts[0].comparison.further_runs
    assert further > 0
    assert f"you need {further} more, and may add them here" in found.verdict


def test_arms_that_score_alike_do_not_differ(tmp_path):
    settings = made(tmp_path / "c", [0.0] * 6)
    verdict = found_in(tmp_path / "c", settings).verdict
    assert verdict.startswith("new scored exactly as much as old in accuracy on the held-out validation problems")
    assert verdict.endswith("Recommendation: insufficient_statistical_evidence.")

    assert "no 95% interval, because all pairs differ by the same amount" in verdict
    assert "All seeds agree, so the scatter of seeds, and what 6 of them can find, is not known." in verdict


def test_six_seeds_of_three_arms_are_not_said_to_find_what_holms_procedure_makes_impossible(tmp_path, capsys):
    arms = {"old": {}, "new": {}, "newer": {}}
    settings = made(tmp_path / "c", arms=arms)
    for seed in range(6):
        write_run(tmp_path / "c" / "runs" / "newer" / f"seed{seed}", [0.1, 0.3, 0.4 + 0.05 * (seed % 3)])
    found = found_in(tmp_path / "c", settings)
    assert found.recommendation == "insufficient_statistical_evidence"
    assert found.verdict.count("6 seeds cannot find a difference of any size among 3 arms.") == 2
    assert "95% interval of this difference alone" in found.verdict
    assert "of the time" not in found.verdict
    assert "with 80% power, takes 7 seeds: you need 1 more, as a new campaign of 7" in found.verdict
    write_report(found, tmp_path / "c")
    (tmp_path / "plan.toml").write_text("seeds = [0, 1, 2, 3, 4, 5]\n[arms.a]\n[arms.b]\n[arms.c]\n")
    for stopping in ("fixed", "anytime"):
        out = f"--output={tmp_path / stopping}"
        assert main(["campaign", "plan", str(tmp_path / "plan.toml"), out, f"--stopping={stopping}"]) == 0
        assert "cannot reach p <= 0.05" in (said := capsys.readouterr().out)
        assert "adjusted for 3 arms); 7 can" in said


@pytest.mark.parametrize("seeds", [1, 2, 6])
@pytest.mark.parametrize("stopping", ["fixed", "anytime"])
def test_a_campaign_judged_on_one_problem_has_a_report(tmp_path, seeds, stopping):
    settings = made(tmp_path / "c", [], seeds=seeds, stopping=stopping)
    for seed in range(seeds):
        for arm, right in (("old", 0), ("new", seed % 2)):
            write_run(tmp_path / "c" / "runs" / arm / f"seed{seed}", [0.0, right], solved=str(right))
    for path in (tmp_path / "c" / "runs").glob("*/*/metrics.jsonl"):
        path.write_text(path.read_text().replace('"problems": 10', '"problems": 1'))
    found = found_in(tmp_path / "c", settings)
    write_report(found, tmp_path / "c")
    assert (found.contrasts[0].same_models is None) == (seeds > 1)


def test_one_seed_per_arm_concludes_nothing_about_the_methods(tmp_path):
    settings = made(tmp_path / "c", [0.5], seeds=1)
    found = found_in(tmp_path / "c", settings)
    assert "One seed per arm cannot say whether another seed would agree" in found.verdict
    same = found.contrasts[0].same_models
    assert same.mcnemar_p == 2 / 2**5  # five problems that only one of them solved
    assert same.newcombe.estimate == pytest.approx(0.5)


def test_a_campaign_that_is_not_finished_decides_nothing(tmp_path):
    settings = made(tmp_path / "c", seeds=8)
    found = found_in(tmp_path / "c", settings)
    assert not found.complete
    assert "12 of 16 runs are finished" in found.verdict
    assert found.recommendation == "insufficient_statistical_evidence"


@pytest.mark.parametrize("half", [b'{"test_aft', '{"task": "d\u00e9'.encode()[:-1]])  # the second within a letter
def test_a_half_written_run_does_not_count(tmp_path, half):
    settings = made(tmp_path / "c")
    (tmp_path / "c" / "runs" / "new" / "seed5" / "summary.json").write_bytes(half)
    assert len(found_in(tmp_path / "c", settings).arms[1].outcomes) == 5


def test_an_anytime_campaign_stops_when_its_evidence_is_enough(tmp_path):
    settings = made(tmp_path / "c", [0.2] * 5, seeds=20, stopping="anytime")
    assert not enough(settings, tmp_path / "c")
    settings = made(tmp_path / "d", [0.2] * 6, seeds=20, stopping="anytime")
    assert enough(settings, tmp_path / "d")
    found = found_in(tmp_path / "d", settings)
    assert found.complete
    assert found.verdict.startswith("Stopped after 12 of 40 runs, as the stopping rule allows.")
    assert found.recommendation == "statistically_significant_improvement"


@pytest.mark.parametrize(("summary", "difference"), [("last", 1 / 6), ("auc", 0.1 + 1 / 24), ("kept", 0.5)])
def test_the_one_number_of_a_run_is_the_one_that_was_planned(tmp_path, summary, difference):
    settings = made(tmp_path / "c", summary=summary)
    found = found_in(tmp_path / "c", settings)
    assert found.contrasts[0].comparison.difference == pytest.approx(difference)


def test_runs_on_different_problems_are_refused(tmp_path):
    settings = made(tmp_path / "c")
    path = tmp_path / "c" / "runs" / "new" / "seed2" / "metrics.jsonl"
    path.write_text(path.read_text().replace('"problems": 10', '"problems": 7'))
    with pytest.raises(UserError, match=r"evaluated on \[7, 10\] problems"):
        found_in(tmp_path / "c", settings)


@pytest.mark.parametrize("split", ["validation", "test"])
def test_a_run_without_a_held_out_evaluation_is_refused(tmp_path, split):
    settings = made(tmp_path / "c")
    path = tmp_path / "c" / "runs" / "new" / "seed2" / "metrics.jsonl"
    rows = [line for line in path.read_text().splitlines(keepends=True) if json.loads(line).get("split") != split]
    path.write_text("".join(rows))
    with pytest.raises(UserError, match="seed2 has no evaluation on held-out problems; run it again, with some"):
        found_in(tmp_path / "c", settings)


ODD_ROWS = {
    "another name": ("accuracy", None),
    "no number": ("accuracy", "0.4"),
    "nothing": ("accuracy", float("nan")),
    "more than all": ("accuracy", 1.4),
    "less than none": ("accuracy", -0.1),
    "no problems": ("problems", 0),
    "a list of problems": ("problems", [1]),
    "half a problem": ("problems", 9.5),
    "no step": ("step", None),
    "a step in words": ("step", "last"),
    "no split": ("split", None),
}


@pytest.mark.parametrize("name", ODD_ROWS)
def test_a_run_with_an_odd_evaluation_is_one_sentence(name, tmp_path, capsys):
    key, value = ODD_ROWS[name]
    made(tmp_path / "c")
    path = tmp_path / "c" / "runs" / "new" / "seed2" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    rows = [{**row, key: value} if row["kind"] == "eval" else row for row in rows]
    path.write_text("".join(json.dumps({k: v for k, v in row.items() if v is not None}) + "\n" for row in rows))
    assert main(["campaign", "report", str(tmp_path / "c")]) == 2
    assert len(capsys.readouterr().err.splitlines()) == 1


@pytest.mark.parametrize("key", ["sample_seconds", "update_seconds", "sampled_tokens", "trained_tokens", "solved"])
def test_a_run_without_a_figure_that_only_describes_has_a_report(key, tmp_path):
    settings = made(tmp_path / "c")
    for path in (tmp_path / "c" / "runs").glob("*/seed[23]/metrics.jsonl"):
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        rows = [{k: v for k, v in row.items() if k != key} for row in rows]
        path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    assert write_report(found_in(tmp_path / "c", settings), tmp_path / "c")


@pytest.mark.parametrize("marks", [7, "01x", ["1"], "1" * 9])
def test_marks_of_problems_that_are_none_are_left_out(marks, tmp_path):
    settings = made(tmp_path / "c")
    path = tmp_path / "c" / "runs" / "new" / "seed2" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps({**row, "solved": marks} if "solved" in row else row) + "\n" for row in rows))
    assert found_in(tmp_path / "c", settings).contrasts[0].same_models is None


def test_curves_without_a_common_step_are_left_out_and_seeds_keep_their_places(tmp_path):
    arms = {"old": {}, "new": {}, "newer": {}}
    settings = made(tmp_path / "c", [0.1, 0.2], seeds=3, arms=arms)
    for seed in range(2):  # evaluated after other steps
        write_run(tmp_path / "c" / "runs" / "newer" / f"seed{seed + 1}", [0.1, 0.3])
        path = tmp_path / "c" / "runs" / "newer" / f"seed{seed + 1}" / "metrics.jsonl"
        rows = [json.loads(line) for line in path.read_text().splitlines()]
        path.write_text("".join(json.dumps({**row, "step": row["step"] + 5 * seed}) + "\n" for row in rows))
    found = found_in(tmp_path / "c", settings)
    assert curve_of(found.arms[2]) == []
    drawn = figures(found)
    assert "newer (2 seeds)" not in drawn["curves"]
    assert "old (2 seeds)" in drawn["curves"]
    words = re.findall(r"<text[^>]*>([^<]*)</text>", drawn["differences"])
    assert [word for word in words if word in "012"][:3] == ["0", "1", "2"]


def test_an_arm_without_a_finished_run_is_named_with_the_command_that_runs_it(tmp_path):
    folder = tmp_path / "my duel"
    settings = made(folder, [])
    with pytest.raises(UserError, match="the arm old has no finished run") as refused:
        found_in(folder, settings)
    assert shlex.split(str(refused.value).split(": ")[1]) == ["textpolicy", "campaign", "run", str(folder)]


def test_costs_are_those_of_the_runs_at_the_prices_given(tmp_path):
    prices = {"sampled_per_million": 10.0, "trained_per_million": 1.0, "hour": 3600.0}
    settings = made(tmp_path / "c", prices=prices)
    arm = found_in(tmp_path / "c", settings).arms[0]
    assert (arm.cost.sampled_tokens, arm.cost.trained_tokens, arm.cost.seconds) == (1200, 3600, 36.0)
    assert arm.money == pytest.approx(0.012 + 0.0036 + 36)


UNKNOWN = [("sampled_tokens", 0), ("trained_tokens", 1), ("update_seconds", 2)]


@pytest.mark.parametrize(("name", "place"), UNKNOWN)
def test_a_cost_that_a_step_did_not_record_is_unknown_and_not_smaller(tmp_path, name, place):
    root = tmp_path / "c"
    settings = made(root, [0.1, 0.2], seeds=2, prices={"sampled_per_million": 1.0, "hour": 1.0})
    path = root / "runs" / "new" / "seed1" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    del next(row for row in rows if row["kind"] == "train")[name]
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    old, new = found_in(root, settings).arms
    assert [x is None for x in dataclasses.astuple(new.cost)] == [i == place for i in range(3)]
    assert None not in dataclasses.astuple(old.cost)
    assert (new.money is None) == (name != "trained_tokens")  # which has no price here
    [row] = [r for r in markdown(found_in(root, settings)).splitlines() if r.startswith("| new | 4") or "unknown" in r]
    assert row.count("unknown") == 1 + (new.money is None)


NO_NUMBERS = [float("nan"), float("inf"), -1.0, "many", [7], {"a": 1}]


@pytest.mark.parametrize("value", NO_NUMBERS)
@pytest.mark.parametrize("name", ["sampled_tokens", "trained_tokens", "sample_seconds", "update_seconds", "accuracy"])
def test_what_is_no_cost_and_no_score_is_refused_with_its_line(tmp_path, name, value):
    root = tmp_path / "c"
    settings = made(root, [0.1], seeds=1)
    path = root / "runs" / "new" / "seed0" / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    number = max(i for i, row in enumerate(rows) if name in row)
    rows[number][name] = value
    path.write_text("".join(json.dumps(row) + "\n" for row in rows))
    with pytest.raises(UserError, match=rf"^line {number + 1} of {path} .*{name}"):
        found_in(root, settings)


ATTEMPT = {"arm": "old", "seed": 0, "returncode": 0, "seconds": 1.5}


@pytest.mark.parametrize(
    "odd",
    [{"seconds": v} for v in (float("nan"), float("inf"), 10**400, -1, "1", None)]
    + [{"seed": 0.5}, {"seed": "0"}, {"seed": True}, {"arm": 7}, {"returncode": "0"}, {"returncode": None}],
)
def test_an_attempt_of_odd_values_is_refused_with_its_line(tmp_path, capsys, odd):
    made(tmp_path / "c", [], seeds=1)
    lines = [json.dumps(ATTEMPT), json.dumps({**ATTEMPT, **odd})]
    (tmp_path / "c" / "progress.jsonl").write_text("".join(f"{line}\n" for line in lines))
    assert main(["campaign", "status", str(tmp_path / "c")]) == 2
    assert "line 2 of" in (said := capsys.readouterr().err)
    assert "is not an attempt at a run; remove the line" in said


def test_curves_are_over_all_runs_of_an_arm(tmp_path):
    settings = made(tmp_path / "c")
    curve = curve_of(found_in(tmp_path / "c", settings).arms[1])
    assert [step for step, _ in curve] == [0, 1, 2]
    assert curve[2][1] == pytest.approx([0.4 + gain for gain in GAINS])


def test_pooled_answers_of_runs_that_repeat_themselves_are_worth_one_run():
    a, b = np.tile([1, 0] * 20, (6, 1)), np.tile([1, 1, 1, 0] * 10, (6, 1))
    found = pooled(a, b)
    assert found.fisher_p < 1e-7
    assert found.design_effect == pytest.approx(6 * 40 / 39)
    assert found.effective == pytest.approx(39)


def test_the_same_models_are_compared_problem_by_problem():
    rng = np.random.default_rng(0)
    a, b = rng.integers(0, 2, (3, 30)), rng.integers(0, 2, (3, 30))
    d = (b - a).mean(axis=0)
    assert same_models(a, b, 0.05).clustered.se_by_problem == pytest.approx(d.std(ddof=1) / np.sqrt(30))


class Reader(HTMLParser):
    """The reader that collects tags, text and links to other files."""

    def __init__(self):
        super().__init__()
        self.text, self.tags, self.outside = "", set(), []

    def handle_starttag(self, tag, attrs):
        self.tags.add(tag)
        self.outside += [v for k, v in attrs if k in ("src", "href", "xlink:href") and v and not v.startswith("#")]

    def handle_data(self, data):
        self.text += data


def test_the_report_is_markdown_json_and_a_page_that_needs_nothing_else(tmp_path, capsys):
    root = tmp_path / "c"
    settings = made(root)
    assert main(["campaign", "report", str(root)]) == 0
    assert "statistically_significant_improvement" in capsys.readouterr().out
    analysis = root / "analysis"
    names = {"analysis.json", "report.md", "report.html", "curves.svg", "differences.svg", "intervals.svg"}
    assert {p.name for p in analysis.iterdir()} == names
    values = json.loads((analysis / "analysis.json").read_text())
    assert values["contrasts"][0]["comparison"]["p"] == 2 / 64
    assert values["arms"][0]["outcomes"][0]["solved"] == "1111000000"
    page = (analysis / "report.md").read_text()
    assert found_in(root, settings).verdict in page
    assert "| new | +16.67 | +10.00 to +30.00 |" in page
    reader = Reader()
    reader.feed((analysis / "report.html").read_text())
    assert reader.tags >= {"svg", "table", "h2"}
    assert reader.outside == []
    assert "statistically_significant_improvement" in reader.text


def test_the_same_runs_give_the_same_pages(tmp_path):
    root = tmp_path / "c"
    settings = made(root)
    first = [path.read_bytes() for path in write_report(found_in(root, settings), root)]
    assert [path.read_bytes() for path in write_report(found_in(root, settings), root)] == first


def test_a_report_with_one_seed_and_no_marks_still_has_every_part(tmp_path):
    root = tmp_path / "c"
    settings = made(root, [0.1], seeds=1, summary="auc")
    page = markdown(found_in(root, settings))
    assert "too few pairs" in page
    assert "no price given" in page
    write_report(found_in(root, settings), root)


def test_one_run_an_arm_is_compared_by_mcnemars_test(tmp_path):
    root = tmp_path / "c"
    settings = made(root, [0.6], seeds=1)  # solves all ten, where the other one solves four of them
    page = markdown(found_in(root, settings))
    [row] = [line for line in page.splitlines() if "McNemar" in line and line.startswith("| new |")]
    same = found_in(root, settings).contrasts[0].same_models
    assert same.mcnemar_p == 2 / 2**6  # six problems changed sides, all in one direction
    assert "| new | +60.00 |" in row
    assert "McNemar p 0.03125, Newcombe +" in row


def test_analyze_prints_the_verdict_and_writes_it_down(tmp_path, capsys):
    root = tmp_path / "c"
    settings = made(root)
    assert main(["campaign", "analyze", str(root)]) == 0
    printed = capsys.readouterr().out.splitlines()
    assert printed[0] == found_in(root, settings).verdict
    assert printed[1] == f"written to {root / 'analysis' / 'analysis.json'}"
    assert json.loads((root / "analysis" / "analysis.json").read_text())["recommendation"] == (
        "statistically_significant_improvement"
    )


def test_status_prints_which_runs_failed(tmp_path, capsys):
    made(tmp_path / "c", [], seeds=1)
    rows = [("old", 0, 1.5), ("new", 3, 2.0)]
    with (tmp_path / "c" / "progress.jsonl").open("w") as file:
        for arm, code, seconds in rows:
            file.write(json.dumps({"arm": arm, "seed": 0, "returncode": code, "seconds": seconds}) + "\n")
    write_run(tmp_path / "c" / "runs" / "old" / "seed0", [0.1, 0.2])
    assert main(["campaign", "status", str(tmp_path / "c")]) == 0
    states = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert states == {"old-seed0": "finished in 1.5 s", "new-seed0": "failed (3)"}


def test_status_prints_which_runs_are_finished_and_which_are_to_come(tmp_path, capsys):
    made(tmp_path / "c", [0.1], seeds=2)
    (tmp_path / "c" / "runs" / "new" / "seed1").mkdir()
    assert main(["campaign", "status", str(tmp_path / "c")]) == 0
    states = dict(line.split(maxsplit=1) for line in capsys.readouterr().out.splitlines())
    assert states == {"old-seed0": "finished", "new-seed0": "finished", "old-seed1": "to come", "new-seed1": "begun"}
