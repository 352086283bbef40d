"""``textpolicy doctor RUN``: what it prints about a run folder, and its exit code."""

import json
import re
from pathlib import Path

import numpy as np
import pytest

from textpolicy.cli.main import main
from textpolicy.doctor import RULES, Completions, Example, Facts, Finding, Report, examine
from textpolicy.doctor.words import as_json, full, last_lines

ROW = {
    "kind": "train", "learning_rate": 3e-4, "reward_mean": 0.0, "reward_std": 0.0, "unscorable": 0.0,
    "frac_reward_zero_std": 1.0, "accuracy": 0.0, "length_mean": 3.0, "truncated": 0.0, "prompt_draws": 1.0,
    "batch_full": 1.0, "updated": 0.0, "loss": 0.0, "grad_norm": 0.0,
}  # fmt: skip
FINE = {"reward_std": 0.4, "frac_reward_zero_std": 0.1, "updated": 1.0, "grad_norm": 0.3}


def folder(path, rows, end=""):
    lines = [json.dumps({"kind": "eval", "step": 0, "split": "test", "accuracy": 0.25, "problems": 8})]
    lines += [json.dumps({"step": step, **row}) for step, row in enumerate(rows)]
    path.mkdir()
    (path / "metrics.jsonl").write_text("\n".join(lines) + "\n" + end)
    (path / "config.json").write_text(json.dumps({"rollout": {"max_tokens": 8}}))
    return path


def test_a_run_that_failed_is_described_with_exit_code_1(tmp_path, capsys):
    assert main(["doctor", str(folder(tmp_path / "run", [ROW] * 4))]) == 1
    output = capsys.readouterr().out
    assert "4 steps, 13 rules checked, " in output.splitlines()[0]
    assert output.splitlines()[0].endswith("2 found something")
    assert "1. no_gradient" in output
    assert "2. all_fail" in output
    assert "to change: teach first" in output
    assert "evidence: agreeing_groups 1, idle_steps 4, steps 4" in output
    assert "  empty_completions: its completions are not recorded" in output


def test_a_healthy_run_has_exit_code_0(tmp_path, capsys):
    assert main(["doctor", str(folder(tmp_path / "run", [{**ROW, **FINE}] * 4))]) == 0
    assert capsys.readouterr().out.splitlines()[0].endswith("nothing found")


def test_a_line_that_is_still_being_written_is_left_for_later(tmp_path, capsys):
    run = folder(tmp_path / "run", [{**ROW, **FINE}] * 3, end='{"kind": "train", "ste')
    assert main(["doctor", str(run)]) == 0
    assert "3 steps" in capsys.readouterr().out


def test_json_is_for_programs(tmp_path, capsys):
    assert main(["doctor", str(folder(tmp_path / "run", [ROW] * 4)), "--json"]) == 1
    report = json.loads(capsys.readouterr().out)
    assert [finding["name"] for finding in report["findings"]] == ["no_gradient", "all_fail"]
    assert report["steps"] == 4


@pytest.mark.parametrize(
    ("argv", "sentence"),
    [(["doctor", "nowhere"], "nowhere is not a run folder"), (["doctor"], "RUN is missing")],
)
def test_a_folder_that_is_not_a_run_is_one_sentence(argv, sentence, capsys):
    assert main(argv) == 2
    output = capsys.readouterr().err
    assert sentence in output
    assert output.count("\n") == 1


HOSTILE = Report(
    (Finding("f", "What.", "that", {"x": float("nan")}, (Example(1, "p\n", "\x1b[2J" + "a" * 99, 0.0, True),)),),
    ("f",), (), 3,
)  # fmt: skip


def test_a_completion_is_printed_escaped_and_short():
    output = full(HOSTILE, "run")
    assert "\x1b" not in output
    assert r"'p\n' -> '\x1b[2Jaaaa" in output
    assert "aaa…  reward 0, cut off" in output


def test_a_number_that_is_not_finite_is_null_in_json():
    assert json.loads(as_json(HOSTILE))["findings"][0]["evidence"] == {"x": None}


def test_the_last_lines_of_a_run_are_one_per_finding():
    assert last_lines(HOSTILE) == ["doctor: What. To change it: that."]
    assert last_lines(Report((), ("a", "b"), (("c", "why"),), 3)) == [
        "doctor: nothing found by 2 rules; 1 could not be checked"
    ]
    assert last_lines(Report((), ("a",), (), 3)) == ["doctor: nothing found by 1 rules"]


def test_recorded_completions_are_read_back_as_they_were(tmp_path):
    pa = pytest.importorskip("pyarrow", reason="reads Parquet files: pip install 'textpolicy[data]'")
    import pyarrow.parquet as pq

    from textpolicy.record import layout

    run = folder(tmp_path / "run", [{**ROW, **FINE}] * 3)
    columns = {
        "step": [2, 2, 2], "split": ["train"] * 3, "group": [0, 0, 1], "prompt": ["p", "p", "q"],
        "text": ["", "x", ""], "finish_reason": ["stop", "length", "stop"], "reward": [0.5, None, 1.0],
        "is_correct": [False, None, True], "scores": [[("a", 0.5), ("b", 0.0)], [], [("a", 1.0)]], "length": [1, 2, 3],
    }  # fmt: skip
    schema = layout.schema()
    table = pa.table({f.name: pa.array(columns.get(f.name, [None] * 3), f.type) for f in schema}, schema)
    (run / "rollouts").mkdir()
    pq.write_table(table, layout.rollouts_path(run, 2))
    pq.write_table(table.set_column(0, "step", pa.array([0] * 3, pa.int32())), layout.rollouts_path(run, 0))

    from textpolicy.doctor import read_facts

    read = read_facts(run).completions
    assert isinstance(read, Completions)
    assert read.step.tolist() == [2, 2, 2]  # of the last third
    assert read.truncated.tolist() == [False, True, False]
    assert np.isnan(read.reward).tolist() == np.isnan(read.correct).tolist() == [False, True, False]
    assert read.scores["a"][[0, 2]].tolist() == [0.5, 1.0]
    assert np.isnan(read.scores["b"]).tolist() == [False, True, True]
    [finding] = examine(run).findings
    assert finding.name == "empty_completions"
    assert [e.prompt for e in finding.examples] == ["q", "p"]


def test_facts_of_your_own_need_no_folder():
    names = [finding.name for finding in examine(Facts([{k: v for k, v in ROW.items() if k != "kind"}] * 4)).findings]
    assert names == ["no_gradient", "all_fail"]


def test_the_page_lists_every_rule_in_the_order_of_the_table():
    page = (Path(__file__).parents[2] / "docs" / "doctor.md").read_text(encoding="utf-8")
    table = page.split("## The rules")[1].split("##")[0]
    assert re.findall(r"^\| `(\w+)` \|", table, re.MULTILINE) == [rule.name for rule in RULES]


@pytest.mark.parametrize(
    "config",
    [
        {"optimizer": None},
        {"optimizer": "sgd", "rollout": [1], "on_policy": 3},
        {"optimizer": {"updates_per_step": "two"}, "rollout": {"max_tokens": None}, "on_policy": {"max_gap": {}}},
        {"rollout": {"max_tokens": True}, "algorithm": "grpo"},
        {"optimizer": {"updates_per_step": {"deeper": 1}}},
    ],
)
def test_settings_of_another_shape_are_unknown(config, tmp_path):
    from textpolicy.doctor import Settings, read_facts

    (tmp_path / "metrics.jsonl").write_text(json.dumps({**ROW, "step": 0}) + "\n")
    (tmp_path / "config.json").write_text(json.dumps(config))
    assert read_facts(tmp_path).settings == Settings()
    assert examine(tmp_path).steps == 1
