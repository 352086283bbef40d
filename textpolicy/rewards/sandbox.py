"""Runs programs that a model wrote, in a process with few rights, and rewards what they print."""

from __future__ import annotations

import json
import math
import os
import re
import signal
import subprocess
import sys
import tempfile
import time
from collections.abc import Mapping, Sequence
from contextlib import suppress
from dataclasses import dataclass
from pathlib import Path
from typing import IO, Any

from ..errors import RewardError, UserError
from . import confine
from .registry import reward

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """What a program may use. Over a limit its own calls fail, or it is killed."""

    seconds: float = 5.0  # of wall-clock time, its start included; CPU time is limited to the next whole second
    memory: int = 512 * MIB  # bytes of address space
    output: int = MIB  # bytes of standard output, of standard error, and of each file it writes
    open_files: int = 32
    writes: bool = False  # whether it may write files, in a folder of its own that is removed
    confined: bool = True  # False: resource limits alone, which refuse neither files nor the network


@dataclass(frozen=True, slots=True)
class Ran:
    """How a program ended."""

    exit_code: int  # 0: well; below 0: by that signal
    stdout: str
    stderr: str
    seconds: float  # wall-clock
    timed_out: bool = False

    @property
    def ok(self) -> bool:
        """Whether the program ended by itself and without an error."""
        return self.exit_code == 0 and not self.timed_out


def run_python(program: str, stdin: str = "", limits: Limits = Limits()) -> Ran:
    """Run the text of a Python ``program`` in a process of its own, and wait for it.

    It sees an empty folder, the standard library and what is installed beside this package, and starts no
    processes or threads. With ``confined`` (Linux 5.13 or later on x86_64 or arm64: Landlock and seccomp) it
    reads no other files, writes none, and has no network. What this does not protect from: docs/02_rewards.md.

    Raises UserError where the system cannot confine, RewardError when the process could not be started.
    """
    _refuse_unusable(limits)
    with tempfile.TemporaryDirectory(prefix="textpolicy-") as outside:
        folder = Path(outside, "folder")
        folder.mkdir()
        path = Path(outside, "program.py")
        path.write_text(program, encoding="utf-8", errors="surrogatepass")
        with _file(outside, stdin) as given, _file(outside) as out, _file(outside) as err:
            ran, ready = _waited(_settings(path, folder, limits), folder, (given, out, err), limits)
            texts = [_read(file, limits.output) for file in (out, err)]
    if not ready and not ran.timed_out:
        raise RewardError(f"the sandbox did not start: {texts[1].strip()[-300:]!r}; mend that, or raise its limits")
    return Ran(ran.exit_code, texts[0], texts[1], ran.seconds, ran.timed_out)


def _settings(program: Path, folder: Path, limits: Limits) -> dict[str, Any]:
    return {
        "program": str(program),
        "folder": str(folder),
        "parent": os.getpid(),
        "writes": limits.writes,
        "confined": limits.confined,
        "limits": {
            "RLIMIT_CPU": math.ceil(limits.seconds),
            "RLIMIT_AS": limits.memory,
            "RLIMIT_FSIZE": limits.output,
            "RLIMIT_NOFILE": limits.open_files,
            "RLIMIT_NPROC": 0,
            "RLIMIT_CORE": 0,
        },
    }


def _waited(settings: dict[str, Any], folder: Path, files: Sequence[IO[bytes]], limits: Limits) -> tuple[Ran, bool]:
    """How the process ended, and whether it had been confined by then."""
    reading, writing = os.pipe()
    started = time.perf_counter()
    with open(reading, "rb") as ready:
        try:
            process = subprocess.Popen(
                [sys.executable, "-I", "-B", confine.__file__, json.dumps(settings | {"ready": writing})],
                cwd=folder,
                env={"PATH": "", "HOME": str(folder), "TMPDIR": str(folder), "OPENBLAS_NUM_THREADS": "1"},
                stdin=files[0],
                stdout=files[1],
                stderr=files[2],
                pass_fds=[writing],
                start_new_session=True,
            )
        finally:
            os.close(writing)
        timed_out = _late(process, limits.seconds)
        seconds = time.perf_counter() - started
        os.set_blocking(ready.fileno(), False)  # unconfined, a child of it may hold the other end
        return Ran(process.returncode, "", "", seconds, timed_out), ready.read(len(confine.READY)) == confine.READY


def _late(process: subprocess.Popen[bytes], seconds: float) -> bool:
    """Wait for the process, and kill its session when ``seconds`` are over or anything goes wrong."""
    try:
        process.wait(seconds)
        return False
    except subprocess.TimeoutExpired:
        return True
    finally:
        with suppress(ProcessLookupError, PermissionError):  # nothing is left of it
            os.killpg(process.pid, signal.SIGKILL)
        process.wait()


def _file(folder: str, text: str = "") -> IO[bytes]:
    """A file without a name, closed by the caller: the program has it open and nothing else."""
    file = tempfile.TemporaryFile(dir=folder)  # noqa: SIM115 (the caller's "with" closes it)
    file.write(text.encode("utf-8", "surrogatepass"))
    file.seek(0)
    return file


def _read(file: IO[bytes], size: int) -> str:
    file.seek(0)
    return file.read(size).decode("utf-8", "replace")


def _refuse_unusable(limits: Limits) -> None:
    if not limits.seconds > 0:
        raise UserError(f"the sandbox's limit is {limits.seconds} s; give a positive number of seconds")
    if limits.confined and not confine.can_confine():
        raise UserError(
            "this system cannot confine a program to its folder and off the network (that takes Linux 5.13 with "
            "Landlock, on x86_64 or arm64); run rewards in a virtual machine with Limits(confined=False)"
        )


# ---- the reward

_BLOCK = re.compile(r"^```[ \t]*(?:python|py)?[ \t]*\n(.*?)^```", re.DOTALL | re.MULTILINE | re.IGNORECASE)


def extract_program(completion: str) -> str | None:
    """The last fenced Python block of a completion, or None; one that is not closed is no block."""
    blocks = _BLOCK.findall(completion)
    return blocks[-1] if blocks else None


@reward(name="code_output")
def code_output_reward(
    prompt: str,
    completion: str,
    example: Mapping[str, Any],
    limits: Limits = Limits(),
    **_: Any,
) -> dict[str, Any]:
    """Share of example["tests"], each {"input": text, "output": text}, that the completion's program passes.

    The program is the last fenced Python block; it passes when it ends well and prints the output, but for
    white space at the ends of lines and of the text. Correct is all of them; without a program it is 0.
    Raises UserError when the example has no tests.
    """
    tests = example.get("tests") or []
    if not tests:
        raise UserError(f"a code_output example has a list of 'tests', but this one is {dict(example)!r}; give it some")
    program = extract_program(completion)
    passed = 0 if program is None else sum(_passes(program, test, limits) for test in tests)
    return {"reward": passed / len(tests), "is_correct": passed == len(tests)}


def _passes(program: str, test: Mapping[str, str], limits: Limits) -> bool:
    ran = run_python(program, test["input"], limits)
    return ran.ok and _tidy(ran.stdout) == _tidy(test["output"])


def _tidy(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]
