"""Run folders that are damaged: doctor, report and viewer report the damage in one sentence."""

import json
import os
from pathlib import Path

import pytest
from made_run import make_run

from textpolicy.cli.main import main
from textpolicy.config.settings import Config
from textpolicy.errors import UserError
from textpolicy.record.reader import ended, load_run, marks
from textpolicy.record.trackers import open_trackers


def after(name, content):
    return lambda folder: (folder / name).write_bytes((folder / name).read_bytes() + content)


def instead(name, content):
    return lambda folder: (folder / name).write_bytes(content)


def halved(name):
    return lambda folder: (folder / name).write_bytes(
        (folder / name).read_bytes()[: (folder / name).stat().st_size // 2]
    )


def a_folder(name):
    return lambda folder: ((folder / name).unlink(), (folder / name).mkdir())


def a_pipe(name):
    return lambda folder: ((folder / name).unlink(), os.mkfifo(folder / name))


def another_table(folder):
    import pyarrow as pa
    import pyarrow.parquet as pq

    pq.write_table(pa.table({"step": ["one"], "text": [7]}), folder / "rollouts" / "step-000002.parquet")


ROWS = {
    "half a line in the middle": (b'{"kind": "tr\n', "is not JSON"),
    "zero bytes": (b"\0" * 64 + b"\n", "is not JSON"),
    "not text": (b"\xff\xfe\n", "is not JSON"),
    "a list": (b"[1, 2]\n", "is not a row of a run"),
    "without a kind": (b'{"step": 3}\n', "is not a row of a run"),
    "a step of text": (b'{"kind": "train", "step": "3"}\n', "has no number as its step"),
    "a metric of text": (b'{"kind": "train", "step": 9, "loss": "low"}\n', "a metric that is not a number ('loss')"),
    "tokens that are no number": (
        b'{"kind": "train", "step": 9, "sampled_tokens": NaN}\n',
        "has a sampled_tokens of nan",
    ),
    "a time without end": (b'{"kind": "train", "step": 9, "update_seconds": 1e999}\n', "has a update_seconds of inf"),
    "memory below 0": (b'{"kind": "train", "step": 9, "peak_memory_bytes": -8}\n', "has a peak_memory_bytes of -8"),
    "nested without end": (b"[" * 5000 + b"\n", "is not JSON (it is nested too deeply)"),
    "an evaluation without a split": (
        b'{"kind": "eval", "step": 9, "accuracy": 0.5, "problems": 2}\n',
        "does not name its split",
    ),
    **{
        f"an evaluation of {accuracy} on {problems}": (
            b'{"kind": "eval", "step": 9, "split": "test", "accuracy": %g, "problems": %d}\n' % (accuracy, problems),
            f"has an accuracy of {accuracy} on {problems} problems",
        )
        for accuracy, problems in ((1.7, 10), (-0.1, 10), (0.5, 0), (0.5, -5))
    },
    "an evaluation without accuracy": (
        b'{"kind": "eval", "step": 9, "split": "test"}\n',
        "has no number as its accuracy",
    ),
}
DAMAGES = {
    **{name: (after("metrics.jsonl", line), sentence) for name, (line, sentence) in ROWS.items()},
    "settings cut off": (instead("config.json", b'{"seed"'), "config.json is not JSON"),
    "settings that are a list": (instead("config.json", b"[1]"), "config.json is not a JSON object"),
    "settings that are no number": (instead("config.json", b'{"seed": NaN}'), "config.json is not JSON"),
    "settings in a folder": (a_folder("config.json"), "config.json cannot be read (it is not a file)"),
    "settings in a pipe": (a_pipe("config.json"), "config.json cannot be read (it is not a file)"),
    "completions in a folder": (a_folder("rollouts/step-000002.parquet"), "is not a valid Parquet file of completions"),
    "completions in a pipe": (a_pipe("rollouts/step-000002.parquet"), "is not a valid Parquet file of completions"),
    "completions cut off": (halved("rollouts/step-000002.parquet"), "is not a valid Parquet file of completions"),
    "an empty file of completions": (
        instead("rollouts/step-000002.parquet", b""),
        "is not a valid Parquet file of completions",
    ),
    "another table": (another_table, "is not a valid Parquet file of completions"),
}


def doctor(folder):
    return main(["doctor", str(folder)])


def report(folder):
    return main(["report", str(folder)])


OTHERS = [name for name in DAMAGES if "settings" not in name]  # the doctor does not read the settings here


@pytest.mark.parametrize(
    ("command", "damage"), [*((report, name) for name in DAMAGES), *((doctor, name) for name in OTHERS)]
)
def test_a_damaged_run_folder_is_one_sentence(tmp_path, capsys, damage, command):
    spoil, sentence = DAMAGES[damage]
    folder = make_run(tmp_path / "run", steps=4)
    spoil(folder)
    assert command(folder) == 2
    output = capsys.readouterr().err
    assert sentence in output
    assert output.count("\n") == 1


@pytest.mark.parametrize("damage", OTHERS)
def test_the_viewer_shows_the_same_sentence_on_its_page(tmp_path, damage):
    from starlette.testclient import TestClient

    from textpolicy.report.view.server import make_app

    spoil, sentence = DAMAGES[damage]
    folder = make_run(tmp_path / "run", steps=4)
    spoil(folder)
    answer = TestClient(make_app([folder], "token"), base_url="http://127.0.0.1").get("/token/")
    assert 400 <= answer.status_code < 500
    assert sentence.replace("'", "&#39;") in answer.text


@pytest.mark.parametrize("spoil", [instead("summary.json", b'{"te'), a_folder("summary.json"), a_pipe("summary.json")])
def test_a_run_whose_summary_is_damaged_has_not_ended(tmp_path, spoil):
    from textpolicy.report.page import report_html

    folder = make_run(tmp_path / "run", steps=4)
    assert "not finished" not in report_html([folder])
    spoil(folder)
    assert not ended(folder)
    assert "not finished" in report_html([folder])


def test_the_list_of_runs_says_which_one_is_damaged_and_shows_the_others(tmp_path):
    from starlette.testclient import TestClient

    from textpolicy.report.view.server import make_app

    for name in ("a", "b", "c", "d"):
        make_run(tmp_path / name, steps=2)
    after("metrics.jsonl", b'{"kind": "train", "step": 9, "sample_seconds": -1}\n')(tmp_path / "a")
    instead("config.json", b"[" * 9000)(tmp_path / "b")
    a_pipe("metrics.jsonl")(tmp_path / "c")
    text = TestClient(make_app([tmp_path], "token"), base_url="http://127.0.0.1").get("/token/").text
    assert "has a sample_seconds of -1" in text
    assert "config.json is not JSON (it is nested too deeply)" in text
    assert [name for name in "abcd" if f">{name}</a>" in text] == ["a", "b", "d"]  # c is no run


def test_a_file_that_may_not_be_read_is_a_sentence_on_the_page(tmp_path, monkeypatch):
    from starlette.testclient import TestClient

    from textpolicy.report.view.server import make_app

    folder = make_run(tmp_path / "run", steps=2)
    app, read = make_app([folder], "token"), Path.read_bytes

    def refuse(path):
        if path.name == "metrics.jsonl":
            raise PermissionError(13, "Permission denied", str(path))
        return read(path)

    monkeypatch.setattr(Path, "read_bytes", refuse)
    answer = TestClient(app, base_url="http://127.0.0.1").get("/token/")
    assert answer.status_code == 400
    assert "metrics.jsonl cannot be read (Permission denied)" in answer.text


@pytest.mark.parametrize("content", [b"", b"[", b"[1]", b'{"wandb": 5}', b'{"mlflow": ["a"]}', b'{"wandb": NaN}'])
def test_marks_of_trackers_that_are_damaged_are_one_sentence(tmp_path, content):
    (tmp_path / "trackers.json").write_bytes(content)
    config = Config(tracking={"to": ["wandb"]})
    with pytest.raises(UserError, match=r"^\S*trackers\.json .*; remove it, and the trackers get a new run$"):
        open_trackers(config, tmp_path)


def test_marks_that_are_not_one_for_each_problem_are_no_evidence():
    row = {"problems": 4, "accuracy": 0.5}
    assert marks({**row, "solved": "0110"}) == "0110"
    assert [marks({**row, "solved": odd}) for odd in ("01", "01101", "01x0", "", 110, None, ["0", "1"])] == [None] * 7
    assert marks(row) is None


def test_a_line_that_is_being_written_is_left_out(tmp_path):
    folder = make_run(tmp_path / "run", steps=2)
    rows = load_run(folder).rows
    after("metrics.jsonl", b'{"kind": "tra')(folder)
    assert load_run(folder).rows == rows


def test_a_metric_may_be_nan_and_a_step_may_not(tmp_path):
    folder = make_run(tmp_path / "run", steps=2)
    after("metrics.jsonl", json.dumps({"kind": "train", "step": 2, "loss": float("nan")}).encode() + b"\n")(folder)
    assert load_run(folder).metrics.num_rows == 3
    after("metrics.jsonl", b'{"kind": "train", "step": 1e400}\n')(folder)
    with pytest.raises(UserError, match="has no number as its step"):
        _ = load_run(folder).rows
