"""Write a report in words: for the command, for the last lines of a run, and as JSON."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from typing import Any

from .rules import Report

_WIDTH, _SHOWN = 100, 60  # columns; characters of a prompt or completion


def full(report: Report, name: str) -> str:
    """Return every finding on the run called ``name`` with its evidence, and the rules that could not be checked."""
    verdict = f"{len(report.findings)} found something" if report.findings else "nothing found"
    lines = [f"{name}: {report.steps} steps, {_rules(len(report.looked))} checked, {verdict}"]
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
    unchecked = f"; {_rules(len(report.blind))} could not be checked" if report.blind else ""
    return [f"doctor: nothing found by {_rules(len(report.looked))}{unchecked}"]


def as_json(report: Report) -> str:
    """Return the report for a program to read; numbers that are not finite become null."""
    return json.dumps(_finite(asdict(report)), indent=2)


def _rules(count: int) -> str:
    return f"{count} {'rule' if count == 1 else 'rules'}"


def _finite(value: Any) -> Any:
    """Replace NaN and infinities by None, at any depth."""
    match value:
        case dict():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
        case float():
            return value if value - value == 0 else None
    return value
