"""The folder of a run on a service: JSON lines that can be cut back to a checkpoint, and what a run needs to go on."""

from __future__ import annotations

import json
import math
import os
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass, field, replace
from pathlib import Path
from typing import Any, Self

from .._system.files import write_whole
from .._system.lock import RunLock
from ..errors import UserError
from .money import Tokens

Line = Mapping[str, Any]
LEDGER = "ledger.jsonl"  # tokens spent so far, as they are spent


@dataclass(frozen=True, slots=True)
class Progress:
    """How far a run has come: what it goes on from, with the weights and the optimiser that the server keeps."""

    step: int = 0  # steps done
    correct: int = 0  # completions, over all steps
    judged: int = 0  # completions that were told to be right or wrong
    spent: Tokens = field(default_factory=Tokens)
    state_path: str | None = None  # on the server; None begins anew
    sepa: Mapping[str, Any] | None = None  # the controller's state

    @classmethod
    def of(cls, line: Line) -> Self:
        """From a line of ``checkpoints.jsonl``."""
        known = {name: line[name] for name in ("step", "correct", "judged", "state_path", "sepa")}
        return cls(**known, spent=Tokens(**line["spent"]))

    def line(self, name: str) -> dict[str, Any]:
        """For ``checkpoints.jsonl``, under the checkpoint's ``name``."""
        return {"name": name, **asdict(self)}


@dataclass(frozen=True, slots=True)
class RunFolder:
    """Where a run writes. Lines are appended, and on the disk at once."""

    path: Path

    def look(self, settings: Line, resume: bool, free: Sequence[str]) -> Progress:
        """Where a run with these ``settings`` begins, or goes on; ``free`` names those that may change. Writes nothing.

        Raises UserError for a folder that holds a run which is not to go on, or was begun with other settings.
        """
        written = self.path / "config.json"
        if not written.exists():
            if resume:
                raise UserError(f"there is no run in {self.path} to resume; leave --resume out, or mend --log-dir")
            return Progress()
        if not resume:
            raise UserError(f"{self.path} holds a run; add --resume to go on with it, or choose another --log-dir")
        _refuse_changes(json.loads(written.read_text(encoding="utf-8")), settings, free)
        lines = self.lines("checkpoints.jsonl")
        progress = Progress.of(lines[-1]) if lines else Progress()
        return replace(progress, spent=max(progress.spent, self.paid(), key=lambda tokens: tokens.total))

    def paid(self) -> Tokens:
        """All tokens so far by the ledger, those of steps that are cut off, too."""
        entries = [Tokens(**line["spent"]) for line in self.lines(LEDGER)]
        return max(entries, key=lambda tokens: tokens.total, default=Tokens())

    def enter(self, step: int, spent: Tokens) -> None:
        """Write down what is spent, so that a run that dies here knows it when it goes on."""
        self.append(LEDGER, {"step": step, "spent": spent.as_dict()})

    def claim(self) -> RunLock:
        """The folder, made where it is not there, for this process alone as long as the lock is a context."""
        self.path.mkdir(parents=True, exist_ok=True)
        return RunLock(self.path)

    def begin(self, settings: Line, progress: Progress) -> None:
        """Write the settings, and cut the rest back to ``progress``: later lines move to ``.cut.jsonl`` files."""
        write_whole(self.path / "config.json", json.dumps(settings, indent=2) + "\n")
        for name in ("metrics.jsonl", "emergence/steps.jsonl", "emergence/generations.jsonl"):
            self._cut(name, progress.step)
        self._cut("evals.jsonl", progress.step + 1)  # a look is after so many steps
        for name in ("checkpoints.jsonl", LEDGER):
            self.mend(name)

    def lines(self, name: str) -> list[Any]:
        """The lines of a file, none if it is not there; the last is left out if it was cut off in writing."""
        path = self.path / name
        if not path.exists():
            return []
        whole = path.read_text(encoding="utf-8").rpartition("\n")[0]
        return [json.loads(line) for line in whole.splitlines()]

    def append(self, name: str, line: Line) -> None:
        with (self.path / name).open("a", encoding="utf-8") as file:
            file.write(json.dumps(line) + "\n")
            file.flush()
            os.fsync(file.fileno())

    def mend(self, name: str) -> None:
        """Drop half a line at the end, so that what is appended is a line of its own."""
        self._cut(name, math.inf)

    def _cut(self, name: str, step: float) -> None:
        """Move the lines of ``step`` and later to a file of their own, and drop half a line at the end."""
        path, lines = self.path / name, self.lines(name)
        if not path.exists():
            return
        kept = [line for line in lines if line["step"] < step]
        late = [line for line in lines if line["step"] >= step]
        if late:
            with path.with_suffix(".cut.jsonl").open("a", encoding="utf-8") as file:
                file.writelines(json.dumps(line) + "\n" for line in late)
        new = path.with_suffix(".new")
        new.write_text("".join(json.dumps(line) + "\n" for line in kept), encoding="utf-8")
        os.replace(new, path)


def _refuse_changes(before: Line, now: Line, free: Sequence[str]) -> None:
    fixed = [name for name in now if name not in free]
    changed = [f"{n} was {before.get(n)!r} and is {now[n]!r}" for n in fixed if before.get(n) != now[n]]
    if changed:
        raise UserError(f"the run was begun otherwise: {'; '.join(changed)}; resume it as it was, or begin another")
