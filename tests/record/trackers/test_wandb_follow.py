"""scripts/tinker_wandb_follow.py: following a metrics file while it grows."""

import json
import math
import os
import subprocess
import sys
from pathlib import Path

import pytest

from textpolicy.record.trackers.follow import Follower, follow, log_new

SCRIPT = Path(__file__).parents[3] / "scripts" / "tinker_wandb_follow.py"


def line(step, **figures):
    return json.dumps({"step": step, **figures}) + "\n"


@pytest.fixture
def metrics(tmp_path):
    return tmp_path / "metrics.jsonl"


def add(path, text):
    with path.open("a", encoding="utf-8") as file:
        file.write(text)


def test_a_file_that_is_not_there_yet_has_nothing_new(metrics):
    follower = Follower(metrics)
    assert follower.new() == []
    add(metrics, line(0, loss=1.0))
    assert follower.new() == [{"tinker/step": 0, "tinker/loss": 1.0}]
    assert follower.new() == []


def test_a_line_counts_once_it_is_complete(metrics):
    follower = Follower(metrics)
    complete = line(3, loss=0.5)
    add(metrics, complete[:9])
    assert follower.new() == []
    add(metrics, complete[9:])
    assert follower.new() == [{"tinker/step": 3, "tinker/loss": 0.5}]


def test_every_integer_step_is_logged_once_and_other_lines_are_skipped(metrics):
    add(metrics, line(0, loss=1.0) + "half a li\n" + "[1]\n" + line(0, loss=9.0) + line(1.5) + line(None) + line(True))
    add(metrics, line(1, loss=0.5) + json.dumps({"loss": 2.0}) + "\n" + json.dumps({"kind": "eval", "step": 2}) + "\n")
    assert Follower(metrics).new() == [
        {"tinker/step": 0, "tinker/loss": 1.0},
        {"tinker/step": 1, "tinker/loss": 0.5},
    ]


def test_only_finite_numbers_are_logged(metrics):
    add(metrics, line(0, loss=math.nan, kl=math.inf, large=10**400, note="warm", full=True, tokens=12, scores=[1.0]))
    add(metrics, '{"step": 1, "a": ' + "[" * 9000 + "\n")
    assert Follower(metrics).new() == [{"tinker/step": 0, "tinker/tokens": 12}]


def test_bytes_that_are_not_text_are_skipped(metrics):
    metrics.write_bytes(b"\xff\xfe\n" + line(4).encode())
    assert Follower(metrics).new() == [{"tinker/step": 4}]


def test_a_file_that_was_written_anew_is_read_from_its_start(metrics):
    follower = Follower(metrics)
    add(metrics, line(0, note="x" * 80) + line(1))
    assert len(follower.new()) == 2
    metrics.write_text(line(1) + line(2))
    assert follower.new() == [{"tinker/step": 2}]


def test_it_follows_until_no_step_has_come_for_a_while(metrics):
    now, logged = [0.0], []

    def sleep(seconds):
        now[0] += seconds
        if now[0] in (10, 25):
            add(metrics, line(int(now[0])))

    count = follow(Follower(metrics), logged.append, 5, 20, sleep, lambda: now[0])
    assert count == 2
    assert logged == [{"tinker/step": 10}, {"tinker/step": 25}]
    assert now[0] == 45  # 20 s after the last


def test_existing_rows_can_be_logged_at_once(metrics):
    add(metrics, line(0) + line(1))
    logged = []
    assert log_new(Follower(metrics), logged.append) == 2
    assert logged == [{"tinker/step": 0}, {"tinker/step": 1}]


def run(*flags, **environment):
    return subprocess.run(
        [sys.executable, str(SCRIPT), *flags], capture_output=True, text=True, timeout=120,
        env={**os.environ, **environment},
    )  # fmt: skip


def test_the_script_lists_the_documented_flags():
    output = run("--help").stdout
    flags = "--metrics-path --project --entity --run-name --group --poll-seconds --idle-timeout-seconds --no-follow"
    assert all(flag in output for flag in flags.split())
    assert run().returncode == 2


def test_a_wandb_that_refuses_is_one_sentence_of_the_script(metrics, tmp_path):
    (tmp_path / "wandb.py").write_text("def init(**about):\n    raise ValueError('No API key\\nconfigured.')\n")
    folders = os.pathsep.join([str(tmp_path), *sys.path])
    done = run(f"--metrics-path={metrics}", "--no-follow", PYTHONPATH=folders)
    assert done.returncode == 2
    assert done.stderr == (
        "tinker_wandb_follow: wandb cannot start a run (No API key configured.); log in with 'wandb login', or set "
        "WANDB_MODE=offline\n"
    )


def test_the_script_logs_to_an_offline_run(metrics, tmp_path):
    pytest.importorskip("wandb", reason="installed by pip install 'textpolicy[trackers]'")
    from test_trackers import wandb_history, wandb_records

    add(metrics, line(0, loss=1.0) + line(1, loss=0.5))
    done = run(
        f"--metrics-path={metrics}", "--no-follow", "--run-name=first", "--group=g",
        WANDB_MODE="offline", WANDB_DIR=str(tmp_path), WANDB_SILENT="true",
    )  # fmt: skip
    assert done.returncode == 0, done.stderr
    assert done.stdout.splitlines()[-1] == "2 steps logged"
    records = wandb_records(tmp_path)
    [about] = [r.run for r in records if r.WhichOneof("record_type") == "run"][:1]
    assert (about.project, about.display_name, about.run_group) == ("textpolicy-tinker", "first", "g")
    assert wandb_history(records) == [
        {"tinker/step": 0, "tinker/loss": 1.0},
        {"tinker/step": 1, "tinker/loss": 0.5},
    ]
