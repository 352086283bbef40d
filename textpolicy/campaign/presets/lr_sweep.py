"""The script ``tinker_lr_sweep.py``: short Tinker runs at several learning rates, to choose one per recipe."""

from __future__ import annotations

import json
import shlex
from collections.abc import Sequence
from math import isfinite
from typing import Annotated, Any

from pydantic import Field

from ..._system.files import write_whole
from ...config.settings import LocalPath, Positive, PositiveInt
from ...record.reader import load_run
from ..jobs import Job, carry_out
from .scripts import MathAlgorithm, MathCampaignSettings, Seeds, math_job, new_root, only_planned, write_commands


class SweepArguments(MathCampaignSettings):
    """Try learning rates with short runs on a Tinker server; without --execute only the plan is written."""

    sweep_root: LocalPath | None = None
    """Folder of the sweep; a new one under results/ if not given."""
    probe_steps: PositiveInt = 20
    """Training steps of each run."""
    group_size: Annotated[int, Field(ge=2)] = 16
    """Completions of each problem."""
    lr_values: tuple[Positive, ...] = (1e-5, 2e-5, 4e-5, 8e-5, 1.6e-4)
    """Learning rates to try."""
    algorithms: tuple[MathAlgorithm, ...] = ("grpo", "full")
    """Recipes to try them with."""
    seeds: Seeds = (0,)
    """The seeds of the runs at each rate; use others in the campaign, since these chose the rate."""
    execute: bool = False
    """Train, which costs money on the hosted server; without it only the plan is written."""


def run(args: SweepArguments) -> int:
    """Write the plan; with ``execute`` train, print the table and the best rates, write ``sweep_results.json``.

    Return 1 if no run finished, else 0.
    """
    root = args.sweep_root or new_root("tinker_lr_sweep")
    jobs: dict[tuple[MathAlgorithm, float], list[Job]] = {}
    for algorithm in args.algorithms:
        for lr in args.lr_values:
            label = f"{algorithm}_lr{label_of(lr)}"
            folders = {s: root / (label if len(args.seeds) == 1 else f"{label}_seed{s}") for s in args.seeds}
            jobs[algorithm, lr] = [
                math_job(args, label, algorithm, lr, s, args.probe_steps, folder) for s, folder in folders.items()
            ]
    planned = [job for some in jobs.values() for job in some]
    root.mkdir(parents=True, exist_ok=True)
    write_commands(planned, root)
    if not args.execute:
        steps = f"of {args.probe_steps} steps with {args.batch_size} x {args.group_size} completions"
        return only_planned(f"{len(planned)} runs {steps} on {args.model}", root)
    carry_out(planned, root, continue_on_error=True)
    probes = [probed(algorithm, lr, some) for (algorithm, lr), some in jobs.items()]
    best: dict[str, dict[str, Any]] = {}  # by held-out accuracy; the lower rate where two are as good
    for p in probes:
        if p["status"] == "completed" and p["held_out"] is not None:
            best[p["algorithm"]] = max(best.get(p["algorithm"], p), p, key=lambda p: (p["held_out"], -p["lr"]))
    rates = {algorithm: p["lr"] for algorithm, p in best.items()}
    chosen_by = "held-out accuracy at the last step"
    results = {"settings": args.model_dump(mode="json"), "results": probes, "best_lr": rates, "chosen_by": chosen_by}
    write_whole(root / "sweep_results.json", json.dumps(results, indent=2) + "\n")
    print("\n".join(table(probes)))
    if not best:
        print(f"no run finished; see {root / 'logs'}")
        return 1
    print("\n".join(f"best for {algorithm}: {lr:g}" for algorithm, lr in rates.items()))
    arms = {"grpo": "baseline", "full": "candidate"}
    flags = [f"--{arms[algorithm]}-lr={lr:g}" for algorithm, lr in rates.items()]
    words = ["scripts/tinker_campaign.py", f"--model={args.model}", *flags, "--seeds=101,102,103,104,105,106"]
    print(f"a campaign with them: {shlex.join(['python', *words])}")
    return 0


def label_of(lr: float) -> str:
    """Return ``lr`` with one digit where that is exact (4e-05), else with as many as needed (1.2e-05)."""
    return next(text for text in (f"{lr:.0e}", f"{lr:g}", repr(lr)) if float(text) == lr)


def probed(algorithm: MathAlgorithm, lr: float, jobs: Sequence[Job]) -> dict[str, Any]:
    """Return the results of one learning rate, means over its finished runs; None where no run is finished."""
    done = [load_run(job.folder).rows for job in jobs if job.done]
    looks = [[row for row in rows if row["kind"] == "eval"] for rows in done]
    rows = [[row for row in of_run if row["kind"] == "train"] for of_run in done]
    return {
        "algorithm": algorithm,
        "lr": lr,
        "seeds": len(done),  # finished runs
        "steps": sum(map(len, rows)),
        "datums": int(sum(row.get("num_datums", 0) for run in rows for row in run)),  # sequences learned from
        "correct_rate": _mean([run[-1].get("correct_rate") for run in rows if run]),  # of the last step's completions
        "running_correct_rate": _mean([run[-1].get("running_correct_rate") for run in rows if run]),  # of all
        "held_out": _mean([of_run[-1]["accuracy"] for of_run in looks if of_run]),  # at the last step
        "loss": _mean([row.get("loss") for run in rows for row in run]),
        "status": "completed" if len(done) == len(jobs) else "failed",
    }


def table(probes: Sequence[dict[str, Any]]) -> list[str]:
    """Return one line per rate, after the heads."""
    heads = ("Algorithm", "LR", "Steps", "Datums", "Correct%", "Running%", "HeldOut%", "MeanLoss", "Status")
    widths, rows = (10, 9, 6, 7, 9, 9, 9, 10, 9), [list(heads)]
    for p in probes:
        shares = (p["correct_rate"], p["running_correct_rate"], p["held_out"])
        percent = ["-" if share is None else f"{100 * share:.1f}" for share in shares]
        loss = "-" if p["loss"] is None else f"{p['loss']:.4f}"
        counts = [str(p["steps"]), str(p["datums"])]
        rows.append([p["algorithm"], f"{p['lr']:g}", *counts, *percent, loss, p["status"]])
    return [
        "  ".join(c.rjust(w) if n else c.ljust(w) for n, (c, w) in enumerate(zip(row, widths, strict=True)))
        for row in rows
    ]


def _mean(values: Sequence[float | None]) -> float | None:
    known = [v for v in values if v is not None and isfinite(v)]
    return sum(known) / len(known) if known else None
