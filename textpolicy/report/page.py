"""Write the report, one HTML file with the learning curves, every metric by step, and the prompts that changed."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field

from .._system.files import write_whole
from ..config.settings import LocalPath, Positional, Section
from ..errors import UserError
from ..record.prompts import compare, halves
from ..record.reader import RecordedRun, flat, load_run
from .arms import Arm, Series, arms_of, by_evaluation, by_step, differences, series
from .charts import line_chart, running_width, stacked_bars
from .rendering import render

_PROMPTS = 5  # of each kind: best, worst, most changed
_LONGEST = 300  # characters of a prompt or completion
_METRICS: tuple[tuple[str, str, str, bool], ...] = (  # name in metrics.jsonl, title, axis, whether a share of 1
    ("accuracy", "Correct in training, sampled", "share correct", True),
    ("reward_mean", "Reward", "mean reward", False),
    ("frac_reward_zero_std", "No-signal groups, whose rewards are all equal", "share of groups", True),
    ("length_mean", "Length", "sampled tokens", False),
    ("truncated", "Completions cut off", "share", True),
    ("entropy", "Entropy", "nats per token", False),
    ("grad_norm", "Gradient", "norm before clipping", False),
    ("clip_fraction_high", "Clipped above", "share of tokens", False),
    ("clip_fraction_low", "Clipped below", "share of tokens", False),
    ("sampler_kl", "KL, learner to sampler", "nats per token", False),
    ("reference_kl", "KL to the reference", "nats per token", False),
    ("logprob_gap_mean", "Difference of log-probs, learner and sampler", "nats per token", False),
    ("on_policy_gap_mean", "On-policy check", "nats per token", False),
    ("tokens_per_second", "Speed", "sampled tokens/s", False),
)


class ReportArguments(Section):
    """Write one run, or several side by side, as an HTML file; runs that differ in their seed alone are averaged."""

    runs: Annotated[list[LocalPath], Field(min_length=1), Positional]
    """Folders of the runs."""
    out: LocalPath | None = None
    """The file; report.html in the first run's folder if not given."""


def write_report(folders: Sequence[Path], path: Path) -> None:
    """Write the report on the runs in ``folders``. Raises UserError."""
    html = report_html(folders)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, html)
    except OSError as error:
        raise UserError(f"cannot write the report {path} ({error.strerror}); choose another with --out") from error


def report_html(folders: Sequence[Path], back: str | None = None) -> str:
    """Return the page, which escapes what a model or a user wrote; ``back`` is a link out of it. Raises UserError."""
    from markupsafe import Markup

    runs = [load_run(folder) for folder in folders]
    arms = arms_of(runs)
    table: list[dict[str, Any]] = []
    for run in runs:
        rows = [r for r in run.rows if r["kind"] == "train"]
        evaluations = [r for r in run.rows if r["kind"] == "eval"]
        tests = [r for r in evaluations if r["split"] == "test"]  # before, and of the kept adapter
        tests = tests or evaluations[:1] + (evaluations[-1:] if run.summary else [])  # train_math has no others
        after = tests[-1] if len(tests) > 1 else None
        table.append(
            {
                "name": run.folder.resolve().name,
                "settings": flat(run.config),
                "seed": run.config.get("seed"),
                "model": run.config.get("model"),
                "steps": len(rows),
                "over": after is not None,
                "before": tests[0]["accuracy"] if tests else None,
                "after": after and after["accuracy"],
                "problems": tests[0]["problems"] if tests else None,
                "kept_step": after and after["step"],
                "seconds": sum(r["sample_seconds"] + r["update_seconds"] for r in rows),
                "tokens": sum(r["sampled_tokens"] for r in rows),
                "memory": max((r["peak_memory_bytes"] for r in rows if "peak_memory_bytes" in r), default=None),
            }
        )
    return render(
        "report.html",
        back=back,
        title=" and ".join(arm.name for arm in arms),
        runs=table,
        differing=differences([run["settings"] for run in table]),
        charts=[(title, Markup(svg)) for title, svg in _charts(arms)],
        bands=any(len(arm.runs) > 1 for arm in arms),
        smoothed=any(running_width(run["steps"]) > 1 for run in table),
        prompts=[shown for run in runs if (shown := _prompts(run)) is not None],
    )


def _charts(arms: Sequence[Arm]) -> list[tuple[str, str]]:
    """Return (title, SVG) for everything that the runs recorded."""
    held_out = _curves(arms, partial(by_evaluation, split="validation"), ", validation")
    test = _curves(arms, partial(by_evaluation, split="test"), ", test")
    held_out += [replace(curve, joined=False) for curve in test]
    lines = [
        (title, _curves(arms, partial(by_step, metric=metric)), label, True, share)
        for metric, title, label, share in _METRICS
    ]
    lines.insert(0, ("Held-out problems, greedy", held_out, "share correct", False, True))
    rewards = {n for arm in arms for run in arm.runs for row in run.rows for n in row if n.startswith("reward_mean/")}
    parts: list[Series] = []
    for name in sorted(rewards):
        parts += _curves(arms, partial(by_step, metric=name), ", " + name.removeprefix("reward_mean/"))
    lines.insert(3, ("Parts of the reward", parts, "mean", True, False))
    drawn = [
        (title, line_chart(curves, label, smooth=smooth, share=share))
        for title, curves, label, smooth, share in lines
        if any(len(c.steps) > 1 for c in curves)
    ]
    seconds: dict[str, list[float]] = {"rollouts": [], "updates": []}  # mean of each arm; rollouts include rewards
    for arm in arms:
        for part, metric in (("rollouts", "sample_seconds"), ("updates", "update_seconds")):
            values = [v for run in arm.runs for v in by_step(run, metric).values()]
            seconds[part].append(statistics.fmean(values) if values else 0.0)
    if any(seconds["updates"]):
        bars = stacked_bars([arm.name for arm in arms], seconds, "seconds of a step, mean")
        drawn.append(("Seconds of a step", bars))
    return drawn


def _curves(arms: Sequence[Arm], values: Callable[[RecordedRun], dict[float, float]], suffix: str = "") -> list[Series]:
    """Return a curve of the ``values`` for each arm whose runs have any step in common."""
    found = [series(arm, [values(run) for run in arm.runs], arm.name + suffix) for arm in arms]
    return [curve for curve in found if curve is not None]


def _prompts(run: RecordedRun) -> dict[str, Any] | None:
    """Return the best, worst and most changed prompts of a run; None if its halves have no prompt in common."""
    import pyarrow.compute as pc

    rows = compare(*halves(run.read("rollouts", ["step", "prompt_index", "reward"])))
    if not rows:
        return None
    # Ranked by the mean reward over both halves.
    ranked = sorted(rows, key=lambda r: sum(n * x for n, x in zip(r.count, r.reward, strict=True)) / sum(r.count))
    kinds = {"Most changed": rows[:_PROMPTS], "Best": ranked[: -_PROMPTS - 1 : -1], "Worst": ranked[:_PROMPTS]}
    wanted = pc.field("prompt_index").isin(sorted({row.prompt_index for chosen in kinds.values() for row in chosen}))
    texts: dict[int, dict[str, str]] = {}  # prompt -> its text, and a completion of the last step that drew it
    for line in run.read("rollouts", ["prompt_index", "prompt", "text"], wanted).to_pylist():
        both = {name: line[name] for name in ("prompt", "text")}
        texts[line["prompt_index"]] = {k: s if len(s) <= _LONGEST else s[:_LONGEST] + " …" for k, s in both.items()}
    shown = {kind: [{"row": row, **texts[row.prompt_index]} for row in chosen] for kind, chosen in kinds.items()}
    return {"name": run.folder.resolve().name, "kinds": shown, "count": len(rows)}
