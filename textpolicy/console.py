"""What a run says on the terminal: a live bar where there is one, plain lines where there is not."""

from __future__ import annotations

from collections.abc import Sequence
from types import TracebackType
from typing import Self

from rich.console import Console
from rich.progress import (
    BarColumn,
    MofNCompleteColumn,
    Progress,
    TextColumn,
    TimeElapsedColumn,
    TimeRemainingColumn,
)
from rich.table import Table
from rich.text import Text

from .metrics import Row
from .types import Episode

_LINES = 16  # step lines of a run on a plain terminal


class RunView:
    """Shows a run as it goes. Used as a context manager; prints to ``console``."""

    def __init__(self, steps: int, console: Console | None = None):
        self.steps = steps
        self.console = console or Console(highlight=False)
        self.progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[last]}"),
            console=self.console,
            disable=not self.console.is_terminal,
            transient=True,
        )
        self.bar = self.progress.add_task("training", total=steps, last="", start=False)

    def __enter__(self) -> Self:
        self.progress.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.progress.stop()

    def say(self, text: str) -> None:
        """One line."""
        self.console.print(Text(text), soft_wrap=True)

    def step(self, step: int, row: Row) -> None:
        """Progress after ``step`` (counted from 0)."""
        if self.progress.tasks[0].start_time is None:  # the first step, or the first after a checkpoint
            self.progress.start_task(self.bar)
        self.progress.update(self.bar, completed=step + 1, last=short_line(row))
        if not self.console.is_terminal and (step % max(1, self.steps // _LINES) == 0 or step == self.steps - 1):
            self.say(step_line(step, row))

    def examples(self, episodes: Sequence[Episode], count: int = 3) -> None:
        """A few completions with their rewards, as they were sampled."""
        for e in episodes[:count]:
            self.say(f"      {e.prompt!r} -> {e.text!r}  reward {e.reward:g}")

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """The closing table; nothing moves after it."""
        self.progress.stop()
        table = Table(title=title, show_header=False, title_justify="left", title_style="bold")
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, Text(value))
        self.console.print(table)


def short_line(row: Row) -> str:
    """What stands beside the bar, which needs most of an 80-column line for itself."""
    return f"correct {row['accuracy']:.0%}" if "accuracy" in row else _reward(row)


def _reward(row: Row) -> str:
    return f"reward {row['reward_mean']:.2f}" if "reward_mean" in row else "nothing could be scored"


def step_line(step: int, row: Row) -> str:
    """One training step in one line."""
    accuracy = f"  correct {row['accuracy']:4.0%}" if "accuracy" in row else ""
    entropy = f"entropy {row['entropy']:.2f}  " if "entropy" in row else ""  # an engine may not see it
    seconds = row["sample_seconds"] + row["update_seconds"]
    return (
        f"step {step + 1:3d}  {_reward(row)}{accuracy}  "
        f"agreeing groups {row['frac_reward_zero_std']:3.0%}  length {row['length_mean']:.1f}  "
        f"{entropy}gradient {row['grad_norm']:.2f}  {seconds:.1f} s"
    )
