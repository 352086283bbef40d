"""What files are written through."""

import os
import threading

import pytest

from textpolicy._system.files import write_whole


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
