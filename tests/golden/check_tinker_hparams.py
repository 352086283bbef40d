"""Runs the vectors of tinker_hparams.json: learning rates by hidden size."""

from __future__ import annotations

from vectors import Answer, Case, UnknownCase

from textpolicy.tinker.hparams import learning_rate


def check(case: Case) -> list[Answer]:
    """The learning rate for the case's hidden size and family."""
    if not {"hidden", "power"} <= set(case.params):
        raise UnknownCase(case.id)
    return [Answer("lr", learning_rate(**case.params))]
