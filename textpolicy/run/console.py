"""The output of a run on the console: a live view on a terminal, plain lines elsewhere."""

from __future__ import annotations

import time
from collections.abc import Mapping, Sequence
from itertools import pairwise
from pathlib import Path
from types import TracebackType
from typing import Any, Self, TextIO, cast

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
from rich.text import Text

from .._system.terminal import Lasting, columns, example, wrap
from ..loop.metrics import Row
from ..types import Episode

_LINES = 16  # step lines of a run on a plain terminal
_CURVE = 24  # characters of a curve in the live view
_BLOCKS = "▁▂▃▄▅▆▇█"
_LAST = 3  # completions in the live view
_WIDE = 60  # columns from which names and values stand side by side


class RunView:
    """Show a run as it goes; a sink and a context manager. Prints to ``console``, and to the file ``log``."""

    def __init__(self, steps: int, console: Console | None = None, *, quiet: bool = False, log: Path | None = None):
        """Open the view; ``quiet`` prints the closing table alone, while ``log`` gets every line."""
        self.steps, self.quiet = steps, quiet
        # whatever the environment says of colours, what is no terminal cannot be redrawn
        self.console = console or Console(highlight=False, force_terminal=None if columns() else False)
        self.console.file = cast(TextIO, Lasting(self.console.file))  # a run does not end with its reader
        self.rows: list[Row] = []
        self.held_out: list[float] = []
        self.last: Sequence[Episode] = ()
        bar, last = (MofNCompleteColumn(), TimeElapsedColumn()), TextColumn("{task.fields[last]}")
        if self.console.width < _WIDE:
            self.progress = Progress(BarColumn(bar_width=5), *bar, last)
        else:
            left = (TextColumn("left"), TimeRemainingColumn())
            self.progress = Progress(TextColumn("[bold]training"), BarColumn(bar_width=20), *bar, *left, last)
        self.bar = self.progress.add_task("training", total=steps, last="", start=False)
        self.live: Live | None = None
        if self.console.is_terminal and self.console.is_interactive and not (self.console.is_dumb_terminal or quiet):
            self.live = Live(get_renderable=self.shown, console=self.console, refresh_per_second=4, transient=True)
        self.log = None if log is None else log.open("a", encoding="utf-8", buffering=1)  # each line at once

    def __enter__(self) -> Self:
        if self.live is not None:
            self.live.start()
        return self

    def __exit__(self, kind: type | None, error: BaseException | None, trace: TracebackType | None) -> None:
        self.close()

    def close(self) -> None:
        """Stop the live view and close the log; more than once is harmless."""
        self.stop()
        if self.log is not None:
            self.log.close()
            self.log = None

    def print(self, text: str) -> None:
        """Print one line, on a terminal broken between its words."""
        self._write_log(text)
        if not self.quiet:
            self._show(Text(wrap(text, self.width, "  ")))

    def example(self, episode: Episode) -> None:
        """Print a completion with its prompt and reward, as it was sampled, in one line."""
        self._write_log(f"      {example_line(episode)}")
        if not self.quiet:
            self._show(Text(example_line(episode, self.width, "      ")))

    @property
    def width(self) -> int | None:
        """The columns of the terminal; None where there is none."""
        return self.console.width if self.console.is_terminal else None

    def step(self, step: int, row: Row, episodes: Sequence[Episode] = ()) -> None:
        """Show the progress after ``step``, counted from 0."""
        if self.progress.tasks[0].start_time is None:  # the first step, or the first after a checkpoint
            self.progress.start_task(self.bar)
        self.rows.append(row)
        one_of_each_group = list({e.group: e for e in reversed(episodes)}.values())[::-1]
        self.last = one_of_each_group[:_LAST] or self.last
        learned = "learned_tokens" in row  # from demonstrations, without rollouts
        reward = f"reward {row['reward_mean']:.2f}" if "reward_mean" in row else "nothing could be scored"
        reward = f"loss {row['loss']:.4f}" if learned else reward
        short = f"correct {row['accuracy']:.0%}" if "accuracy" in row else reward  # beside the bar, in 80 columns
        self.progress.update(self.bar, completed=step + 1, last=short)
        accuracy = f"  correct {row['accuracy']:4.0%}" if "accuracy" in row else ""
        # an engine may not see the entropy, and a server may not report the norm of the gradient
        uncertain = "".join(f"{name} {row[name]:.2f}  " for name in ("entropy", "surprisal") if name in row)
        gradient = f"gradient {row['grad_norm']:.2f}  " if "grad_norm" in row else ""
        sampled = f"{row['learned_tokens']:.0f} tokens  " if learned else ""
        if not learned:
            sampled = f"no-signal groups {row['frac_reward_zero_std']:3.0%}  length {row['length_mean']:.1f}  "
        line = (
            f"step {step + 1:3d}  {reward}{accuracy}  "
            f"{sampled}{uncertain}{gradient}{row['sample_seconds'] + row['update_seconds']:.1f} s"
        )
        self._write_log(line)
        worth_a_line = step % max(1, self.steps // _LINES) == 0 or step == self.steps - 1
        if worth_a_line and self.live is None and not self.quiet:
            self._show(Text(wrap(line, self.width, "  ")))

    def evaluated(self, step: int, split: str, row: Mapping[str, Any], episodes: Sequence[Episode]) -> None:
        """Add a point to the held-out curve."""
        if row["kind"] == "eval" and split == "validation":
            self.held_out.append(row["accuracy"])

    def table(self, title: str, rows: Sequence[tuple[str, str]], commands: Sequence[tuple[str, str]] = ()) -> None:
        """Stop the live view and print the closing table, then ``commands``, each a line to copy as it stands.

        On a narrow terminal a value is below its name.
        """
        self.stop()
        self._show(Text(title, style="bold"))
        names = 2 + max(len(name) for name, _ in rows)
        for name, value in rows:
            self._write_log(f"{name}: {value}")
            if self.width is None or self.width >= _WIDE:
                self._show(Text(wrap(f"{name:<{names}}{value}", self.width, " " * names)))
            else:
                self._show(Text(f"{name}\n{wrap(f'  {value}', self.width, '  ')}"))
        for name, value in commands:
            self._write_log(f"{name}: {value}")
            self._show(Text(f"{name}: {value}"))

    def shown(self) -> RenderableType:
        """Return the live view as it stands: the bar, curves, tokens per second, memory and the last completions."""
        if not self.rows:
            return self.progress
        lines = []
        if rewards := [row["reward_mean"] for row in self.rows if "reward_mean" in row]:
            lines.append(f"reward    {spark(rewards):<{_CURVE}} {rewards[-1]:.2f}")
        if self.held_out:
            lines.append(f"held-out  {spark(self.held_out):<{_CURVE}} {self.held_out[-1]:.1%}")
        row = self.rows[-1]
        halves = (("rollouts", row["sample_seconds"]), ("updates", row["update_seconds"]))
        speeds = ", ".join(f"{name} {row['sampled_tokens'] / seconds:.0f}" for name, seconds in halves if seconds > 0)
        memory = f"  memory {row['peak_memory_bytes'] / 1e9:.2f} GB" if "peak_memory_bytes" in row else ""
        if "tokens_per_second" in row:
            ranks = f"  ranks at work {row['scaling']:.0%} of the time" if "scaling" in row else ""
            lines += [f"tokens/s  {row['tokens_per_second']:.0f} ({speeds}){memory}{ranks}"]
        lines += [example_line(episode, self.console.width) for episode in self.last]
        return Group(self.progress, *(Text(line, no_wrap=True, overflow="ellipsis") for line in lines))

    def stop(self) -> None:
        """Take the live view away, for what must stay on the screen; lines follow instead."""
        live, self.live = self.live, None
        if live is not None:
            live.stop()

    def _show(self, text: Text) -> None:
        self.console.print(text, soft_wrap=True)

    def _write_log(self, line: str) -> None:
        if self.log is not None:
            self.log.write(f"{time.strftime('%Y-%m-%d %H:%M:%S')} {line}\n")


def spark(values: Sequence[float], width: int = _CURVE) -> str:
    """Return ``values`` as blocks, from the lowest to the highest; more than ``width`` become means of equal parts."""
    if len(values) > width:
        ends = [i * len(values) // width for i in range(width + 1)]
        values = [sum(values[a:b]) / (b - a) for a, b in pairwise(ends)]
    low, span = min(values), (max(values) - min(values)) or 1.0
    return "".join(_BLOCKS[round((v - low) / span * (len(_BLOCKS) - 1))] for v in values)


def example_line(episode: Episode, width: int | None = None, start: str = "") -> str:
    """Return a completion with its prompt and reward, as it was sampled, in ``width`` columns if given."""
    return example(episode.prompt, episode.text, f"  reward {episode.reward:g}", width, start)
