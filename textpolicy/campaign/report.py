"""Write the findings of a campaign as JSON, Markdown and one HTML page that needs no other file."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import dataclass, replace
from math import inf, isfinite, nan
from pathlib import Path
from typing import Any

from markupsafe import Markup

from .._system.files import write_whole
from ..analysis.comparison import DECLINE, IMPROVEMENT, INSUFFICIENT
from ..analysis.plain import plain
from ..loop.evaluation import Rate
from ..report.rendering import render
from ..report.words import duration, in_points
from .figures import figures
from .findings import Findings
from .plan import versions
from .settings import SUMMARIES

Rows = list[Sequence[str]]
_PLAIN = {IMPROVEMENT: "better", DECLINE: "worse", INSUFFICIENT: "not enough evidence"}


@dataclass(frozen=True, slots=True)
class ReportSection:
    """The part of the report under one heading: the heading, a text, a table and a picture."""

    heading: str
    text: str
    heads: Sequence[str]
    rows: Sequence[Sequence[str]]  # no table if empty
    picture: str | None = None  # its name in ``figures``


def write_analysis(found: Findings, root: Path) -> Path:
    """Write ``analysis/analysis.json``, all numbers of the pages, and return its path."""
    path = root / "analysis" / "analysis.json"
    path.parent.mkdir(parents=True, exist_ok=True)
    write_whole(path, json.dumps(as_json(found), indent=2) + "\n")
    return path


def write_report(found: Findings, root: Path) -> list[Path]:
    """Write ``analysis/``, analysis.json, report.md with its pictures and report.html, and return their paths."""
    paths, drawn = [write_analysis(found, root)], figures(found)
    pages = {"report.md": markdown(found), "report.html": page(found, drawn)}
    for name, text in {**{f"{name}.svg": svg + "\n" for name, svg in drawn.items()}, **pages}.items():
        write_whole(paths[0].with_name(name), text)
    return [*paths, *(paths[0].with_name(name) for name in pages)]


def as_json(found: Findings) -> dict[str, Any]:
    """Return all findings as plain JSON values."""
    settings: Any = found.settings.model_dump(mode="json")
    verdict = {"recommendation": found.recommendation, "verdict": found.verdict, "versions": versions()}
    return {**verdict, **plain(replace(found, settings=settings))}


def markdown(found: Findings) -> str:
    """Return the Markdown page, with links to the pictures beside it."""
    lines = ["# Campaign report", "", found.verdict, ""]
    for section in sections(found):
        lines += [f"## {section.heading}", ""]
        if section.text:
            lines += [section.text, ""]
        if section.rows:
            heads, *rows = (f"| {' | '.join(row)} |" for row in [section.heads, *section.rows])
            lines += [heads, "|" + "---|" * len(section.heads), *rows, ""]
        if section.picture:
            lines += [f"![{section.heading}]({section.picture}.svg)", ""]
    return "\n".join(lines).rstrip() + "\n"


def page(found: Findings, drawn: dict[str, str]) -> str:
    """Return the same page as HTML, with the pictures in it."""
    pictures = {name: Markup(svg) for name, svg in drawn.items()}
    return render("campaign.html", verdict=found.verdict, sections=sections(found), pictures=pictures) + "\n"


def sections(found: Findings) -> list[ReportSection]:
    """Return the parts of the report, in order."""
    s, baseline = found.settings, found.settings.reference
    arms, runs, costs = _arm_rows(found)
    differences, power, same_models, pooled = _contrast_rows(found)
    chosen = (
        f"The number of a run is its {SUMMARIES[s.summary]}, chosen before the runs were made; the run is the unit."
    )
    test = {
        "fixed": "p permutes the signs of the paired differences and the interval is that test's, exact, of one "
        "difference alone; Holm's procedure adjusts p, and divides the power, for the number of arms.",
        "anytime": "p and the interval are of the e-process over pairs, which is valid after every pair.",
    }[s.stopping]
    problems = (
        "Standard errors over problems, with the answers of these runs paired by problem: how far the difference "
        "would move on other problems. They say nothing about other seeds and decide nothing."
    )
    independent = (
        "All answers of all runs as if each were independent, which they are not: Fisher's test then finds "
        "differences where there are none. The design effect says how many times fewer answers they are worth."
    )
    took = f"All attempts together took {duration(found.wall_seconds)} of wall-clock time."
    failed = f" Failed: {', '.join(found.failed)}." if found.failed else ""
    return [
        ReportSection("Arms", chosen, ("arm", "runs", "mean", "SD over runs", "lowest", "highest"), arms, "curves"),
        ReportSection(
            "Differences",
            f"Candidate minus {baseline}, in points. {test}",
            ("candidate", "difference", "interval", "BCa bootstrap", "p", "p adjusted", "e", "verdict"),
            differences,
            "differences",
        ),
        ReportSection(
            "Intervals and power",
            "",
            ("candidate", "pairs", "SD of differences", f"found with {s.power:.0%} power", "difference that matters",
             "seeds to find it"),
            power,
            "intervals",
        ),
        ReportSection("Runs", "", ("arm", "seed", "summary", "held-out at the last step (Wilson 95%)", "steps"), runs),
        ReportSection(
            "The same models on other problems",
            problems,
            ("candidate", "difference", "s.e. by problem", "s.e. by run", "s.e. if independent", "of one run an arm"),
            same_models,
        ),
        ReportSection(
            "Pooled answers, descriptive only",
            independent,
            ("candidate", "Fisher p", "design effect", "answers per arm", "worth"),
            pooled,
        ),
        ReportSection("Costs", took + failed, ("arm", "tokens sampled", "tokens trained", "time", "money"), costs),
    ]  # fmt: skip


def _arm_rows(found: Findings) -> tuple[Rows, Rows, Rows]:
    """Return the rows of the tables with a row per arm or run: arms, runs, costs."""
    arms: Rows = []
    runs: Rows = []
    costs: Rows = []
    priced = any(found.settings.prices.model_dump().values())
    for a in found.arms:
        shares = [f"{share:.1%}" for share in (a.mean, a.lowest, a.highest)]
        arms.append([a.name, str(len(a.outcomes)), shares[0], _points(a.sd), *shares[1:]])
        for o in a.outcomes:
            last = o.curve[-1]
            held_out = Rate(round(last.accuracy * last.problems), last.problems)  # with its Wilson interval
            runs.append([a.name, str(o.seed), f"{o.value:.1%}", str(held_out), str(last.step)])
        tokens = ("unknown" if n is None else f"{n:,}" for n in (a.cost.sampled_tokens, a.cost.trained_tokens))
        money = "unknown" if a.money is None else f"{a.money:.4g}"
        took = duration(nan if a.cost.seconds is None else a.cost.seconds)
        costs.append([a.name, *tokens, took, money if priced else "no price given"])
    return arms, runs, costs


def _contrast_rows(found: Findings) -> tuple[Rows, Rows, Rows, Rows]:
    """Return the rows of the tables with a row per candidate: differences, power, the same models, pooled answers."""
    differences: Rows = []
    power: Rows = []
    same_models: Rows = []
    pooled: Rows = []
    for contrast in found.contrasts:
        c, same, p = contrast.comparison, contrast.same_models, contrast.pooled
        absent = "all pairs agree" if c.sd == 0 else "too few pairs"
        bootstrap = "" if c.bootstrap is None else _range(c.bootstrap.low, c.bootstrap.high)
        e = "" if c.anytime is None else f"{c.anytime.e[-1]:.3g}"
        tested = [_range(c.interval.low, c.interval.high, absent), bootstrap, f"{c.p:.4g}", f"{c.p_adjusted:.4g}", e]
        differences.append([c.candidate, _signed(c.difference), *tested, _PLAIN[c.recommendation]])
        needed = "unknown" if c.runs_needed is None else f"{c.runs_needed:,}"
        sizes = [_points(x) for x in (c.sd, c.detectable, c.difference_that_matters)]
        power.append([c.candidate, str(len(c.seeds)), *sizes, needed])
        if same is not None and (k := same.clustered) is not None:
            errors = [_points(x) for x in (k.se_by_problem, k.se_by_run, k.se_iid)]
            same_models.append([c.candidate, _signed(k.mean), *errors, ""])
        elif same is not None and (newcombe := same.newcombe) is not None:
            interval = f"McNemar p {same.mcnemar_p:.4g}, Newcombe {_range(newcombe.low, newcombe.high)}"
            same_models.append([c.candidate, _signed(newcombe.estimate), "", "", "", interval])
        if p is not None:
            numbers = [f"{p.fisher_p:.4g}", f"{p.design_effect:.1f}", str(p.answers), f"{p.effective:.0f}"]
            pooled.append([c.candidate, *numbers])
    return differences, power, same_models, pooled


def _points(value: float | None) -> str:
    """Return a share as percentage points."""
    if value is None or not isfinite(value):
        return "none" if value == inf else "unknown"
    return in_points(value, decimals=2)[0]


def _signed(value: float) -> str:
    """Return a difference of shares as percentage points."""
    return in_points(value, sign="+", decimals=2)[0]


def _range(low: float, high: float, absent: str = "none") -> str:
    """Return an interval of such differences, or the reason why it has no end."""
    return " to ".join(in_points(low, high, sign="+", decimals=2)) if isfinite(low) else absent
