"""What a run says on the terminal: a live view where there is one, plain lines where there is not."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self

from rich.console import Console, Group, RenderableType
from rich.live import Live
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

from ..loop.metrics import Row
from ..types import Episode

_LINES = 16  # step lines of a run on a plain terminal
_CURVE = 24  # characters of a curve in the live view
_BLOCKS = "▁▂▃▄▅▆▇█"
_LAST = 3  # completions in the live view


class RunView:
    """Shows a run as it goes; a sink, used as a context manager. Prints to ``console``, and to the file ``log``."""

    def __init__(self, steps: int, console: Console | None = None, *, quiet: bool = False, log: Path | None = None):
        """``quiet`` prints the closing table alone; ``log`` gets every line whatever is printed."""
        self.steps, self.quiet = steps, quiet
        self.console = console or Console(highlight=False)
        self.rows: list[Row] = []
        self.held_out: list[float] = []
        self.last: Sequence[Episode] = ()
        self.progress = Progress(
            TextColumn("[bold]training"),
            BarColumn(bar_width=20),
            MofNCompleteColumn(),
            TimeElapsedColumn(),
            TextColumn("left"),
            TimeRemainingColumn(),
            TextColumn("{task.fields[last]}"),
        )
        self.bar = self.progress.add_task("training", total=steps, last="", start=False)
        self.live: Live | None = None
        if self.console.is_terminal and not quiet:
            self.live = Live(get_renderable=self.shown, console=self.console, refresh_per_second=4, transient=True)
        self.log = None if log is None else log.open("a", encoding="utf-8", buffering=1)  # each line at once

    def __enter__(self) -> Self:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Nothing moves after it, and the log is closed; more than once is harmless."""
        self._stop()
        if self.log is not None:
            self.log.close()
            self.log = None

    def say(self, text: str) -> None:
        """One line."""
        self._note(text)
        if not self.quiet:
            self.console.print(Text(text), soft_wrap=True)

    def step(self, step: int, row: Row, episodes: Sequence[Episode] = ()) -> None:
        """Progress after ``step`` (counted from 0)."""
        if self.progress.tasks[0].start_time is None:  # the first step, or the first after a checkpoint
            self.progress.start_task(self.bar)
        self.rows.append(row)
        self.last = _one_of_each_group(episodes)[:_LAST] or self.last
        self.progress.update(self.bar, completed=step + 1, last=short_line(row))
        line = step_line(step, row)
        self._note(line)
        if not (self.console.is_terminal or self.quiet) and self._is_worth_a_line(step):
            self.console.print(Text(line), soft_wrap=True)

    def evaluated(self, step: int, split: str, row: Mapping[str, Any], episodes: Sequence[Episode]) -> None:
        """A point of the held-out curve."""
        if row["kind"] == "eval" and split == "validation":
            self.held_out.append(row["accuracy"])

    def examples(self, episodes: Sequence[Episode], count: int = 3) -> None:
        """A few completions with their rewards, as they were sampled."""
        for e in episodes[:count]:
            self.say(f"      {_example(e)}")

    def table(self, title: str, rows: Sequence[tuple[str, str]]) -> None:
        """The closing table; nothing moves after it."""
        self._stop()
        table = Table(title=title, show_header=False, title_justify="left", title_style="bold")
        table.add_column(no_wrap=True)
        table.add_column(overflow="fold")
        for name, value in rows:
            table.add_row(name, Text(value))
            self._note(f"{name}: {value}")
        self.console.print(table)

    def shown(self) -> RenderableType:
        """The live view as it stands."""
        if not self.rows:
            return self.progress
        lines = [*_curve_lines(self.rows, self.held_out), _speed_line(self.rows[-1]), *map(_example, self.last)]
        return Group(self.progress, *(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))

    def _is_worth_a_line(self, step: int) -> bool:
        return step % max(1, self.steps // _LINES) == 0 or step == self.steps - 1

    def _stop(self) -> None:
        if self.live is not None:
            self.live.stop()
            self.live = None

    def _note(self, line: str) -> None:
        if self.log is not None:
            self.log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


def short_line(row: Row) -> str:
    """What stands beside the bar, which needs most of an 80-column line for itself."""
    return f"correct {row['accuracy']:.0%}" if "accuracy" in row else _reward(row)


def _reward(row: Row) -> str:
    return f"reward {row['reward_mean']:.2f}" if "reward_mean" in row else "nothing could be scored"


def step_line(step: int, row: Row) -> str:
    """One training step in one line."""
    accuracy = f"  correct {row['accuracy']:4.0%}" if "accuracy" in row else ""
    # an engine may not see the entropy, and a server may not say the gradient's norm
    uncertain = "".join(f"{name} {row[name]:.2f}  " for name in ("entropy", "surprisal") if name in row)
    gradient = f"gradient {row['grad_norm']:.2f}  " if "grad_norm" in row else ""
    seconds = row["sample_seconds"] + row["update_seconds"]
    return (
        f"step {step + 1:3d}  {_reward(row)}{accuracy}  "
        f"agreeing groups {row['frac_reward_zero_std']:3.0%}  length {row['length_mean']:.1f}  "
        f"{uncertain}{gradient}{seconds:.1f} s"
    )


def spark(values: Sequence[float], width: int = _CURVE) -> str:
    """``values`` as a line of blocks, the lowest to the highest; of more than ``width`` the means of equal parts."""
    if len(values) > width:
        ends = [i * len(values) // width for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(ends)]
    low, span = min(values), (max(values) - min(values)) or 1.0
    return "".join(_BLOCKS[round((v - low) / span * (len(_BLOCKS) - 1))] for v in values)


def _curve_lines(rows: Sequence[Row], held_out: Sequence[float]) -> list[str]:
    rewards = [row["reward_mean"] for row in rows if "reward_mean" in row]
    lines = [f"reward    {spark(rewards):<{_CURVE}} {rewards[-1]:.2f}"] if rewards else []
    return lines + ([f"held-out  {spark(held_out):<{_CURVE}} {held_out[-1]:.1%}"] if held_out else [])


def _speed_line(row: Row) -> str:
    """Tokens per second, of the whole step and of its halves, and memory where the engine knows it."""
    tokens, halves = row["sampled_tokens"], []
    for name, figure in (("rollouts", "sample_seconds"), ("updates", "update_seconds")):
        if row[figure] > 0:
            halves.append(f"{name} {tokens / row[figure]:.0f}")
    memory = f"  memory {row['peak_memory_bytes'] / 1e9:.2f} GB" if "peak_memory_bytes" in row else ""
    return f"tokens/s  {row['tokens_per_second']:.0f} ({', '.join(halves)}){memory}"


def _example(episode: Episode) -> str:
    return f"{episode.prompt!r} -> {episode.text!r}  reward {episode.reward:g}"


def _one_of_each_group(episodes: Sequence[Episode]) -> list[Episode]:
    return list({e.group: e for e in reversed(episodes)}.values())[::-1]
