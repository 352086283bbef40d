"""A few trials of each set of kill_anywhere.py; fifty are in benchmarks/results/chaos.jsonl."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]


@pytest.mark.slow
@pytest.mark.parametrize(("which", "count"), [("kill", 4), ("term", 2), ("disk", 2), ("size", 1)])
def test_a_run_that_is_struck_anywhere_ends_as_if_it_had_not_been(which, count):
    seed = os.environ.get("CHAOS_SEED", "1")
    done = subprocess.run(
        [
            sys.executable,
            ROOT / "tests/chaos/kill_anywhere.py",
            f"--set={which}",
            f"--trials={count}",
            f"--seed={seed}",
        ],
        capture_output=True,
        text=True,
        check=False,
    )
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["equal"] == row["trials"] == count
    assert sum(row["struck"].values()) >= 1
