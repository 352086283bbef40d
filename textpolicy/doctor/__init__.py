"""The doctor: rules that read what a run recorded and say in plain words what is wrong and what to change."""

from .facts import Completions, Evaluation, Facts, Settings, read_facts
from .finding import Example, Finding
from .rules import RULES, Report, Rule, examine

__all__ = [
    "RULES",
    "Completions",
    "Evaluation",
    "Example",
    "Facts",
    "Finding",
    "Report",
    "Rule",
    "Settings",
    "examine",
    "read_facts",
]
