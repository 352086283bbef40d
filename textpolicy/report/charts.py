"""Draw charts as inline SVG with matplotlib; their colours become those of the page, light or dark."""

from __future__ import annotations

import io
import re
import textwrap
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import numpy as np

from .arms import Series

# The colours given to matplotlib, and the page's variables that replace them.
_INK, _FAINT = "#010203", "#010204"
_COLOURS = tuple(f"#0101{n:02x}" for n in range(16, 24))
_VARIABLES = {_INK: "var(--ink)", _FAINT: "var(--faint)", **{c: f"var(--c{i})" for i, c in enumerate(_COLOURS)}}
_STYLE = {
    "svg.fonttype": "none",
    "font.family": "sans-serif",
    "font.size": 9,
    "text.color": _INK,
    "axes.labelcolor": _FAINT,
    "axes.edgecolor": _FAINT,
    "xtick.color": _FAINT,
    "ytick.color": _FAINT,
    "axes.spines.top": False,
    "axes.spines.right": False,
    "legend.frameon": False,
    "path.simplify_threshold": 0.5,
}
_SIZE = (5.2, 2.5)  # inches
_WINDOW = 20  # a noisy curve is also shown as its mean over this part of the steps


def line_chart(
    curves: Sequence[Series], label: str, *, smooth: bool = False, share: bool = False, legend: bool = False
) -> str:
    """Draw the ``curves`` with their intervals, each in its colour; from the ninth arm on dashed.

    ``smooth`` adds running means, ``share`` fixes the axis to 0 to 1, and ``legend`` names the curves below them.
    """
    rows = -(-len(curves) // 2) if legend else 0
    with _axes(label + "".join(c.name for c in curves), _SIZE[1] + 0.17 * rows) as (axes, svg):
        for curve in curves:
            colour, width = _COLOURS[curve.colour % len(_COLOURS)], running_width(len(curve.steps)) if smooth else 1
            style = ("--" if curve.colour >= len(_COLOURS) else "-") if curve.joined else "none"
            name, few = _in_lines(curve.name, 40), len(curve.steps) <= 30
            axes.plot(
                curve.steps, curve.mean, color=colour, lw=1 if width > 1 else 1.6, alpha=0.3 if width > 1 else 1,
                ls=style, marker=("o" if curve.joined else "D") if few else None, ms=3 if curve.joined else 5,
                label=None if width > 1 else name,
            )  # fmt: skip
            if width > 1:
                axes.plot(curve.steps, running_mean(curve.mean, width), color=colour, lw=1.6, ls=style, label=name)
            if curve.low is None or curve.high is None:
                continue
            if curve.joined:
                axes.fill_between(curve.steps, curve.low, curve.high, color=colour, alpha=0.15, lw=0)
            else:
                axes.vlines(curve.steps, curve.low, curve.high, color=colour, lw=1.2)
        axes.set(xlabel="step", ylabel=label)
        axes.xaxis.get_major_locator().set_params(integer=True)
        if share:
            axes.set_ylim(-0.03, 1.03)
        if legend:
            axes.figure.legend(loc="outside lower left", ncols=2, fontsize=8)
    return _for_page(svg)


def stacked_bars(names: Sequence[str], parts: Mapping[str, Sequence[float]], label: str) -> str:
    """Draw one horizontal bar per name, made of ``parts``."""
    labels, places = [_in_lines(name, 26) for name in names], np.arange(len(names))  # names may be equal once cut
    lines = max(label.count("\n") + 1 for label in labels)
    with _axes(label, 0.9 + (0.2 + 0.15 * lines) * len(names)) as (axes, svg):
        left = np.zeros(len(names))
        for i, (part, values) in enumerate(parts.items()):
            axes.barh(places, values, left=left, color=_COLOURS[i % len(_COLOURS)], height=0.6, label=part)
            left += np.asarray(values)
        axes.set_yticks(places, labels)
        axes.invert_yaxis()
        axes.set(xlabel=label)
        axes.legend(fontsize=8, loc="lower left", bbox_to_anchor=(0, 1), ncols=len(parts))
    return _for_page(svg)


def running_width(steps: int) -> int:
    """Return how many values a running mean over ``steps`` steps averages; 1 means no running mean."""
    return max(1, steps // _WINDOW)


def running_mean(values: np.ndarray, width: int) -> np.ndarray:
    """Return the mean of the ``width`` values around each value, fewer at the ends."""
    kernel = np.ones(width)
    return np.convolve(values, kernel, "same") / np.convolve(np.ones(len(values)), kernel, "same")


def _in_lines(name: str, width: int) -> str:
    """Break ``name`` into at most three lines of ``width`` characters, because differing settings can be long."""
    return textwrap.fill(name, width, max_lines=3, placeholder=" ...", break_on_hyphens=False)


@contextmanager
def _axes(salt: str, height: float) -> Iterator[tuple[Any, io.StringIO]]:
    """Give axes in the style of the page, and the text that has their SVG afterwards; ``salt`` makes its ids unique."""
    import matplotlib as mpl
    from matplotlib.figure import Figure

    style: Any = {**_STYLE, "svg.hashsalt": salt}
    with mpl.rc_context(style):
        figure, out = Figure(figsize=(_SIZE[0], height), layout="constrained"), io.StringIO()
        yield figure.subplots(), out
        figure.savefig(out, format="svg", transparent=True, metadata={"Date": None, "Creator": None})


def _for_page(svg: io.StringIO) -> str:
    """Return the SVG element alone, sized and coloured by the page."""
    text = svg.getvalue()
    element = text[text.index("<svg") :]
    element = re.sub(r"<metadata>.*?</metadata>", "", element, flags=re.DOTALL)
    element = re.sub(r'<g id="[^"]*">', "<g>", element)  # other charts have the same ids
    element = re.sub(r'(<svg[^>]*?) width="[^"]*"', r"\1", element, count=1)
    element = re.sub(r'(<svg[^>]*?) height="[^"]*"', r"\1", element, count=1)
    for colour, variable in _VARIABLES.items():
        element = element.replace(colour, variable)
    return re.sub(r"\n\s*", "\n", element)
