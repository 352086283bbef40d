"""Rewards, rollouts, runs, resuming and campaigns on a pretended Mac: the half of macOS that is not Metal."""

import os
import subprocess
import sys
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
pytestmark = pytest.mark.skipif(
    sys.platform != "linux", reason="a Mac is pretended on Linux, where calls of both exist"
)

CHOSEN = [  # what touches the system most: processes, pipes, locks, signals, files
    "tests/rewards/test_scoring.py",
    "tests/rollout",
    "tests/run/test_checkpoint.py",
    "tests/run/test_resume.py::test_a_resumed_run_ends_as_an_uninterrupted_one",
    "tests/run/test_resume.py::test_a_run_begins_in_a_folder_that_finder_has_looked_into",
    "tests/_system/test_faults.py::test_a_model_that_only_stops_trains_to_the_end",
    "tests/campaign/test_campaign_run.py",
]

CHECK = """
import os, platform, resource, subprocess, sys
from textpolicy._system import files, machine, openblas
from textpolicy.rewards import confine, workers
from textpolicy.mlx import blas
assert (machine.sys.platform, confine.platform.machine(), openblas.platform.mac_ver()[0]) == ("darwin", "arm64", "15.5")
assert sys.platform == "linux"  # seen by everybody else
for module, name in ((openblas.os, "memfd_create"), (confine.os, "O_PATH")):
    try:
        getattr(module, name)
    except AttributeError:
        continue
    raise SystemExit(f"{name} is there")
try:
    confine.resource.setrlimit(resource.RLIMIT_AS, (10**12, 10**12))
    raise SystemExit("RLIMIT_AS is taken")
except ValueError:
    pass
assert confine.resource.getrusage(resource.RUSAGE_SELF).ru_maxrss > 20e6  # bytes
synced, true = [], os.fsync
os.fsync = lambda descriptor: synced.append(true(descriptor))  # what the stand-in does for F_FULLFSYNC
with open(sys.argv[1], "w") as file:
    files.to_disk(file.fileno())
assert synced == [None]
assert not confine.can_confine()
blas.set_blas_threads(3)
ask = "from textpolicy._system import machine; print(machine.sys.platform)"
child = subprocess.run([sys.executable, "-c", ask], capture_output=True, text=True)
print(child.stdout.strip(), os.environ["AGX_RELAX_CDM_CTXSTORE_TIMEOUT"])
"""


def pretending(*words):
    paths = [str(ROOT / "tests/darwin/pretended"), str(ROOT), os.environ.get("PYTHONPATH", "")]
    variables = {"PRETENDED_MAC": f"{ROOT / 'textpolicy'}/", "PYTHONPATH": os.pathsep.join(filter(None, paths))}
    return subprocess.run(
        [sys.executable, *words], cwd=ROOT, env={**os.environ, **variables}, capture_output=True, text=True, check=False
    )


def test_the_package_and_its_processes_see_a_mac(tmp_path):
    ran = pretending("-c", CHECK, str(tmp_path / "file"))
    assert (ran.returncode, ran.stdout) == (0, "darwin 1\n"), ran.stderr
    assert ran.stderr.count("has no effect here") == 1


@pytest.mark.slow
@pytest.mark.timeout(900)
def test_rewards_rollouts_runs_and_campaigns_work_on_a_mac():
    ran = pretending("-m", "pytest", "-q", "-p", "no:cacheprovider", "-m", "not slow", *CHOSEN)
    assert ran.returncode == 0, ran.stdout[-4000:]
    assert int(ran.stdout.rsplit(" passed", 1)[0].split()[-1]) > 100, ran.stdout[-500:]
