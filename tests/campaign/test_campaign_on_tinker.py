"""A campaign of several seeds on a real Tinker server, killed in the middle and finished by the same command."""

import json
import os
import signal
import subprocess
import sys
import time
from collections import Counter

import pytest

pytest.importorskip("textpolicy.tinker.engine", reason="the Tinker engine is not in this version")

CAMPAIGN = """
seeds = [0, 1]
[base]
model = "{model}"
steps = 3
tinker = {{ base_url = "{url}" }}
optimizer.warmup_steps = 1
rollout = {{ prompts_per_step = 2, group_size = 4, max_tokens = 4 }}
evaluation = {{ every = 3, problems = 4 }}
adapter.rank = 4
[arms.grpo.algorithm]
name = "grpo"
[arms.full.algorithm]
name = "full"
"""


@pytest.fixture
def start(tmp_path, request):
    """Starts the campaign's command; the server is the one that all tests share."""
    server = request.getfixturevalue("tinker_server")
    request.getfixturevalue("no_tinker_account")
    file = tmp_path / "duel.toml"
    file.write_text(CAMPAIGN.format(model=server.name, url=server.url))
    words = ["campaign", "run", str(file), "--engine", "tinker", "--output", str(tmp_path / "out")]
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "TINKER_API_KEY": "tml-not-a-real-key"}
    return lambda: subprocess.Popen(
        [sys.executable, "-m", "textpolicy", *words],
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        text=True,
        env=environment,
    )


@pytest.mark.slow
@pytest.mark.timeout(600)
def test_a_campaign_on_tinker_is_killed_and_finished_without_repeating_a_run(start, tmp_path):
    root = tmp_path / "out"
    first = start()
    deadline = time.monotonic() + 300
    while not (root / "runs" / "full" / "seed0" / "metrics.jsonl").exists():
        assert first.poll() is None, first.communicate()[0] + logs(root)
        assert time.monotonic() < deadline, logs(root)
        time.sleep(0.05)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    again = start()
    output, _ = again.communicate(timeout=280)
    assert again.returncode == 0, output + logs(root)
    finished = Counter()
    for line in (root / "progress.jsonl").read_text().splitlines():
        attempt = json.loads(line)
        finished[attempt["arm"], attempt["seed"]] += attempt["returncode"] == 0
    assert finished == {(arm, seed): 1 for arm in ("grpo", "full") for seed in (0, 1)}
    values = json.loads((root / "analysis" / "analysis.json").read_text())
    assert values["recommendation"] == "insufficient_statistical_evidence"
    assert all(len(o["solved"]) == 4 for arm in values["arms"] for o in arm["outcomes"])
    for folder in root.glob("runs/*/seed?"):
        config = json.loads((folder / "config.json").read_text())
        assert (config["engine"], config["steps"]) == ("tinker", 3)


def logs(root):
    return "".join(path.read_text() for path in sorted(root.glob("logs/*.log")))
