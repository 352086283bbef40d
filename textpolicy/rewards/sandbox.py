"""Run programs that a model wrote, in a process with few rights, and reward what they print."""

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
from contextlib import ExitStack, suppress
from dataclasses import dataclass, replace
from pathlib import Path
from typing import IO, Any

import numpy as np

from .._system.machine import resident
from ..errors import RewardError, UserError
from . import confine
from .answer import answered, code_blocks
from .contract import judge
from .example import shown
from .registry import reward

MIB = 1 << 20


@dataclass(frozen=True, slots=True)
class Limits:
    """The resources of a program. Over a limit its own calls fail, or it is killed."""

    seconds: float = 5.0  # of wall-clock time, its start included; CPU time is limited to the next whole second
    memory: int = 512 * MIB  # bytes of address space
    output: int = MIB  # bytes of standard output, of standard error, and of each file it writes
    open_files: int = 32
    writes: bool = False  # whether it may write files, in a folder of its own that is removed
    confined: bool = True  # False: resource limits alone, which block neither files nor the network


@dataclass(frozen=True, slots=True)
class Ran:
    """The result of running a program."""

    exit_code: int  # 0 is success; below 0, the number of the signal that ended it
    stdout: str
    stderr: str
    seconds: float  # wall-clock
    timed_out: bool = False

    @property
    def ok(self) -> bool:
        """Return whether the program ended by itself and without an error."""
        return self.exit_code == 0 and not self.timed_out


def run_python(program: str, stdin: str = "", limits: Limits = Limits()) -> Ran:
    """Run the text of a Python ``program`` in a process of its own, and wait for it.

    It sees an empty folder, the standard library and what is installed beside this package, and cannot start
    processes or threads. With ``confined`` (Linux 5.13 or later on x86_64 or arm64: Landlock and seccomp; a Mac:
    Seatbelt) it reads no other files, writes none, and has no network. docs/02_rewards.md lists what this does not
    prevent.

    Raises UserError where the system cannot confine, RewardError when the process could not be started.
    """
    if not limits.seconds > 0:
        raise UserError(f"the sandbox's limit is {limits.seconds} s; give a positive number of seconds")
    if limits.confined and not confine.can_confine():
        raise UserError(
            "this system cannot confine a program to its folder and off the network (that takes Linux 5.13 with "
            f"Landlock, on x86_64 or arm64, or a Mac with {confine.SANDBOX_EXEC}); run rewards in a virtual machine "
            "with Limits(confined=False)"
        )
    with tempfile.TemporaryDirectory(prefix="textpolicy-") as outside:
        folder = Path(outside, "folder")
        folder.mkdir()
        path = Path(outside, "program.py")
        path.write_text(program, encoding="utf-8", errors="surrogatepass")
        # files without a name: the program has them open and nothing else
        with ExitStack() as opened:
            given, out, err = (opened.enter_context(tempfile.TemporaryFile(dir=outside)) for _ in range(3))
            given.write(stdin.encode("utf-8", "surrogatepass"))
            given.seek(0)
            ran, started = _run(path, folder, (given, out, err), limits)
            for file in (out, err):
                file.seek(0)
            stdout, stderr = (file.read(limits.output).decode("utf-8", "replace") for file in (out, err))
    if not started and not ran.timed_out:
        raise RewardError(f"the sandbox did not start: {stderr.strip()[-300:]!r}; fix that, or raise its limits")
    return replace(ran, stdout=stdout, stderr=stderr)


def _run(program: Path, folder: Path, files: Sequence[IO[bytes]], limits: Limits) -> tuple[Ran, bool]:
    """Run ``program`` with ``files`` as input, output and error; return also whether it was confined and started."""
    settings = {
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
    command = [sys.executable, "-I", "-B", confine.__file__]
    if limits.confined and sys.platform == "darwin":
        command = [*confine.seatbelt(str(program), str(folder), limits.writes), *command]
    reading, writing = os.pipe()
    started = time.perf_counter()
    with open(reading, "rb") as ready:
        try:
            process = subprocess.Popen(
                [*command, json.dumps(settings | {"ready": writing})],
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
        timed_out = False
        try:
            timed_out = _late(process, limits, files[2])
        finally:  # kill its session when it is late, when anything goes wrong, and after it ended
            with suppress(ProcessLookupError, PermissionError):  # no process of it is left
                os.killpg(process.pid, signal.SIGKILL)
            process.wait()
        seconds = time.perf_counter() - started
        os.set_blocking(ready.fileno(), False)  # unconfined, a child of it may hold the other end
        return Ran(process.returncode, "", "", seconds, timed_out), ready.read(len(confine.READY)) == confine.READY


def _late(process: subprocess.Popen[bytes], limits: Limits, err: IO[bytes]) -> bool:
    """Wait until the program ends, or holds too much memory where that has no limit; return whether it is late."""
    look = math.inf if sys.platform == "linux" else 0.02  # seconds between two looks; Linux has RLIMIT_AS
    until = time.monotonic() + limits.seconds
    while (left := until - time.monotonic()) > 0:
        with suppress(subprocess.TimeoutExpired):
            process.wait(min(left, look))
            return False
        if look < left and resident(process.pid) > limits.memory:
            os.write(err.fileno(), b"MemoryError: the program held %d bytes or more, its limit\n" % limits.memory)
            return False
    return True


# ---- the reward

_PYTHON = re.compile(r"\{?\s*\.?(?:python|py)[\d.]*(?![\w-])", re.IGNORECASE)  # the start of a fence's info


def extract_program(completion: str, thinking: str = "", truncated: bool = False) -> str | None:
    """Return the program of a completion: after the thought, the last fenced block whose language is Python, or None.

    Without any such block, the last one that names no language. A block that is not closed goes on to the end; in a
    ``truncated`` completion it was cut off, and is none.
    """
    blocks = [b for b in code_blocks(answered(completion, thinking) or "") if b.code.strip() or truncated]
    named = [block for block in blocks if _PYTHON.match(block.info)]
    blocks = named or [block for block in blocks if not block.info]
    return blocks[-1].code if blocks and (blocks[-1].closed or not truncated) else None


@reward(name="code_output")
@judge
def code_output_reward(
    prompt: str,
    completion: str,
    example: Mapping[str, Any],
    limits: Limits = Limits(),
    truncated: bool = False,
    thinking: str = "",
    **_: Any,
) -> dict[str, Any]:
    """Return the share of example["tests"], each {"input": text, "output": text}, that the completion's program passes.

    ``extract_program`` finds it; it passes a test when it succeeds and prints the output, apart from
    white space at the ends of lines and of the text. All tests must pass for a correct completion; one without
    a program gets 0. Raises UserError when the example has no tests, or they are something else.
    """
    tests = example.get("tests")
    tests = tests.tolist() if isinstance(tests, np.ndarray) else tests
    fields = {"input", "output"}
    if not (
        isinstance(tests, list | tuple)
        and tests
        and all(isinstance(t, Mapping) and fields <= {*t} and all(isinstance(t[f], str) for f in fields) for t in tests)
    ):
        raise UserError(
            "a code_output example has a list of 'tests', each {'input': text, 'output': text}, but in this one they "
            f"are {shown(tests)}; give it some"
        )
    program, passed = extract_program(completion, thinking, truncated), 0
    if program is not None:
        for test in tests:
            ran = run_python(program, test["input"], limits)
            passed += ran.ok and _stripped_lines(ran.stdout) == _stripped_lines(test["output"])
    return {"reward": passed / len(tests), "is_correct": passed == len(tests)}


def _stripped_lines(text: str) -> list[str]:
    return [line.rstrip() for line in text.strip().splitlines()]
