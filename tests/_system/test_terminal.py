"""What is written on terminals of any width, and what happens when nobody reads it."""

import os
import random
import subprocess
import sys

import pytest
from rich.cells import cell_len

from textpolicy._system.terminal import counted, example, latest, one_line, wrap
from textpolicy.cli.main import main

LETTERS = "ab c漢字😀é\n\x1b\u202e'\"\\"


@pytest.mark.parametrize("width", [30, 40, 41, 80, 200])
def test_any_example_is_one_line_that_fits(width):
    draw = random.Random(width)
    for _ in range(500):
        prompt, text = ("".join(draw.choices(LETTERS, k=draw.randrange(90))) for _ in range(2))
        line = example(prompt, text, "  reward 0.25", width, "   ")
        assert cell_len(line) <= width
        assert len(line.splitlines()) == 1
        assert " -> " in line


def test_the_completion_is_kept_before_the_prompt():
    assert example("Which? " * 90, "the answer", "  reward 1", 40) == "…ich? Which? ' -> 'the answer'  reward 1"
    assert example("2+2?", "4" * 90, "", 30) == "'2+2?' -> '444444444444444444…"
    assert example("p" * 900, "t" * 900, "", None) == f"'{'p' * 900}' -> '{'t' * 900}'"


@pytest.mark.parametrize("width", [40, 80, 200])
def test_lines_are_broken_between_words_alone(width):
    words = ["doctor:", "100%", "of", "the", "groups", "/a/path/" + "x" * 60, "漢字 漢字", "stop."] * 9
    text = "   " + " ".join(words)
    lines = wrap(text, width, "  ").split("\n")
    assert " ".join(line.strip() for line in lines) == text.strip()
    assert lines[0].startswith("   doctor:")
    assert all(line.startswith("  ") for line in lines)
    assert all(cell_len(line) <= width or " " not in line.strip() for line in lines)
    assert wrap(text, None) == text


WHOLE = [
    "textpolicy train --resume 'a b' --steps 9",
    "pip install 'textpolicy[mlx]'",
    "textpolicy generate --run runs/x 'Add [a, b] and [c].'",
]


@pytest.mark.parametrize("command", WHOLE)
def test_a_command_at_the_end_of_a_sentence_stays_whole(command):
    lines = wrap(f"the run in runs/x was stopped after 3 of 6 steps; go on with: {command}", 30, "  ").split("\n")
    assert lines[-1] == f"  {command}"
    assert all(len(line) <= 30 for line in lines[:-1])


@pytest.mark.parametrize("width", [68, 80])
@pytest.mark.parametrize("words", [["--help"], ["campaign", "--help"], ["algorithms"], ["tasks"]])
def test_a_list_of_commands_fits_the_terminal(words, width, monkeypatch, capsys):
    """Their usage, with [ARGUMENTS], is read and not copied, so that it is broken as any text."""
    monkeypatch.setattr("textpolicy._system.terminal.columns", lambda stream=None: width)
    assert main(words) == 0
    assert [line for line in capsys.readouterr().out.splitlines() if cell_len(line) > width] == []


@pytest.mark.parametrize("name", ["a\nb", "a\x1b[2Jb", "a\u202eb", "a\rb", "a\u2028b", "a\x85b", "a\tb", "a\x7fb"])
def test_an_error_is_one_line_whatever_a_path_is_called(name, tmp_path, monkeypatch, capsys):
    monkeypatch.chdir(tmp_path)
    os.mkdir(name)
    for words in (["doctor", name], ["export", name, "--to=hf"], ["campaign", "status", name], ["train", name]):
        assert main(words) == 2
        said = capsys.readouterr().err
        assert len(said.splitlines()) == 1
        assert said.removesuffix("\n").isprintable()
    assert one_line("漢字 é 😀 'x'") == "漢字 é 😀 'x'"


def test_one_thing_has_no_s():
    assert [counted(n, "step") for n in (0, 1, 2)] == ["0 steps", "1 step", "2 steps"]
    assert [latest(n, "step") for n in (1, 7)] == ["the last step", "the last 7 steps"]


COMMANDS = [
    ["--help"], ["train", "--help"], ["algorithms"], ["algorithms", "sepa"], ["tasks", "largest", "--show", "900"],
    ["validate"], ["validate", "--json"], ["--version"],
]  # fmt: skip
PROGRAM = [sys.executable, "-m", "textpolicy"]
SETTINGS = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}


@pytest.mark.parametrize("words", COMMANDS)
def test_a_command_whose_reader_is_gone_ends_quietly(words):
    reading, writing = os.pipe()
    os.close(reading)
    with subprocess.Popen([*PROGRAM, *words], stdout=writing, stderr=subprocess.PIPE, env=SETTINGS) as command:
        os.close(writing)
        assert command.stderr.read() == b""
    assert command.returncode == 141


@pytest.mark.skipif(not os.path.exists("/dev/full"), reason="a device of Linux")
@pytest.mark.parametrize("words", COMMANDS[3:6])
def test_a_full_disk_under_the_output_is_one_sentence(words):
    with open("/dev/full", "wb") as full:
        done = subprocess.run([*PROGRAM, *words], stdout=full, stderr=subprocess.PIPE, env=SETTINGS, check=False)
    assert done.stderr == b"textpolicy: the output cannot be written (No space left on device); make room for it\n"
    assert done.returncode == 2
    closed = subprocess.run(["sh", "-c", 'exec "$@" >&-', "sh", *PROGRAM, *words], capture_output=True, env=SETTINGS)
    assert (closed.returncode, closed.stderr) == (0, b"")


PROBE = """
import os, sys
from textpolicy._system.terminal import until_unread

def command():
    with open(sys.argv[1], "w") as file:
        os.write(1, b"of a library")
        os.system("echo of a child; echo of a child >&2")
        print("printed")
        print("an error", file=sys.stderr)
        file.write(f"{file.fileno() > 2} {sys.stdin.read()!r}")
    return 0

sys.exit(until_unread(command))
"""


@pytest.mark.parametrize("closed", [(0,), (1,), (2,), (1, 2), (0, 1, 2)])
def test_no_file_gets_the_descriptor_of_a_closed_stream(closed, tmp_path):
    ends = " ".join(f"{number}<&-" for number in closed)
    words = ["sh", "-c", f'exec "$@" {ends}', "sh", sys.executable, "-c", PROBE, str(tmp_path / "file")]
    done = subprocess.run(words, stdin=subprocess.DEVNULL, capture_output=True, text=True, check=False)
    assert (tmp_path / "file").read_text() == "True ''"
    assert done.returncode == 0
    assert done.stdout.split("\n") == ([""] if 1 in closed else ["of a libraryof a child", "printed", ""])
    assert done.stderr.split("\n") == ([""] if 2 in closed else ["of a child", "an error", ""])


def test_an_error_is_not_printed_among_the_results_where_its_stream_is_closed():
    words = ["sh", "-c", 'exec "$@" 2>&-', "sh", *PROGRAM, "doctor", "nowhere"]
    done = subprocess.run(words, capture_output=True, env=SETTINGS, check=False)
    assert (done.returncode, done.stdout) == (2, b"")
