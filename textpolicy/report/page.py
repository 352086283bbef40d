"""Write the report, one HTML file: whether runs learned and what stood in their way, then curves and completions."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import replace
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import numpy as np
from pydantic import Field

from .._system.files import write_whole
from ..config.settings import LocalPath, Positional, Section
from ..errors import UserError
from ..record.prompts import compare, halves
from ..record.reader import RecordedRun, ended, flat, load_run
from .arms import Arm, Series, arms_of, by_step, differences, held_out, series
from .charts import line_chart, running_width, stacked_bars
from .learning import learning, outcome
from .rendering import render
from .words import duration, folder_names, natural, stage_line, title_of

_PROMPTS = 5  # of each kind: best, worst, most changed
_COMPLETIONS = 3  # of each kind, where no prompt was drawn in both halves
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
    ("scaling", "Ranks at work", "share of their time", True),
)
_OF_RANKS: tuple[tuple[str, str, str], ...] = (("tokens_per_second", "Speed of each rank", "sampled tokens/s"),)
_OF_RANKS += tuple(
    (f"waited_{what}", f"Waiting of each rank while {what}", "seconds") for what in ("sampling", "updating")
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

    named = sorted(zip(folder_names(folders), folders, strict=True), key=lambda pair: natural(pair[0]))
    runs = {name: load_run(folder) for name, folder in named}
    arms = arms_of(list(runs.values()))
    drawn, constant = _charts(arms)
    steps = [sum(row["kind"] == "train" for row in run.rows) for run in runs.values()]
    return render(
        "report.html",
        title=title_of([flat(run.config) for run in runs.values()], [arm.name for arm in arms]),
        arms=[(arm, learning(arm.runs)) for arm in arms],
        columns=_table(runs),
        stages=[(name, [stage_line(stage) for stage in run.stages]) for name, run in runs.items() if run.stages],
        charts=[(title, Markup(svg)) for title, svg in drawn],
        constant=constant,
        back=back,
        bands=any(len(arm.runs) > 1 for arm in arms),
        alone=any(len(arm.runs) == 1 for arm in arms),
        smoothed=any(running_width(n) > 1 for n in steps),
        prompts=[(name, shown) for name, run in runs.items() if (shown := _prompts(run) or _completions(run))],
    )


def _table(runs: dict[str, RecordedRun]) -> list[tuple[str, list[tuple[str, str]]]]:
    """Return the columns of the table of runs: a head, and for each run a text and a small one; none is empty."""
    settings = [flat(run.config) for run in runs.values()]
    differing = [name for name in differences(settings) if name not in ("model", "steps")]
    columns = {"run": [(name, "" if ended(run.folder) else "not finished") for name, run in runs.items()]}
    for name in [*differing, "seed", "model"]:
        values = [of_run.get(name) for of_run in settings]
        columns[name] = [("" if value is None else str(value), "") for value in values]
    for run, of_run in zip(runs.values(), settings, strict=True):
        rows, found = [r for r in run.rows if r["kind"] == "train"], outcome(run)
        before, after = (found and found.before), (found and found.after)
        seconds = [row[name] for row in rows for name in ("sample_seconds", "update_seconds") if name in row]
        tokens = [row["sampled_tokens"] for row in rows if "sampled_tokens" in row]
        memory = max((row["peak_memory_bytes"] for row in rows if "peak_memory_bytes" in row), default=0)
        size = f"{memory / 1e9:.2f} GB" if memory > 1e8 else f"{memory / 1e6:.1f} MB"
        planned = of_run.get("steps")
        cells = {
            "held-out before": (f"{before.rate.value:.1%}", f"of {before.total}") if before else ("", ""),
            "after": (f"{after.rate.value:.1%}", f"step {after.step:g}") if after else ("", ""),
            "steps": (str(len(rows)), "" if planned in (len(rows), None) else f"of {planned}"),
            "time": (duration(sum(seconds)) if seconds else "", ""),
            "sampled tokens": (f"{sum(tokens):,.0f}" if tokens else "", ""),
            "peak memory": (size if memory else "", ""),
        }
        for name, cell in cells.items():
            columns.setdefault(name, []).append(cell)
    return [(name, cells) for name, cells in columns.items() if any(text for text, _ in cells)]


def _charts(arms: Sequence[Arm]) -> tuple[list[tuple[str, str]], list[str]]:
    """Return (title, SVG) for everything that the runs recorded, and in words what never changed."""
    several = len(arms) > 1
    looks = [_curves(arms, partial(held_out, split=split)) for split in ("validation", "test")]
    on_held_out = [*looks[0], *(replace(curve, joined=False) for curve in looks[1])]
    lines = [
        (title, _curves(arms, partial(_averaged, metric=metric)), label, True, share)
        for metric, title, label, share in _METRICS
    ]
    marks = " (line: validation, diamond: test)" if all(looks) else ""
    lines.insert(0, (f"Held-out problems, greedy{marks}", on_held_out, "share correct", False, True))
    rewards = {n for arm in arms for run in arm.runs for row in run.rows for n in row if n.startswith("reward_mean/")}
    parts = {name.removeprefix("reward_mean/"): name for name in sorted(rewards, key=natural)}
    of_parts = {part: _curves(arms, partial(_averaged, metric=metric)) for part, metric in parts.items()}
    if several:
        charts = [(f"Parts of the reward: {part}", curves) for part, curves in of_parts.items()]
    else:  # in one chart, a colour for each
        named = [replace(c, name=part, colour=i) for i, (part, curves) in enumerate(of_parts.items()) for c in curves]
        charts = [("Parts of the reward", named)]
    lines[3:3] = [(title, curves, "mean", True, False) for title, curves in charts]
    several_ranks = {n for arm in arms for run in arm.runs for row in run.rows for n in row if n.startswith("rank_")}
    for metric, title, label in () if several else _OF_RANKS:
        names = sorted((n for n in several_ranks if n.endswith(f"_{metric}")), key=natural)
        of_rank = [(n.split("_")[1], c) for n in names for c in _curves(arms, partial(_averaged, metric=n))]
        together = [replace(c, name=f"rank {rank}", colour=i) for i, (rank, c) in enumerate(of_rank)]
        lines.append((title, together, label, True, False))
    drawn, constant = list[tuple[str, str]](), list[str]()
    for title, curves, label, smooth, share in lines:
        values = np.concatenate([curve.mean for curve in curves]) if curves else np.empty(0)
        if not any(len(curve.steps) > 1 for curve in curves):
            continue
        if np.ptp(values) <= 1e-9 * np.abs(values).max():
            constant.append(f"{title}: {f'{values[0]:.0%}' if share else f'{values[0]:.3g}'}")
            continue
        legend = not several and len(curves) > 1 and curves is not on_held_out
        drawn.append((title, line_chart(curves, label, smooth=smooth, share=share, legend=legend)))
    seconds: dict[str, list[float]] = {"rollouts": [], "updates": []}  # mean of each arm; rollouts include rewards
    for arm in arms:
        for part, metric in (("rollouts", "sample_seconds"), ("updates", "update_seconds")):
            found = [v for run in arm.runs for v in by_step(run, metric).values()]
            seconds[part].append(statistics.fmean(found) if found else 0.0)
    if any(seconds["updates"]):
        drawn.append(("Seconds of a step", stacked_bars([a.name for a in arms], seconds, "seconds of a step, mean")))
    return drawn, constant


def _averaged(arm: Arm, metric: str) -> Series | None:
    return series(arm, [by_step(run, metric) for run in arm.runs])


def _curves(arms: Sequence[Arm], curve_of: Callable[[Arm], Series | None]) -> list[Series]:
    """Return the curve of each arm whose runs have any step in common, in the arm's colour."""
    found = [(i, curve_of(arm)) for i, arm in enumerate(arms)]
    return [replace(curve, colour=i) for i, curve in found if curve is not None]


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
        texts[line["prompt_index"]] = {name: _cut(line[name]) for name in ("prompt", "text")}
    shown = {
        kind: [
            {
                "head": f"prompt {row.prompt_index}: {row.reward[0]:.3g} to {row.reward[1]:.3g}",
                "change": row.change,
                **texts[row.prompt_index],
            }
            for row in chosen
        ]
        for kind, chosen in kinds.items()
    }
    note = f"the {len(rows)} prompts drawn in both, and the last completion."
    note = f"Mean reward in the first and in the second half of the run, for {note}"
    return {"title": "Prompts", "note": note, "kinds": shown}


def _completions(run: RecordedRun) -> dict[str, Any] | None:
    """Return completions of the first step, and the best and worst of the last; None if none were recorded."""
    import pyarrow.compute as pc

    recorded = run.read("rollouts", ["step"])["step"]
    if not len(recorded):
        return None
    first, last = pc.min(recorded).as_py(), pc.max(recorded).as_py()
    names = ["step", "group", "prompt", "text", "reward", "is_correct", "finish_reason"]
    lines = run.read("rollouts", names, pc.field("step").isin([first, last])).to_pylist()

    def of_groups(chosen: Sequence[dict[str, Any]]) -> list[dict[str, Any]]:
        """Return the first few of them, each from another group."""
        found = list({line["group"]: line for line in reversed(chosen)}.values())
        return sorted(found, key=chosen.index)[:_COMPLETIONS]

    ending = [line for line in lines if line["step"] == last]
    scored = sorted((line for line in ending if line["reward"] is not None), key=lambda line: -line["reward"])
    kinds = {"First step": of_groups([line for line in lines if line["step"] == first])} if first < last else {}
    kinds |= {"Last step, best": of_groups(scored), "Last step, worst": of_groups(scored[::-1])}
    kinds = kinds if scored else {**kinds, "Last step": of_groups(ending)}
    shown: dict[str, list[dict[str, Any]]] = {kind: [] for kind, chosen in kinds.items() if chosen}
    for kind in shown:
        for line in kinds[kind]:
            reward = "not scored" if line["reward"] is None else f"reward {line['reward']:.3g}"
            right = {True: ", right", False: ", wrong", None: ""}[line["is_correct"]]
            cut = ", cut off" if line["finish_reason"] == "length" else ""
            texts = {name: _cut(line[name]) for name in ("prompt", "text")}
            shown[kind].append({"head": f"step {line['step']}: {reward}{right}{cut}", "change": None, **texts})
    note = "No prompt was drawn in both halves of the run; these are single completions, each of another prompt."
    return {"title": "Completions", "note": note, "kinds": shown}


def _cut(text: str | None) -> str:
    """Return a text as the page shows it, at most 300 characters."""
    text = text or ""
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " …"
