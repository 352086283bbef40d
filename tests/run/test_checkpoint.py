"""Checkpoints: whole or not at all, whatever goes wrong at whichever moment, and few of them."""

import contextlib
import errno
import json
import os

import pytest

from textpolicy._system.files import write_whole
from textpolicy.run.checkpoint import Checkpoints, Pace, UnsoundError, link_tree, read


def fill(text):
    def write(folder):
        (folder / "weights").write_text(text)
        (folder / "best").mkdir()
        (folder / "best" / "weights").write_text(text[::-1])

    return write


def test_a_written_checkpoint_is_read_back(tmp_path):
    written = Checkpoints(tmp_path / "c").write(3, {"a": [1, 2.5]}, fill("abc"))
    found = Checkpoints(tmp_path / "c").latest()
    assert found.checkpoint == written
    assert found.faults == ()
    assert found.checkpoint.state == {"a": [1, 2.5]}
    assert (found.checkpoint.path / "best" / "weights").read_text() == "cba"


def test_no_checkpoint_is_found_in_an_empty_folder(tmp_path):
    assert Checkpoints(tmp_path / "none").latest().checkpoint is None


def test_the_last_checkpoints_and_the_best_are_kept(tmp_path):
    checkpoints = Checkpoints(tmp_path, keep=2)
    for step in range(6):
        checkpoints.write(step, {}, fill(str(step)), best=min(step, 1))
    assert checkpoints.steps() == [1, 4, 5]
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000001", "step-000004", "step-000005"]


def test_what_macos_puts_beside_files_is_no_part_of_a_checkpoint(tmp_path):
    def with_litter(new):
        fill("abc")(new)
        for name in (".DS_Store", "._weights", "best/._weights"):
            (new / name).write_text("Mac")

    written = Checkpoints(tmp_path).write(3, {}, with_litter)
    (tmp_path / "._step-000003").write_text("Mac")
    (tmp_path / ".DS_Store").write_text("Mac")
    for path in [p for p in written.path.rglob("*") if "Mac" in (p.read_text() if p.is_file() else "")]:
        path.unlink()  # as a copy to another disk leaves them behind
    assert Checkpoints(tmp_path).latest().checkpoint == written
    link_tree(written.path, tmp_path / "copy")
    (written.path / "best" / "._weights").write_text("Mac")
    assert Checkpoints(tmp_path).latest().checkpoint == written
    assert Checkpoints(tmp_path).steps() == [3]


def test_old_checkpoints_go_where_half_of_a_file_goes_with_the_file(tmp_path, monkeypatch):
    """As on exFAT and on servers, where macOS keeps a file's attributes in ._FILE and removes both at once."""
    true = os.unlink

    def unlink(path, *, dir_fd=None):
        true(path, dir_fd=dir_fd)
        name = os.path.basename(path)
        if not name.startswith("._"):
            with contextlib.suppress(FileNotFoundError):
                true(os.path.join(os.path.dirname(path), f"._{name}"), dir_fd=dir_fd)

    def with_halves(new):
        fill("abc")(new)
        for name in ("._weights", "best/._weights", "other", "._other"):
            (new / name).write_text("Mac")

    checkpoints = Checkpoints(tmp_path, keep=1)
    checkpoints.write(1, {}, with_halves)
    monkeypatch.setattr(os, "unlink", unlink)
    for step in (2, 3):
        checkpoints.write(step, {}, with_halves)
    assert sorted(p.name for p in tmp_path.iterdir()) == ["step-000003"]


def test_a_step_can_be_written_again(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    checkpoints.write(3, {"n": 1}, fill("old"))
    checkpoints.write(3, {"n": 2}, fill("new"))
    assert checkpoints.latest().checkpoint.state == {"n": 2}
    assert (tmp_path / "step-000003" / "weights").read_text() == "new"


class PowerError(Exception):
    """It has gone."""


def calls_of(monkeypatch, name, last):
    """Let the ``last`` call of os.``name``, counted from 0, and every later one fail."""
    true, calls = getattr(os, name), []

    def fail(*arguments, **keywords):
        calls.append(1)
        if last is not None and len(calls) > last:
            raise PowerError
        return true(*arguments, **keywords)

    monkeypatch.setattr(os, name, fail)
    return calls


@pytest.mark.parametrize("name", ["replace", "fsync"])
def test_wherever_the_power_goes_there_is_a_sound_checkpoint(tmp_path, name):
    def two(folder, last):
        checkpoints = Checkpoints(folder, keep=1)
        checkpoints.write(1, {"n": 1}, fill("one"))
        with pytest.MonkeyPatch.context() as patch:
            calls = calls_of(patch, name, last)
            checkpoints.write(2, {"n": 2}, fill("two"))
        return len(calls)

    total = two(tmp_path / "whole", None)
    assert total >= 2
    for last in range(total):
        folder = tmp_path / str(last)
        with pytest.raises(PowerError):
            two(folder, last)
        found = Checkpoints(folder).latest()
        assert found.checkpoint.state["n"] in (1, 2)
        assert found.faults == ()
        Checkpoints(folder, keep=1).write(3, {"n": 3}, fill("three"))
        assert [p.name for p in folder.iterdir()] == ["step-000003"]


def test_every_changed_byte_is_noticed(tmp_path):
    path = Checkpoints(tmp_path).write(1, {"n": 1}, fill("abcdef")).path
    for file in (p for p in path.rglob("*") if p.is_file()):
        whole = file.read_bytes()
        for i in range(len(whole)):
            changed = bytearray(whole)
            changed[i] ^= 4
            file.write_bytes(bytes(changed))
            try:
                sound = read(path)
            except UnsoundError:
                continue
            finally:
                file.write_bytes(whole)
            assert sound.state == {"n": 1}  # white space in the manifest, which says the same
            assert file.name == "manifest.json"


@pytest.mark.parametrize("cut", [0, 1, 10, -2])
def test_every_file_that_is_cut_off_is_noticed(tmp_path, cut):
    path = Checkpoints(tmp_path).write(1, {"n": list(range(9))}, fill("abcdef" * 3)).path
    for file in (p for p in path.rglob("*") if p.is_file()):
        whole = file.read_bytes()
        file.write_bytes(whole[:cut])
        with pytest.raises(UnsoundError):
            read(path)
        file.write_bytes(whole)


def test_a_checkpoint_of_another_format_or_under_another_name_is_not_sound(tmp_path):
    path = Checkpoints(tmp_path).write(1, {}, fill("a")).path
    path.rename(tmp_path / "step-000009")
    with pytest.raises(UnsoundError, match="of format 1 and step 1"):
        read(tmp_path / "step-000009")
    manifest = tmp_path / "step-000009" / "manifest.json"
    manifest.write_text(json.dumps({"format": 2, "step": 9, "files": {}}))
    with pytest.raises(UnsoundError, match="of format 2"):
        read(tmp_path / "step-000009")


ODD = {
    "a pipe": None,
    "a list": b"[1]",
    "nested without end": b"[" * 90000,
    "a step without end": b'{"format": 1, "step": 1e999, "files": {}}',
    "a step of text": b'{"format": 1, "step": "2", "files": {}}',
    "a step of a half": b'{"format": 1, "step": 2.5, "files": {}}',
    "files of numbers": b'{"format": 1, "step": 2, "files": [[5, "x"]]}',
    "no files": b'{"format": 1, "step": 2}',
}


@pytest.mark.parametrize("odd", ODD)
def test_a_checkpoint_whose_list_is_no_list_of_files_is_passed_over(tmp_path, odd):
    checkpoints = Checkpoints(tmp_path)
    older, newer = (checkpoints.write(step, {"n": step}, fill("a")) for step in (1, 2))
    (newer.path / "manifest.json").unlink()
    if ODD[odd] is None:
        os.mkfifo(newer.path / "manifest.json")
    else:
        (newer.path / "manifest.json").write_bytes(ODD[odd])
    found = checkpoints.latest()
    assert found.checkpoint == older
    assert [fault.count("\n") for fault in found.faults] == [0]
    assert "manifest.json" in found.faults[0]


def test_a_checkpoint_whose_list_lacks_the_state_is_passed_over(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    older = checkpoints.write(1, {"n": 1}, fill("a"))
    newer = checkpoints.write(2, {"n": 2}, fill("b"))
    manifest = json.loads((newer.path / "manifest.json").read_text())
    del manifest["files"]["state.json"]
    (newer.path / "manifest.json").write_text(json.dumps(manifest))
    with pytest.raises(UnsoundError, match=r"it lacks state\.json"):
        read(newer.path)
    found = checkpoints.latest()
    assert found.checkpoint == older
    assert len(found.faults) == 1


def test_unsound_ones_are_set_aside_and_never_chosen_again(tmp_path):
    checkpoints = Checkpoints(tmp_path)
    for step in (1, 2):
        checkpoints.write(step, {}, fill("a"))
    (tmp_path / "step-000002" / "weights").write_text("b")
    found = checkpoints.latest()
    assert found.checkpoint.step == 1
    assert "step-000002 is not sound: weights is not as it was written" in found.faults[0]
    checkpoints.set_aside(1)
    assert checkpoints.steps() == [1]
    assert (tmp_path / "unsound-step-000002" / "weights").read_text() == "b"


@pytest.mark.parametrize("links", [True, False])
def test_files_are_shared_or_copied(tmp_path, monkeypatch, links):
    def refuse(*arguments):
        raise OSError(errno.EPERM, "no links here")

    (tmp_path / "a" / "b").mkdir(parents=True)
    (tmp_path / "a" / "b" / "file").write_text("text")
    if not links:
        monkeypatch.setattr(os, "link", refuse)
    link_tree(tmp_path / "a", tmp_path / "c")
    assert (tmp_path / "c" / "b" / "file").read_text() == "text"
    assert (tmp_path / "c" / "b" / "file").stat().st_nlink == (2 if links else 1)


def test_a_pace_in_steps():
    pace = Pace(3)
    assert [step for step in range(1, 10) if pace.due(step)] == [3, 6, 9]


@pytest.mark.parametrize(("cost", "step_time"), [(0.1, 3.0), (1.0, 3.0), (8.0, 3.0), (0.001, 5.0)])
def test_a_pace_by_cost_spends_at_most_a_twentieth_and_nearly_that_where_steps_are_short(cost, step_time):
    now, spent = 0.0, 0.0
    pace = Pace(0, lambda: now)
    for step in range(1, 2001):
        now += step_time
        if pace.due(step):
            with pace.timed():
                now += cost
                spent += cost
    assert spent - 2 * cost <= 0.05 * now  # of the first the cost is not known yet, and the last is not paid for yet
    if cost / (cost + step_time) > 0.05:
        assert spent / now > 0.03
    else:
        assert spent == pytest.approx(2000 * cost)


def test_a_file_is_replaced_whole_or_not_at_all(tmp_path, monkeypatch):
    path = tmp_path / "config.json"
    write_whole(path, "old")
    for name in ("fsync", "replace"):
        with monkeypatch.context() as patch:
            calls_of(patch, name, 0)
            with pytest.raises(PowerError):
                write_whole(path, "new")
        assert path.read_text() == "old"
    write_whole(path, "new")
    assert path.read_text() == "new"
    assert [p.name for p in tmp_path.iterdir()] == ["config.json"]
