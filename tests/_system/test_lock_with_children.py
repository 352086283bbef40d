"""The lock of a folder for a program and the processes that it starts."""

import subprocess
import sys
import time

import pytest

from textpolicy._system.lock import lock_with_children
from textpolicy.errors import UserError


def test_a_second_lock_is_refused_also_in_the_same_process(tmp_path):
    with lock_with_children(tmp_path / "lock", 0, "taken"), pytest.raises(UserError, match="taken"):
        lock_with_children(tmp_path / "lock", 0, "taken")
    lock_with_children(tmp_path / "lock", 0, "taken").close()


def test_it_is_held_until_the_last_child_has_ended_and_waited_for(tmp_path):
    with lock_with_children(tmp_path / "lock", 0, "taken") as lock:
        child = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE, pass_fds=(lock.fileno(),))
        other = subprocess.Popen([sys.executable, "-c", "input()"], stdin=subprocess.PIPE)
    with pytest.raises(UserError, match="taken"):
        lock_with_children(tmp_path / "lock", 0.2, "taken")
    child.stdin.close()
    began = time.monotonic()
    lock_with_children(tmp_path / "lock", 30, "taken").close()  # though the other one still runs
    assert time.monotonic() - began < 30
    assert other.poll() is None
    other.stdin.close()
    for process in (child, other):
        process.wait()
