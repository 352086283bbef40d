"""Kill a run at random moments in every phase, resume it until it is done, and compare it with a run in one go.

    python tests/chaos/kill_anywhere.py --trials 50             kill -9 from outside, and at the edges of phases
    python tests/chaos/kill_anywhere.py --set disk --trials 20  a disk that is full from a random write or sync on
    python tests/chaos/kill_anywhere.py --set size --trials 10  the same by a limit on the size of files (RLIMIT_FSIZE)
    python tests/chaos/kill_anywhere.py --set term --trials 20  SIGTERM or SIGINT, sometimes twice
    python tests/chaos/kill_anywhere.py --stages --trials 20    kill -9 of a run of four stages

Every attempt is a child of this process, forked once everything but mlx is imported, so that it starts in a moment. On
a Mac, and with --spawn, it is a new program: macOS gives a process that was forked no Metal.
"""

from __future__ import annotations

import argparse
import errno
import json
import os
import random
import resource
import select
import shutil
import signal
import sys
import tempfile
import time
from collections import Counter
from collections.abc import Iterator
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

ROOT = Path(__file__).parents[2]
sys.path[:0] = [str(ROOT), str(ROOT / "benchmarks"), str(Path(__file__).parent)]
os.environ.setdefault("OPENBLAS_NUM_THREADS", "1")
os.environ["TOKENIZERS_PARALLELISM"] = "false"

import toy_run  # noqa: E402

LIMIT = 600.0  # seconds an attempt may take, on a machine that is busy with other things
PHASES = ("rollout", "reward", "update", "checkpoint", "rename", "eval", "logging", "start", "finish")
SETS = ("kill", "term", "disk", "size")
SPAWN = False  # whether an attempt is a new program, not a fork


# ---- in the child


def child(argv: list[str], folder: Path, pipe: int, fault: Fault | None) -> None:
    """Run ``textpolicy`` with ``argv``, writing a line to ``pipe`` at each end of each phase; never returns."""
    output = os.open(folder / "output.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
    os.dup2(output, 1)
    os.dup2(output, 2)
    code = 70
    try:
        toy_run.register()
        _probe(pipe)
        if fault is not None:
            FAULTS[fault[0]](fault[1])
        from textpolicy.cli.main import main

        code = main(argv)
    except BaseException:  # noqa: BLE001 (this is the end of a process, which must not become its parent)
        import traceback

        traceback.print_exc()
    sys.stdout.flush()
    sys.stderr.flush()
    os._exit(code)


def _probe(pipe: int) -> None:
    """Tell the parent of every phase."""
    import textpolicy.run.training_run as run
    from textpolicy.mlx.engine import MLXEngine
    from textpolicy.record.metrics_file import MetricsFile
    from textpolicy.rewards.scoring import Scorer
    from textpolicy.run import assembly
    from textpolicy.run.checkpoint import Checkpoints

    def wrap(place: Any, name: str, phase: str) -> None:
        true = getattr(place, name)

        def announced(*arguments: Any, **keywords: Any) -> Any:
            os.write(pipe, f"+{phase}\n".encode())
            try:
                return true(*arguments, **keywords)
            finally:
                os.write(pipe, f"-{phase}\n".encode())

        setattr(place, name, announced)

    wrap(MLXEngine, "sample", "rollout")
    wrap(Scorer, "score", "reward")
    wrap(MLXEngine, "update", "update")
    wrap(MLXEngine, "distil", "update")
    wrap(Checkpoints, "write", "checkpoint")
    wrap(os, "replace", "rename")
    wrap(run, "evaluate", "eval")
    wrap(MetricsFile, "write", "logging")
    wrap(assembly, "build_engine", "start")
    wrap(run.Run, "finish", "finish")


def full_disk(after: int) -> None:
    """From the ``after``-th call on every sync, and every file opened to be written, finds no room."""
    import builtins
    import io

    from textpolicy._system import files

    true_sync, true_open, calls = files.to_disk, io.open, [0]

    def no_room(path: Any = None) -> None:
        calls[0] += 1
        if calls[0] > after:
            raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC), path)

    def to_disk(descriptor: int) -> None:
        no_room()
        true_sync(descriptor)

    def opened(file: Any, mode: str = "r", *arguments: Any, **keywords: Any) -> Any:
        if set(mode) & set("wax+") and "checkpoints" in str(file):
            no_room(str(file))
        return true_open(file, mode, *arguments, **keywords)

    for module in [m for name, m in sys.modules.items() if name.startswith("textpolicy")]:
        if vars(module).get("to_disk") is true_sync:
            module.to_disk = to_disk  # type: ignore[attr-defined]
    io.open = builtins.open = opened


def small_files(size: int) -> None:
    """No file may grow beyond ``size`` bytes."""
    resource.setrlimit(resource.RLIMIT_FSIZE, (size, size))


FAULTS = {"full_disk": full_disk, "small_files": small_files}
Fault = tuple[str, int]  # one of these, and its number


# ---- in the parent


@dataclass
class Attempt:
    """One child process, and its output so far."""

    pid: int
    pipe: int
    began: float
    seen: Counter[str] = field(default_factory=Counter)  # entries of phases
    text: bytes = b""

    @classmethod
    def start(cls, argv: list[str], folder: Path, fault: Fault | None = None) -> Attempt:
        ours, theirs = os.pipe()
        if SPAWN:
            os.set_inheritable(theirs, True)
            told = json.dumps([argv, str(folder), theirs, fault])
            pid = os.posix_spawn(sys.executable, [sys.executable, __file__, "--child", told], os.environ)
        else:
            pid = os.fork()
            if pid == 0:
                os.close(ours)
                child(argv, folder, theirs, fault)
        os.close(theirs)
        return cls(pid, ours, time.perf_counter())

    def events(self) -> Iterator[str]:
        """The lines of the process as it prints them, until it ends."""
        while True:
            left = self.began + LIMIT - time.perf_counter()
            if left <= 0 or not select.select([self.pipe], [], [], left)[0]:
                os.kill(self.pid, signal.SIGKILL)
                self.wait()
                raise RuntimeError(f"an attempt took more than {LIMIT} s")
            if not (some := os.read(self.pipe, 4096)):
                return
            *lines, self.text = (self.text + some).split(b"\n")
            for line in lines:
                yield line.decode()

    def wait(self) -> int:
        """Its exit code; minus the signal that ended it."""
        os.close(self.pipe)
        return os.waitstatus_to_exitcode(os.waitpid(self.pid, 0)[1])


def to_the_end(attempt: Attempt) -> tuple[int, Counter[str], dict[str, float]]:
    """Its code, how often it entered each phase, and how long phases took on average, in seconds."""
    count, since, spent = Counter(), {}, Counter()
    for event in attempt.events():
        phase, now = event[1:], time.perf_counter()
        if event[0] == "+":
            count[phase] += 1
            since[phase] = now
        else:
            spent[phase] += now - since[phase]
    return attempt.wait(), count, {phase: spent[phase] / count[phase] for phase in count}


def struck(attempt: Attempt, phase: str, occurrence: int, delay: float, signals: list[int]) -> int:
    """Send ``signals`` ``delay`` seconds after the phase was entered for the given time; the exit code."""
    entered = 0
    for event in attempt.events():
        if event != f"+{phase}" or entered > occurrence:
            continue
        if entered == occurrence:
            time.sleep(delay)
            for number in signals:
                os.kill(attempt.pid, number)  # it cannot have been reaped, even if it has ended
        entered += 1
    return attempt.wait()


@dataclass
class Chaos:
    """The run under test, and what a run of it in one go does."""

    folder: Path
    config: Path
    random: random.Random
    expected: dict[str, Any] = field(default_factory=dict)
    count: Counter[str] = field(default_factory=Counter)
    duration: dict[str, float] = field(default_factory=dict)

    @classmethod
    def prepare(cls, folder: Path, seed: int, stages: bool = False) -> Chaos:
        chaos = cls(folder, toy_run.settings(folder, stages=stages), random.Random(seed))
        run = chaos.place("whole")
        code, chaos.count, chaos.duration = to_the_end(Attempt.start(chaos.command(run), run))
        if code != 0:
            raise RuntimeError(f"the run in one go ended with {code}:\n{(run / 'output.txt').read_text()}")
        chaos.expected = toy_run.outcome(run / "run")
        return chaos

    def place(self, name: str) -> Path:
        path = self.folder / name
        path.mkdir()
        return path

    def command(self, place: Path) -> list[str]:
        """The same command again, or --resume, by chance, where there is something to resume."""
        run = place / "run"
        if (run / "config.json").exists() and self.random.random() < 0.5:
            return ["train", f"--resume={run}"]
        return ["train", str(self.config), f"--output={run}"]

    def moment(self, phase: str) -> tuple[int, float]:
        """Which entry into the phase, and how many seconds later: often at once, else anywhere in it."""
        delay = 0.0 if self.random.random() < 0.3 else self.random.uniform(0, 1.2 * self.duration[phase])
        return self.random.randrange(self.count[phase]), delay

    def compare(self, place: Path) -> list[str]:
        """What differs from the run in one go, in words."""
        found = toy_run.outcome(place / "run")
        return [name for name in {*found, *self.expected} if found.get(name) != self.expected.get(name)]

    def finish(self, place: Path) -> list[str]:
        """Resume without faults, and compare."""
        if (place / "run" / "summary.json").exists():
            return self.compare(place)
        code, _, _ = to_the_end(Attempt.start(self.command(place), place))
        return [f"it ended with {code}"] if code != 0 else self.compare(place)

    # ---- trials: what was done, and what went wrong

    def kill(self, place: Path, phase: str) -> tuple[Counter[str], list[str]]:
        """One to three kill -9, the first in ``phase``."""
        done: Counter[str] = Counter()
        for n in range(self.random.choice((1, 1, 2, 3))):
            where = phase if n == 0 else self.random.choice(PHASES)
            attempt = Attempt.start(self.command(place), place)
            code = struck(attempt, where, *self.moment(where), [signal.SIGKILL])
            if code == -signal.SIGKILL:
                done[where] += 1
            elif code == 0:  # it was over before that moment came
                break
            else:
                return done, [f"an attempt ended with {code}"]
        return done, self.finish(place)

    def term(self, place: Path, phase: str) -> tuple[Counter[str], list[str]]:
        """SIGTERM or SIGINT, and now and then the same once more."""
        number = self.random.choice((signal.SIGTERM, signal.SIGINT))
        twice = self.random.random() < 0.3
        attempt = Attempt.start(self.command(place), place)
        code = struck(attempt, phase, *self.moment(phase), [number] * (1 + twice))
        polite = {128 + number}  # and where it had nothing yet, or two came at once, the signal's own way
        if code not in {*polite, -number, 0}:
            return Counter(), [f"{number.name} in {phase} ended with {code}"]
        printed = (place / "output.txt").read_text()
        if (
            code in polite
            and "resume with: textpolicy train --resume" not in printed
            and "stopped by Ctrl-C" not in printed
        ):
            return Counter(), ["it did not say how to resume"]
        return Counter({phase: 1}), self.finish(place)

    def disk(self, place: Path, phase: str) -> tuple[Counter[str], list[str]]:
        """A full disk from a random moment on."""
        return self._refused(place, ("full_disk", self.random.randrange(1, 60)))

    def size(self, place: Path, phase: str) -> tuple[Counter[str], list[str]]:
        """Files that may not grow, as with a quota."""
        return self._refused(place, ("small_files", self.random.choice((200, 2000, 6000, 20000, 60000))))

    def _refused(self, place: Path, fault: Fault) -> tuple[Counter[str], list[str]]:
        code, _, _ = to_the_end(Attempt.start(self.command(place), place, fault))
        printed = (place / "output.txt").read_text()
        if code not in (0, 2) or "Traceback" in printed:
            return Counter(), [f"it ended with {code}: {printed[-300:]}"]
        return Counter({"full": int(code == 2)}), self.finish(place)


def trials(chaos: Chaos, which: str, count: int) -> dict[str, Any]:
    """Make ``count`` of them; a row of what came of it."""
    faults, done, began = [], Counter(), time.perf_counter()
    for n in range(count):
        place, kind = chaos.place(f"{which}-{n}"), SETS[n % len(SETS)] if which == "all" else which
        struck_in, wrong = getattr(chaos, kind)(place, PHASES[n % len(PHASES)])
        done += struck_in
        if wrong:
            faults.append({"trial": n, "wrong": wrong})
            print(f"trial {n}: {wrong}\n{(place / 'output.txt').read_text()[-2000:]}", file=sys.stderr)
        else:
            shutil.rmtree(place)
    return {
        "benchmark": "chaos",
        "set": which,
        "trials": count,
        "equal": count - len(faults),
        "faults": faults,
        "struck": dict(sorted(done.items())),
        "seconds": round(time.perf_counter() - began, 1),
    }


def warm_up() -> None:
    """Import what takes long and starts no threads; mlx does, so each child imports it itself."""
    import matplotlib.figure  # noqa: F401
    import numpy.random  # noqa: F401
    import scipy.stats  # noqa: F401
    import transformers.models.auto.tokenization_auto  # noqa: F401

    import textpolicy.config.settings
    import textpolicy.run.summary  # noqa: F401

    if "mlx.core" in sys.modules:
        raise RuntimeError("mlx is imported before the fork")


def main(argv: list[str] | None = None) -> int:
    parser = argparse.ArgumentParser(description=__doc__.splitlines()[0])
    parser.add_argument("--trials", type=int, default=50)
    parser.add_argument("--set", choices=(*SETS, "all"), default="kill", help="all: one of each in turn")
    parser.add_argument("--stages", action="store_true", help="of a run of sft, rft, distill and rl")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--record", action="store_true", help="append the row to benchmarks/results/chaos.jsonl")
    parser.add_argument("--spawn", action="store_true", help="start attempts as new programs, as always on a Mac")
    parser.add_argument("--child", type=json.loads, help=argparse.SUPPRESS)
    args = parser.parse_args(argv)
    if args.child:
        words, place, pipe, fault = args.child
        child(words, Path(place), pipe, fault)
    global SPAWN
    SPAWN = args.spawn or sys.platform == "darwin"
    if not SPAWN:
        warm_up()
    with tempfile.TemporaryDirectory() as folder:
        chaos = Chaos.prepare(Path(folder), args.seed, args.stages)
        row = {**trials(chaos, args.set, args.trials), "seed": args.seed, **({"stages": True} if args.stages else {})}
    if args.record:
        from machine import describe

        with (ROOT / "benchmarks" / "results" / "chaos.jsonl").open("a") as file:
            file.write(json.dumps({**row, **describe()}) + "\n")
    print(json.dumps(row))
    return 0 if row["equal"] == row["trials"] else 1


if __name__ == "__main__":
    sys.exit(main())
