"""The folder that a run is to write to: what is there stays, and one that cannot be made is reported at once."""

import json
import shutil
from pathlib import Path

import pytest
from toy_run import make_model, quickly, settings

from textpolicy._system.files import local_path
from textpolicy.cli.main import main
from textpolicy.config.settings import Config
from textpolicy.errors import UserError
from textpolicy.report.page import write_report
from textpolicy.run.resume import has_trained, is_run


@pytest.fixture(autouse=True)
def toy(monkeypatch):
    quickly(monkeypatch)


@pytest.fixture(scope="module")
def config(tmp_path_factory):
    return settings(tmp_path_factory.mktemp("toy"), steps=3)


@pytest.fixture(scope="module")
def finished(config, tmp_path_factory):
    folder = tmp_path_factory.mktemp("runs") / "whole"
    with pytest.MonkeyPatch.context() as patch:
        quickly(patch)
        assert main(["train", str(config), f"--output={folder}", "--quiet"]) == 0
    return folder


def content(folder):
    return {str(p.relative_to(folder)): p.read_bytes() for p in folder.rglob("*") if p.is_file() and p.name != ".lock"}


def refused(capsys, folder, config, *flags):
    """The sentence with which a run into ``folder`` is refused, which leaves everything as it was."""
    before = content(folder)
    capsys.readouterr()
    assert main(["train", str(config), f"--output={folder}", *flags]) == 2
    error = capsys.readouterr().err
    assert error.startswith("textpolicy: ")
    assert error.count("\n") == 1
    assert content(folder) == before
    return error


KEPT = {  # of a finished run, after somebody has made room
    "all but its checkpoints": lambda name: not name.startswith("checkpoints"),
    "all but its last checkpoint": lambda name: not name.startswith("checkpoints/step-000003"),
    "metrics": lambda name: name in ("config.json", "versions.json", "metrics.jsonl"),
    "rollouts": lambda name: name.startswith("rollouts") or name in ("config.json", "versions.json"),
    "evaluations": lambda name: name.startswith("evals") or name in ("config.json", "versions.json"),
    "adapter": lambda name: name.startswith("adapter") or name in ("config.json", "versions.json"),
    "summary": lambda name: name in ("config.json", "versions.json", "summary.json"),
    "report": lambda name: name in ("config.json", "versions.json", "report.html"),
    "settings lost": lambda name: name not in ("config.json",) and not name.startswith("checkpoints"),
    "settings alone": lambda name: name == "config.json",
    "metrics alone": lambda name: name == "metrics.jsonl",
    "checkpoints alone": lambda name: name.startswith("checkpoints"),
}


@pytest.mark.parametrize("what", KEPT)
def test_what_is_left_of_a_finished_run_stays(what, config, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    for name, data in content(finished).items():
        if KEPT[what](name):
            (folder / name).parent.mkdir(parents=True, exist_ok=True)
            (folder / name).write_bytes(data)
    error = refused(capsys, folder, config)
    assert "is finished" in error or "its checkpoints are gone" in error or "exists; choose another" in error
    if (folder / "config.json").exists() and not (folder / "checkpoints").exists():
        refused(capsys, folder, config, "--seed=9", "--steps=8", "--allow=steps,seed")


def test_a_run_that_was_cut_short_and_has_lost_its_checkpoints_is_not_begun_again(config, finished, tmp_path, capsys):
    folder = tmp_path / "run"
    shutil.copytree(finished, folder)
    for name in ("checkpoints", "adapter", "summary.json", "report.html"):
        path = folder / name
        shutil.rmtree(path) if path.is_dir() else path.unlink()
    error = refused(capsys, folder, config)
    assert "has made steps and its checkpoints are gone, so it cannot resume; choose another output" in error
    assert main(["train", f"--resume={folder}"]) == 2


OTHERS = {  # folders that are no run's, as their files and texts
    "project": {"config.json": "{}", "main.py": "1"},
    "project of a language model": {"config.json": '{"model": "x", "steps": 5, "seed": 0}', "README.md": ""},
    "checkout": {".git/HEAD": "ref: refs/heads/main", "config.json": "[]", "task.py": "x = 1"},
    "task of one's own": {"task.py": "x = 1"},
    "versions": {"versions.json": "{}"},
    "versions and settings": {"versions.json": "{}", "config.json": '{"name": "app"}'},
    "settings of a run alone": {"config.json": Config().model_dump_json()},
    "campaign": {"plan.json": "{}", "runs/a/seed0/config.json": Config().model_dump_json()},
    "another trainer": {"config.json": '{"model_type": "gpt2"}', "checkpoints/step-000010/model.pt": ""},
    "files": {"a file": "", "ünï ☃": ""},
    "settings that are a folder": {"config.json/x": "", "versions.json": "{}"},
}


@pytest.mark.parametrize("what", [*OTHERS, "model"])
@pytest.mark.parametrize("name", ["run", "a, b: c"])
def test_a_folder_that_is_no_runs_is_left_alone(what, name, config, tmp_path, capsys):
    folder = tmp_path / name
    for file, text in OTHERS.get(what, {}).items():
        (folder / file).parent.mkdir(parents=True, exist_ok=True)
        (folder / file).write_text(text)
    if what == "model":
        make_model(folder)
    assert "exists; choose another or remove it" in refused(capsys, folder, config)
    assert not (folder / ".lock").exists()
    link = tmp_path / "link"
    link.symlink_to(folder)
    assert "exists; choose another or remove it" in refused(capsys, link, config)


def test_a_folder_in_which_a_run_was_cut_short_before_its_first_step_is_its_own(tmp_path):
    empty = {"kind": "eval", "step": 0, "split": "test", "accuracy": 0.5, "problems": 2}
    begun = {".lock": "7", "task.py": "", "versions.json": "{}", ".config.json.new": "{"}
    for files, name in (({}, "a"), ({".lock": "7"}, "b"), (begun, "c")):
        (tmp_path / name).mkdir()
        for file, text in files.items():
            (tmp_path / name / file).write_text(text)
        assert is_run(tmp_path / name)
        assert not has_trained(tmp_path / name)
    for file, text in (
        ("config.json", Config().model_dump_json()),
        ("metrics.jsonl", json.dumps(empty) + '\n{"kind": "ev'),
        ("notes.txt", "mine"),
    ):
        (tmp_path / "c" / file).write_text(text)
        assert is_run(tmp_path / "c")
        assert not has_trained(tmp_path / "c")


@pytest.mark.parametrize(
    "output",
    ["", "file/run", "file/a/b", "new/" + "x" * 300, "dangling", "new/dangling/../x\0y", "~nobody-here/x", "z\udcff"],
)
def test_a_folder_that_cannot_be_made_is_reported_before_the_model_is_loaded(output, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "file").write_text("")
    (tmp_path / "dangling").symlink_to("nowhere")
    assert main(["train", "--model=no/such", f"--output={output}"]) == 2
    error = capsys.readouterr().err
    assert "output" in error or "the path" in error or "a path is empty" in error
    assert "no/such" not in error
    assert sorted(p.name for p in tmp_path.iterdir()) == ["dangling", "file"]


@pytest.mark.parametrize(
    "words",
    [
        ["train", "--model="],
        ["train", "--output", ""],
        ["generate", "--run=", "hi"],
        ["view", ""],
        ["export", "--to=peft", ""],
    ],
)
def test_a_path_that_is_empty_is_not_the_folder_one_is_in(words, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    (tmp_path / "config.json").write_text("{}")
    assert main(words) == 2
    error = capsys.readouterr().err
    assert "a path is empty; give one" in error or "model is ; string should have at least 1 character" in error
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]


def test_a_run_that_cannot_begin_leaves_nothing_where_there_was_nothing(tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    for words in ([], ["--output=a/b/c"], ["--output=d"]):
        assert main(["train", "--model=no/such", *words]) == 2
        assert "no/such" in capsys.readouterr().err
    assert list(tmp_path.iterdir()) == []


def test_a_path_is_read_as_people_write_it(tmp_path, monkeypatch):
    monkeypatch.chdir(tmp_path)
    monkeypatch.setenv("HOME", "/home/me")
    read = {"~": "/home/me", "~/runs/x": "/home/me/runs/x", "a~/b": "a~/b", "a/~/b": "a/~/b", "s3:x": "s3:x"}
    assert {given: local_path(given) for given in read} == read
    assert local_path("./~x") == str(tmp_path / "~x")
    assert Config(output=Config(output="./~x").model_dump(mode="json")["output"]).output == tmp_path / "~x"
    assert local_path(None) is None
    for wrong in ("~nobody-here", "a\0b", "b\udcff"):
        with pytest.raises(UserError, match="the path"):
            local_path(wrong)


@pytest.mark.parametrize(
    "name",
    ["s3:x", "file:x", "http:", "./~", "./~root", "a%20b", "a?b*", "a\\b", "new\nline", "é 😀", "#", "123", "a,b"],
)
def test_a_run_of_any_name_is_read(name, finished, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    shutil.copytree(finished, name)
    assert main(["doctor", name]) in (0, 1)
    write_report([Path(local_path(name))], Path("o.html"))
    assert Path("o.html").stat().st_size > 1000
