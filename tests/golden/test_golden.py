"""Every golden vector, ours or those in the folder that TEXTPOLICY_GOLDEN names, through the public functions."""

from __future__ import annotations

import importlib
import os
from pathlib import Path

import pytest
from vectors import Case, read, verify

FOLDER = Path(os.environ.get("TEXTPOLICY_GOLDEN") or Path(__file__).parent)
CASES = list(read(FOLDER))


@pytest.mark.parametrize("case", [pytest.param(case, id=f"{case.file}/{case.id}") for case in CASES])
def test_vector_is_reproduced(case: Case):
    check = importlib.import_module(f"check_{case.file}")
    verify(case, check.check(case), getattr(check, "NOT_TARGETS", {}))


def test_the_folder_holds_vectors():
    assert CASES, f"{FOLDER} has no vectors; set TEXTPOLICY_GOLDEN to a folder of the same format, or unset it"
