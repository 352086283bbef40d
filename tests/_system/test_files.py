"""What files are written through, and what JSON is read as."""

import json
import os
import threading
from pathlib import Path

import pytest

from textpolicy._system.files import parse_json, read_object, write_whole
from textpolicy.errors import UserError


def test_a_pipe_is_written_to_and_not_replaced(tmp_path):
    os.mkfifo(pipe := tmp_path / "pipe")
    read = []
    reader = threading.Thread(target=lambda: read.append(pipe.read_text()), daemon=True)
    reader.start()
    write_whole(pipe, "a report")
    reader.join(10)
    assert read == ["a report"]
    assert pipe.is_fifo()
    assert [p.name for p in tmp_path.iterdir()] == ["pipe"]


def test_a_folder_is_neither(tmp_path):
    with pytest.raises(OSError, match="directory"):
        write_whole(tmp_path, "x")


DAMAGED = {
    "cut off": b'{"steps": 4, "s',
    "empty": b"",
    "a list": b"[1, 2]",
    "a number": b"7",
    "a word": b"null",
    "not UTF-8": b'{"name": "\xff\xfe"}',
    "zero bytes": b"\0" * 40,
    "NaN": b'{"steps": NaN}',
    "infinite": b'{"steps": [1, {"a": -Infinity}]}',
    "too large": b'{"steps": 1e999}',
    "of thousands of digits": b'{"steps": ' + b"9" * 9000 + b"}",
    "nested deeply": b'{"a": ' * 100 + b"1" + b"}" * 100,
    "nested without end": b'{"a": [' * 90000,
}


def damages(path):
    """Put each of the damages at ``path``, one after the other, and yield its name."""
    for name, content in DAMAGED.items():
        path.write_bytes(content)
        yield name
    path.unlink()
    path.mkdir()
    yield "a folder"
    path.rmdir()
    os.mkfifo(path)
    yield "a pipe"
    path.unlink()


def test_an_object_that_is_damaged_is_one_sentence_with_its_path_and_what_to_do(tmp_path):
    path, seen = tmp_path / "a.json", 0
    for name in damages(path):
        with pytest.raises(UserError) as caught:
            read_object(path, "restore it")
        said, seen = str(caught.value), seen + 1
        assert said.startswith(f"{path} "), name
        assert said.endswith("; restore it"), name
        assert len(said.splitlines()) == 1, name
        assert len(said) < len(str(path)) + 200, name
    assert seen == len(DAMAGED) + 2


def test_a_file_that_may_not_be_read_is_one_sentence(tmp_path, monkeypatch):
    def refuse(path, encoding):
        raise PermissionError(13, "Permission denied", str(path))

    (tmp_path / "a.json").write_text("{}")
    monkeypatch.setattr(Path, "read_text", refuse)  # root may read everything
    with pytest.raises(UserError, match=r"a\.json cannot be read \(Permission denied\); restore it$"):
        read_object(tmp_path / "a.json", "restore it")


def test_a_sound_object_is_read_and_no_file_is_none(tmp_path):
    values = {"a": [{"b": [1.5, -2, "NaN", None, True]}], "é": "\u2028"}
    (tmp_path / "a.json").write_text(json.dumps(values, ensure_ascii=False), encoding="utf-8")
    assert read_object(tmp_path / "a.json", "") == values
    assert read_object(tmp_path / "b.json", "") is None
    (tmp_path / "c.json").symlink_to(tmp_path / "b.json")
    assert read_object(tmp_path / "c.json", "") is None


def test_a_line_may_have_numbers_that_are_not_finite_and_a_limited_depth():
    assert repr(parse_json(b"[NaN, 1e999, -Infinity, 0.1]")) == "[nan, inf, -inf, 0.1]"
    assert parse_json("[" * 64 + "]" * 64) is not None
    for depth in (65, 900, 100_000):
        with pytest.raises(ValueError, match="nested too deeply"):
            parse_json("[" * depth + "]" * depth)


def test_a_file_that_several_write_at_once_is_a_whole_one_and_none_of_them_fails(tmp_path):
    path, failed = tmp_path / "report.html", list[BaseException]()
    texts = [letter * 300_000 for letter in "abcdef"]

    def write(text):
        try:
            for _ in range(20):
                write_whole(path, text)
                assert path.read_text() in texts
        except BaseException as error:  # noqa: BLE001 - of a thread, whose errors nobody sees
            failed.append(error)

    threads = [threading.Thread(target=write, args=(text,)) for text in texts]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert failed == []
    assert [p.name for p in tmp_path.iterdir()] == ["report.html"]


def test_what_a_killed_process_left_beside_a_file_is_written_over(tmp_path):
    (tmp_path / ".a.json.new").write_text("x" * 100)
    write_whole(tmp_path / "a.json", "short")
    assert (tmp_path / "a.json").read_text() == "short"
    assert [p.name for p in tmp_path.iterdir()] == ["a.json"]
