"""Trackers: what each library stored of a run, read back with that library."""

import json
import os
import struct
import subprocess
import sys
import tomllib
from pathlib import Path
from types import SimpleNamespace

import pytest

from textpolicy.cli.main import main
from textpolicy.config.settings import Config, check_config
from textpolicy.errors import MissingDependencyError, UserError
from textpolicy.record.reader import flat
from textpolicy.record.trackers import open_trackers, require
from textpolicy.record.trackers.tracker import Tracker

WHY = "installed by pip install 'textpolicy[trackers]'"
NAMES = ("tensorboard", "wandb", "trackio", "mlflow")


def track(tracker, folder, **settings):
    """Log two steps and three evaluations, the last of an earlier step, as ``textpolicy train`` does."""
    folder.mkdir()
    config = Config(seed=7, tracking={"to": [tracker], "project": "demo", **settings})
    [sink] = open_trackers(config, folder)
    evaluation = {"kind": "eval", "problems": 8}
    sink.evaluated(0, "validation", {**evaluation, "step": 0, "split": "validation", "accuracy": 0.25}, [])
    for step in (0, 1):
        sink.step(step, {"step": step, "reward_mean": 0.5 + step / 4, "reward_mean/my reward!": 0.125}, [])
    sampled = {"kind": "eval_sampled", "split": "validation", "step": 2, "avg@4": 0.5, "problems": 8}
    sink.evaluated(2, "validation", sampled, [])
    sink.evaluated(1, "test", {**evaluation, "step": 1, "split": "test", "accuracy": 0.75}, [])
    sink.close()


def test_every_tracker_gets_the_same_names():
    sent = []
    tracker = Tracker(lambda step, metrics: sent.append((step, metrics)), list)
    tracker.step(3, {"step": 3, "loss": 0.5}, [])
    row = {"kind": "eval_sampled", "step": 2, "split": "validation", "avg@4": 0.5, "samples": 4}
    tracker.evaluated(2, "validation", row, [])
    assert sent == [
        (3, {"train/loss": 0.5}),
        (2, {"validation/avg_at_4": 0.5, "validation/samples": 4.0}),
    ]
    assert flat({"a": {"b": {"c": 1}}, "d": [2]}) == {"a.b.c": 1, "d": [2]}


def test_no_tracker_is_opened_by_default(tmp_path):
    assert open_trackers(Config(), tmp_path) == []


@pytest.mark.parametrize("name", NAMES)
def test_a_tracker_that_is_not_installed_is_named_before_a_run_begins(name, monkeypatch, tmp_path, capsys):
    monkeypatch.setitem(sys.modules, name, None)
    with pytest.raises(MissingDependencyError, match=f"{name} is not installed; install it with: pip install"):
        require(Config(tracking={"to": [name]}).tracking)
    assert main(["train", f"--tracking.to={name}", f"--output={tmp_path / 'run'}"]) == 2
    assert capsys.readouterr().err.count("\n") == 1
    assert not (tmp_path / "run").exists()


def test_an_unknown_tracker_is_refused(capsys):
    assert main(["train", "--tracking.to=tensorbord"]) == 2
    assert "tensorbord" in capsys.readouterr().err


def test_tensorboard_reads_the_event_files_back(tmp_path):
    pytest.importorskip("tensorboard", reason=WHY)
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    track("tensorboard", tmp_path / "run")
    events = EventAccumulator(str(tmp_path / "run" / "tensorboard"))
    events.Reload()

    def series(name):
        return [(event.step, event.value) for event in events.Scalars(name)]

    assert series("train/reward_mean") == [(0, 0.5), (1, 0.75)]
    assert series("train/reward_mean/my reward!") == [(0, 0.125), (1, 0.125)]
    assert series("validation/accuracy") == [(0, 0.25)]
    assert series("validation/avg_at_4") == [(2, 0.5)]
    assert series("test/accuracy") == [(1, 0.75)]


def wandb_records(folder):
    """Read the records of an offline wandb run: a log in LevelDB's format after a header of 7 bytes.

    Blocks of 32 KiB hold fragments: checksum (4 bytes), length (2), kind (1: whole, 2: first, 3: middle, 4: last).
    """
    from wandb.proto.wandb_internal_pb2 import Record

    [path] = folder.glob("wandb/offline-run-*/*.wandb")
    data, place, record, records = path.read_bytes(), 7, b"", []
    while place + 7 <= len(data):
        if (left := 32768 - place % 32768) < 7:
            place += left
            continue
        length, kind = struct.unpack_from("<HB", data, place + 4)
        record += data[place + 7 : place + 7 + length]
        place += 7 + length
        if kind in (1, 4):
            records.append(Record.FromString(record))
            record = b""
    return records


def wandb_history(records):
    rows = []
    for record in records:
        if record.WhichOneof("record_type") == "history":
            items = {item.key or "/".join(item.nested_key): json.loads(item.value_json) for item in record.history.item}
            rows.append({key: value for key, value in items.items() if not key.startswith("_")})
    return rows


APART = """
import json, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_trackers import track
track({tracker!r}, Path({folder!r}), offline=True)
"""


def tracked_apart(tracker, folder, then="", **environment):
    """Call ``track`` in its own process, for libraries that read the environment once or write at exit."""
    script = APART.format(tests=str(Path(__file__).parent), tracker=tracker, folder=str(folder)) + then
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    done = subprocess.run(
        [sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env={**kept, **environment}
    )
    assert done.returncode == 0, done.stderr
    return done.stdout


def test_weights_and_biases_keeps_an_offline_run_in_the_folder(tmp_path):
    pytest.importorskip("wandb", reason=WHY)
    tracked_apart("wandb", tmp_path / "run", WANDB_SILENT="true", WANDB_CONSOLE="off")
    records = wandb_records(tmp_path / "run")
    [about] = [r.run for r in records if r.WhichOneof("record_type") == "run"][:1]
    assert (about.project, about.display_name) == ("demo", "run")
    settings = {item.key: json.loads(item.value_json) for item in about.config.update}
    assert settings["seed"] == 7
    assert settings["rollout"]["group_size"] == 8
    assert wandb_history(records) == [
        {"step": 0, "validation/accuracy": 0.25, "validation/problems": 8},
        {"step": 0, "train/reward_mean": 0.5, "train/reward_mean/my reward!": 0.125},
        {"step": 1, "train/reward_mean": 0.75, "train/reward_mean/my reward!": 0.125},
        {"step": 2, "validation/avg_at_4": 0.5, "validation/problems": 8},
        {"step": 1, "test/accuracy": 0.75, "test/problems": 8},
    ]


def test_a_wandb_run_that_cannot_start_is_one_sentence(tmp_path, monkeypatch):
    class RefusedError(Exception):
        pass

    def refuse(**about):
        raise RefusedError("no API key")

    monkeypatch.setitem(sys.modules, "wandb", SimpleNamespace(init=refuse, errors=SimpleNamespace(Error=RefusedError)))
    with pytest.raises(UserError, match=r"wandb cannot start a run \(no API key\); log in with 'wandb login'"):
        open_trackers(Config(tracking={"to": ["wandb"]}), tmp_path)


TRACKIO = """
from trackio.sqlite_storage import SQLiteStorage
keep = lambda row: {k: v for k, v in row.items() if k == "step" or "/" in k}
about = [SQLiteStorage.get_runs("demo"), SQLiteStorage.get_run_config("demo", "run")["rollout.group_size"]]
print("read:", json.dumps([about, [keep(row) for row in SQLiteStorage.get_logs("demo", "run")]]))
"""


def test_trackio_reads_its_database_back(tmp_path):
    pytest.importorskip("trackio", reason=WHY)
    out = tracked_apart("trackio", tmp_path / "run", TRACKIO, TRACKIO_DIR=str(tmp_path / "trackio"))
    [read] = [line.removeprefix("read:") for line in out.splitlines() if line.startswith("read:")]
    about, rows = json.loads(read)
    assert about == [["run"], 8]
    assert rows == [
        {"step": 0, "validation/problems": 8, "validation/accuracy": 0.25},
        {"step": 0, "train/reward_mean": 0.5, "train/reward_mean/my reward!": 0.125},
        {"step": 1, "train/reward_mean": 0.75, "train/reward_mean/my reward!": 0.125},
        {"step": 2, "validation/avg_at_4": 0.5, "validation/problems": 8},
        {"step": 1, "test/problems": 8, "test/accuracy": 0.75},
    ]


def test_mlflow_reads_its_file_store_back(tmp_path):
    pytest.importorskip("mlflow", reason=WHY)
    from mlflow.tracking import MlflowClient

    track("mlflow", tmp_path / "run", name="first")
    client = MlflowClient((tmp_path / "run" / "mlflow").as_uri())
    [run] = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    assert (run.info.run_name, run.info.status) == ("first", "FINISHED")
    assert run.data.params["seed"] == "7"
    assert run.data.params["rollout.group_size"] == "8"

    def series(name):
        return [(metric.step, metric.value) for metric in client.get_metric_history(run.info.run_id, name)]

    assert series("train/reward_mean") == [(0, 0.5), (1, 0.75)]
    assert series("train/reward_mean.my reward_") == [(0, 0.125), (1, 0.125)]
    assert series("validation/avg_at_4") == [(2, 0.5)]
    assert series("test/accuracy") == [(1, 0.75)]


def test_a_server_that_is_gone_does_not_end_the_run(tmp_path, monkeypatch, caplog):
    pytest.importorskip("mlflow", reason=WHY)
    from mlflow.exceptions import MlflowException
    from mlflow.tracking import MlflowClient

    [sink] = open_trackers(Config(tracking={"to": ["mlflow"]}), tmp_path)
    calls = []

    def gone(self, *given, **what):
        calls.append(what)
        raise MlflowException("no answer")

    monkeypatch.setattr(MlflowClient, "log_batch", gone)
    sink.step(0, {"loss": 1.0}, [])
    sink.step(1, {"loss": 1.0}, [])
    sink.close()
    assert len(calls) == 1
    assert "MLflow gets no more metrics of this run, which are in its folder: no answer" in caplog.text


def test_the_settings_on_the_page_are_settings():
    page = (Path(__file__).parents[3] / "docs" / "trackers.md").read_text(encoding="utf-8")
    shown = tomllib.loads(page.split("```toml\n")[1].split("```")[0])
    assert check_config(shown, "docs/trackers.md").tracking.to == ("tensorboard", "mlflow")
