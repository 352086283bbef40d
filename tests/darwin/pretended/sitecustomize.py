"""Pretend macOS to textpolicy, in this process and in those that it starts, which inherit PYTHONPATH.

A module of textpolicy that imports one of the modules below gets a stand-in: a Mac's where Darwin and Linux differ,
and the true module's attributes otherwise. Tests and other packages see Linux. What Darwin lacks raises
AttributeError, as there.
"""

import builtins
import fcntl
import os
import platform
import resource
import sys
import types
from importlib import import_module

LACKING = {
    "os": "sched_getaffinity sched_setaffinity O_TMPFILE O_PATH O_DIRECT memfd_create pidfd_open pipe2 eventfd "
    "posix_fadvise copy_file_range splice getrandom setresuid unshare listxattr getxattr",
    "resource": "prlimit RLIMIT_OFILE RLIMIT_RTPRIO RLIMIT_SIGPENDING",
    "signal": "SIGRTMIN SIGRTMAX SIGPWR SIGSTKFLT sigtimedwait pidfd_send_signal",
    "select": "epoll EPOLLIN",
    "fcntl": "F_ADD_SEALS F_GET_SEALS F_SETPIPE_SZ",
    "socket": "AF_NETLINK AF_PACKET SO_PEERCRED",
}
FULL_FSYNC = 51


def setrlimit(which, limits):
    """Refuse what Darwin refuses."""
    if which == resource.RLIMIT_AS:
        raise ValueError("current limit exceeds maximum limit")
    resource.setrlimit(which, limits)


def getrusage(who):
    """Give the peak of memory in bytes, not in KiB."""
    used = resource.getrusage(who)
    figures = {name: getattr(used, name) for name in dir(used) if name.startswith("ru_")}
    return types.SimpleNamespace(**{**figures, "ru_maxrss": used.ru_maxrss * 1024})


def control(descriptor, command, *rest):
    """Know the command that empties the drive's cache."""
    return os.fsync(descriptor) if command == FULL_FSYNC else fcntl.fcntl(descriptor, command, *rest)


INSTEAD = {
    "sys": {"platform": "darwin"},
    "platform": {
        "machine": lambda: "arm64",
        "system": lambda: "Darwin",
        "mac_ver": lambda: ("15.5", ("", "", ""), "arm64"),
        "platform": lambda *_: "macOS-15.5-arm64-arm-64bit",
    },
    "resource": {"setrlimit": setrlimit, "getrusage": getrusage},
    "fcntl": {"fcntl": control, "F_FULLFSYNC": FULL_FSYNC},
}


class StandIn(types.ModuleType):
    """A module as Darwin has it; to set an attribute sets that of the true one."""

    def __init__(self, name):
        super().__init__(name)
        vars(self).update(true=import_module(name), lacking=set(LACKING.get(name, "").split()), **INSTEAD.get(name, {}))

    def __getattr__(self, name):
        if name in self.lacking:
            raise AttributeError(f"module {self.__name__!r} of macOS has no attribute {name!r}")
        return getattr(self.true, name)

    def __setattr__(self, name, value):
        setattr(self.true, name, value)


PACKAGE = os.environ.get("PRETENDED_MAC", "")  # the folder of textpolicy
made, find = {}, builtins.__import__


def imported(name, globals=None, locals=None, fromlist=(), level=0):
    """Import as always; modules of textpolicy get stand-ins."""
    module = find(name, globals, locals, fromlist, level)
    if level == 0 and name in {*LACKING, *INSTEAD} and str((globals or {}).get("__file__", "")).startswith(PACKAGE):
        if name not in made:
            made[name] = StandIn(name)
        return made[name]
    return module


if PACKAGE:
    builtins.__import__ = imported
    assert platform.system() == "Linux" and sys.platform == "linux"  # noqa: PT018 (there is nothing to pretend on a Mac)
