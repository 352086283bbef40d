"""A few trials of every set of kill_anywhere.py; fifty of the first are in benchmarks/results/chaos.jsonl."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRIALS = 4


@pytest.mark.slow
@pytest.mark.parametrize("stages", [[], ["--stages"]])
def test_a_run_that_is_killed_anywhere_ends_as_an_uninterrupted_one(stages):
    args = ["--set=all", f"--trials={TRIALS}", f"--seed={os.environ.get('CHAOS_SEED', '1')}", *stages]
    done = subprocess.run(
        [sys.executable, ROOT / "tests/chaos/kill_anywhere.py", *args], capture_output=True, text=True, check=False
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["equal"] == row["trials"] == TRIALS
    assert sum(row["struck"].values()) >= 1
