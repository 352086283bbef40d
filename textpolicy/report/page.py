"""The report: learning curves, what happened step by step, and what became of the prompts, as one HTML file."""

from __future__ import annotations

import statistics
from collections.abc import Callable, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from typing import Annotated, Any

from pydantic import Field
from pydantic_settings import CliPositionalArg

from .._system.files import write_whole
from ..config.settings import Section
from ..errors import UserError
from ..record import layout
from ..record.prompts import PromptRow, compare, halves
from ..record.reader import RecordedRun, load_run
from .arms import Arm, Series, arms_of, by_look, by_step, differences, flat, series
from .charts import line_chart, running_over, stacked_bars

_HERE = Path(__file__).parent
_PROMPTS = 5  # of each kind: best, worst, most changed
_LONGEST = 300  # characters of a prompt or completion
_FIGURES: tuple[tuple[str, str, str, bool], ...] = (  # figure of metrics.jsonl, title, axis, whether a share of 1
    ("accuracy", "Correct in training, sampled", "share correct", True),
    ("reward_mean", "Reward", "mean reward", False),
    ("frac_reward_zero_std", "Groups whose rewards agree", "share of groups", True),
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

    runs: CliPositionalArg[Annotated[list[Path], Field(min_length=1)]]
    """Folders of the runs."""
    out: Path | None = None
    """The file; report.html in the first run's folder if not given."""


def report(arguments: ReportArguments) -> Path:
    """Write the report and return its path. Raises UserError."""
    path = arguments.out or arguments.runs[0] / layout.REPORT
    write_report(arguments.runs, path)
    return path


def write_report(folders: Sequence[Path], path: Path) -> None:
    """The report on the runs in ``folders``. Raises UserError."""
    html = report_html(folders)
    try:
        path.parent.mkdir(parents=True, exist_ok=True)
        write_whole(path, html)
    except OSError as error:
        raise UserError(f"cannot write the report {path} ({error.strerror}); choose another with --out") from error


def report_html(folders: Sequence[Path]) -> str:
    """The page. Everything that a model or a user wrote is escaped."""
    from jinja2 import Environment, FileSystemLoader
    from markupsafe import Markup

    runs = [load_run(folder) for folder in folders]
    arms = arms_of(runs)
    environment = Environment(loader=FileSystemLoader(_HERE), autoescape=True, trim_blocks=True, lstrip_blocks=True)
    return environment.get_template("report.html").render(
        title=" and ".join(arm.name for arm in arms),
        runs=[run_facts(run) for run in runs],
        differing=differences([flat(run.config) for run in runs]),
        charts=[(title, Markup(svg)) for title, svg in charts(arms)],
        bands=any(len(arm.runs) > 1 for arm in arms),
        smoothed=any(running_over(sum(row["kind"] == "train" for row in run.rows)) > 1 for run in runs),
        prompts=[told for run in runs if (told := prompts_told(run)) is not None],
    )


def charts(arms: Sequence[Arm]) -> list[tuple[str, str]]:
    """(title, SVG) of everything that the runs know."""
    drawn = [("Held-out problems, greedy", _chart(_looks(arms), "share correct", share=True))]
    for figure, title, label, share in _FIGURES:
        curves = _curves(arms, lambda run, figure=figure: by_step(run, figure))  # type: ignore[misc]  # bound now
        drawn.append((title, _chart(curves, label, smooth=True, share=share)))
    drawn.insert(3, ("Parts of the reward", _chart(_reward_parts(arms), "mean", smooth=True)))
    drawn.append(("Seconds of a step", _step_times(arms)))
    return [(title, svg) for title, svg in drawn if svg]


def _chart(curves: Sequence[Series], label: str, **how: bool) -> str:
    return line_chart(curves, label, **how) if any(len(c.steps) > 1 for c in curves) else ""


def _curves(arms: Sequence[Arm], figure: Callable[[RecordedRun], dict[float, float]], suffix: str = "") -> list[Series]:
    found = [series(arm, [figure(run) for run in arm.runs], arm.name + suffix) for arm in arms]
    return [curve for curve in found if curve is not None]


def _looks(arms: Sequence[Arm]) -> list[Series]:
    validation = _curves(arms, lambda run: by_look(run, "validation"), ", validation")
    test = _curves(arms, lambda run: by_look(run, "test"), ", test")
    return validation + [replace(curve, joined=False) for curve in test]


def _reward_parts(arms: Sequence[Arm]) -> list[Series]:
    names = {n for arm in arms for run in arm.runs for row in run.rows for n in row if n.startswith("reward_mean/")}
    out: list[Series] = []
    for name in sorted(names):
        part = ", " + name.removeprefix("reward_mean/")
        out += _curves(arms, lambda run, name=name: by_step(run, name), part)  # type: ignore[misc]  # bound now
    return out


def _step_times(arms: Sequence[Arm]) -> str:
    """Mean seconds of rollouts, rewards included, and of updates."""
    parts: dict[str, list[float]] = {"rollouts": [], "updates": []}
    for arm in arms:
        for part, figure in (("rollouts", "sample_seconds"), ("updates", "update_seconds")):
            values = [v for run in arm.runs for v in by_step(run, figure).values()]
            parts[part].append(statistics.fmean(values) if values else 0.0)
    return stacked_bars([arm.name for arm in arms], parts, "seconds of a step, mean") if any(parts["updates"]) else ""


def run_facts(run: RecordedRun) -> dict[str, Any]:
    """What the table of runs says of one."""
    rows = [r for r in run.rows if r["kind"] == "train"]
    tests = [r for r in run.rows if r["kind"] == "eval" and r["split"] == "test"]  # before, and of what is kept
    after = tests[-1] if len(tests) > 1 else None
    return {
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


@dataclass(frozen=True, slots=True)
class PromptTold:
    """A prompt with its rewards in both halves of the run, and what was last said to it."""

    row: PromptRow
    prompt: str
    text: str


def prompts_told(run: RecordedRun) -> dict[str, Any] | None:
    """The best, worst and most changed prompts of a run; None before two halves have any in common."""
    rows = compare(*halves(run.read("rollouts", ["step", "prompt_index", "reward"])))
    if not rows:
        return None
    ranked = sorted(rows, key=lambda row: row.mean)
    kinds = {"Most changed": rows[:_PROMPTS], "Best": ranked[: -_PROMPTS - 1 : -1], "Worst": ranked[:_PROMPTS]}
    texts = _last_said(run, {row.prompt_index for chosen in kinds.values() for row in chosen})
    told = {kind: [PromptTold(row, *texts[row.prompt_index]) for row in chosen] for kind, chosen in kinds.items()}
    return {"name": run.folder.resolve().name, "kinds": told, "count": len(rows)}


def _last_said(run: RecordedRun, prompts: set[int]) -> dict[int, tuple[str, str]]:
    """Prompt -> its text, and a completion of the last step that drew it."""
    import pyarrow.compute as pc

    asked = pc.field("prompt_index").isin(sorted(prompts))
    rows = run.read("rollouts", ["prompt_index", "prompt", "text"], asked).to_pylist()  # in order, so the last stays
    return {row["prompt_index"]: (_short(row["prompt"]), _short(row["text"])) for row in rows}


def _short(text: str) -> str:
    return text if len(text) <= _LONGEST else text[:_LONGEST] + " …"
