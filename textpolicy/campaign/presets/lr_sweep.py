"""``scripts/tinker_lr_sweep.py``: short runs at several learning rates on a Tinker server, to choose one per recipe."""

from __future__ import annotations

import json
import shlex
import time
from collections.abc import Sequence
from dataclasses import asdict, dataclass
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from ...analysis.sepa.emergence_runs import read_rows
from ...config.settings import Positive, PositiveInt
from ..jobs import Job, carry_out, write_whole
from .math_jobs import MathAlgorithm, MathSettings, math_job


class SweepArguments(MathSettings):
    """Try learning rates with short runs on a Tinker server; this costs money on the hosted one."""

    sweep_root: Path | None = None
    """Folder of the sweep; a new one under results/ if not given."""
    probe_steps: PositiveInt = 20
    """Training steps of each run."""
    group_size: Annotated[int, Field(ge=2)] = 16
    """Completions of each problem."""
    lr_values: tuple[Positive, ...] = (1e-5, 2e-5, 4e-5, 8e-5, 1.6e-4)
    """Learning rates to try."""
    algorithms: tuple[MathAlgorithm, ...] = ("grpo", "full")
    """Recipes to try them with."""
    seeds: tuple[Annotated[int, Field(ge=0)], ...] = (0,)
    """Of the runs at each rate; take others in the campaign, for these were looked at."""


@dataclass(frozen=True, slots=True)
class Probe:
    """What one learning rate gave, means over its seeds; None where no run came to its end."""

    algorithm: str
    lr: float
    seeds: int  # finished runs
    steps: int
    datums: int  # sequences learned from
    correct_rate: float | None  # of the last step's completions
    running_correct_rate: float | None  # of all completions
    held_out: float | None  # accuracy at the last step
    loss: float | None
    status: str  # completed or failed


def run(asked: SweepArguments) -> int:
    """Train, print the table and the best rates, write ``sweep_results.json``. Exit code 1 if no run finished."""
    root = asked.sweep_root or Path(f"results/tinker_lr_sweep_{time.strftime('%Y%m%d_%H%M%S')}")
    jobs = {(a, lr): probe_jobs(asked, root, a, lr) for a in asked.algorithms for lr in asked.lr_values}
    carry_out([job for some in jobs.values() for job in some], root, continue_on_error=True)
    probes = [probed(a, lr, some) for (a, lr), some in jobs.items()]
    best = {a: found for a in asked.algorithms if (found := best_of([p for p in probes if p.algorithm == a]))}
    write_whole(root / "sweep_results.json", json.dumps(results(asked, probes, best), indent=2) + "\n")
    print("\n".join(table(probes)))
    if not best:
        print(f"no run came to its end; see {root / 'logs'}")
        return 1
    print("\n".join(f"best for {a}: {p.lr:g}" for a, p in best.items()))
    print(f"a campaign with them: {shlex.join(recommended(asked, best))}")
    return 0


def probe_jobs(asked: SweepArguments, root: Path, algorithm: MathAlgorithm, lr: float) -> list[Job]:
    """The runs of one rate, a folder each."""
    label = f"{algorithm}_lr{label_of(lr)}"
    folders = {s: root / (label if len(asked.seeds) == 1 else f"{label}_seed{s}") for s in asked.seeds}
    return [math_job(asked, label, algorithm, lr, s, asked.probe_steps, folder) for s, folder in folders.items()]


def label_of(lr: float) -> str:
    """One digit where that is all there is to it (4e-05), as many as it takes else (1.2e-05)."""
    short = f"{lr:.0e}"
    return short if float(short) == lr else f"{lr:g}"


def probed(algorithm: str, lr: float, jobs: Sequence[Job]) -> Probe:
    """Read the finished runs of one rate."""
    done = [job.folder for job in jobs if job.done]
    rows = [read_rows(folder / "metrics.jsonl") for folder in done]
    last = [read_rows(folder / "evals.jsonl")[-1]["accuracy"] for folder in done]
    return Probe(
        algorithm=algorithm,
        lr=lr,
        seeds=len(done),
        steps=sum(map(len, rows)),
        datums=int(sum(row["num_datums"] for run in rows for row in run)),
        correct_rate=_mean([run[-1]["correct_rate"] for run in rows]),
        running_correct_rate=_mean([run[-1]["running_correct_rate"] for run in rows]),
        held_out=_mean(last),
        loss=_mean([row["loss"] for run in rows for row in run]),
        status="completed" if len(done) == len(jobs) else "failed",
    )


def best_of(probes: Sequence[Probe]) -> Probe | None:
    """The completed one with the best held-out accuracy; the lower rate where two are as good."""
    known = [p for p in probes if p.status == "completed" and p.held_out is not None]
    return max(known, key=lambda p: (p.held_out, -p.lr), default=None)


def results(asked: SweepArguments, probes: Sequence[Probe], best: dict[MathAlgorithm, Probe]) -> dict[str, Any]:
    """What ``sweep_results.json`` holds."""
    return {
        "settings": asked.model_dump(mode="json"),
        "results": [asdict(p) for p in probes],
        "best_lr": {algorithm: p.lr for algorithm, p in best.items()},
        "chosen_by": "held-out accuracy at the last step",
    }


def recommended(asked: SweepArguments, best: dict[MathAlgorithm, Probe]) -> list[str]:
    """The campaign's command, with a rate for each arm."""
    arms = {"grpo": "baseline", "full": "candidate"}
    rates = [f"--{arms[a]}-lr={p.lr:g}" for a, p in best.items()]
    return ["python", "scripts/tinker_campaign.py", f"--model={asked.model}", *rates, "--seeds=101,102,103,104,105,106"]


def table(probes: Sequence[Probe]) -> list[str]:
    """One line per rate."""
    heads = ("Algorithm", "LR", "Steps", "Datums", "Correct%", "Running%", "HeldOut%", "MeanLoss", "Status")
    widths = (10, 9, 6, 7, 9, 9, 9, 10, 9)
    cells = [heads, *map(_cells, probes)]
    return [
        "  ".join(c.rjust(w) if n else c.ljust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in cells
    ]


def _cells(p: Probe) -> tuple[str, ...]:
    rates = [_percent(p.correct_rate), _percent(p.running_correct_rate), _percent(p.held_out)]
    loss = "-" if p.loss is None else f"{p.loss:.4f}"
    return p.algorithm, f"{p.lr:g}", str(p.steps), str(p.datums), *rates, loss, p.status


def _percent(share: float | None) -> str:
    return "-" if share is None else f"{100 * share:.1f}"


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None]
    return sum(known) / len(known) if known else None
