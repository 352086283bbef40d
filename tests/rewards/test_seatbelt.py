"""The sandbox on a Mac: what its profile says, and that programs run under it, here enforced by Landlock.

``sandbox-exec`` is a stand-in that reads the profile as Seatbelt would, gives the files that it allows to Landlock, and
starts the command with a Mac pretended. What only macOS itself can answer is in docs/mac.md.
"""

import json
import os
import re
import sys
from functools import partial
from pathlib import Path

import pytest
from seatbelt_profile import parsed

from textpolicy.errors import RewardError, UserError
from textpolicy.rewards import confine, sandbox
from textpolicy.rewards.sandbox import MIB, code_output_reward, run_python

landlock = pytest.mark.skipif(
    sys.platform != "linux" or not confine.can_confine(), reason="the stand-in for Seatbelt needs Linux with Landlock"
)

Limits = partial(sandbox.Limits, seconds=60)  # a busy machine takes seconds to start the stand-in


# Operations and filters of Apple's language that occur in Apple's own profiles of macOS 14.
OPERATIONS = {
    *("default", "process-exec", "process-info*", "signal", "sysctl-read"),
    *(
        "file-read*",
        "file-read-metadata",
        "file-test-existence",
        "file-map-executable",
        "file-write*",
        "file-write-data",
    ),
}
FILTERS = {"literal", "subpath", "target", "sysctl-name", "sysctl-name-prefix"}


def matches(condition, value, given):
    kind, argument = condition
    wanted = given[argument[1].strip('"')] if isinstance(argument, list) else argument.strip('"')
    if kind in ("subpath", "sysctl-name-prefix"):
        return value == wanted or value.startswith(wanted.rstrip("/") + "/" * (kind == "subpath"))
    return value == wanted


def allowed(profile, given, operation, value=""):
    """Return what Seatbelt answers: the last rule that matches decides."""
    answer = None
    for action, *words in profile[1:]:
        operations = [word for word in words if isinstance(word, str)]
        conditions = [word for word in words if isinstance(word, list)]
        named = any(re.fullmatch(name.replace("*", ".*"), operation) for name in operations) or operations == [
            "default"
        ]
        if named and (not conditions or any(matches(c, value, given) for c in conditions)):
            answer = action == "allow"
    return answer


STAND_IN = """#!{python}
import ctypes, json, os, struct, sys
sys.path.insert(0, {tests!r})
from seatbelt_profile import files_of
profile, words = sys.argv[2], sys.argv[3:]
given = dict(word[2:].split("=", 1) for word in words[:words.index("--")])
command = words[words.index("--") + 1 :]
json.dump([sys.argv[1], profile, given, command], open({record!r}, "w"))
if {confines}:
    readable, writable = files_of(profile, given)
    libc = ctypes.CDLL(None, use_errno=True)
    rules = libc.syscall({rules[0]}, struct.pack("Q", 0x1FFF), 8, 0)
    for path, right in [*((p, 12) for p in readable), *((p, 0x1FFE) for p in writable)]:
        if os.path.exists(path):
            kept = right | 1 if os.path.isdir(path) else right & 7
            libc.syscall({rules[1]}, rules, 1, struct.pack("=Qi", kept, os.open(path, os.O_PATH)), 0)
    libc.prctl(38, 1, 0, 0, 0)
    if libc.syscall({rules[2]}, rules, 0):
        sys.exit("no landlock")
pretend = '''import runpy, resource, sys
true = resource.setrlimit
def setrlimit(which, pair):
    if which == resource.RLIMIT_AS:
        raise ValueError("current limit exceeds maximum limit")
    true(which, pair)
resource.setrlimit, sys.platform, sys.argv = setrlimit, "darwin", sys.argv[1:]
runpy.run_path(sys.argv[0], run_name="__main__")'''
at = command.index("-B") + 1
os.execv(command[0], [*command[:at], "-c", pretend, *command[at:]])
"""


@pytest.fixture
def mac(tmp_path, monkeypatch):
    """Return a function that pretends a Mac whose sandbox-exec confines or not, and the path of what that was given."""
    record = tmp_path / "record.json"

    def pretended(confines=True):
        tool = tmp_path / "sandbox-exec"
        rules = (confine.CREATE_RULESET, confine.ADD_RULE, confine.RESTRICT_SELF)
        given = {"tests": str(Path(__file__).parent), "record": str(record), "confines": confines, "rules": rules}
        tool.write_text(STAND_IN.format(python=sys.executable, **given))
        tool.chmod(0o755)
        monkeypatch.setattr(confine, "SANDBOX_EXEC", str(tool))
        monkeypatch.setattr(sys, "platform", "darwin")
        return record

    return pretended


# ---- the profile


@pytest.mark.parametrize("writes", [False, True])
def test_the_profile_is_well_formed_and_every_path_in_it_is_given(writes, monkeypatch, tmp_path):
    link = tmp_path / "link"
    link.symlink_to(tmp_path)
    tool, flag, text, *given, end = confine.seatbelt(str(link / 'a "b" (c).py'), str(link), writes)
    assert (tool, flag, end) == ("/usr/bin/sandbox-exec", "-p", "--")
    given = dict(word.removeprefix("-D").split("=", 1) for word in given)
    assert (given["FOLDER"], given["PROGRAM"]) == (
        os.path.realpath(tmp_path),
        f'{os.path.realpath(tmp_path)}/a "b" (c).py',
    )
    version, first, *rules = parsed(text)
    assert (version, first) == (["version", "1"], ["deny", "default"])
    used = {name.strip('"') for name in re.findall(r"\(param ([^)]*)\)", text)}
    assert used == {*given}
    for action, *words in rules:
        assert action == "allow"
        assert {word for word in words if isinstance(word, str)} <= OPERATIONS
        for kind, argument in (word for word in words if isinstance(word, list)):
            assert kind in FILTERS
            quoted = isinstance(argument, str) and argument[0] == argument[-1] == '"'
            assert quoted or argument == "self" or argument[0] == "param"
    assert ("file-write*" in text) is writes


@pytest.mark.parametrize(
    ("operation", "value", "answer"),
    [
        ("file-read-data", "/Users/me/.ssh/id_ed25519", False),
        ("file-read-data", "/Users/me", False),
        ("file-read-data", "/private/etc/passwd", False),
        ("file-read-data", "/System/Volumes/Data/Users/me/.zshrc", False),
        ("file-read-data", "/usr/lib/dyld", True),
        ("file-read-data", "/usr/libexec/x", False),
        ("file-read-data", "/base/lib/python3.12/os.py", True),
        ("file-read-data", "/baseball", False),
        ("file-read-data", "/tmp/program.py", True),
        ("file-read-data", "/tmp/stdin", False),
        ("file-write-create", "/tmp/folder/x", None),
        ("file-write-create", "/tmp/x", False),
        ("file-write-data", "/tmp/program.py", False),
        ("file-write-data", "/dev/null", True),
        ("file-write-data", "/base/lib/python3.12/os.py", False),
        ("file-write-unlink", "/Users/me/x", False),
        ("network-outbound", "", False),
        ("network-bind", "", False),
        ("system-socket", "", False),
        ("process-fork", "", False),
        ("process-exec", "/bin/sh", False),
        ("process-exec", "/base/Resources/Python.app/Contents/MacOS/Python", True),
        ("mach-lookup", "com.apple.securityd", False),
        ("mach-register", "x", False),
        ("iokit-open", "AGXDeviceUserClient", False),
        ("signal", "others", False),
        ("sysctl-read", "hw.ncpu", True),
        ("sysctl-read", "kern.procargs2.1", False),
        ("sysctl-write", "kern.hostname", False),
        ("appleevent-send", "", False),
    ],
)
@pytest.mark.parametrize("writes", [False, True])
def test_the_profile_allows_python_and_denies_the_rest(operation, value, answer, writes):
    text = confine.SEATBELT + confine.SEATBELT_WRITES * writes
    given = {"PYTHON": "/venv/bin/python", "PREFIX": "/venv", "BASE": "/base", "SCRIPT": "/x/confine.py"}
    given |= {"PROGRAM": "/tmp/program.py", "FOLDER": "/tmp/folder"}
    expected = writes if answer is None else answer
    assert allowed(parsed(text), given, operation, value) is expected


# ---- programs under it


@landlock
def test_a_program_runs_through_sandbox_exec_with_its_limits(mac):
    record = mac()
    ran = run_python("import json, math, random, fractions\nprint(int(input()) ** 2)", "12\n", Limits())
    assert (ran.exit_code, ran.stdout, ran.stderr) == (0, "144\n", "")
    flag, profile, given, command = json.loads(record.read_text())
    assert (flag, profile) == ("-p", confine.SEATBELT)
    assert command[:4] == [sys.executable, "-I", "-B", confine.__file__]
    settings = json.loads(command[4])
    assert settings["limits"]["RLIMIT_NPROC"] == 0
    assert os.path.dirname(settings["program"]) == os.path.dirname(given["FOLDER"])
    assert not os.path.exists(given["FOLDER"])


@landlock
@pytest.mark.parametrize(
    "program",
    [
        f"open({__file__!r}).read()",
        "import os; os.listdir('..')",
        "import os; print(os.listdir('/root' if os.path.exists('/root') else '/etc'))",
        "open('made', 'w')",
        "open('../made', 'w')",
        "import os; os.mkdir('made')",
        "import os; os.remove('../program.py')",
        "open('../program.py', 'w')",
    ],
)
def test_files_outside_are_closed_and_the_folder_is_read_only(program, mac):
    mac()
    ran = run_python(program, limits=Limits())
    assert not ran.ok
    assert "PermissionError" in ran.stderr


@landlock
def test_with_writes_the_folder_alone_is_open_and_files_have_a_size(mac):
    record = mac()
    limits = Limits(writes=True, output=1000)
    program = "open('a', 'w').write('x'); print(open('a').read())\nwith open('b', 'w') as f: f.write('x' * 2000)"
    ran = run_python(program, limits=limits)
    assert (ran.stdout, ran.ok) == ("x\n", False)
    assert not run_python("open('../a', 'w')", limits=limits).ok
    assert json.loads(record.read_text())[1] == confine.SEATBELT + confine.SEATBELT_WRITES


@landlock
def test_the_reward_is_given_on_a_mac(mac):
    mac()
    example = {"tests": [{"input": "21", "output": "42"}, {"input": "-1", "output": "0"}]}
    judged = code_output_reward("", "```python\nprint(2 * int(input()))\n```", example)
    assert judged == {"reward": 0.5, "is_correct": False}


@landlock
@pytest.mark.parametrize(
    "program",
    [
        "x = b'a' * 10**9\nimport time; time.sleep(9)",
        "x = []\nwhile True: x.append(b'a' * 10**6)",
        "x = [1] * 10**9\nx *= 9",
    ],
)
@pytest.mark.parametrize("way", [True, False])
def test_a_memory_hog_is_killed_where_the_system_has_no_limit(program, way, mac, monkeypatch):
    mac()
    if not way:  # the limit that Darwin refuses: here it is as good as none
        true = json.dumps
        monkeypatch.setattr(json, "dumps", lambda x: true(x).replace('"RLIMIT_AS": ', '"RLIMIT_AS": 9999'))
    ran = run_python(program, limits=Limits(memory=100 * MIB, seconds=60, confined=way))
    assert (ran.ok, ran.timed_out) == (False, False)
    assert "MemoryError" in ran.stderr
    assert ran.seconds < 50


@landlock
def test_a_sandbox_exec_that_does_not_confine_is_found_out(mac):
    mac(confines=False)
    with pytest.raises(RewardError, match="sandbox-exec has not confined this process"):
        run_python("print(1)", limits=Limits())


@pytest.mark.parametrize("there", [False, True])
def test_a_mac_without_a_working_sandbox_exec_is_refused(there, monkeypatch, tmp_path):
    monkeypatch.setattr(sys, "platform", "darwin")
    tool = tmp_path / "sandbox-exec"
    if there:
        tool.write_text("#!/bin/sh\necho 'sandbox-exec: no such operation' >&2\nexit 65\n")
        tool.chmod(0o755)
    monkeypatch.setattr(confine, "SANDBOX_EXEC", str(tool))
    error, words = (RewardError, "no such operation") if there else (UserError, r"Limits\(confined=False\)")
    with pytest.raises(error, match=words):
        run_python("print(1)", limits=Limits())
