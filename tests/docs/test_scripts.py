"""A script that is asked for help gives it, and does nothing else."""

import subprocess
import sys

import pytest
from pages import ROOT

SCRIPTS = [
    path.relative_to(ROOT)
    for folder in ("scripts", "benchmarks", "tests/chaos", "experiments")
    for path in sorted((ROOT / folder).glob("*.py"))
    if '__name__ == "__main__"' in path.read_text(encoding="utf-8")
]
QUICK = [path for path in SCRIPTS if path.parts[0] == "scripts"]


def asked(path, *words):
    return subprocess.run(
        [sys.executable, ROOT / path, *words], capture_output=True, text=True, timeout=120, check=False
    )


def test_the_scripts_are_seen():
    assert {"bootstrap.py", "gemma_file.py", "tinker_campaign.py"} <= {path.name for path in QUICK}


@pytest.mark.parametrize(
    "path", [pytest.param(p, marks=[] if p in QUICK else pytest.mark.slow, id=str(p)) for p in SCRIPTS]
)
def test_help_is_given_and_nothing_is_done(path):
    done = asked(path, "--help")
    assert done.returncode == 0, done.stderr
    assert "usage: " in done.stdout
    assert len(done.stdout) > 100


@pytest.mark.parametrize("path", QUICK, ids=str)
def test_a_flag_that_does_not_exist_is_refused_and_nothing_is_done(path):
    done = asked(path, "--definitely-not")
    assert done.returncode == 2
    assert "definitely-not" in done.stderr or "are required" in done.stderr
    assert "Traceback" not in done.stderr
