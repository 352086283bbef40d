"""Runs as subprocesses: order, failures, locks, a kill in the middle, and a real campaign on a tiny model."""

import json
import os
import signal
import subprocess
import sys
import time

import pytest
from tiny_folder import SMALL, write_tiny_model

from textpolicy.campaign.jobs import Job, carry_out, read_attempts
from textpolicy.cli.main import main
from textpolicy.errors import UserError
from textpolicy.record.reader import ended

RUN = """
import json, os, pathlib, sys, time
folder = pathlib.Path(sys.argv[1])
folder.mkdir()
(folder / "began").write_text(os.environ["TEXTPOLICY_RUNS_AT_A_TIME"])
time.sleep(float(sys.argv[2]))
if sys.argv[3:] == ["fail"]:
    sys.exit(3)
(folder / "summary.json").write_text("{}")
"""


@pytest.fixture
def module(tmp_path, monkeypatch):
    """A run of a given length, as a module that subprocesses find."""
    (tmp_path / "pretended_run.py").write_text(RUN)
    paths = [str(tmp_path), os.environ.get("PYTHONPATH", "")]
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join(filter(None, paths)))
    return "pretended_run"


def job(root, module, arm, seed=0, seconds=0.0, *words):
    folder = root / "runs" / arm / f"seed{seed}"
    return Job(arm, seed, folder, (module, str(folder), str(seconds), *words), lambda f: (f / "summary.json").exists())


def quietly(jobs, root, **options):
    return carry_out(jobs, root, log=lambda text: None, **options)


def test_runs_are_made_in_order_and_never_again(tmp_path, module):
    root = tmp_path / "c"
    jobs = [job(root, module, arm, seed) for seed in (0, 1) for arm in ("a", "b")]
    assert [(a.arm, a.seed, a.returncode) for a in quietly(jobs, root)] == [
        ("a", 0, 0),
        ("b", 0, 0),
        ("a", 1, 0),
        ("b", 1, 0),
    ]
    assert quietly(jobs, root) == []
    assert len(read_attempts(root)) == 4
    assert (root / "logs" / "a-seed0.log").exists()


@pytest.mark.parametrize(("parallel", "runs", "told"), [(1, 2, "1"), (2, 3, "2"), (8, 2, "2")])
def test_runs_at_the_same_time_are_told_how_many_share_the_memory(parallel, runs, told, tmp_path, module):
    jobs = [job(tmp_path / "c", module, "a", seed) for seed in range(runs)]
    quietly(jobs, tmp_path / "c", parallel=parallel)
    assert {(j.folder / "began").read_text() for j in jobs} == {told}


def test_two_at_a_time_take_half_as_long(tmp_path, module):
    root = tmp_path / "c"
    jobs = [job(root, module, arm, 0, 1.5) for arm in "ab"]
    started = time.monotonic()
    attempts = quietly(jobs, root, parallel=2)
    assert time.monotonic() - started < sum(a.seconds for a in attempts)


def test_a_failure_stops_later_runs_unless_continue_on_error(tmp_path, module):
    root = tmp_path / "c"
    jobs = [job(root, module, "a"), job(root, module, "b", 0, 0.0, "fail"), job(root, module, "c")]
    assert [a.returncode for a in quietly(jobs, root)] == [0, 3]
    assert not jobs[2].done
    assert [(a.arm, a.returncode) for a in quietly(jobs, root, continue_on_error=True)] == [("b", 3), ("c", 0)]
    assert (root / "runs" / "b" / "seed0.unfinished1" / "began").exists()


def test_a_run_that_ends_well_without_its_files_has_failed(tmp_path, module):
    root = tmp_path / "c"
    lost = Job("a", 0, root / "runs" / "a", (module, str(root / "runs" / "a"), "0"), lambda folder: False)
    assert [a.returncode for a in quietly([lost], root)] == [1]


def test_enough_ends_a_campaign_between_runs(tmp_path, module):
    root = tmp_path / "c"
    jobs = [job(root, module, "a", seed) for seed in range(3)]
    assert len(quietly(jobs, root, enough=lambda: jobs[1].done)) == 2


def test_one_campaign_at_a_time_works_in_a_folder(tmp_path, module, monkeypatch):
    root = tmp_path / "c"
    monkeypatch.setattr("textpolicy.campaign.jobs._PATIENCE", 0.2)
    held = []

    def second():
        if not held:
            held.append(True)
            with pytest.raises(UserError, match="another campaign is running"):
                quietly([], root)
        return False

    quietly([job(root, module, "a")], root, enough=second)
    assert held


def test_what_a_campaign_does_is_said_at_once_into_a_file(tmp_path, module):
    root = tmp_path / "c"
    with (tmp_path / "said").open("w") as said:
        campaign = subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path), str(root), "30"], stdout=said)
    wait_for(root / "runs" / "a" / "seed0" / "began")
    assert (tmp_path / "said").read_text().startswith("a-seed0: started, log in")
    campaign.kill()
    campaign.wait()


@pytest.mark.parametrize("engine", ["mlx", "tinker"])
def test_a_package_that_the_report_needs_is_asked_for_before_the_first_run(engine, tmp_path, monkeypatch, capsys):
    (tmp_path / "duel.toml").write_text(DUEL)
    monkeypatch.setitem(sys.modules, "statsmodels.stats.multitest", None)
    root = tmp_path / "c"
    assert main(["campaign", "run", str(tmp_path / "duel.toml"), f"--output={root}", f"--engine={engine}"]) == 2
    assert "pip install 'textpolicy[analysis]'" in capsys.readouterr().err
    assert not (root / "runs").exists()


def test_folders_of_failed_runs_are_kept_side_by_side(tmp_path, module):
    root = tmp_path / "c"
    for _ in range(3):
        quietly([job(root, module, "a", 0, 0.0, "fail")], root)
    left = sorted(p.name for p in (root / "runs" / "a").iterdir())
    assert left == ["seed0", "seed0.unfinished1", "seed0.unfinished2"]


STUBBORN = """
import pathlib, signal, sys, time
signal.signal(signal.SIGTERM, signal.SIG_IGN if sys.argv[2:] == ["stubborn"] else signal.SIG_DFL)
folder = pathlib.Path(sys.argv[1])
folder.mkdir()
(folder / "began").write_text("")
time.sleep(60)
"""


@pytest.mark.parametrize(("options", "ended_by"), [((), signal.SIGTERM), (("stubborn",), signal.SIGKILL)])
def test_ctrl_c_leaves_no_run_behind(tmp_path, module, monkeypatch, options, ended_by):
    root = tmp_path / "c"
    (tmp_path / "pretended_run.py").write_text(STUBBORN)
    if options:
        monkeypatch.setattr("textpolicy.campaign.jobs._PATIENCE", 0.3)
    folders = [root / "runs" / arm / "seed0" for arm in ("a", "b")]
    started, popen = [], subprocess.Popen

    def noted(*arguments, **keywords):
        started.append(popen(*arguments, **keywords))
        return started[-1]

    def interrupted(text):
        if text.startswith("b-seed0"):
            wait_for(folders[0] / "began")
            raise KeyboardInterrupt

    monkeypatch.setattr(subprocess, "Popen", noted)
    jobs = [Job(f.parent.name, 0, f, (module, str(f), *options), lambda folder: False) for f in folders]
    with pytest.raises(KeyboardInterrupt):
        carry_out(jobs, root, parallel=2, log=interrupted)
    assert [process.poll() for process in started] == [-ended_by]
    assert not folders[1].exists()


# ---- the command, with runs that only write their results


TRAINED = """
import pathlib, sys
from made_runs import write_run
if sys.argv[2] == "fails":
    sys.exit(3)
write_run(pathlib.Path(sys.argv[1]), [0.1, float(sys.argv[2])])
"""
DUEL = "seeds = [0]\n[arms.old]\n[arms.new]\nsteps = 9\n"


@pytest.fixture
def duel(tmp_path, module, monkeypatch):
    """``duel(old, new)``: the exit code of the command, given the accuracy of each arm, or "fails"."""
    (tmp_path / "pretended_run.py").write_text(TRAINED)
    here = os.path.dirname(__file__)
    monkeypatch.setenv("PYTHONPATH", os.pathsep.join([os.environ["PYTHONPATH"], here]))
    (tmp_path / "duel.toml").write_text(DUEL)

    def run(*learns, source=tmp_path / "duel.toml", words=(f"--output={tmp_path / 'c'}",)):
        def jobs(settings, root):
            folders = {arm: root / "runs" / arm / "seed0" for arm in settings.arms}
            pairs = zip(folders.items(), learns, strict=True)
            return [Job(arm, 0, f, (module, str(f), str(learnt)), ended) for (arm, f), learnt in pairs]

        monkeypatch.setattr("textpolicy.cli.campaign.jobs_of", jobs)
        return main(["campaign", "run", str(source), *words])

    return run


def test_a_campaign_that_is_finished_ends_with_its_report(tmp_path, duel, capsys):
    assert duel(0.3, 0.5) == 0
    printed = capsys.readouterr().out
    assert "new scored 20.0 points above old" in printed
    assert f"written to {tmp_path / 'c' / 'analysis'}" in printed
    assert json.loads((tmp_path / "c" / "manifest.json").read_text())["status"] == "completed"


def test_a_campaign_in_which_a_run_failed_resumes_by_the_same_command(tmp_path, duel, capsys):
    assert duel("fails", 0.5) == 1
    assert "failed: the same command resumes with the unfinished runs" in capsys.readouterr().out
    assert json.loads((tmp_path / "c" / "manifest.json").read_text())["status"] == "failed"
    assert not (tmp_path / "c" / "runs" / "new").exists()
    assert duel(0.3, 0.5, source=tmp_path / "c", words=()) == 0  # by its folder, which knows the plan
    assert "new scored 20.0 points above old" in capsys.readouterr().out


def test_a_campaign_by_its_folder_takes_no_other_plan(tmp_path, duel, capsys):
    assert main(["campaign", "plan", str(tmp_path / "duel.toml"), f"--output={tmp_path / 'c'}"]) == 0
    for words in (["--seeds=1"], [f"--output={tmp_path / 'd'}"]):
        assert duel(0.3, 0.5, source=tmp_path / "c", words=words) == 2
        assert "is planned already; give its TOML file beside --output to change it" in capsys.readouterr().err
    assert not (tmp_path / "c" / "runs").exists()


def test_less_than_one_at_a_time_is_refused(tmp_path):
    with pytest.raises(UserError, match="parallel is 0"):
        quietly([], tmp_path, parallel=0)


DRIVER = """
import sys
sys.path.insert(0, sys.argv[1])
from pathlib import Path
from textpolicy.campaign.jobs import Job, carry_out
root = Path(sys.argv[2])
jobs = []
for seed in range(3):
    folder = root / "runs" / "a" / f"seed{seed}"
    words = ("pretended_run", str(folder), sys.argv[3])
    jobs.append(Job("a", seed, folder, words, lambda f: (f / "summary.json").exists()))
carry_out(jobs, root)
"""


def test_a_campaign_killed_in_the_middle_takes_its_run_with_it_and_is_finished_by_the_same_call(tmp_path, module):
    root = tmp_path / "c"

    def driver(seconds):
        return subprocess.Popen([sys.executable, "-c", DRIVER, str(tmp_path), str(root), seconds])

    first = driver("0.5")
    wait_for(root / "runs" / "a" / "seed1" / "began")
    first.kill()
    first.wait()
    again = driver("0.1")
    assert again.wait(60) == 0
    finished = {p.parent.name: p.stat().st_mtime_ns for p in root.glob("runs/a/seed?/summary.json")}
    assert set(finished) == {"seed0", "seed1", "seed2"}
    assert [(a.seed, a.returncode) for a in read_attempts(root)] == [(0, 0), (1, 0), (2, 0)]
    time.sleep(0.6)  # the killed run would have written its summary by now
    assert not (root / "runs" / "a" / "seed1.unfinished1" / "summary.json").exists()


def wait_for(path, patience=60):
    deadline = time.monotonic() + patience
    while not path.exists():
        assert time.monotonic() < deadline, f"{path} never came"
        time.sleep(0.02)


# ---- with a model


@pytest.fixture(scope="module")
def tiny(tmp_path_factory):
    folder = tmp_path_factory.mktemp("models") / "tiny"
    folder.mkdir()
    write_tiny_model(folder)
    return folder


def write_campaign(path, model, seeds, **more):
    small = {**SMALL, "model": str(model), **more}
    lines = [f"seeds = {seeds}"]
    lines += [
        f"base.{key} = {json.dumps(value) if not isinstance(value, dict) else table(value)}"
        for key, value in small.items()
    ]
    lines += ['arms.grpo = {algorithm = {name = "grpo"}}', 'arms.full = {algorithm = {name = "full"}}']
    path.write_text("\n".join(lines) + "\n")
    return path


def table(values):
    return "{" + ", ".join(f"{k} = {json.dumps(v)}" for k, v in values.items()) + "}"


def textpolicy(*words, **options):
    return subprocess.Popen(
        [sys.executable, "-m", "textpolicy", *map(str, words)], stdout=subprocess.PIPE, stderr=subprocess.STDOUT,
        text=True, env={**os.environ, "OPENBLAS_NUM_THREADS": "1"}, **options,
    )  # fmt: skip


@pytest.mark.slow
def test_a_real_campaign_killed_in_the_middle_is_finished_by_the_same_command(tmp_path, tiny):
    file, root = write_campaign(tmp_path / "duel.toml", tiny, [4]), tmp_path / "out"
    first = textpolicy("campaign", "run", file, "--output", root)
    wait_for(root / "runs" / "full" / "seed4" / "metrics.jsonl", 120)
    os.kill(first.pid, signal.SIGKILL)
    first.communicate()
    again = textpolicy("campaign", "run", file, "--output", root)
    printed, _ = again.communicate(timeout=280)
    assert again.returncode == 0, printed
    assert "Recommendation: insufficient_statistical_evidence" in printed
    attempts = [(a.arm, a.seed, a.returncode) for a in read_attempts(root)]
    assert sorted(attempts) == sorted({*attempts})  # every run was finished once
    assert {(a, s) for a, s, code in attempts if code == 0} == {("grpo", 4), ("full", 4)}
    manifest = json.loads((root / "manifest.json").read_text())
    assert manifest["status"] == "completed"
    assert [run["finished"] for run in manifest["runs"]] == [True] * 2
    for run in manifest["runs"]:
        assert run["config"] == json.loads((root / run["folder"] / "config.json").read_text())
    values = json.loads((root / "analysis" / "analysis.json").read_text())
    assert values["arms"][0]["cost"]["trained_tokens"] > values["arms"][0]["cost"]["sampled_tokens"] > 0
    assert all(len(o["solved"]) == 6 for arm in values["arms"] for o in arm["outcomes"])
    orders = [run_order(root / "runs" / arm / "seed4") for arm in ("grpo", "full")]
    assert orders[0] == orders[1]


def run_order(folder):
    """What must agree between arms of one seed: the settings that fix prompts and problems, and where it began."""
    config = json.loads((folder / "config.json").read_text())
    start = [json.loads(line) for line in (folder / "metrics.jsonl").read_text().splitlines()][:2]
    return config["seed"], config["task"], config["evaluation"], [(row["split"], row["accuracy"]) for row in start]


STAGES = """
[arms.rl]
[[arms.taught.stage]]
kind = "sft"
steps = 1
[[arms.taught.stage]]
kind = "rl"
steps = 1
"""


@pytest.mark.slow
def test_arms_may_be_runs_of_stages(tmp_path, tiny):
    file, root = tmp_path / "taught.toml", tmp_path / "out"
    lines = write_campaign(file, tiny, [4], task="addition").read_text().splitlines()
    file.write_text("\n".join(line for line in lines if not line.startswith("arms.")) + STAGES)
    printed, _ = (ran := textpolicy("campaign", "run", file, "--output", root)).communicate(timeout=280)
    assert ran.returncode == 0, printed
    rows = {arm: (root / "runs" / arm / "seed4" / "metrics.jsonl").read_text().splitlines() for arm in ("rl", "taught")}
    trained = {arm: [row for row in map(json.loads, some) if row["kind"] == "train"] for arm, some in rows.items()}
    assert [row.get("stage") for row in trained["rl"]] == [None, None]
    assert [row["stage"] for row in trained["taught"]] == ["sft", "rl"]
    values = json.loads((root / "analysis" / "analysis.json").read_text())
    assert [len(outcome["solved"]) for arm in values["arms"] for outcome in arm["outcomes"]] == [6, 6]
