"""The parts that all peers' scripts share: the task, the reward, and the gate at which the driver allows one step.

Standard library only, so that it runs in any peer's environment.
"""

from __future__ import annotations

import ctypes
import importlib.util
import json
import os
import platform
import resource
import sys
import time
from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from importlib.metadata import PackageNotFoundError, version
from pathlib import Path
from typing import Any

REPOSITORY = Path(__file__).resolve().parents[2]
PACKAGES = (
    "textpolicy",
    "mlx",
    "mlx-lm",
    "mlx-lm-lora",
    "unsloth-zoo",
    "torch",
    "transformers",
    "trl",
    "peft",
    "numpy",
)


@dataclass(frozen=True)
class Task:
    """One workload, the same for every peer."""

    model: str  # folder in the Hugging Face layout, float32
    prompts: list[str]  # each tokenises to its entry in prompt_ids
    prompt_ids: list[list[int]]
    group: int  # completions per prompt
    new_tokens: int  # of every completion; nothing ends one early
    rank: int
    alpha: float
    learning_rate: float
    threads: int
    variant: str  # which of a peer's settings, where it has several
    on_gpu: bool
    at_once: int  # completions in a pass of the update, for peers that want to be told

    @classmethod
    def from_command_line(cls) -> Task:
        return cls(**json.loads(sys.argv[1]))

    @property
    def rows(self) -> int:
        return len(self.prompts) * self.group


def reward_of(text: str) -> float:
    """Cheap, and different for nearly any two completions: the share of the letter e."""
    return (text.count("e") + 1) / (len(text) + 1)


def load_openblas() -> None:
    """Put OpenBLAS below mlx, as ``import textpolicy`` does, whatever the peer is. Call before mlx is imported."""
    if Task.from_command_line().on_gpu:
        return
    spec = importlib.util.spec_from_file_location("_openblas", REPOSITORY / "textpolicy" / "_system" / "openblas.py")
    assert spec is not None
    assert spec.loader is not None
    module = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(module)
    module.preload()
    if module.runs_on_linux_cpu() and not hasattr(ctypes.CDLL(None), "openblas_get_num_threads"):
        raise SystemExit("OpenBLAS did not load; the comparison would be with a slow reference BLAS")


@dataclass(frozen=True)
class Moment:
    """A reading of the clocks, in seconds."""

    clock: float
    mine: float  # of CPU, used by this process
    machine: float  # of CPU, used by everything that runs here

    @classmethod
    def now(cls) -> Moment:
        used = resource.getrusage(resource.RUSAGE_SELF)
        return cls(time.perf_counter(), used.ru_utime + used.ru_stime, cpu_seconds_of_the_machine())


def cpu_seconds_of_the_machine() -> float:
    """CPU time spent on anything since the machine started, over all cores; of this process, except on Linux."""
    if sys.platform != "linux":
        return time.process_time()
    with open("/proc/stat", encoding="ascii") as file:
        user, nice, system, _, _, irq, softirq, *_ = map(int, file.readline().split()[1:])
    return (user + nice + system + irq + softirq) / os.sysconf("SC_CLK_TCK")


class Gate:
    """Stops a peer's own training loop before each step until the driver asks for one. Make it before anything prints.

    The driver writes a line per step to standard input and gets a JSON line back on what was standard
    output; whatever the peer prints goes to standard error.
    """

    def __init__(self) -> None:
        self.answers = os.fdopen(os.dup(1), "w")
        os.dup2(2, 1)
        self.begun: Moment | None = None  # None until the first step

    def watch(self, weights_sum: Callable[[], float], peak_gpu_bytes: Callable[[], float] | None = None) -> None:
        """``weights_sum`` is a number that changes with the trained weights; it is taken outside the time measured."""
        self.sum_weights, self.weights_sum, self.peak_gpu_bytes = weights_sum, weights_sum(), peak_gpu_bytes

    def step(self) -> None:
        """Report the step that ended, if there was one, and wait for leave to begin another."""
        if self.begun is None:
            self._answer({"ready": True, "versions": _versions()})
        else:
            self._answer(self._report(self.begun, Moment.now()))
        if not sys.stdin.readline():
            sys.stdout.flush()
            os._exit(0)  # the driver has what it wants; the peer's own loop has no end
        self.phases = {"rollout": 0.0}
        self.completions: list[int] = []
        self.prompt_tokens: list[int] = []
        self.begun = Moment.now()

    @contextmanager
    def timed(self, phase: str) -> Iterator[None]:
        begin = time.perf_counter()
        yield
        self.phases[phase] = self.phases.get(phase, 0.0) + time.perf_counter() - begin

    def generated(self, prompt_tokens: Sequence[int], completions: Sequence[int]) -> None:
        """Token counts of the prompts as read and of the completions as sampled, one each per row."""
        self.prompt_tokens += [int(n) for n in prompt_tokens]
        self.completions += [int(n) for n in completions]

    def _report(self, begun: Moment, ended: Moment) -> dict[str, Any]:
        before, self.weights_sum = self.weights_sum, self.sum_weights()
        seconds = ended.clock - begun.clock
        mine, all_of_it = ended.mine - begun.mine, ended.machine - begun.machine
        unit = 1 if sys.platform == "darwin" else 1024  # ru_maxrss is in bytes on macOS, in KiB elsewhere
        gpu = {"peak_gpu_gb": self.peak_gpu_bytes() / 1e9} if self.peak_gpu_bytes else {}
        return {
            "seconds": seconds,
            "rollout_seconds": self.phases["rollout"],
            "update_seconds": self.phases.get("update", seconds - self.phases["rollout"]),
            "cpu_seconds": mine,
            "others_cores": max(0.0, all_of_it - mine) / seconds,
            "prompt_tokens": self.prompt_tokens,
            "completion_tokens": self.completions,
            "weights_moved": self.weights_sum != before,
            "peak_rss_gb": resource.getrusage(resource.RUSAGE_SELF).ru_maxrss * unit / 1e9,
            **gpu,
        }

    def _answer(self, message: dict[str, Any]) -> None:
        self.answers.write(json.dumps(message) + "\n")
        self.answers.flush()


def _versions() -> dict[str, str]:
    found = {"python": platform.python_version()}
    for name in PACKAGES:
        try:
            found[name] = version(name)
        except PackageNotFoundError:
            continue
    return found
