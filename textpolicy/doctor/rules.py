"""The table of rules, and ``examine``: every rule that can look, over one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path

from . import gradient, movement, sampled
from .facts import Facts, read_facts
from .finding import Finding


@dataclass(frozen=True, slots=True)
class Need:
    """Something a rule reads that not every run has."""

    absent: str  # what is said where it is not there
    met: Callable[[Facts], bool]


@dataclass(frozen=True, slots=True)
class Rule:
    """A function from facts to a finding, named as its finding is."""

    look: Callable[[Facts], Finding | None]
    needs: tuple[Need, ...] = ()

    @property
    def name(self) -> str:
        return self.look.__name__

    @property
    def summary(self) -> str:
        """What it looks for, in a sentence."""
        return (self.look.__doc__ or "").splitlines()[0]


@dataclass(frozen=True, slots=True)
class Report:
    """What the doctor saw in a run, and where it could not look."""

    findings: tuple[Finding, ...]
    looked: tuple[str, ...]  # names of rules
    blind: tuple[tuple[str, str], ...]  # (name of a rule, what the run lacks)
    steps: int


def _column(name: str) -> Need:
    return Need(f"its metrics have no {name}", lambda facts: any(name in row for row in facts.rows))


def _steps(count: int) -> Need:
    return Need(f"it has fewer than {count} steps", lambda facts: len(facts.rows) >= count)


MOVED = _column("updated")
RECORDED = Need("its completions are not recorded", lambda facts: facts.completions is not None)
JUDGED = Need("it was never judged twice on validation problems", lambda facts: len(facts.held_out()) > 1)
NAMED_REWARDS = Need(
    "it has one reward", lambda facts: facts.completions is not None and len(facts.completions.scores) > 1
)

RULES: tuple[Rule, ...] = (
    Rule(gradient.no_gradient, (MOVED,)),
    Rule(gradient.not_finite, (MOVED,)),
    Rule(gradient.unscorable, (_column("unscorable"),)),
    Rule(gradient.reward_constant, (MOVED,)),
    Rule(gradient.all_truncated, (MOVED,)),
    Rule(gradient.all_fail, (MOVED,)),
    Rule(gradient.all_pass, (MOVED,)),
    Rule(gradient.groups_agree, (MOVED,)),
    Rule(gradient.short_batches, (_column("batch_full"),)),
    Rule(sampled.stop_never_learned, (_column("truncated"),)),
    Rule(sampled.truncation, (_column("truncated"),)),
    Rule(sampled.empty_completions, (RECORDED,)),
    Rule(sampled.repeated_completions, (RECORDED,)),
    Rule(sampled.looping_completions, (RECORDED,)),
    Rule(sampled.entropy_collapse, (_column("entropy"), _steps(3))),
    Rule(sampled.format_without_answers, (RECORDED, _column("accuracy"), _steps(6))),
    Rule(sampled.one_part_dominates, (RECORDED, NAMED_REWARDS)),
    Rule(movement.on_policy_gap, (_column("on_policy_gap_mean"),)),
    Rule(movement.clips_most, (_column("clip_fraction_high"),)),
    Rule(movement.clips_nothing, (_column("clip_fraction_high"),)),
    Rule(movement.held_out_falls, (JUDGED, _steps(6))),
    Rule(movement.learning_rate_high, (MOVED,)),
    Rule(movement.learning_rate_low, (_column(movement.MEASURED), _steps(4))),
)


def examine(run: Facts | Path | str) -> Report:
    """What is wrong with ``run``, given as facts or as the folder of a run, finished or not.

    The order is that of the rules, causes before what follows from them. Raises UserError for another folder.
    """
    facts = run if isinstance(run, Facts) else read_facts(run)
    if not facts.rows:
        return Report((), (), tuple((rule.name, "it has no step yet") for rule in RULES), 0)
    lacks = [(rule, next((need.absent for need in rule.needs if not need.met(facts)), "")) for rule in RULES]
    able = [rule for rule, absent in lacks if not absent]
    findings = tuple(finding for rule in able if (finding := rule.look(facts)) is not None)
    blind = tuple((rule.name, absent) for rule, absent in lacks if absent)
    return Report(findings, tuple(rule.name for rule in able), blind, len(facts.rows))
