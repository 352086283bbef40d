"""Draw the pictures of a campaign, as SVG text."""

from __future__ import annotations

import io
from math import isfinite
from typing import Any

import numpy as np

from .findings import Findings, curve_of


def figures(found: Findings) -> dict[str, str]:
    """Return SVG by name: the held-out curve of every arm, the differences by seed, and their intervals."""
    return {"curves": curves(found), "differences": differences(found), "intervals": intervals(found)}


def curves(found: Findings) -> str:
    """Draw the mean of each arm over its seeds, in a band from its lowest run to its highest."""
    figure, axes = _sheet(7, 3.6)
    for n, arm in enumerate(found.arms):
        points = curve_of(arm)
        if not points:
            continue
        steps, runs = [step for step, _ in points], np.array([values for _, values in points])
        axes.fill_between(steps, runs.min(axis=1), runs.max(axis=1), color=f"C{n}", alpha=0.15, lw=0)
        label = f"{arm.name} ({len(arm.outcomes)} {'seed' if len(arm.outcomes) == 1 else 'seeds'})"
        axes.plot(steps, runs.mean(axis=1), color=f"C{n}", marker="o", ms=3, label=label)
    axes.set(xlabel="training step", ylabel="held-out problems right", ylim=(0, 1))
    axes.set_title("held-out accuracy; bands from the lowest seed to the highest", fontsize=10)
    _legend(figure, axes)
    return _svg(figure)


def differences(found: Findings) -> str:
    """Draw candidate minus baseline for every seed, in points."""
    figure, axes = _sheet(7, 1.2 + 0.5 * max(4, len(found.contrasts)))
    width, seeds = 0.8 / len(found.contrasts), found.settings.seeds
    for n, contrast in enumerate(found.contrasts):
        c = contrast.comparison
        points = 100 * (np.array(c.candidate_runs) - np.array(c.baseline_runs))
        places = np.array([seeds.index(s) for s in c.seeds]) + (n - (len(found.contrasts) - 1) / 2) * width
        axes.bar(places, points, 0.9 * width, color=f"C{n + 1}", label=f"{c.candidate} - {c.baseline}")
    axes.set_xticks(range(len(seeds)), map(str, seeds))
    axes.axhline(0, color="0.3", lw=0.8)
    axes.set(xlabel="seed", ylabel="difference, points")
    axes.set_title("paired differences by seed", fontsize=10)
    _legend(figure, axes)
    return _svg(figure)


def intervals(found: Findings) -> str:
    """Draw each difference with its interval, its bootstrap interval, and its pairs."""
    figure, axes = _sheet(7, 1.0 + 0.8 * len(found.contrasts))
    for row, contrast in enumerate(found.contrasts):
        c = contrast.comparison
        pairs = 100 * (np.array(c.candidate_runs) - np.array(c.baseline_runs))
        axes.plot(pairs, np.full(len(pairs), row + 0.25), "|", color="0.5", ms=8)
        if isfinite(c.interval.low):
            axes.plot([100 * c.interval.low, 100 * c.interval.high], [row, row], color=f"C{row + 1}", lw=2.5)
        if c.bootstrap is not None:
            ends = [100 * c.bootstrap.low, 100 * c.bootstrap.high]
            axes.plot(ends, [row - 0.2, row - 0.2], color=f"C{row + 1}", lw=1, ls=":")
        axes.plot(100 * c.difference, row, "o", color=f"C{row + 1}")
    axes.axvline(0, color="0.3", lw=0.8)
    axes.set_yticks(range(len(found.contrasts)), [c.comparison.candidate for c in found.contrasts])
    axes.set(xlabel=f"points above {found.settings.reference}", ylim=(-0.6, len(found.contrasts) - 0.4))
    level = f"{1 - found.settings.alpha:.0%}"
    axes.set_title(f"difference: {level} interval, bootstrap (dotted), pairs (ticks)", fontsize=10)
    return _svg(figure)


def _sheet(width: float, height: float) -> tuple[Any, Any]:
    """Return a figure of so many inches and its axes."""
    from matplotlib.figure import Figure  # 0.3 s to import

    figure = Figure(figsize=(width, height), layout="constrained")
    axes = figure.subplots()
    axes.spines[["top", "right"]].set_visible(False)
    return figure, axes


def _legend(figure: Any, axes: Any) -> None:
    """Draw the legend below the axes, where it covers no line."""
    if axes.get_legend_handles_labels()[0]:
        figure.legend(loc="outside lower left", ncols=2, frameon=False, fontsize=9)


def _svg(figure: Any) -> str:
    """Return the figure as an SVG element."""
    import matplotlib

    text = io.StringIO()
    with matplotlib.rc_context({"svg.hashsalt": "textpolicy", "svg.fonttype": "none"}):  # the same bytes every time
        figure.savefig(text, format="svg", metadata={"Date": None})
    svg = text.getvalue()
    return svg[svg.index("<svg") :]
