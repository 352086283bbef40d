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
    assert [(arm.name, len(arm.runs)) for arm in arms] == [("<i>grpo</i>", 1), ("hicra", 3)]


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
    assert page.tags.count("svg") == 3  # all that changed
    assert "Clipped above: 0.01" in text
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


def test_it_opens_with_whether_it_learned_and_what_stands_in_its_way(runs, written, tmp_path):
    text = "".join(Elements(written).text)
    assert text.index("hicra: ") < text.rindex("What stands in its way") < text.index("held-out before")
    write_report(runs[:1], tmp_path / "one.html")
    alone = (tmp_path / "one.html").read_text()
    assert "<h1>hicra on largest</h1>" in alone
    assert "Did it learn? Not shown" in alone
    assert "stayed at 66.7% (95% interval" in alone


def changed(folder, change=None, config=None):
    """Change every row of a run by a function, and some of its settings."""
    path = folder / "metrics.jsonl"
    rows = [json.loads(line) for line in path.read_text().splitlines()]
    path.write_text("".join(json.dumps(change(row) if change else row) + "\n" for row in rows))
    if config is not None:
        before = json.loads((folder / "config.json").read_text())
        (folder / "config.json").write_text(json.dumps({**before, **config}))
    return folder


@pytest.mark.parametrize("seed", range(20))
def test_rows_of_another_shape_leave_out_what_they_lack(seed, tmp_path):
    rng = np.random.default_rng(seed)
    always, sometimes = rng.random() ** 2, rng.random() ** 3
    lacks = {
        name for name in ("sample_seconds", "update_seconds", "sampled_tokens", "reward_mean") if rng.random() < always
    }

    def less(row):
        kept = {k for k in row if k in ("kind", "step") or (k not in lacks and rng.random() > sometimes)}
        return {k: v for k, v in row.items() if row["kind"] != "train" or k in kept}

    runs = [changed(make_run(tmp_path / name), less) for name in ("a", "b")]
    write_report(runs, tmp_path / "report.html")


@pytest.mark.parametrize(
    "config",
    [
        {"algorithm": "grpo"},
        {"algorithm": None, "optimizer": None},
        {"algorithm": {}, "task": None, "model": None},
        {"task": ["a", "b"], "model": 7, "steps": "many"},
        {"rollout": [{"x": 1}], "seed": {"a": None}},
        {"task": ""},
    ],
)
def test_settings_of_another_shape_are_shown_as_they_are(config, tmp_path):
    runs = [make_run(tmp_path / "a"), changed(make_run(tmp_path / "b"), config=config)]
    for some in (runs[1:], runs):
        write_report(some, tmp_path / "report.html")
        assert "<h1></h1>" not in (tmp_path / "report.html").read_text()


@pytest.mark.parametrize("odd", [{"accuracy": 1.5}, {"accuracy": -1}, {"problems": 0}, {"problems": 2.5}])
def test_evaluations_that_are_no_share_are_refused(odd, tmp_path):
    run = changed(make_run(tmp_path / "a"), lambda row: {**row, **odd} if row["kind"] == "eval" else row)
    with pytest.raises(UserError, match="an accuracy of"):
        write_report([run], tmp_path / "report.html")
    changed(run, lambda row: {**row, "accuracy": 1 / 3, "problems": 3.0} if row["kind"] == "eval" else row)
    write_report([run], tmp_path / "report.html")


@pytest.mark.parametrize(
    ("first", "second"),
    [
        ({"model": "a", "steps": 6}, {"model": "b", "steps": 9}),
        ({"seed": 1, "model": None}, {"seed": 2, "model": "b"}),
        ({"steps": 3, "optimizer": {"learning_rate": 1e-3}}, {"steps": 6, "optimizer": {"learning_rate": None}}),
        ({"run": 1, "time": 2, "after": 3}, {"run": 2, "time": 3, "after": 4}),
    ],
)
def test_no_column_stands_twice_or_empty(first, second, tmp_path):
    runs = [changed(make_run(tmp_path / n), config=c) for n, c in (("a", first), ("b", second))]
    write_report(runs, tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    heads = re.findall(r"<th>([^<]*)</th>", page)
    assert len(heads) == len(set(heads))
    for name in heads:
        cells = re.findall(f'<td data-of="{re.escape(name)}">(.*?)</td>', page)
        assert len(cells) == 2
        assert any(cells), name


def test_runs_and_settings_are_in_the_order_of_their_numbers(tmp_path):
    made = [changed(make_run(tmp_path / f"r{n}", n), config={"adapter": {"rank": 32 // n}}) for n in (1, 2, 10)]
    write_report([made[0], made[2], made[1]], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r'<td data-of="run">(\w+)', page) == ["r1", "r2", "r10"]
    assert [arm.name for arm in arms_of([load_run(run) for run in made])] == ["rank 3", "rank 16", "rank 32"]
    assert "<h1>rank 3, rank 16 and rank 32 on largest</h1>" in page


def test_runs_of_one_name_are_told_apart_by_their_folders(tmp_path):
    for arm in ("old", "new"):
        (tmp_path / arm).mkdir()
        make_run(tmp_path / arm / "seed0")
    write_report([tmp_path / "old" / "seed0", tmp_path / "new" / "seed0"], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert re.findall(r'<td data-of="run">([\w/]+)', page) == ["new/seed0", "old/seed0"]


@pytest.mark.parametrize("value", [0.0, 1.0, 7.25])
def test_charts_that_never_change_are_named_and_not_drawn(value, tmp_path):
    def still(row):
        return {**row, "entropy": value, "grad_norm": row["step"] + 0.5} if row["kind"] == "train" else row

    write_report([changed(make_run(tmp_path / "a"), still)], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    assert f"Entropy: {value:.3g}" in page
    assert "<h3>Entropy</h3>" not in page
    assert "<h3>Gradient</h3>" in page


def test_a_run_that_draws_no_prompt_twice_shows_completions(tmp_path):
    import pyarrow as pa
    import pyarrow.parquet as pq

    run = make_run(tmp_path / "a")
    for path in (run / "rollouts").iterdir():
        table = pq.read_table(path)
        at, step = table.schema.get_field_index("prompt_index"), table["step"][0].as_py()
        new = [1000 * step + n for n in table["prompt_index"].to_pylist()]
        pq.write_table(table.set_column(at, "prompt_index", pa.array(new, pa.int32())), path)
    write_report([run], tmp_path / "report.html")
    page = (tmp_path / "report.html").read_text()
    for kind in ("First step", "Last step, best", "Last step, worst"):
        assert len(re.findall('class="prompt"', page.split(f"<h3>{kind}</h3>")[1].split("<h3>")[0])) == 3
    assert "step 0: reward" in page
    assert "Question 1 &lt;b&gt;?" in page


def test_the_legend_stands_below_the_lines(tmp_path):
    def parts(row):
        return (
            {**row, "reward_mean/r10": row["step"], "reward_mean/r2": -row["step"]} if row["kind"] == "train" else row
        )

    write_report([changed(make_run(tmp_path / "a"), parts)], tmp_path / "report.html")
    svg = (tmp_path / "report.html").read_text().split("<h3>Parts of the reward</h3>")[1].split("</svg>")[0]
    found = re.findall(r'<text[^>]*?(?:translate\([\d.]+ | y=")([\d.]+)[^>]*>([^<]+)</text>', svg)
    height = {text: float(y) for y, text in found}
    assert min(height["r2"], height["r10"]) > height["step"]


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
