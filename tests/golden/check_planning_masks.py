"""Planning masks from pieces of text, and the built-in lists of grams."""

from __future__ import annotations

from collections.abc import Sequence

from vectors import Answer, Case, UnknownCase

from textpolicy.algorithms.grams import (
    DEFAULT_STRATEGIC_GRAMS,
    get_countdown_strategic_grams,
    get_default_strategic_grams,
)
from textpolicy.algorithms.planning import PlanningGrams, planning_mask, planning_masks

LISTS = {
    "DEFAULT_STRATEGIC_GRAMS": DEFAULT_STRATEGIC_GRAMS,
    "COUNTDOWN_STRATEGIC_GRAMS": get_countdown_strategic_grams(),
}


def check(case: Case) -> list[Answer]:
    if "default" in case.expected:
        return built_in()
    if "grams" not in case.params:
        raise UnknownCase(case.id)
    grams = PlanningGrams(gram_list(case.params["grams"]))
    if "episodes" in case.inputs:
        return [Answer("masks", by_episode(case.inputs["episodes"], grams))]
    mask = planning_mask(case.inputs["pieces"], grams).astype(int).tolist()
    answers = [Answer("mask", mask)]
    if "upstream_mask" in case.expected:
        answers.append(Answer("agree", mask == case.expected["upstream_mask"]))
    return answers


def gram_list(grams: str | list[str]) -> Sequence[str]:
    return LISTS[grams] if isinstance(grams, str) else grams


def by_episode(episodes: list[list[str]], grams: PlanningGrams) -> list[list[int]]:
    flat = iter(planning_masks(episodes, grams).astype(int).tolist())
    return [[next(flat) for _ in pieces] for pieces in episodes]


def built_in() -> list[Answer]:
    default, countdown = get_default_strategic_grams(), get_countdown_strategic_grams()
    return [
        Answer("default", default),
        Answer("countdown", countdown),
        Answer("n_default", len(default)),
        Answer("n_countdown", len(countdown)),
    ]
