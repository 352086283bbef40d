"""The way of a campaign script: flags to settings, then plan, run, report; shared by all of them."""

from __future__ import annotations

import shlex
import sys
import time
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Annotated, Any, Literal, TypeVar

from pydantic import Field

from ..._system.files import write_whole
from ..._system.terminal import one_line, until_unread
from ...analysis._inputs import statsmodels
from ...config.flags import parse
from ...config.settings import LocalPath, PositiveInt, Section
from ...errors import TextPolicyError
from ...record.reader import ended
from ...run.train_math import MathSettings
from ..jobs import Attempt, Job, carry_out
from ..plan import in_words
from ..settings import Share

Arguments = TypeVar("Arguments", bound=Section)
MathAlgorithm = Literal["grpo", "full"]
Seeds = tuple[Annotated[int, Field(ge=0)], ...]
MODULE = "textpolicy.tinker.train_math"


class CampaignArguments(Section):
    """The flags that every campaign script has."""

    campaign_root: LocalPath | None = None
    """Folder of the campaign; a new one under results/ if not given."""
    execute: bool = False
    """Train; without it only the plan is written."""
    continue_on_error: bool = False
    """Start the remaining runs after one that failed."""
    parallel: PositiveInt = 1
    """Runs at a time."""
    alpha: Share = 0.05
    """Level of the tests."""
    resamples: Annotated[int, Field(ge=100)] = 20_000
    """Arrangements drawn where there are too many to enumerate."""


class MathCampaignSettings(MathSettings):
    """The settings that all runs of a campaign on a Tinker server share, with the defaults of a campaign."""

    lora_rank: PositiveInt = 64
    """Width of the LoRA."""
    batch_size: PositiveInt = 4
    """Distinct problems in each step."""
    group_size: Annotated[int, Field(ge=2)] = 8
    """Completions of each problem."""
    sepa_steps: Annotated[int, Field(ge=0)] = 100
    """SEPA: steps of the ramp."""
    sepa_delay_steps: Annotated[int, Field(ge=0)] = 10
    """SEPA: steps before the ramp."""
    eval_every: PositiveInt = 20
    """Steps between evaluations on held-out problems."""


def math_job(
    shared: MathSettings, arm: str, algorithm: MathAlgorithm, lr: float, seed: int, steps: int, folder: Path
) -> Job:
    """Return one run of train_math, which resumes from its last checkpoint if it was killed."""
    values = {**shared.model_dump(include=set(MathSettings.model_fields)), "algorithm": algorithm, "lr": lr}
    values |= {"seed": seed, "max_steps": steps, "log_dir": folder}
    flags = [f"--{name.replace('_', '-')}={value}" for name, value in values.items() if value is not None]
    return Job(arm, seed, folder, (MODULE, *flags), ended, resumes=True)


def new_root(name: str) -> Path:
    """Return the folder of a campaign for which none is given."""
    return Path(f"results/{name}_{time.strftime('%Y%m%d_%H%M%S')}")


def run_campaign(
    args: CampaignArguments,
    root: Path,
    jobs: Sequence[Job],
    write: Callable[[str, Sequence[Attempt], Mapping[str, Any]], None],
    report: Callable[[], Mapping[str, Any]],
) -> int:
    """Plan the ``jobs`` of a campaign in ``root``; with ``execute`` run them and report. Return the exit code.

    ``write`` gets the status, the attempts and what ``report`` returned, once for the plan and once at the end.
    """
    write("planned", (), {})
    if not args.execute:
        return only_planned(f"{len({job.arm for job in jobs})} arms x {len({job.seed for job in jobs})} seeds", root)
    statsmodels("multitest")  # the report needs it: said before the first run, not after the last
    attempts = carry_out(jobs, root, parallel=args.parallel, continue_on_error=args.continue_on_error)
    if all(job.done for job in jobs):
        write("completed", attempts, report())
        print(f"completed: {root}")
        return 0
    status = "partial" if any(job.done for job in jobs) or not attempts else "failed"
    write(status, attempts, {})
    print(f"{status}: {root}; the same command resumes")
    return 1


def only_planned(what: str, root: Path) -> int:
    """Print that a script without --execute has spent nothing, and how to go on. Return the exit code."""
    print(f"{what}, planned in {root}; nothing was run")
    print(f"train with: sh {shlex.quote(str(root / 'run_commands.sh'))}, or with --execute, which resumes and reports")
    return 0


def write_commands(jobs: Sequence[Job], root: Path) -> None:
    """Write ``run_commands.sh``, a line for each of the ``jobs``. Raises OSError."""
    lines = ["#!/bin/sh", "set -e", *(shlex.join(job.command) for job in jobs)]
    write_whole(root / "run_commands.sh", "\n".join(lines) + "\n")
    (root / "run_commands.sh").chmod(0o755)


def script(name: str, kind: type[Arguments], run: Callable[[Arguments], int], argv: Sequence[str]) -> int:
    """Run one script and return its exit code; a UserError is one sentence on stderr and exit code 2."""

    def command() -> int:
        try:
            with in_words():
                return run(parse(kind, argv, "", program=name))
        except TextPolicyError as error:
            print(f"{name}: {one_line(str(error))}", file=sys.stderr)
            return 2
        except KeyboardInterrupt:
            print(f"{name}: stopped by Ctrl-C; the same command resumes", file=sys.stderr)
            return 130

    return until_unread(command)
