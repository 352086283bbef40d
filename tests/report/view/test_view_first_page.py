"""The first page says how a run went and what to look at; the list of runs compares them; prompts are judged."""

import html
import json
import os
import re
import shutil
from itertools import pairwise
from pathlib import Path

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
from made_run import PROMPTS, SAMPLES, STEPS, make_run

pytest.importorskip("starlette", reason="the viewer is textpolicy[view]")
from starlette.testclient import TestClient

from textpolicy.analysis import load_run
from textpolicy.doctor import examine
from textpolicy.errors import UserError
from textpolicy.loop.evaluation import Rate
from textpolicy.report.view.curves import curves
from textpolicy.report.view.server import make_app


class Opened:
    """The pages of some folders, without a server."""

    def __init__(self, *folders):
        self.client = TestClient(make_app(folders, "t"), base_url="http://127.0.0.1", raise_server_exceptions=False)

    def page(self, path="", status=200):
        answer = self.client.get(f"/t/{path}")
        assert answer.status_code == status, answer.text
        return answer.text

    def words(self, path="", status=200):
        return " ".join(html.unescape(re.sub("<[^>]+>", " ", self.page(path, status))).split())


def rows_of(page):
    """The cells of each row of a page's first table."""
    body = page.split("<tbody>")[1].split("</tbody>")[0]
    cells = [re.findall(r"<td[^>]*>(.*?)</td>", line, re.DOTALL) for line in body.split("<tr>")[1:]]
    return [[" ".join(html.unescape(re.sub("<[^>]+>", "", cell)).split()) for cell in row] for row in cells]


def evaluated(folder, *accuracies, split="test", problems=200):
    """Add evaluations after 0, 10, 20 ... steps."""
    with (folder / "metrics.jsonl").open("a") as file:
        for i, accuracy in enumerate(accuracies):
            row = {"kind": "eval", "step": 10 * i, "split": split, "accuracy": accuracy, "problems": problems}
            file.write(json.dumps(row) + "\n")


def plain_run(folder, *accuracies, **settings):
    """A folder with evaluations on the test problems and settings, no completions."""
    folder.mkdir(parents=True)
    (folder / "config.json").write_text(json.dumps(settings))
    (folder / "metrics.jsonl").write_text("")
    evaluated(folder, *accuracies)
    return folder


def test_the_first_page_has_the_outcome_with_intervals_the_unusual_settings_and_the_doctor(tmp_path):
    run = make_run(tmp_path / "run")
    recorded = (run / "metrics.jsonl").read_text().replace('"truncated": 0.1', '"truncated": 1.0')
    lines = [line for line in recorded.splitlines() if '"test"' not in line]
    (run / "metrics.jsonl").write_text("\n".join(lines) + "\n")
    evaluated(run, 0.17, 0.91)
    settings = {
        "model": "tiny",
        "task": "largest",
        "algorithm": {"name": "hicra"},
        "optimizer": {"learning_rate": 0.25},
    }
    (run / "config.json").write_text(json.dumps({**settings, "rollout": {"temperature": 1.0}, "output": "x"}))
    words = Opened(run).words()
    before, after = Rate(34, 200).interval, Rate(182, 200).interval
    assert f"17.0% [{100 * before[0]:.1f}, {100 * before[1]:.1f}] before" in words
    assert f"91.0% [{100 * after[0]:.1f}, {100 * after[1]:.1f}] after 10 steps: +74.0 points" in words
    assert "optimizer.learning_rate 0.25" in words
    assert "rollout.temperature" not in words  # it is the default
    assert "output" not in words
    findings = examine(run).findings
    assert findings
    for finding in findings:
        assert f"{finding.name} : {finding.what}" in words
        assert finding.change in words


@pytest.mark.parametrize("link", ["sort=best", "sort=worst", "sort=spread", "finish=length", "kind=evals"])
def test_the_first_page_leads_to_what_stands_out(tmp_path, link):
    opened = Opened(make_run(tmp_path / "run"))
    assert f'href="./?run=0&amp;{link}"' in opened.page()
    first = opened.page(f"?run=0&{link}").split('class="line')[1]
    rewards = [r["reward"] for r in load_run(tmp_path / "run").rollouts.to_pylist()]
    if link in ("sort=best", "sort=worst"):
        extreme = max(rewards) if link == "sort=best" else min(rewards)
        assert f">{extreme:.3g}</span>" in first
    assert "Summary" not in opened.page(f"?run=0&{link}")


@pytest.mark.parametrize("accuracies", [(), (0.5,), (0.5, 0.5), (1.0, 0.0), (0.2, 0.9, 0.4)])
def test_a_first_page_of_any_number_of_evaluations(tmp_path, accuracies):
    words = Opened(plain_run(tmp_path / "run", *accuracies, seed=3)).words()
    assert ("so far" in words) == (len(accuracies) == 1)
    assert ("points" in words) == (len(accuracies) > 1)
    assert len(accuracies) != 3 or "+20.0 points" in words


@pytest.mark.parametrize(
    "config",
    [None, "{}", '{"algorithm": "grpo"}', '{"seed": null, "x": {"y": [1, {"z": "<b>"}]}}', '{"model": "\\u202e"}'],
)
def test_settings_of_any_shape_are_shown(tmp_path, config):
    run = plain_run(tmp_path / "run", 0.1, 0.2)
    (run / "config.json").unlink()
    if config is not None:
        (run / "config.json").write_text(config)
    page = Opened(run).page()
    assert "+10.0 points" in page
    assert "<b>'" not in page
    assert "\u202e" not in page


def test_a_folder_of_runs_is_a_table_that_compares_them_by_setting(tmp_path):
    for rate, seed, after in ((0.1, 0, 0.4), (0.1, 1, 0.6), (0.02, 0, 0.9), (0.02, 1, 0.7), (0.003, 0, 0.2)):
        settings = {"model": "tiny", "seed": seed, "optimizer": {"learning_rate": rate}, "algorithm": {"name": "grpo"}}
        plain_run(tmp_path / "runs" / f"rate{rate}" / f"seed{seed}", 0.1, after, **settings)
    plain_run(tmp_path / "runs" / "r10", 0.3, seed=0, model="tiny", optimizer={"learning_rate": 0.1})
    plain_run(tmp_path / "runs" / "r2", seed=0, model="tiny", optimizer={"learning_rate": 0.1})
    opened = Opened(tmp_path / "runs")
    page = opened.page()
    names = [row[0].removesuffix(" not finished") for row in rows_of(page)]
    assert names[:2] == ["r2", "r10"]
    assert sorted(names[2:]) == sorted(
        f"rate{r}/seed{s}" for r, s in ((0.003, 0), (0.02, 0), (0.02, 1), (0.1, 0), (0.1, 1))
    )
    column = re.findall(r"<th[^>]*>(.*?)</th>", page.split("</thead>")[0])
    heads = [re.sub("<[^>]+>", "", head) for head in column]
    assert heads[:3] == ["run", "optimizer.learning_rate", "algorithm.name"]
    for sort, order in (("after", ""), ("after", "rising"), ("optimizer.learning_rate", "rising"), ("steps", "")):
        rows = rows_of(opened.page(f"runs?sort={sort}" + (f"&order={order}" if order else "")))
        at = heads.index(sort)
        values = [float(row[at].split("%")[0]) for row in rows if row[at]]
        assert values == sorted(values, reverse=order != "rising")
    words = " ".join(html.unescape(re.sub("<[^>]+>", " ", page.split("By setting</h2>")[1])).split())
    assert "optimizer.learning_rate 0.003 1 20.0%" in words
    assert "optimizer.learning_rate 0.02 2 80.0% 70.0% to 90.0%" in words
    assert "optimizer.learning_rate 0.1 4 50.0% 40.0% to 60.0%" in words
    plain_run(tmp_path / "runs" / "late", 0.1, 0.3)
    assert "8 runs" in opened.page("runs")
    (tmp_path / "runs" / "r2" / "metrics.jsonl").write_text("junk\n")
    shutil.rmtree(tmp_path / "runs" / "r10")
    words = opened.words("runs")
    assert "is not JSON" in words
    assert "r10 is not a run folder" in words.replace(str(tmp_path / "runs") + "/", "")
    assert "late" in opened.words("?run=7")


def test_a_folder_without_a_run_and_one_among_others_is_refused(tmp_path):
    (tmp_path / "a" / "b").mkdir(parents=True)
    with pytest.raises(UserError, match="is not a run folder"):
        make_app([tmp_path], "t")
    run = plain_run(tmp_path / "run", 0.1)
    with pytest.raises(UserError, match="is not a run folder"):
        make_app([run, tmp_path / "a"], "t")


def test_prompts_are_judged_by_how_often_they_are_right_even_if_each_is_drawn_once(tmp_path):
    run = make_run(tmp_path / "run")
    for step, path in enumerate(sorted((run / "rollouts").iterdir())):  # as a run that draws each prompt once
        table = pq.read_table(path)
        indices = pa.array([100 * step + i for i in table["group"].to_pylist()], pa.int32())
        pq.write_table(table.set_column(table.schema.get_field_index("prompt_index"), "prompt_index", indices), path)
    opened, found = Opened(run), load_run(run).rollouts.to_pylist()
    shares = {
        i: np.mean([r["is_correct"] for r in found if r["prompt_index"] == i])
        for i in {r["prompt_index"] for r in found}
    }
    assert len(shares) == STEPS * PROMPTS
    for order, sign in (("hardest", 1), ("easiest", -1)):
        rows = rows_of(opened.page(f"prompts?sort={order}"))
        assert {int(row[0]): row[2] for row in rows} == {i: f"{100 * share:.0f}%" for i, share in shares.items()}
        assert all("Question" in row[1] and row[4] == str(SAMPLES) and row[5] == "\u2013" for row in rows)
        values = [sign * float(row[2].rstrip("%")) for row in rows]
        assert values == sorted(values)
    assert len(rows_of(opened.page("prompts?sort=changed"))) == len(shares)


def test_prompts_that_are_drawn_again_show_their_change(tmp_path):
    run = make_run(tmp_path / "run")
    found = load_run(run).rollouts.to_pylist()
    rows = rows_of(Opened(run).page("prompts?sort=changed"))
    for row in rows:
        halves = [
            [r["reward"] for r in found if r["prompt_index"] == int(row[0]) and (r["step"] >= 2.5) == late]
            for late in (0, 1)
        ]
        assert float(row[5]) == pytest.approx(np.mean(halves[1]) - np.mean(halves[0]), abs=2e-3)
    assert [abs(float(row[5])) for row in rows] == sorted((abs(float(row[5])) for row in rows), reverse=True)


def test_a_file_that_is_replaced_is_shown_anew_by_every_page_that_was_open(tmp_path):
    run, other = make_run(tmp_path / "run"), make_run(tmp_path / "other", seed=7)
    paths = [
        "?step_from=2&step_to=2",
        "?sort=best",
        "prompts",
        "completion?at=0:rollouts:step-000002:3",
        "?kind=evals",
        "",
    ]
    opened, fresh = Opened(run), Opened(other)
    assert all(opened.page(path) != fresh.page(path).replace("other", "run") for path in paths)
    times = {path.name: path.stat() for path in (run / "rollouts").iterdir()}
    for name in ("rollouts", "evals"):
        for path in (other / name).iterdir():
            os.replace(path, run / name / path.name)
            if path.name in times:  # even with the time of the file before
                os.utime(run / name / path.name, ns=(times[path.name].st_atime_ns, times[path.name].st_mtime_ns))
    shutil.copy(other / "metrics.jsonl", run / "metrics.jsonl")
    again = Opened(run)
    for path in paths:
        assert opened.page(path) == again.page(path), path


def test_a_curve_answers_for_its_steps():
    rows = [{"kind": "train", "step": s, "reward_mean": float(np.sin(s)), "entropy": float("nan")} for s in range(1000)]
    [curve] = curves(rows)
    assert (curve.first, curve.last) == (0, 999)
    assert curve.value == pytest.approx(np.sin(999))
    assert len(curve.columns) <= 140
    assert curve.columns[-1].step == 999
    assert all(c.value == pytest.approx(np.sin(c.step)) for c in curve.columns)
    ends = [c.left for c in curve.columns] + [curve.columns[-1].left + curve.columns[-1].width]
    assert all(a < b for a, b in pairwise(ends))
    assert all(c.left <= c.x <= c.left + c.width + 1e-9 for c in curve.columns)


def test_a_click_on_a_step_of_a_curve_shows_its_completions(tmp_path):
    run = make_run(tmp_path / "run")
    opened = Opened(run)
    links = [html.unescape(link) for link in re.findall(r'class="at" tabindex="-1" href="./([^"]+)"', opened.page())]
    assert len(links) >= 2 * STEPS
    for link in {*links[:2], *links[-2:]}:
        step = int(re.search(r"step_to=(\d+)", link)[1])
        kind = "evals" if "kind=evals" in link else "rollouts"
        held = [r for r in load_run(run).read(kind).to_pylist() if r["step"] == step and r["split"] != "test"]
        assert f">{len(held)} completion" in opened.page(link)


@pytest.mark.parametrize("path", ["report", "completion?at=0:rollouts:step-000000:0", "prompts", "?prompt=99999999999"])
def test_every_page_has_a_way_back_to_the_list(tmp_path, path):
    page = Opened(make_run(tmp_path / "run")).page(path, 400 if "9999" in path else 200)
    assert re.search(r'<a[^>]* href="\./[^"]*"', page)


HIDDEN = "a\u202eb\u200bc\u2066d\0e\r\U000e0041f"


def test_characters_that_hide_are_shown_on_every_page(tmp_path):
    run = make_run(tmp_path / "run")
    for path in (run / "rollouts").iterdir():
        table = pq.read_table(path)
        for name, value in (("prompt", HIDDEN), ("text", HIDDEN)):
            values = pa.array([value] * len(table), table.schema.field(name).type)
            table = table.set_column(table.schema.get_field_index(name), name, values)
        pieces = pa.array([[HIDDEN] * len(p) for p in table["pieces"].to_pylist()], table.schema.field("pieces").type)
        pq.write_table(table.set_column(table.schema.get_field_index("pieces"), "pieces", pieces), path)
    opened = Opened(run)
    at = ["0:rollouts:step-000000:0", "0:rollouts:step-000000:1"]
    for path in ("", "prompts", f"completion?at={at[0]}", f"pair?a={at[0]}&b={at[1]}", "report"):
        page = opened.page(path)
        assert "a⟨U+202E⟩b⟨U+200B⟩c⟨U+2066⟩d⟨U+0000⟩e⟨U+000D⟩⟨U+E0041⟩f" in page, path
        assert not set(HIDDEN) - set("abcdef") & set(page)
    found = opened.page("?words=%E2%80%AEb%E2%80%8B")  # the filter takes the characters themselves
    assert 'value="\u202eb\u200b"' in found
    assert f">{STEPS * PROMPTS * SAMPLES} completions" in found


@pytest.mark.parametrize(
    "rows",
    ['{"epoch": 0, "loss": 0.1}', '{"step": 3, "task": "math", "reward": 0.5}', '{"step": "3"}', "step,loss", "[1, 2]",
      '{"_runtime": 3.2, "_step": 0}', '{"kind": 4}', "\0\0\0", "null"],
)  # fmt: skip
def test_a_folder_of_another_program_is_not_told_to_lose_its_lines(tmp_path, rows):
    (tmp_path / "metrics.jsonl").write_text(rows + "\n")
    words = Opened(Path(tmp_path)).words(status=400)
    assert "give the folder of a run" in words
    assert "remove" not in words


def test_a_folder_of_an_older_train_math_is_read(tmp_path):
    rows = [{"step": s, "algorithm": "full", "loss": 0.1, "mean_reward": s / 4, "skipped": None} for s in range(4)]
    (tmp_path / "metrics.jsonl").write_text("".join(json.dumps(row) + "\n" for row in rows))
    (tmp_path / "evals.jsonl").write_text('{"step": 2, "accuracy": 0.25, "problems": 8}\n')
    run = load_run(tmp_path)
    assert run.metrics["mean_reward"].to_pylist() == [0.0, 0.25, 0.5, 0.75]
    assert run.evaluations.select(["step", "split", "accuracy"]).to_pylist() == [
        {"step": 2, "split": "validation", "accuracy": 0.25}
    ]
    assert "25.0%" in Opened(tmp_path).words()
