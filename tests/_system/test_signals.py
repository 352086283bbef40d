"""The first signal stops a run, the second the process, in processes of their own."""

import signal
import subprocess
import sys

import pytest

TWICE = """
import os, signal
from textpolicy._system import signals

signal.signal(signal.SIGINT, signal.default_int_handler)  # ignored where the tests run in the background

def write(file, text, write=os.write):
    {during}
    return write(file, text)

with signals.StopSignal() as stop:
    signals.os.write = write
    os.kill(os.getpid(), signal.{first})
    while stop.number is None:
        pass
    {after}
    write(1, b"still here")
"""
SECOND = "os.kill(os.getpid(), signal.SIGTERM)"


def run(first, during="pass", after="pass"):
    script = TWICE.format(first=first, during=during, after=after)
    return subprocess.run([sys.executable, "-c", script], capture_output=True, timeout=250, check=False)


@pytest.mark.parametrize("first", ["SIGINT", "SIGTERM"])
def test_a_second_signal_ends_the_process_whenever_it_comes_and_a_first_alone_does_not(first):
    for when, code in (("during", -signal.SIGTERM), ("after", -signal.SIGTERM), (None, 0)):
        done = run(first, **({when: SECOND} if when else {}))
        assert done.returncode == code, done.stderr
        assert done.stdout == (b"" if when else b"still here")
        assert (b"press Ctrl-C again to stop now" in done.stderr) == (when != "during")


def test_a_first_signal_stops_nothing_at_once_where_its_note_cannot_be_written():
    done = run("SIGTERM", during="os.dup2(os.open(os.devnull, os.O_RDONLY), 2)")
    assert done.stdout == b"still here"
