"""The command ``textpolicy`` with the toy task, for runs of several ranks: python toy_ranks.py train ...

TOY_FAULT="1 sampling 3 kill" has rank 1 kill itself as it samples for the third time; "stop" stops it, "raise" raises
an error there, and "later" kills it up to 0.2 s after that. With TOY_STEADY in the environment the reward draws
nothing, and so is the same whichever rank computes it.
"""

from __future__ import annotations

import importlib
import itertools
import os
import random
import signal
import subprocess
import sys
import threading
import time
from pathlib import Path
from types import SimpleNamespace

sys.path[:0] = [str(Path(__file__).parents[2]), str(Path(__file__).parents[1] / "chaos")]
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import toy_run  # noqa: E402


class _Patches:
    """pytest's, as far as ``quickly`` needs them."""

    def setitem(self, table, key, value):
        table[key] = value

    def setattr(self, name, value):
        module, _, attribute = name.rpartition(".")
        __import__(module)
        setattr(sys.modules[module], attribute, value)


HERE = Path(__file__).parent
PHASES = {  # where each begins: module, class or "", function
    "start": ("textpolicy.run.assembly", "", "build_engine"),
    "sampling": ("textpolicy.mlx.engine", "MLXEngine", "sample"),
    "reward": ("textpolicy.rewards.scoring", "Scorer", "score"),
    "update": ("textpolicy.mlx.engine", "MLXEngine", "update"),
    "sum": ("textpolicy.mlx.engine", "", "summed"),
    "exchange": ("textpolicy.devices.team", "Team", "exchange"),
    "checkpoint": ("textpolicy.run.training_run", "Run", "checkpoint"),
    "rename": ("os", "", "replace"),
    "eval": ("textpolicy.run.training_run", "", "evaluate"),
    "logging": ("textpolicy.record.metrics_file", "MetricsFile", "write"),
    "finish": ("textpolicy.run.training_run", "Run", "finish"),
}


def plant(phase: str, count: int, fault: str) -> None:
    """Have this process suffer the ``fault`` as it enters the ``phase`` for the ``count``-th time."""
    name, inside, function = PHASES[phase]
    place = importlib.import_module(name)
    place = getattr(place, inside) if inside else place
    true, left = getattr(place, function), itertools.count(count, -1)

    def faulty(*arguments, **keywords):
        if next(left) == 1:
            Path("struck").write_text(str(time.time()))
            if fault == "raise":
                raise ValueError("it is planted")
            if fault == "later":
                threading.Timer(random.SystemRandom().uniform(0, 0.2), os.kill, (os.getpid(), signal.SIGKILL)).start()
            else:
                os.kill(os.getpid(), signal.SIGSTOP if fault == "stop" else signal.SIGKILL)
        return true(*arguments, **keywords)

    setattr(place, function, faulty)


def train(folder, *words, fault=None, steady=False, seconds=240):
    """Run ``textpolicy train`` in ``folder``; return its exit code, what it printed, and the seconds that it took.

    Raises RuntimeError where it leaves a process behind.
    """
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1"}
    environment |= {"TOY_FAULT": fault} if fault else {}
    environment |= {"TOY_STEADY": "1"} if steady else {}
    command = [sys.executable, str(HERE / "toy_ranks.py"), "train", *map(str, words)]
    started = time.monotonic()
    process = subprocess.Popen(
        command,
        cwd=folder,
        env=environment,
        text=True,
        stdout=subprocess.PIPE,
        stderr=subprocess.STDOUT,
        start_new_session=True,
    )
    printed, _ = process.communicate(timeout=seconds)  # which waits for all that hold the pipe
    listed = subprocess.run(["ps", "-A", "-o", "pgid=,stat="], capture_output=True, text=True, check=True).stdout
    groups = [line.split() for line in listed.splitlines()]
    if left := [state for group, state in groups if int(group) == process.pid and "Z" not in state]:
        raise RuntimeError(f"{len(left)} processes of the run are left after {printed}")
    return process.returncode, printed, time.monotonic() - started


if __name__ == "__main__":
    toy_run.quickly(_Patches())
    if "TOY_STEADY" in os.environ:
        toy_run.random = SimpleNamespace(random=lambda: 0.5)
    if "TOY_FAULT" in os.environ:
        rank, phase, count, fault = os.environ["TOY_FAULT"].split()
        if rank == os.environ.get("MLX_RANK", "0"):
            plant(phase, int(count), fault)
    from textpolicy.cli.main import main

    sys.exit(main())
