"""A campaign's findings as JSON, Markdown and one HTML page that needs nothing else."""

from __future__ import annotations

import json
from collections.abc import Sequence
from dataclasses import replace
from html import escape
from math import isfinite
from pathlib import Path
from typing import Any

from ..analysis.plain import plain
from .figures import figures
from .findings import ArmFindings, Contrast, Findings, rate_of
from .jobs import write_whole
from .plan import versions
from .settings import SUMMARIES

Table = tuple[Sequence[str], Sequence[Sequence[str]]]  # heads, and rows of cells


def write_analysis(found: Findings, root: Path) -> Path:
    """``analysis/analysis.json``: everything that the pages say, as numbers."""
    path = root / "analysis" / "analysis.json"
    write_whole(path, json.dumps(as_json(found), indent=2) + "\n")
    return path


def write_report(found: Findings, root: Path) -> list[Path]:
    """``analysis/``: analysis.json, report.md with its pictures, report.html."""
    folder, drawn = root / "analysis", figures(found)
    pages = {"report.md": markdown(found), "report.html": page(found, drawn)}
    for name, text in {**{f"{name}.svg": svg + "\n" for name, svg in drawn.items()}, **pages}.items():
        write_whole(folder / name, text)
    return [write_analysis(found, root), *(folder / name for name in pages)]


def as_json(found: Findings) -> dict[str, Any]:
    """All findings as plain JSON values."""
    kept = replace(found, settings=found.settings.model_dump(mode="json"))  # type: ignore[arg-type]
    verdict = {"recommendation": found.recommendation, "verdict": found.verdict, "versions": versions()}
    return {**verdict, **plain(kept)}


def markdown(found: Findings) -> str:
    """The page, its pictures beside it."""
    lines = ["# Campaign report", "", found.verdict, ""]
    for heading, text, table, picture in _sections(found):
        lines += [f"## {heading}", "", *([text, ""] if text else [])]
        lines += [*_markdown_table(table), ""] if table else []
        lines += [f"![{heading}]({picture}.svg)", ""] if picture else []
    return "\n".join(lines).rstrip() + "\n"


def page(found: Findings, drawn: dict[str, str]) -> str:
    """The same as HTML, its pictures inside."""
    parts = [f"<h1>Campaign report</h1><p class=verdict>{escape(found.verdict)}</p>"]
    for heading, text, table, picture in _sections(found):
        parts += [f"<h2>{escape(heading)}</h2>", f"<p>{escape(text)}</p>" if text else ""]
        parts += [_html_table(table) if table else "", drawn[picture] if picture else ""]
    return _SHELL.format(body="\n".join(filter(None, parts)))


_SHELL = """<!doctype html>
<html lang="en"><head><meta charset="utf-8"><title>Campaign report</title><style>
body {{ font: 16px/1.5 system-ui, sans-serif; max-width: 56rem; margin: 2rem auto; padding: 0 1rem; color: #222 }}
.verdict {{ background: #f3f3f3; padding: 1rem; border-left: 4px solid #888 }}
table {{ border-collapse: collapse; margin: 1rem 0 }}
td, th {{ padding: .2rem .8rem .2rem 0; text-align: left; border-bottom: 1px solid #ddd; vertical-align: top }}
svg {{ max-width: 100%; height: auto }}
</style></head><body>
{body}
</body></html>
"""


# ---- what both pages hold


def _sections(found: Findings) -> list[tuple[str, str, Table | None, str | None]]:
    """(heading, text, table, picture) in order."""
    s = found.settings
    asked = f"The number of a run is its {SUMMARIES[s.summary]}, chosen before the runs were made; the run is the unit."
    return [
        ("Arms", asked, _arms_table(found), "curves"),
        ("Differences", _differences_text(found), _differences_table(found), "differences"),
        ("Intervals and power", "", _power_table(found), "intervals"),
        ("Runs", "", _runs_table(found), None),
        ("The same models on other problems", _SAME_MODELS, _same_models_table(found), None),
        ("Pooled answers, descriptive only", _POOLED, _pooled_table(found), None),
        ("Costs", _cost_text(found), _cost_table(found), None),
    ]


_SAME_MODELS = (
    "Standard errors over problems, with the answers of these runs paired by problem: how far the difference would "
    "move on other problems. They know nothing of other seeds and decide nothing."
)
_POOLED = (
    "All answers of all runs as if each were independent, which they are not: Fisher's test then finds differences "
    "where there are none. The design effect says how many times fewer answers they are worth."
)


def _arms_table(found: Findings) -> Table:
    heads = ("arm", "runs", "mean", "SD over runs", "lowest", "highest")
    return heads, [
        (a.name, str(len(a.outcomes)), _share(a.mean), _points(a.sd), _share(a.lowest), _share(a.highest))
        for a in found.arms
    ]


def _differences_text(found: Findings) -> str:
    rule = {
        "fixed": "p permutes the signs of the paired differences and the interval is that test's, exact; Holm's "
        "procedure adjusts p for the number of arms.",
        "anytime": "p and the interval are of the e-process over pairs, which holds whenever one looks or stops.",
    }[found.settings.stopping]
    return f"Candidate minus {found.settings.reference}, in points. {rule}"


def _differences_table(found: Findings) -> Table:
    heads = ("candidate", "difference", "interval", "BCa bootstrap", "p", "p adjusted", "e", "recommendation")
    return heads, [_difference_row(c) for c in found.contrasts]


def _difference_row(contrast: Contrast) -> list[str]:
    c = contrast.comparison
    bootstrap = "" if c.bootstrap is None else _range(c.bootstrap.low, c.bootstrap.high)
    e = "" if c.anytime is None else f"{c.anytime.e[-1]:.3g}"
    numbers = [_signed(c.difference), _range(c.interval.low, c.interval.high), bootstrap, f"{c.p:.4g}"]
    return [c.candidate, *numbers, f"{c.p_adjusted:.4g}", e, c.recommendation]


def _power_table(found: Findings) -> Table:
    heads = (
        "candidate",
        "pairs",
        "SD of differences",
        "found with 80% power".replace("80%", f"{found.settings.power:.0%}"),
    )
    rows = []
    for contrast in found.contrasts:
        c = contrast.comparison
        needed = "unknown" if c.runs_needed is None else str(c.runs_needed)
        rows.append(
            (
                c.candidate,
                str(len(c.seeds)),
                _points(c.sd),
                _points(c.detectable),
                _points(c.difference_that_matters),
                needed,
            )
        )
    return (*heads, "difference that matters", "seeds to find it"), rows


def _runs_table(found: Findings) -> Table:
    rows = []
    for arm in found.arms:
        for o in arm.outcomes:
            last = rate_of(o.curve[-1])
            rows.append((arm.name, str(o.seed), _share(o.value), str(last), str(o.curve[-1].step)))
    return ("arm", "seed", "summary", "held-out at the last step (Wilson 95%)", "steps"), rows


def _same_models_table(found: Findings) -> Table | None:
    rows = []
    for contrast in found.contrasts:
        same, c = contrast.same_models, contrast.comparison
        if same is None:
            continue
        if same.clustered is not None:
            k = same.clustered
            rows.append(
                (c.candidate, _signed(k.mean), _points(k.se_by_problem), _points(k.se_by_run), _points(k.se_iid), "")
            )
        elif same.newcombe is not None:
            interval = f"McNemar p {same.mcnemar_p:.4g}, Newcombe {_range(same.newcombe.low, same.newcombe.high)}"
            rows.append((c.candidate, _signed(same.newcombe.estimate), "", "", "", interval))
    heads = ("candidate", "difference", "s.e. by problem", "s.e. by run", "s.e. if independent", "of one run an arm")
    return (heads, rows) if rows else None


def _pooled_table(found: Findings) -> Table | None:
    rows = [
        (c.comparison.candidate, f"{p.fisher_p:.4g}", f"{p.design_effect:.1f}", str(p.answers), f"{p.effective:.0f}")
        for c in found.contrasts
        if (p := c.pooled) is not None
    ]
    return (("candidate", "Fisher p", "design effect", "answers per arm", "worth"), rows) if rows else None


def _cost_text(found: Findings) -> str:
    hours = found.wall_seconds / 3600
    failed = f" Failed: {', '.join(found.failed)}." if found.failed else ""
    return f"All attempts together took {hours:.2f} hours of wall-clock time.{failed}"


def _cost_table(found: Findings) -> Table:
    heads = ("arm", "tokens sampled", "tokens trained", "hours", "money")
    return heads, [_cost_row(a, priced=any(found.settings.prices.model_dump().values())) for a in found.arms]


def _cost_row(arm: ArmFindings, *, priced: bool) -> list[str]:
    cost = arm.cost
    money = f"{arm.money:.4g}" if priced else "no price given"
    return [arm.name, f"{cost.sampled_tokens:,}", f"{cost.trained_tokens:,}", f"{cost.seconds / 3600:.2f}", money]


# ---- cells


def _share(value: float) -> str:
    return f"{value:.1%}"


def _points(value: float | None) -> str:
    return "unknown" if value is None or not isfinite(value) else f"{100 * value:.2f}"


def _signed(value: float) -> str:
    return f"{100 * value:+.2f}"


def _range(low: float, high: float) -> str:
    return f"{_signed(low)} to {_signed(high)}" if isfinite(low) else "too few pairs"


def _markdown_table(table: Table) -> list[str]:
    heads, rows = table
    return [f"| {' | '.join(heads)} |", "|" + "---|" * len(heads), *(f"| {' | '.join(row)} |" for row in rows)]


def _html_table(table: Table) -> str:
    heads, rows = table
    body = "".join(f"<tr>{''.join(f'<td>{escape(c)}</td>' for c in row)}</tr>" for row in rows)
    return f"<table><tr>{''.join(f'<th>{escape(h)}</th>' for h in heads)}</tr>{body}</table>"
