"""The HTML report: one file that needs nothing else, with bands over seeds and the prompts that changed."""

import json
import math
import re
from html.parser import HTMLParser

import numpy as np
import pytest
from made_run import IMAGE, SCRIPT, make_run

from textpolicy.cli.main import main
from textpolicy.errors import UserError
from textpolicy.record.reader import load_run
from textpolicy.report.arms import arms_of, by_step, series
from textpolicy.report.charts import running_mean, stacked_bars
from textpolicy.report.page import write_report


@pytest.fixture(scope="module")
def runs(tmp_path_factory):
    root = tmp_path_factory.mktemp("runs")
    made = [make_run(root / f"seed{seed}", seed) for seed in range(3)]
    other = make_run(root / "other", 0)
    config = json.loads((other / "config.json").read_text())
    config["algorithm"]["name"] = "<i>grpo</i>"
    (other / "config.json").write_text(json.dumps(config))
    return [*made, other]


@pytest.fixture(scope="module")
def written(runs, tmp_path_factory):
    path = tmp_path_factory.mktemp("report") / "report.html"
    write_report(runs, path)
    return path.read_text()


def test_runs_that_differ_in_their_seed_alone_are_one_arm(runs):
    arms = arms_of([load_run(run) for run in runs])
    assert [(arm.name, len(arm.runs)) for arm in arms] == [("name hicra", 3), ("name <i>grpo</i>", 1)]


def test_the_band_is_a_t_interval_over_seeds(runs):
    [arm] = arms_of([load_run(run) for run in runs[:3]])
    found = series(arm, [by_step(run, "reward_mean") for run in arm.runs])
    values = [[by_step(run, "reward_mean")[step] for run in arm.runs] for step in found.steps]
    for i, v in enumerate(values):
        mean = sum(v) / 3
        sd = math.sqrt(sum((x - mean) ** 2 for x in v) / 2)
        assert found.mean[i] == pytest.approx(mean)
        assert found.high[i] - found.mean[i] == pytest.approx(4.302653 * sd / math.sqrt(3), rel=1e-6)  # t, 2 df, 97.5%
        assert found.mean[i] - found.low[i] == pytest.approx(found.high[i] - found.mean[i])


def test_a_curve_has_the_steps_that_all_its_runs_have():
    class One:
        name, runs = "x", ()

    found = series(One, [{1: 0.0, 2: 1.0, 3: 5.0}, {2: 3.0, 3: 5.0, 4: 9.0}])
    assert found.steps.tolist() == [2, 3]
    assert found.mean.tolist() == [2, 5]
    assert series(One, [{1: 0.0}, {2: 0.0}]) is None


def test_a_running_mean_takes_fewer_values_at_the_ends():
    assert running_mean(np.array([1.0, 2, 3, 4, 9]), 3) == pytest.approx([1.5, 2, 3, 16 / 3, 6.5])


class Elements(HTMLParser):
    def __init__(self, page):
        super().__init__()
        self.tags, self.text = [], []
        self.feed(page)

    def handle_starttag(self, tag, attrs):
        self.tags.append(tag)

    def handle_data(self, data):
        self.text.append(data)


def test_the_report_is_one_small_file_that_loads_nothing(written):
    assert len(written) < 600_000
    assert not re.findall(r"""(?:src|href)=["'](?!#)""", written.replace("xlink:href", "href"))
    assert "url(http" not in written
    assert not {"script", "img", "link", "iframe", "i"} & set(Elements(written).tags)


def test_it_has_the_curves_the_runs_and_the_prompts(written):
    page = Elements(written)
    text = "".join(page.text)
    for title in (
        "Held-out problems, greedy",
        "Reward",
        "Parts of the reward",
        "Entropy",
        "Completions cut off",
        "Seconds of a step",
    ):
        assert title in text
    assert page.tags.count("svg") >= 9
    assert "seed0" in text
    assert "<i>grpo</i>" in text  # as text
    assert "Most changed" in text
    assert "Question 1 <b>?</b>" in text
    assert SCRIPT in text or IMAGE in text


def test_bands_are_explained_where_there_are_some(runs, written, tmp_path):
    assert "Bands are 95% intervals over seeds" in written
    write_report(runs[:1], tmp_path / "one.html")
    alone = (tmp_path / "one.html").read_text()
    assert "Bands are" not in alone
    assert "A faint line" not in alone  # few steps, so none


def test_charts_take_the_colours_of_the_page(written):
    inside = "".join(re.findall(r"<svg.*?</svg>", written, re.DOTALL))
    assert "var(--c0)" in inside
    assert "var(--faint)" in inside
    assert "#0101" not in inside
    assert "<text" in inside  # words are words, not shapes


def test_the_command_writes_it_into_the_run_unless_given_a_path(runs, tmp_path, capsys):
    assert main(["report", str(runs[0])]) == 0
    assert capsys.readouterr().out.strip() == str(runs[0] / "report.html")
    assert (runs[0] / "report.html").stat().st_size < 400_000
    assert main(["report", str(runs[0]), str(runs[1]), f"--out={tmp_path / 'both.html'}"]) == 0
    assert "seed1" in (tmp_path / "both.html").read_text()
    assert main(["report", str(tmp_path)]) == 2
    assert "is not a run folder" in capsys.readouterr().err


def test_a_run_without_completions_or_steps_has_a_report(tmp_path):
    (tmp_path / "metrics.jsonl").write_text("")
    write_report([tmp_path], tmp_path / "report.html")
    assert "not finished" in (tmp_path / "report.html").read_text()


def test_a_report_that_cannot_be_written_is_refused_in_a_sentence(runs, tmp_path):
    (tmp_path / "file").write_text("")
    with pytest.raises(UserError, match="choose another with --out"):
        write_report(runs[:1], tmp_path / "file" / "report.html")


def test_settings_that_differ_at_length_leave_room_for_the_bars():
    names = [f"model /a/folder/{'of/many/levels/' * 12}, task examples/16_own_task.py, seed {n}" for n in range(3)]
    svg = stacked_bars(names, {"rollouts": [1.0, 2.0, 3.0], "updates": [1.0, 1.0, 1.0]}, "seconds")
    [across] = re.findall(r'<rect x="[\d.]+" y="[\d.]+" width="([\d.]+)"', svg)
    [whole] = re.findall(r'viewBox="0 0 ([\d.]+) ', svg)
    assert float(across) > 0.5 * float(whole)
