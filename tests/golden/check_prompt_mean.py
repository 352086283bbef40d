"""The mean over prompts, then over a prompt's tokens."""

from __future__ import annotations

from vectors import Answer, Case, UnknownCase

from textpolicy.types import loss_weights


def check(case: Case) -> list[Answer]:
    if case.params["mode"] != "prompt-mean":
        raise UnknownCase(case.id)
    weights = loss_weights(case.array("mask"), "prompt-mean", groups=case.inputs["group_ids"])
    return [Answer("scaled", weights * case.array("advantages"))]
