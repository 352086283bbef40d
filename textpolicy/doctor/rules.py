"""The table of rules, and ``examine``, which applies every rule that can be checked to one run."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from functools import partial
from pathlib import Path

from . import gradient, movement, sampled, speed
from .facts import Facts, read_facts
from .finding import Finding


@dataclass(frozen=True, slots=True)
class Need:
    """The facts that a rule reads and not every run has."""

    absent: str  # the reason given where it is missing
    met: Callable[[Facts], bool]


@dataclass(frozen=True, slots=True)
class Rule:
    """The function from facts to a finding of the rule's name, and the facts it needs."""

    name: str
    check: Callable[[Facts], Finding | None]
    needs: tuple[Need, ...] = ()


@dataclass(frozen=True, slots=True)
class Report:
    """The doctor's findings on a run, and the rules that could not be checked."""

    findings: tuple[Finding, ...]
    looked: tuple[str, ...]  # names of the rules that were checked
    blind: tuple[tuple[str, str], ...]  # (name of a rule that could not be checked, what the run lacks)
    steps: int


def _column(name: str) -> Need:
    return Need(f"its metrics have no {name}", lambda facts: any(name in row for row in facts.rows))


def _steps(count: int) -> Need:
    return Need(f"it has fewer than {count} steps", lambda facts: len(facts.rows) >= count)


MOVED = _column("updated")
RECORDED = Need("its completions are not recorded", lambda facts: bool(facts.completions))
EVALUATED = Need(
    "it was not evaluated twice on validation problems", lambda facts: len(facts.held_out("validation")) > 1
)
NAMED_REWARDS = Need(
    "it has one reward", lambda facts: facts.completions is not None and len(facts.completions.scores) > 1
)

RULES: tuple[Rule, ...] = (
    Rule("no_gradient", gradient.no_gradient, (MOVED,)),
    Rule("not_finite", gradient.not_finite, (MOVED,)),
    Rule("unscorable", gradient.unscorable, (_column("unscorable"),)),
    *(Rule(name, partial(gradient.no_signal, rule=name), (MOVED,)) for name in gradient.CAUSES),
    Rule("short_batches", gradient.short_batches, (_column("batch_full"),)),
    Rule("stop_never_learned", sampled.stop_never_learned, (_column("truncated"),)),
    Rule("truncation", sampled.truncation, (_column("truncated"),)),
    Rule("empty_completions", sampled.empty_completions, (RECORDED,)),
    Rule("repeated_completions", sampled.repeated_completions, (RECORDED,)),
    Rule("looping_completions", sampled.looping_completions, (RECORDED,)),
    Rule("entropy_collapse", sampled.entropy_collapse, (_column("entropy"), _steps(3))),
    Rule("format_without_answers", sampled.format_without_answers, (RECORDED, _column("accuracy"), _steps(6))),
    Rule("one_part_dominates", sampled.one_part_dominates, (RECORDED, NAMED_REWARDS)),
    Rule("on_policy_gap", movement.on_policy_gap, (_column("on_policy_gap_mean"),)),
    Rule("clips_most", movement.clips_most, (_column("clip_fraction_high"),)),
    Rule("clips_nothing", movement.clips_nothing, (_column("clip_fraction_high"),)),
    Rule("held_out_falls", movement.held_out_falls, (EVALUATED, _steps(6))),
    Rule("learning_rate_high", movement.learning_rate_high, (MOVED,)),
    Rule("learning_rate_low", movement.learning_rate_low, (_column(movement.MEASURED), _steps(4))),
    Rule("held_up", speed.held_up),
)


def examine(run: Facts | Path | str) -> Report:
    """Find what is wrong with ``run``, given as facts or as the folder of a run, finished or not.

    Findings are in the order of the rules, causes before their effects. Raises UserError for another folder.
    """
    facts = run if isinstance(run, Facts) else read_facts(run)
    if not facts.rows:
        return Report((), (), tuple((rule.name, "it has no step yet") for rule in RULES), 0)
    lacks = [(rule, next((need.absent for need in rule.needs if not need.met(facts)), "")) for rule in RULES]
    able = [rule for rule, absent in lacks if not absent]
    findings = tuple(finding for rule in able if (finding := rule.check(facts)) is not None)
    blind = tuple((rule.name, absent) for rule, absent in lacks if absent)
    return Report(findings, tuple(rule.name for rule in able), blind, len(facts.rows))
