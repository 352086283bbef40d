"""The script that trains on either engine does, on a Tinker server that it starts itself."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[1]


@pytest.mark.slow
@pytest.mark.parametrize("engine", [["--engine", "mlx"], ["--engine", "tinker", "--serve", "--model", "tiny"]])
def test_one_script_trains_on_both_engines(engine, tmp_path, tinker_server_can_run):
    pytest.importorskip("tinker", reason="the Tinker SDK is not installed (textpolicy[tinker])")
    small = ["--steps", "1", "--prompts", "1", "--test", "2"]
    done = subprocess.run(
        [sys.executable, str(ROOT / "examples" / "15_tinker.py"), *engine, *small],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    printed = done.stdout.splitlines()
    assert [line.split()[0] for line in printed if line[:4] in ("befo", "step", "afte")] == [
        "before:",
        "step",
        "after:",
    ]
