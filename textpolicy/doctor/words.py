"""Write a report in words: for the command, for the last lines of a run, and as JSON."""

from __future__ import annotations

import json
from dataclasses import asdict

from .._system.terminal import columns, counted, example, wrap
from .rules import Report

_WIDTH = 100  # columns, unless the terminal has fewer


def full(report: Report, name: str) -> str:
    """Return every finding on the run called ``name`` with its evidence, and the rules that could not be checked."""
    verdict = f"{len(report.findings)} found something" if report.findings else "nothing found"
    width = min(columns() or _WIDTH, _WIDTH)
    steps, rules = counted(report.steps, "step"), counted(len(report.looked), "rule")
    lines = [wrap(f"{name}: {steps}, {rules} checked, {verdict}", columns(), "  ")]
    for number, finding in enumerate(report.findings, 1):
        lines += ["", f"{number}. {finding.name}"]
        evidence = ", ".join(f"{name} {value:.4g}" for name, value in finding.evidence.items())
        for head, text in (("", finding.what), ("to change: ", finding.change), ("evidence: ", evidence)):
            if text:
                lines.append(wrap(f"   {head}{text}", width, "   "))
        for shown in finding.examples:
            end = f"  reward {shown.reward:g}{', cut off' if shown.truncated else ''}"
            lines.append(example(shown.prompt, shown.text, end, width, f"   step {shown.step}: "))
    if report.blind:
        unchecked = (wrap(f"  {rule}: {reason}", width, "    ") for rule, reason in report.blind)
        lines += ["", "Could not be checked:", *unchecked]
    return "\n".join(lines)


def last_lines(report: Report) -> list[str]:
    """Return one line per finding, for the end of a run."""
    if report.findings:
        return [f"doctor: {f.what} To change it: {f.change}." for f in report.findings]
    unchecked = f"; {len(report.blind)} could not be checked" if report.blind else ""
    return [f"doctor: nothing found by {len(report.looked)} rules{unchecked}"]


def as_json(report: Report) -> str:
    """Return the report for a program to read; numbers that are not finite become null."""
    finite = json.loads(json.dumps(asdict(report)), parse_constant=lambda name: None)  # NaN, Infinity, -Infinity
    return json.dumps(finite, indent=2)
