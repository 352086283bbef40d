"""The script inside the sandbox: it gives up its rights, and then runs a program. Standard library only.

POSIX resource limits work everywhere. On Linux, Landlock blocks the file system except for reading Python's own
folders, and seccomp refuses the system calls below. On a Mac, sandbox-exec starts this script under ``SEATBELT``.
"""

from __future__ import annotations

import ctypes
import json
import os
import platform
import resource
import signal
import struct
import sys

# ---- system calls by architecture; they reach the network, other processes, the kernel, or gaps in Landlock

REFUSED = {
    "x86_64": {
        "network": (41, 42, 49, 53),  # socket, connect, bind, socketpair
        "processes": (56, 57, 58, 59, 322, 435),  # clone, fork, vfork, execve, execveat, clone3; threads too
        "signals": (62, 129, 200, 234, 297, 424, 434, 438),  # kill, tkill, tgkill, ..., pidfd_open, pidfd_getfd
        "memory of others": (101, 310, 311, 29, 64, 68, 240),  # ptrace, process_vm_*, shmget, semget, msgget, mq_open
        "limits": (160, 302, 141, 144, 203, 251),  # setrlimit, prlimit64, setpriority, sched_set*, ioprio_set
        "metadata": (90, 91, 92, 93, 94, 132, 188, 189, 190, 197, 198, 199, 235, 260, 261, 268, 280, 452),  # chmod, ...
        "kernel": (155, 161, 165, 166, 169, 175, 246, 248, 249, 250, 272, 298, 308, 313, 321, 323, 425, 426, 427),
        "kernel of root": (103, 163, 167, 168, 176, 179, 304, 320, *range(428, 434), 442, 443),  # swapon, mounts, ...
        "clock and names": (159, 164, 170, 171, 172, 173, 227, 305),  # what root could set for the whole system
        "truncation": (76, 437),  # truncate, which Landlock before Linux 6.2 leaves open; openat2, for the same
    },
    "aarch64": {
        "network": (198, 199, 200, 203),
        "processes": (220, 221, 281, 435),
        "signals": (129, 130, 131, 138, 240, 424, 434, 438),
        "memory of others": (117, 270, 271, 180, 186, 190, 194),
        "limits": (164, 261, 140, 119, 122, 30),
        "metadata": (5, 6, 7, 14, 15, 16, 52, 53, 54, 55, 88, 452),
        "kernel": (39, 40, 41, 51, 97, 104, 105, 142, 217, 218, 219, 241, 268, 273, 280, 282, 425, 426, 427),
        "kernel of root": (116, 89, 224, 225, 106, 60, 265, 294, *range(428, 434), 442, 443),
        "clock and names": (112, 161, 162, 170, 171, 266),
        "truncation": (45, 437),
    },
}
OPENS = {"x86_64": {2: 1, 257: 2}, "aarch64": {56: 2}}  # open and openat, and which argument holds the flags
AUDIT_ARCH = {"x86_64": 0xC000003E, "aarch64": 0xC00000B7}
X32 = 0x40000000  # x86_64 numbers from here on are the same calls once more
CREATE_RULESET, ADD_RULE, RESTRICT_SELF = 444, 445, 446  # Landlock, on every architecture
READ = 1 << 2 | 1 << 3  # of files and folders
WRITE_BY_VERSION = {1: 0x1FFF, 2: 0x3FFF, 3: 0x7FFF, 4: 0x7FFF}  # all rights that Landlock knows, in version 5 0xFFFF
WRITE_FILE = 1 << 1 | 1 << 14  # to write a file, and to empty it
SYSTEM_FOLDERS = ("/usr", "/lib", "/lib64", "/dev/null", "/dev/zero", "/dev/urandom", "/dev/stdin")
EPERM = 0x00050001  # the call fails with error 1
READY = b"ready"

# ---- what macOS allows a program; everything else is denied, such as the network and to start a process

SANDBOX_EXEC = "/usr/bin/sandbox-exec"
SEATBELT = """(version 1)
(deny default)
; sandbox-exec starts Python, and a Python that is a framework starts the one inside it
(allow process-exec (literal (param "PYTHON")) (subpath (param "BASE")))
(allow process-info* (target self))
(allow signal (target self))
(allow file-read-metadata file-test-existence file-map-executable)
(allow file-read*
  (literal "/") (subpath (param "PREFIX")) (subpath (param "BASE")) (literal (param "PYTHON"))
  (literal (param "SCRIPT")) (literal (param "PROGRAM")) (subpath (param "FOLDER"))
  (subpath "/usr/lib") (subpath "/usr/share") (subpath "/System/Library") (subpath "/System/Cryptexes")
  (subpath "/System/Volumes/Preboot/Cryptexes") (subpath "/Library/Apple") (subpath "/private/var/db/dyld")
  (subpath "/private/var/db/timezone") (literal "/private/etc/localtime")
  ; where Homebrew, MacPorts and Nix have the libraries of their Pythons
  (subpath "/opt/homebrew/Cellar") (subpath "/opt/homebrew/opt") (subpath "/opt/homebrew/lib")
  (subpath "/usr/local/Cellar") (subpath "/usr/local/opt") (subpath "/usr/local/lib")
  (subpath "/opt/local/lib") (subpath "/nix/store")
  (literal "/dev/null") (literal "/dev/zero") (literal "/dev/random") (literal "/dev/urandom")
  (literal "/dev/stdin") (literal "/dev/fd/0"))
(allow file-write-data
  (literal "/dev/null") (literal "/dev/stdout") (literal "/dev/stderr") (literal "/dev/fd/1") (literal "/dev/fd/2"))
(allow sysctl-read
  (sysctl-name-prefix "hw.") (sysctl-name-prefix "machdep.cpu.") (sysctl-name-prefix "kern.os")
  (sysctl-name "kern.version") (sysctl-name "kern.hostname") (sysctl-name "kern.argmax")
  (sysctl-name "kern.maxfilesperproc") (sysctl-name "kern.usrstack64") (sysctl-name "kern.secure_kernel")
  (sysctl-name "sysctl.proc_cputype"))
"""
SEATBELT_WRITES = '(allow file-write* (subpath (param "FOLDER")))\n'


def seatbelt(program: str, folder: str, writes: bool) -> list[str]:
    """Return the words before a command of this Python that confine it on a Mac; ``writes`` in ``folder`` alone.

    Seatbelt compares paths without links, so those that go into the profile have none.
    """
    paths = {
        "PYTHON": sys.executable,
        "PREFIX": sys.prefix,
        "BASE": sys.base_prefix,
        "SCRIPT": __file__,
        "PROGRAM": program,
        "FOLDER": folder,
    }
    given = [f"-D{name}={os.path.realpath(path)}" for name, path in paths.items()]
    return [SANDBOX_EXEC, "-p", SEATBELT + SEATBELT_WRITES * writes, *given, "--"]


def can_confine() -> bool:
    """Return whether the system can block files, network and other processes (Landlock and seccomp, or Seatbelt)."""
    if sys.platform == "darwin":
        return os.access(SANDBOX_EXEC, os.X_OK)
    return sys.platform == "linux" and platform.machine() in REFUSED and _landlock_version() > 0


def refuse_calls() -> None:
    """Make the refused system calls fail with EPERM; a call of another architecture ends the process.

    Opening a file to read with O_TRUNC, which empties it, fails too: Landlock before Linux 6.2 sees only the reading.
    """
    machine = platform.machine()
    numbers = [n for group in REFUSED[machine].values() for n in group]
    load, equal, at_least, mask, give = 0x20, 0x15, 0x35, 0x54, 0x06
    empties = [step for number, flags in OPENS[machine].items() for step in (
        (equal, 0, 5, number), (load, 0, 0, 16 + 8 * flags), (mask, 0, 0, os.O_TRUNC | os.O_ACCMODE),
        (equal, 1, 0, os.O_TRUNC), (equal, 0, 1, os.O_TRUNC | os.O_ACCMODE), (give, 0, 0, EPERM),
    )]  # fmt: skip
    steps = [(load, 0, 0, 4), (equal, 1, 0, AUDIT_ARCH[machine]), (give, 0, 0, 0x80000000), (load, 0, 0, 0)]
    steps += [(at_least, len(numbers) + len(empties) + 1, 0, X32)]
    steps += [(equal, len(numbers) + len(empties) - i, 0, n) for i, n in enumerate(numbers)]
    steps += [*empties, (give, 0, 0, 0x7FFF0000), (give, 0, 0, EPERM)]  # allow
    code = ctypes.create_string_buffer(b"".join(struct.pack("HBBI", *step) for step in steps))
    program = struct.pack("HxxxxxxP", len(steps), ctypes.addressof(code))
    _checked(_libc().prctl(22, 2, program, 0, 0))


def give_up_files(folder: str, writes: bool) -> None:
    """Give up the file system by Landlock, except for reading Python's folders and ``folder``, which may be written."""
    everything = WRITE_BY_VERSION.get(_landlock_version(), 0xFFFF)
    rights = [(path, READ) for path in (sys.prefix, sys.base_prefix, *SYSTEM_FOLDERS, folder)]
    rights += [("/dev/stdout", WRITE_FILE), ("/dev/stderr", WRITE_FILE)]
    rights += [(folder, everything)] if writes else []
    libc = _libc()
    ruleset = _checked(libc.syscall(CREATE_RULESET, struct.pack("Q", everything), 8, 0))
    for path, right in rights:
        if os.path.exists(path):
            kept = right & everything & (everything if os.path.isdir(path) else WRITE_FILE | 1 << 2)
            opened = os.open(path, os.O_PATH)
            _checked(libc.syscall(ADD_RULE, ruleset, 1, struct.pack("=Qi", kept, opened), 0))
            os.close(opened)
    _checked(libc.prctl(38, 1, 0, 0, 0))  # no new privileges
    _checked(libc.syscall(RESTRICT_SELF, ruleset, 0))
    os.close(ruleset)


def refuse_unless_closed(folder: str) -> None:
    """End this process if it can list ``folder``, which lies outside of what sandbox-exec should have left it."""
    try:
        os.listdir(folder)
    except PermissionError:
        return
    sys.exit("sandbox-exec has not confined this process")


def _landlock_version() -> int:
    return int(_libc().syscall(CREATE_RULESET, None, 0, 1))


def _libc() -> ctypes.CDLL:
    return ctypes.CDLL(None, use_errno=True)


def _checked(result: int) -> int:
    if result < 0:
        raise OSError(ctypes.get_errno(), os.strerror(ctypes.get_errno()))
    return result


def main() -> None:
    """Read settings from the first argument, confine this process, report that it is ready, and run the program."""
    settings = json.loads(sys.argv[1])
    if sys.platform == "linux":  # end as soon as the parent has ended, even by a kill
        _checked(_libc().prctl(1, signal.SIGKILL, 0, 0, 0))
        if os.getppid() != settings["parent"]:
            sys.exit("the process that started this one has ended")
    with open(settings["program"], encoding="utf-8", errors="surrogateescape") as file:
        text = file.read()
    for name, value in settings["limits"].items():  # by their names in ``resource``; soft and hard
        try:
            resource.setrlimit(getattr(resource, name), (value, value))
        except ValueError:  # the system allows less already, or (macOS) has no such limit
            if name != "RLIMIT_AS":
                raise
    if settings["confined"]:
        if sys.platform == "darwin":
            refuse_unless_closed(os.path.dirname(settings["program"]))
        else:
            give_up_files(settings["folder"], settings["writes"])
            refuse_calls()
    os.write(settings["ready"], READY)
    os.close(settings["ready"])
    sys.argv = ["program.py"]
    exec(compile(text, "program.py", "exec"), {"__name__": "__main__"})


if __name__ == "__main__":
    main()
