"""The doctor: rules over what a run recorded, which say in plain words what is wrong and what to change."""

from .facts import Completions, Facts, Look, Settings, read_facts
from .finding import Example, Finding
from .rules import RULES, Report, Rule, examine

__all__ = [
    "RULES",
    "Completions",
    "Example",
    "Facts",
    "Finding",
    "Look",
    "Report",
    "Rule",
    "Settings",
    "examine",
    "read_facts",
]
