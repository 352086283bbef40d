"""The output of a run: plain lines in a file, a bar that fits on a terminal."""

import io

import numpy as np
import pytest
from rich.console import Console

from textpolicy.run.console import RunView, spark
from textpolicy.types import Completion, Episode

ROW = {
    "reward_mean": 0.5,
    "accuracy": 0.25,
    "frac_reward_zero_std": 0.125,
    "length_mean": 3.0,
    "entropy": 1.5,
    "grad_norm": 0.75,
    "sample_seconds": 1.0,
    "update_seconds": 2.0,
    "sampled_tokens": 300.0,
    "tokens_per_second": 100.0,
    "peak_memory_bytes": 1.5e9,
}


def show(row, terminal, steps=3):
    out = io.StringIO()
    with RunView(
        steps, Console(file=out, force_terminal=terminal, width=80, highlight=False, color_system=None)
    ) as view:
        for step in range(steps):
            view.step(step, row)
        view.table("done", [("after", "90% [80%, 95%]")])
    return out.getvalue()


def test_a_file_gets_plain_lines_without_escape_codes():
    lines = show(ROW, terminal=False).splitlines()
    assert lines[0] == (
        "step   1  reward 0.50  correct  25%  no-signal groups 12%  length 3.0  entropy 1.50  gradient 0.75  3.0 s"
    )
    assert sum(line.startswith("step") for line in lines) == 3
    assert not any("\x1b" in line for line in lines)


def test_a_long_run_prints_a_bounded_number_of_lines_and_its_last_step():
    lines = [line for line in show(ROW, terminal=False, steps=1000).splitlines() if line.startswith("step")]
    assert 10 <= len(lines) <= 20
    assert lines[-1].startswith("step 1000 ")


def test_a_terminal_gets_a_bar_with_steps_and_accuracy_on_one_line_of_80():
    shown = show(ROW, terminal=True)
    bar = [line for line in shown.replace("\r", "\n").splitlines() if "3/3" in line][-1]
    assert "correct 25%" in bar
    assert "training" in bar


@pytest.mark.parametrize("missing", ["accuracy", "entropy"])
def test_unknown_values_are_not_shown(missing):
    row = {name: value for name, value in ROW.items() if name != missing}
    for terminal in (True, False):
        shown = show(row, terminal)
        assert {"accuracy": "correct", "entropy": "entropy"}[missing] not in shown


def test_markup_in_a_completion_is_shown_verbatim():
    out = io.StringIO()
    RunView(1, Console(file=out, width=80)).print("[bold]17[/bold] [link=x]")
    assert out.getvalue() == "[bold]17[/bold] [link=x]\n"


def show_step(view, text="17", reward=0.5):
    """Show one step and one evaluation of an episode whose text is ``text``."""
    output = Completion(np.array([3], np.int32), np.zeros(1, np.float32))
    episodes = [
        Episode.from_completion([1], output, reward=reward, group=g, prompt="9+8?", text=text) for g in (0, 0, 1)
    ]
    view.evaluated(0, "validation", {"kind": "eval", "accuracy": 0.25}, episodes)
    view.step(0, ROW, episodes)


def live_lines(view, width=80):
    out = io.StringIO()
    Console(file=out, width=width, highlight=False).print(view.shown())
    return out.getvalue().splitlines()


def test_the_live_view_has_curves_speed_memory_and_the_last_completions():
    view = RunView(3, Console(file=io.StringIO(), force_terminal=True))
    show_step(view)
    bar, reward, held_out, speed, *output = live_lines(view)
    assert "1/3" in bar
    assert reward.startswith("reward ")
    assert reward.endswith(" 0.50")
    assert held_out.endswith(" 25.0%")
    assert speed == "tokens/s  100 (rollouts 300, updates 150)  memory 1.50 GB"
    assert output == ["'9+8?' -> '17'  reward 0.5"] * 2  # one of each group


def test_a_long_completion_does_not_break_the_live_view_and_its_markup_is_text():
    view = RunView(3, Console(file=io.StringIO(), force_terminal=True))
    show_step(view, text="[red]so\n" * 90)
    lines = live_lines(view, width=60)
    assert len(lines) == 6
    assert max(map(len, lines)) <= 60
    assert "[red]so" in lines[-1]


def test_quiet_prints_the_closing_table_alone_and_the_log_has_every_line(tmp_path):
    out = io.StringIO()
    with RunView(40, Console(file=out, width=80), quiet=True, log=tmp_path / "log.txt") as view:
        view.print("begun")
        for step in range(40):
            view.step(step, ROW)
        view.table("done", [("after", "90%")])
    assert "90%" in out.getvalue()
    assert not {"begun", "step"} & set(out.getvalue().split())
    logged = (tmp_path / "log.txt").read_text().splitlines()
    assert [line[20:] for line in logged][:1] == ["begun"]
    assert sum(" step " in line for line in logged) == 40
    assert logged[-1].endswith("after: 90%")


def test_a_resumed_run_adds_to_its_log(tmp_path):
    for word in ("first", "second"):
        with RunView(1, Console(file=io.StringIO()), log=tmp_path / "log.txt") as view:
            view.print(word)
    assert [line.split()[-1] for line in (tmp_path / "log.txt").read_text().splitlines()] == ["first", "second"]


@pytest.mark.parametrize(
    ("values", "width", "shown"),
    [([0, 7], 8, "▁█"), ([1, 1, 1], 8, "▁▁▁"), ([0, 1, 2, 3, 4, 5, 6, 7], 8, "▁▂▃▄▅▆▇█"), ([0, 0, 7, 7], 2, "▁█")],
)
def test_a_curve_is_blocks_from_its_lowest_to_its_highest(values, width, shown):
    assert spark(values, width) == shown


class Full(io.StringIO):
    """A screen that fails after so many characters, as a disk that is full or a pipe whose reader is gone."""

    def __init__(self, error, room):
        super().__init__()
        self.error, self.room = error, room

    def write(self, text):
        self.room -= len(text)
        if self.room < 0:
            raise self.error
        return super().write(text)


@pytest.mark.parametrize(
    "error", [OSError(28, "No space left on device"), BrokenPipeError(32, "gone"), OSError(5, "I/O")]
)
@pytest.mark.parametrize("room", [0, 200])
@pytest.mark.parametrize("terminal", [True, False])
def test_a_screen_that_cannot_be_written_to_ends_nothing_and_the_log_has_every_line(error, room, terminal, tmp_path):
    console = Console(file=Full(error, room), force_terminal=terminal, width=80)
    with RunView(40, console, log=tmp_path / "log.txt") as view:
        for step in range(40):
            view.step(step, ROW)
            view.print("so far")
        view.table("done", [("after", "90%")])
    log = (tmp_path / "log.txt").read_text()
    assert log.count("so far") == 40
    assert "after: 90%" in log


@pytest.mark.parametrize(
    ("environment", "given", "live"),
    [
        ({}, {"force_terminal": True}, True),
        ({"TERM": "dumb"}, {"force_terminal": True}, False),
        ({"TERM": "unknown"}, {"force_terminal": True}, False),
        ({"FORCE_COLOR": "1"}, None, False),
        ({"FORCE_COLOR": "1", "TTY_INTERACTIVE": "1", "TTY_COMPATIBLE": "1"}, None, False),
    ],
)
def test_only_a_terminal_that_can_be_redrawn_has_the_live_view_and_others_have_lines(
    environment, given, live, monkeypatch, capsys
):
    for name in ("TERM", "FORCE_COLOR", "TTY_INTERACTIVE", "TTY_COMPATIBLE", "NO_COLOR"):
        monkeypatch.delenv(name, raising=False)
    for name, value in {"TERM": "xterm", **environment}.items():
        monkeypatch.setenv(name, value)
    out = io.StringIO()
    with RunView(20, given and Console(file=out, width=200, **given)) as view:
        for step in range(20):
            view.step(step, ROW)
    shown = out.getvalue() + capsys.readouterr().out
    assert (view.live is not None or "\x1b[?25l" in shown) == live
    assert ("step  20  reward" in shown) != live
    assert live or "\x1b" not in shown


@pytest.mark.parametrize("width", [40, 80, 200])
def test_lines_and_the_table_are_broken_between_words_and_commands_stay_whole(width):
    out = io.StringIO()
    view = RunView(1, Console(file=out, force_terminal=True, width=width, color_system=None, legacy_windows=False))
    view.live = None
    command = "textpolicy view /a/folder/" + "x" * 50
    view.print("doctor: " + "stop tokens are hardly ever sampled, so stopping cannot be learned; " * 4)
    view.step(0, ROW)
    view.table(
        "done", [("before training", "17.0% [12.4%, 22.8%] of 200 held-out problems right"), ("browse it", command)]
    )
    lines = out.getvalue().splitlines()
    assert all(len(line) <= width or "x" * 50 in line for line in lines)
    assert sum(("/a/folder/" + "x" * 50) in line for line in lines) == 1
    words = " ".join(out.getvalue().split())
    assert "so stopping cannot be learned; stop tokens" in words
    assert "of 200 held-out problems right" in words


def test_what_is_not_a_terminal_gets_whole_lines():
    out = io.StringIO()
    view = RunView(1, Console(file=out, width=80))
    view.print("word " * 90)
    view.table("done", [("try it", "textpolicy generate " + "x" * 90)])
    assert out.getvalue().splitlines() == ["word " * 90, "done", "try it  textpolicy generate " + "x" * 90]
