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
from textpolicy.record import trackers
from textpolicy.record.reader import flat
from textpolicy.record.trackers import open_trackers, require
from textpolicy.record.trackers.tracker import Opened, Tracker

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
    tracker = Tracker("any", lambda step, metrics: sent.append((step, metrics)), sent.append)
    tracker.step(3, {"step": 3, "loss": 0.5}, [])
    row = {"kind": "eval_sampled", "step": 2, "split": "validation", "avg@4": 0.5, "samples": 4, "solved": "0101"}
    tracker.evaluated(2, "validation", row, [])
    assert sent == [
        (3, {"train/loss": 0.5}),
        (2, {"validation/avg_at_4": 0.5, "validation/samples": 4.0}),
    ]
    tracker.exit_code = 130
    tracker.close()
    assert sent[2:] == [130]
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
    assert "mlflow gets no more metrics of this run, which are in its folder: no answer" in caplog.text


def row(n):
    """Row n of a run that evaluates after every second step."""
    step, evaluated = divmod(n, 3)
    if evaluated == 2:
        return {"kind": "eval", "split": "validation", "step": 2 * step + 2, "accuracy": n / 100, "solved": "01"}
    return {"kind": "train", "step": 2 * step + evaluated, "loss": n / 10}


LINES = [json.dumps(row(n)).encode() + b"\n" for n in range(30)]


@pytest.mark.parametrize("held", [None, 0, 3, 12, 20])
def test_a_resumed_run_sends_every_row_once_whatever_the_tracker_has(held, tmp_path, monkeypatch):
    """Twenty rows were written, the tracker has the first ``held``, and the run goes on after the tenth."""
    sent, marks = [row(n)["step"] for n in range(20 if held is None else held)], []

    def reopened(name, config, folder, mark):
        marks.append(mark)
        return Opened("id", held if mark else 0, lambda step, metrics: sent.append(step), lambda code: None)

    monkeypatch.setattr(trackers, "_open", reopened)
    config = Config(tracking={"to": ["mlflow"]})
    open_trackers(config, tmp_path)
    [tracker] = open_trackers(config, tmp_path, b"".join(LINES[:20]) + b'{"kind": "tra', len(b"".join(LINES[:10])))
    for n in range(10, 30):
        tracker.send(row(n))
    assert sent == [row(n)["step"] for n in range(30)]
    assert marks == [None, "id"]


def test_a_metrics_file_that_is_damaged_after_its_checkpoint_does_not_keep_a_tracker_from_opening(tmp_path):
    before = LINES[0] + b"\xff\xfe\n[1]\n7\n{}\n" + LINES[1]
    assert [row["step"] for row in trackers._rows(before)] == [0, 1]


def test_whatever_a_library_raises_at_the_start_is_one_sentence(tmp_path, monkeypatch):
    for error in (OSError("no\nroute"), RuntimeError(""), KeyError("x"), ConnectionRefusedError(111, "refused")):

        def start(*_, error=error):
            raise error

        monkeypatch.setattr(trackers, "_open", start)
        for name, advice in (("mlflow", "correct tracking.uri"), ("trackio", "leave trackio out of tracking.to")):
            with pytest.raises(UserError, match=rf"^{name} cannot start a run \(\S.*\); .*{advice}") as caught:
                open_trackers(Config(tracking={"to": [name]}), tmp_path)
            assert "\n" not in str(caught.value)


CUT = """
import os, sys
from pathlib import Path
sys.path.insert(0, {tests!r})
from test_trackers import LINES, row
from textpolicy.config.settings import Config
from textpolicy.record.trackers import open_trackers

folder = Path({folder!r})
config = Config(tracking={{"to": [{tracker!r}], "project": "demo", "offline": True}})
folder.mkdir(exist_ok=True)
before = (folder / "metrics.jsonl").read_bytes() if (folder / "metrics.jsonl").exists() else b""
kept = {kept}
[sink] = open_trackers(config, folder, before, sum(map(len, LINES[:kept])))
with (folder / "metrics.jsonl").open("wb") as file:
    file.write(b"".join(LINES[:kept]))
    for n in range(kept, {end}):
        sink.send(row(n))
        file.write(LINES[n])
        file.flush()
if {code} == 9:
    os._exit(9)  # as kill -9 ends a process
sink.exit_code = {code}
sink.close()
"""


def steps_of_tensorboard(folder):
    from tensorboard.backend.event_processing.event_accumulator import EventAccumulator

    events = EventAccumulator(str(folder / "tensorboard"))
    events.Reload()
    return [event.step for event in events.Scalars("train/loss")]


def steps_of_wandb(folder):
    from textpolicy.record.trackers.weights_and_biases import _records

    assert len({path.name.rsplit("-", 1)[1] for path in folder.glob("wandb/offline-run-*")}) == 1
    from wandb.proto.wandb_internal_pb2 import Record

    files = sorted(folder.glob("wandb/offline-run-*/*.wandb"))
    records = [Record.FromString(data) for path in files for data in _records(path.read_bytes())]
    assert [r.exit.exit_code for r in records if r.WhichOneof("record_type") == "exit"] == [1, 0]
    rows = wandb_history(records)
    return [row["step"] for row in rows if "train/loss" in row]


def steps_of_trackio(folder):
    from trackio.sqlite_storage import SQLiteStorage

    assert len(SQLiteStorage.get_run_records("demo")) == 1
    return [row["step"] for row in SQLiteStorage.get_logs("demo", "run") if "train/loss" in row]


def steps_of_mlflow(folder):
    from mlflow.tracking import MlflowClient

    client = MlflowClient((folder / "mlflow").as_uri())
    [run] = client.search_runs([client.get_experiment_by_name("demo").experiment_id])
    assert run.info.status == "FINISHED"
    return [metric.step for metric in client.get_metric_history(run.info.run_id, "train/loss")]


@pytest.mark.parametrize("name", NAMES)
def test_a_run_that_is_killed_fails_and_ends_is_one_run_with_every_step_once(name, tmp_path, monkeypatch):
    pytest.importorskip(name, reason=WHY)
    folder, about = tmp_path / "run", {"tests": str(Path(__file__).parent), "tracker": name}
    kept = {k: v for k, v in os.environ.items() if not k.startswith("WANDB_")}
    apart = {**kept, "WANDB_SILENT": "true", "WANDB_CONSOLE": "off", "TRACKIO_DIR": str(tmp_path / "trackio")}
    for first, end, code in ((0, 14, 9), (10, 20, 9), (13, 25, 1), (19, 30, 0)):
        script = CUT.format(**about, folder=str(folder), kept=first, end=end, code=code)
        done = subprocess.run([sys.executable, "-c", script], capture_output=True, text=True, timeout=120, env=apart)
        assert done.returncode == (9 if code == 9 else 0), done.stderr
    read = (
        f"import sys; sys.path.insert(0, {about['tests']!r}); import test_trackers as t; from pathlib import Path\n"
        f"print('read:', t.steps_of_{name}(Path({str(folder)!r})))"
    )
    done = subprocess.run([sys.executable, "-c", read], capture_output=True, text=True, timeout=120, env=apart)
    assert f"read: {list(range(20))}" in done.stdout, done.stderr


def test_the_settings_on_the_page_are_settings():
    page = (Path(__file__).parents[3] / "docs" / "trackers.md").read_text(encoding="utf-8")
    shown = tomllib.loads(page.split("```toml\n")[1].split("```")[0])
    assert check_config(shown, "docs/trackers.md").tracking.to == ("tensorboard", "mlflow")
