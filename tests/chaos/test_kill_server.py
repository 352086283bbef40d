"""A few trials of kill_server.py; a hundred are in benchmarks/results/chaos.jsonl."""

import json
import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
TRIALS = 3


@pytest.mark.slow
def test_a_server_that_is_killed_between_request_and_result_loses_nothing_and_does_nothing_twice():
    args = [f"--trials={TRIALS}", f"--seed={os.environ.get('CHAOS_SEED', '1')}"]
    script = ROOT / "tests/chaos/kill_server.py"
    done = subprocess.run([sys.executable, script, *args], capture_output=True, text=True, check=False)
    assert done.returncode == 0, done.stderr
    row = json.loads(done.stdout.splitlines()[-1])
    assert row["equal"] == row["trials"] == TRIALS
    assert row["struck"]["kill"] >= TRIALS
