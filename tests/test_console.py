"""What a run says: plain lines in a file, a bar that fits on a terminal."""

import io

import pytest
from rich.console import Console

from textpolicy.console import RunView

ROW = {
    "reward_mean": 0.5,
    "accuracy": 0.25,
    "frac_reward_zero_std": 0.125,
    "length_mean": 3.0,
    "entropy": 1.5,
    "grad_norm": 0.75,
    "sample_seconds": 1.0,
    "update_seconds": 2.0,
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
        "step   1  reward 0.50  correct  25%  agreeing groups 12%  length 3.0  entropy 1.50  gradient 0.75  3.0 s"
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
def test_what_is_not_known_is_not_shown(missing):
    row = {name: value for name, value in ROW.items() if name != missing}
    for terminal in (True, False):
        shown = show(row, terminal)
        assert {"accuracy": "correct", "entropy": "entropy"}[missing] not in shown


def test_markup_in_a_completion_is_shown_not_obeyed():
    out = io.StringIO()
    RunView(1, Console(file=out, width=80)).say("[bold]17[/bold] [link=x]")
    assert out.getvalue() == "[bold]17[/bold] [link=x]\n"
