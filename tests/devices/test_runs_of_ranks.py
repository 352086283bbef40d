"""Whole runs of several ranks on this CPU, connected by MLX's ring: equal to a run of one, also when cut short."""

import json
import os
import signal
import socket
import subprocess
import sys
import time
from pathlib import Path

import pytest
from toy_ranks import HERE, train
from toy_run import metrics, outcome, settings

MLX_LAUNCH = Path(sys.executable).parent / "mlx.launch"
pytestmark = pytest.mark.xdist_group("ranks")  # one after the other: each has several processes

if not MLX_LAUNCH.exists():
    pytest.skip("this mlx has no mlx.launch", allow_module_level=True)


def finished(folder, *words, **options):
    code, printed, _ = train(folder, *words, **options)
    assert code == 0, printed
    return printed


@pytest.fixture(scope="module")
def home(tmp_path_factory):
    folder = tmp_path_factory.mktemp("ranks")
    config = settings(folder, steps=4)
    finished(folder, config, "--output", "one", "--quiet", steady=True)
    finished(folder, config, "--output", "two", "--quiet", "--machine.devices", "2", steady=True)
    return folder, config


@pytest.fixture
def free_ports():
    """A function that returns the first of so many free ports in a row."""

    def first(count):
        for port in range(20_000 + os.getpid() % 5_000, 30_000, 16):
            taken = []
            try:
                for n in range(count):
                    taken.append(socket.create_server(("127.0.0.1", port + n)))
                return port
            except OSError:
                continue
            finally:
                for server in taken:
                    server.close()
        raise RuntimeError("no ports are free")

    return first


def agree(one, other):
    """Hold that two runs have the same completions, and the same numbers but for the rounding of float32."""
    import pyarrow.parquet as pq

    rows, others = metrics(one), metrics(other)
    assert len(rows) == len(others)
    for row, same in zip(rows, others, strict=True):
        assert row.keys() == same.keys()
        for name, value in row.items():
            if isinstance(value, float):
                # the largest change of a log-prob, of -3 to -8: sums of ranks differ in rounding, which may be much of
                # a small change
                rounding = 1e-5 if name == "logprob_gap_max" else 1e-6
                assert same[name] == pytest.approx(value, rel=1e-5, abs=rounding), (row["kind"], name)
            else:
                assert same[name] == value, (row["kind"], name)
    for place in ("rollouts", "evals"):
        files = sorted(path.name for path in (one / place).glob("*.parquet"))
        assert files == sorted(path.name for path in (other / place).glob("*.parquet")) != []
        for name in files:
            first, second = (pq.read_table(run / place / name).to_pydict() for run in (one, other))
            assert first["text"] == second["text"]
            assert first["reward"] == second["reward"]


def test_two_ranks_sample_and_learn_what_one_does(home):
    folder, _ = home
    agree(folder / "one", folder / "two")
    rows = [json.loads(line) for line in (folder / "two" / "metrics.jsonl").read_text().splitlines()]
    trained = [row for row in rows if row["kind"] == "train"]
    assert all(row["rank_0_tokens_per_second"] > 0 < row["rank_1_tokens_per_second"] for row in trained)
    assert all(0 < row["scaling"] <= 1 for row in trained)


def test_a_run_begun_on_one_device_goes_on_on_three_and_ends_on_two(home):
    folder, config = home
    words = [config, "--output", "moved", "--quiet"]
    for devices, fault in ((1, "0 update 3 kill"), (3, "2 update 3 kill")):
        code, printed, _ = train(folder, *words, "--machine.devices", devices, fault=fault, steady=True)
        assert code != 0, printed
        words = ["--resume", "moved", "--quiet"]
    finished(folder, *words, "--machine.devices", 2, steady=True)
    agree(folder / "one", folder / "moved")


KILLS = (  # one after the other, each of the run that the last one left; kill_ranks.py has more, at random
    ("1 sampling 5 later", "rank 1 on {host} died while"),
    ("1 reward 2 raise", "rank 1 on {host} failed while scoring completions (it is planted)"),
    ("0 checkpoint 1 kill", "rank 0 on {host} died while taking a step"),
    ("1 sum 2 kill", "rank 1 on {host} died while updating (signal 9)"),
    ("1 update 2 stop", "rank 1 on {host} has not answered for 3 s, while taking a step"),
)


def test_a_run_whose_ranks_die_in_every_phase_ends_as_in_one_go(tmp_path):
    config = settings(tmp_path, steps=4)
    finished(tmp_path, config, "--output", "whole", "--quiet", "--machine.devices", "2")
    options = ["--quiet", "--machine.devices", "2", "--machine.deadline", "6"]
    words = [config, "--output", "cut", *options]
    for fault, said in KILLS:
        code, printed, _ = train(tmp_path, *words, fault=fault)
        assert code != 0, (fault, printed)
        assert f"{said.format(host=socket.gethostname())}" in printed, (fault, printed)
        assert "resume with: textpolicy train --resume cut" in printed, (fault, printed)
        words = ["--resume", "cut", *options]
    finished(tmp_path, *words)
    assert outcome(tmp_path / "cut") == outcome(tmp_path / "whole")


def test_ctrl_c_stops_all_ranks_after_the_same_step(home, tmp_path):
    _, config = home
    command = [sys.executable, str(HERE / "toy_ranks.py"), "train", str(config), "--steps", "400"]
    command += ["--output", "run", "--machine.devices", "2"]
    process = subprocess.Popen(
        command,
        cwd=tmp_path,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
        preexec_fn=lambda: signal.signal(signal.SIGINT, signal.default_int_handler),
    )
    while not (tmp_path / "run" / "rollouts").exists():
        time.sleep(0.1)
        assert process.poll() is None
    os.killpg(process.pid, signal.SIGINT)
    printed, _ = process.communicate(timeout=120)
    assert process.returncode == 130, printed
    assert "stopped by SIGINT after" in printed
    assert "resume with: textpolicy train --resume run" in printed


def launch(ranks, *command, port):
    words = [MLX_LAUNCH, "-n", str(ranks), "--backend", "ring", "--starting-port", str(port), "--", sys.executable]
    return subprocess.run(
        [*words, *map(str, command)], stdin=subprocess.DEVNULL, capture_output=True, text=True, timeout=240, check=False
    )


def test_gradients_of_three_ranks_are_those_of_one_within_2e_6(free_ports):
    found = launch(3, HERE / "ranks_agree.py", port=free_ports(3))
    differences = json.loads(found.stdout.strip().splitlines()[-1])
    assert len(differences) == 24
    # below 1e-6 with AVX-512; without it one process with smaller micro-batches differs from itself by up to 1.6e-6
    assert max(differences.values()) < 2e-6, differences
    assert sum(value > 0 for value in differences.values()) > 10  # they are computed apart


def test_a_rank_whose_machine_lacks_the_folder_resumes_from_what_rank_0_sends(home, tmp_path, free_ports):
    folder, config = home
    words = [config, "--output", "far", "--quiet", "--machine.devices", "2"]
    assert train(folder, *words, fault="1 update 5 kill", steady=True)[0] != 0
    script = tmp_path / "elsewhere.py"
    script.write_text(
        "import os, sys, runpy\n"
        "os.environ['TOY_STEADY'] = '1'\n"
        f"os.chdir([{str(folder)!r}, {str(tmp_path)!r}][int(os.environ['MLX_RANK'])])\n"
        "sys.argv = ['toy', 'train', '--resume', 'far', '--quiet']\n"
        f"runpy.run_path({str(HERE / 'toy_ranks.py')!r}, run_name='__main__')\n"
    )
    found = launch(2, script, port=free_ports(2))
    assert "adapter of step" in found.stdout, found.stdout + found.stderr
    assert not (tmp_path / "far").exists()
    agree(folder / "one", folder / "far")


def test_validate_under_mlx_launch_measures_the_links_and_train_refuses_other_settings(home, tmp_path, free_ports):
    found = launch(2, "-m", "textpolicy", "validate", "--json", port=free_ports(2))
    report = json.loads(found.stdout[found.stdout.index("{") : found.stdout.rindex("}") + 1])
    links = report["checks"]["ranks"]
    assert (links["rank"], links["ranks"], links["backend"]) == (0, 2, "ring")
    assert links["milliseconds_of_a_sum"] > 0
    assert 0 < links["gigabytes_per_second"] < 1000
    script = tmp_path / "unlike.py"
    script.write_text(
        "import os, sys, runpy\n"
        f"sys.argv = ['toy', 'train', {str(home[1])!r}, '--output', 'other', '--seed', os.environ['MLX_RANK']]\n"
        f"runpy.run_path({str(HERE / 'toy_ranks.py')!r}, run_name='__main__')\n"
    )
    found = launch(2, script, port=free_ports(2))
    assert "was given seed 1 and rank 0 on" in found.stdout + found.stderr
    assert not Path("other").exists()
