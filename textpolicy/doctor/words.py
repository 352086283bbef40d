"""Write a report in words: for the command, for the last lines of a run, and as JSON."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict

from .rules import Report

_WIDTH, _SHOWN = 100, 60  # columns; characters of a prompt or completion


def full(report: Report, name: str) -> str:
    """Return every finding on the run called ``name`` with its evidence, and the rules that could not be checked."""
    verdict = f"{len(report.findings)} found something" if report.findings else "nothing found"
    lines = [f"{name}: {report.steps} steps, {len(report.looked)} rules checked, {verdict}"]
    for number, finding in enumerate(report.findings, 1):
        lines += ["", f"{number}. {finding.name}"]
        evidence = ", ".join(f"{name} {value:.4g}" for name, value in finding.evidence.items())
        for head, text in (("", finding.what), ("to change: ", finding.change), ("evidence: ", evidence)):
            if text:
                lines += textwrap.wrap(head + text, _WIDTH, initial_indent="   ", subsequent_indent="   ")
        for example in finding.examples:
            # Escaped, because a terminal obeys some characters.
            prompt, text = (
                repr(s if len(s) <= _SHOWN else f"{s[: _SHOWN - 3]}...") for s in (example.prompt, example.text)
            )
            cut = ", cut off" if example.truncated else ""
            lines.append(f"   step {example.step}: {prompt} -> {text}  reward {example.reward:g}{cut}")
    if report.blind:
        lines += ["", "Could not be checked:", *(f"  {rule}: {reason}" for rule, reason in report.blind)]
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
