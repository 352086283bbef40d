"""A report in words: for the command, for the last lines of a run, and as JSON."""

from __future__ import annotations

import json
import textwrap
from dataclasses import asdict
from typing import Any

from .finding import Example, Finding
from .rules import Report

_WIDTH, _SHOWN = 100, 60  # columns; characters of a prompt or completion


def full(report: Report, name: str) -> str:
    """Every finding of the run called ``name`` with its evidence, and the rules that could not look."""
    counted = f"{report.steps} steps, {len(report.looked)} rules looked"
    verdict = f"{len(report.findings)} found something" if report.findings else "nothing found"
    lines = [f"{name}: {counted}, {verdict}"]
    for number, finding in enumerate(report.findings, 1):
        lines += ["", *_described(number, finding)]
    if report.blind:
        lines += ["", "Could not look:", *(f"  {rule}: {absent}" for rule, absent in report.blind)]
    return "\n".join(lines)


def last_lines(report: Report) -> list[str]:
    """The same in a line per finding, for the end of a run."""
    if report.findings:
        return [f"doctor: {f.what} To change it: {f.change}." for f in report.findings]
    unable = f"; {len(report.blind)} could not look" if report.blind else ""
    return [f"doctor: nothing found by {len(report.looked)} rules{unable}"]


def as_json(report: Report) -> str:
    """The report for a program to read; a figure that is not finite is null."""
    return json.dumps(_finite(asdict(report)), indent=2)


def _described(number: int, finding: Finding) -> list[str]:
    evidence = ", ".join(f"{name} {value:.4g}" for name, value in finding.evidence.items())
    return [
        f"{number}. {finding.name}",
        *_block("", finding.what),
        *_block("to change: ", finding.change),
        *_block("evidence: ", evidence),
        *(f"   {_shown(example)}" for example in finding.examples),
    ]


def _block(head: str, text: str) -> list[str]:
    """``text`` in lines behind ``head``, indented; nothing for an empty one."""
    return textwrap.wrap(head + text, _WIDTH, initial_indent="   ", subsequent_indent="   ") if text else []


def _shown(example: Example) -> str:
    cut = ", cut off" if example.truncated else ""
    prompt, text = (
        repr(_short(s)) for s in (example.prompt, example.text)
    )  # escaped: a terminal obeys some characters
    return f"step {example.step}: {prompt} -> {text}  reward {example.reward:g}{cut}"


def _short(text: str) -> str:
    return text if len(text) <= _SHOWN else f"{text[: _SHOWN - 3]}..."


def _finite(value: Any) -> Any:
    match value:
        case dict():
            return {key: _finite(inner) for key, inner in value.items()}
        case list() | tuple():
            return [_finite(inner) for inner in value]
        case float():
            return value if value - value == 0 else None
    return value
