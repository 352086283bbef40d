"""Programs that a model might write: what they may do, what is refused, and that nothing of them stays."""

import os
import subprocess
import sys
import time
from pathlib import Path

import pytest

from textpolicy.errors import RewardError, UserError
from textpolicy.rewards import Scorer, confine
from textpolicy.rewards.sandbox import MIB, Limits, code_output_reward, extract_program, run_python

confined = pytest.mark.skipif(not confine.can_confine(), reason="needs Linux with Landlock, or a Mac with sandbox-exec")
linux = pytest.mark.skipif(sys.platform != "linux", reason="holds calls of Linux")
WAYS = [pytest.param(True, marks=confined), False]


def sandboxed(*parents):
    """Programs in a sandbox of one of the processes ``parents``, by their command line."""
    listed = subprocess.run(["ps", "-ww", "-eo", "ppid,args"], capture_output=True, text=True, check=True).stdout
    rows = [line.split(maxsplit=1) for line in listed.splitlines() if confine.__file__ in line]
    return [what for parent, what in rows if int(parent) in parents]


def own_sessions():
    """Those that this process has started and that still run; orphans belong to 1."""
    return sandboxed(1, os.getpid())


@pytest.fixture(autouse=True)
def nothing_is_left():
    """No process outlives a test; one that another test's killed worker had may take a moment to end."""
    yield
    assert waited_for(lambda: own_sessions() == [])


# ---- what a program may do


@pytest.mark.parametrize("way", WAYS)
def test_a_program_reads_its_input_prints_and_imports(way):
    program = "import json, math, random, fractions\nprint(int(input()) ** 2)\nimport sys; print('e', file=sys.stderr)"
    ran = run_python(program, "12\n", Limits(confined=way))
    assert (ran.exit_code, ran.stdout, ran.stderr, ran.ok) == (0, "144\n", "e\n", True)


@pytest.mark.parametrize(
    ("program", "code", "message"),
    [
        ("raise SystemExit(3)", 3, ""),
        ("1 / 0", 1, "ZeroDivisionError"),
        ("print(", 1, "SyntaxError"),
        ("import os; os._exit(7)", 7, ""),
        ("\ud800", 1, ""),
        ("\x00", 1, ""),
    ],
)
@confined
def test_an_error_is_the_programs_own(program, code, message):
    ran = run_python(program)
    assert ran.exit_code == code
    assert message in ran.stderr
    assert not ran.ok


@confined
def test_numpy_fits_into_the_limits():
    assert run_python("import numpy as np; print(np.ones((50, 50)).sum())").stdout == "2500.0\n"


def test_nothing_of_this_process_reaches_a_program(monkeypatch):
    monkeypatch.setenv("SECRET", "s")
    program = "import os, sys; print(sorted(os.environ), sys.argv, os.listdir(os.getcwd()))"
    ran = run_python(program, limits=Limits(confined=False))
    assert "SECRET" not in ran.stdout
    assert "['program.py'] []" in ran.stdout


# ---- what ends it


@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "program",
    ["while True: pass", "import time; time.sleep(60)", "import signal; signal.pause()", "input_ = 9**9**9"],
)
def test_an_endless_program_is_killed_in_time(program, way):
    ran = run_python(program, limits=Limits(seconds=1, confined=way))
    assert not ran.ok
    assert ran.seconds < 2


@confined
def test_a_program_cannot_refuse_to_die():
    ignore = "import signal\nfor s in {*range(1, 64)} - {9, 19, 32, 33}: signal.signal(s, signal.SIG_IGN)\n"
    ran = run_python(ignore + "print('deaf', flush=True)\nwhile True: pass", limits=Limits(seconds=1))
    assert (ran.stdout, ran.timed_out or ran.exit_code < 0) == ("deaf\n", True)
    assert ran.seconds < 3


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not hold a process to its address space")
@pytest.mark.parametrize("way", WAYS)
@pytest.mark.parametrize(
    "program", ["x = bytearray(10**10)", "x = []\nwhile True: x.append(bytes(10**6))", "x = 'a' * 10**12"]
)
def test_a_memory_hog_gets_no_memory(program, way):
    ran = run_python(program, limits=Limits(memory=200 * MIB, confined=way))
    assert not ran.ok
    assert "MemoryError" in ran.stderr


@pytest.mark.parametrize("way", WAYS)
def test_a_flood_of_output_is_cut(way):
    ran = run_python("while True: print('x' * 1000)", limits=Limits(output=10_000, confined=way))
    assert not ran.ok
    assert len(ran.stdout) <= 10_000


def test_deep_recursion_crashes_the_program_alone():
    program = "import sys; sys.setrecursionlimit(10**9)\ndef f(): f()\nf()"
    assert not run_python(program, limits=Limits(confined=False, seconds=2, memory=100 * MIB)).ok


# ---- what is refused

FORKS = [
    "import os\nwhile True: os.fork()",
    "import os\nos.posix_spawn('/bin/true', ['true'], {})",
    "import subprocess; subprocess.run(['/bin/true'])",
    "import os; os.execv('/bin/true', ['true'])",
    pytest.param("import threading; threading.Thread(target=print).start()", marks=linux),
    "import multiprocessing as m; m.Process(target=print).start()",
]
NETWORK = [
    "import socket; socket.create_connection(('127.0.0.1', 9), 1)",
    "import socket; socket.socket(socket.AF_INET, socket.SOCK_DGRAM).sendto(b'x', ('127.0.0.1', 9))",
    "import socket; socket.socket(socket.AF_UNIX).connect('/run/systemd/notify')",
    pytest.param("import socket; socket.socketpair()", marks=linux),
    "import urllib.request; urllib.request.urlopen('http://127.0.0.1:9')",
]
OTHERS = [
    "import os; os.kill(os.getppid(), 0)",
    "import os; os.kill(-1, 0)",
    "import time; time.clock_settime(time.CLOCK_REALTIME, time.time())",
    "import socket; socket.sethostname(socket.gethostname())",
    pytest.param("import os; os.pidfd_open(os.getppid())", marks=linux),
    pytest.param("import os; os.setpriority(os.PRIO_PROCESS, 0, 5)", marks=linux),
    pytest.param("import resource; resource.setrlimit(resource.RLIMIT_AS, (10**12, 10**12))", marks=linux),
    pytest.param("import resource; resource.prlimit(0, resource.RLIMIT_NPROC, (99, 99))", marks=linux),
]


@confined
@pytest.mark.parametrize("program", [*FORKS, *NETWORK, *OTHERS])
def test_processes_the_network_and_other_programs_are_refused(program):
    ran = run_python(program + "\nprint('done')", limits=Limits(seconds=3))
    assert "done" not in ran.stdout
    assert not ran.timed_out
    assert "Error" in ran.stderr


@confined
def test_a_fork_bomb_starts_nothing():
    program = (
        "import os, sys\nfor _ in range(1000):\n  try: os.fork(); print('born')\n  except OSError: pass\nprint('end')"
    )
    ran = run_python(program)
    assert ran.stdout == "end\n"


@linux
@confined
def test_a_call_of_another_architecture_is_not_a_way_out():
    """x32 numbers name the same calls once more: a socket by its x32 number is refused too, as error 1, EPERM."""
    program = "import ctypes as c; lib = c.CDLL(None, use_errno=True)\n"
    program += "print(lib.syscall(0x40000000 + 41, 2, 1, 0), c.get_errno())"
    assert run_python(program).stdout == "-1 1\n"


@confined
@pytest.mark.parametrize(
    "program",
    [
        "open({path!r}, 'w')",
        "open({path!r}, 'a')",
        "open({path!r}).read()",
        "import os; os.remove({path!r})",
        "import os; os.rename({path!r}, {path!r} + '2')",
        "import os; os.truncate({path!r}, 0)",
        "import os; os.chmod({path!r}, 0o777)",
        "import os; os.utime({path!r}, (0, 0))",
        "import os; os.symlink({path!r}, 'link')",
        "import os; os.mkdir({path!r} + '3')",
        "import os; os.listdir(os.path.dirname({path!r}))",
        "import shutil; shutil.rmtree(os.path.dirname({path!r})) if (os := __import__('os')) else 0",
        "open('new', 'w')",
        "open('/tmp/textpolicy-escaped', 'w')",
        pytest.param("open('/dev/shm/textpolicy-escaped', 'w')", marks=linux),
        pytest.param("open('/proc/self/environ').read()", marks=linux),
        "open('/etc/passwd').read()",
    ],
)
def test_files_are_neither_read_nor_written_nor_removed(program, tmp_path):
    kept = tmp_path / "kept.txt"
    kept.write_text("secret")
    before = kept.stat()
    ran = run_python(program.format(path=str(kept)) + "\nprint('done')")
    assert "done" not in ran.stdout
    assert "PermissionError" in ran.stderr
    assert kept.read_text() == "secret"
    assert kept.stat().st_mode == before.st_mode
    assert not Path("/tmp/textpolicy-escaped").exists()


@confined
def test_with_writes_a_program_has_a_folder_of_its_own_up_to_a_size():
    small = "open('a', 'w').write('x' * 100)\nprint(open('a').read() == 'x' * 100)"
    large = "open('a', 'w').write('x' * 100_000)"
    limits = Limits(writes=True, output=10_000)
    assert run_python(small, limits=limits).stdout == "True\n"
    assert "File too large" in run_python(large, limits=limits).stderr
    assert "PermissionError" in run_python("open('../program.py', 'w')", limits=limits).stderr


@linux
@confined
def test_the_ways_of_emptying_a_file_that_older_landlocks_leave_open_are_refused_by_seccomp():
    """Shown where Landlock allows them: in the program's own folder. Writing there empties as usual."""
    program = (
        "import ctypes, os\nopen('a', 'w').write('x')\nlib = ctypes.CDLL(None)\n"
        "ways = [lambda: os.truncate('a', 0), lambda: os.open('a', os.O_RDONLY | os.O_TRUNC)]\n"
        "ways += [lambda: os.open('a', os.O_ACCMODE | os.O_TRUNC)]\n"
        "ways += [lambda: os.open('a', os.O_TRUNC, dir_fd=os.open('.', 0))]\n"
        "for way in ways:\n  try: way()\n  except PermissionError as error: print(error.errno, end=' ')\n"
        "print(lib.open(b'a', os.O_TRUNC), open('a').read(), open('a', 'r+').truncate(0), open('a', 'w').write('yz'))"
    )
    assert run_python(program, limits=Limits(writes=True)).stdout == "1 1 1 1 -1 x 0 2\n"


@pytest.mark.skipif(os.geteuid() == 0, reason="root may always start processes; only the confined sandbox refuses")
def test_resource_limits_alone_refuse_processes():
    ran = run_python("import os; os.fork()", limits=Limits(confined=False))
    assert "BlockingIOError" in ran.stderr


def test_a_child_that_survives_the_limits_is_killed_with_its_session():
    program = "import os, time\nif os.fork() == 0: time.sleep(60)"
    run_python(program, limits=Limits(confined=False, seconds=2))  # refused, or started and killed: see the fixture
    time.sleep(0.1)


# ---- what cannot work


def test_where_a_system_cannot_confine_the_error_names_the_alternative(monkeypatch):
    monkeypatch.setattr(confine, "can_confine", lambda: False)
    with pytest.raises(UserError, match=r"cannot confine .* Limits\(confined=False\)"):
        run_python("print(1)")
    assert run_python("print(1)", limits=Limits(confined=False)).ok


@confined
def test_limits_too_small_to_start_are_not_mistaken_for_a_failing_program():
    with pytest.raises(RewardError, match="the sandbox did not start"):
        run_python("print(1)", limits=Limits(open_files=0))
    with pytest.raises(UserError, match="limit is 0 s"):
        run_python("print(1)", limits=Limits(seconds=0))


def test_an_interrupt_kills_the_program(monkeypatch):
    def interrupted(self, timeout=None):
        monkeypatch.undo()
        raise KeyboardInterrupt

    monkeypatch.setattr(subprocess.Popen, "wait", interrupted)
    with pytest.raises(KeyboardInterrupt):
        run_python("import time; time.sleep(60)", limits=Limits(confined=False))


@pytest.mark.skipif(sys.platform != "linux", reason="other systems do not tell a process of its parent's end")
@pytest.mark.parametrize("way", WAYS)
def test_a_program_does_not_outlive_the_process_that_runs_it(way):
    call = f"run_python('import time; time.sleep(60)', limits=Limits(seconds=60, confined={way}))"
    program = f"from textpolicy.rewards.sandbox import Limits, run_python; {call}"
    runner = subprocess.Popen([sys.executable, "-c", program])
    try:
        assert waited_for(lambda: sandboxed(runner.pid))
    finally:
        runner.kill()
        runner.wait()
    assert waited_for(lambda: not own_sessions())


def waited_for(what):
    """Whether ``what`` becomes true in 30 seconds."""
    return any(what() or time.sleep(0.05) for _ in range(600))


# ---- the reward


@pytest.mark.parametrize(
    ("completion", "program"),
    [
        ("```python\nprint(1)\n```", "print(1)\n"),
        ("first\n```py\n1\n```\nthen\n```\n2\n```\nso", "1\n"),
        ("```\n1\n```\nthen\n```\n2\n```\nso", "2\n"),
        ("```py\n1\n```\n```Python3\n2\n```\n```bash\npython x.py\n```", "2\n"),
        ("~~~{.python .numbered}\n1\n~~~", "1\n"),
        ("````python title=a.py\n'\n```\n'\n````", "'\n```\n'\n"),
        ("1. So:\n   ```python3.11\n   if 1:\n       2\n   ```", "if 1:\n    2\n"),
        ("```pycon\n>>> 1\n```\n```text\n1\n```", None),
        ("```python-repl\n1\n```", None),
        ("```python\n1\n```\nor\n```python\n\n```", "1\n"),
        ("Write ```python\n1\n```", None),
        ("````md\n```python\n1\n```\n````", None),
        ("<think>\n```python\n1\n```\n</think>\n```python\n2\n```", "2\n"),
        ("<think>\n```python\n1\n```\n</think>", None),
        ("<think>\n```python\n1\n```", None),
        ("```python\nprint('</think>')\n```", "print('</think>')\n"),
        ("```python\nprint('```')\n```", "print('```')\n"),
        ("```python\nprint(1)", "print(1)"),
        ("print(1)", None),
        ("", None),
    ],
)
def test_the_last_block_of_python_is_the_program(completion, program):
    assert extract_program(completion) == program


def test_a_program_that_was_cut_off_is_none():
    cut = "```python\n1\n```\nBetter:\n```python\n2"
    assert extract_program(cut, truncated=True) is None
    assert extract_program(cut) == "2"
    assert extract_program("```python\n1\n```\nBetter:\n```python\n", truncated=True) is None
    assert extract_program("```python\n1\n```\nIt prints\n```\n4", truncated=True) == "1\n"
    assert extract_program("```python\n1\n```", thinking="<think>\n") is None


DOUBLES = {"tests": [{"input": "2\n", "output": "4"}, {"input": "5", "output": "10\n"}]}


@confined
@pytest.mark.parametrize(
    ("program", "reward"),
    [
        ("print(2 * int(input()))", 1.0),
        ("print(4)", 0.5),
        ("print(2 * int(input()), ' ')\n\n", 1.0),
        ("print(2 * int(input())); raise SystemExit(1)", 0.0),
        ("import os; os._exit(0)", 0.0),
        ("while True: pass", 0.0),
    ],
)
def test_the_reward_is_the_share_of_tests_passed(program, reward):
    completion = f"Here it is:\n```python\n{program}\n```\n"
    scored = code_output_reward("p", completion, DOUBLES, limits=Limits(seconds=1))
    assert scored == {"reward": reward, "is_correct": reward == 1.0}


@confined
@pytest.mark.parametrize(
    "program",
    [
        "print(2 * int(open('/dev/stdin').read()))",
        pytest.param("print(2 * int(open('/proc/self/fd/0').readline()), file=open('/dev/stdout', 'w'))", marks=linux),
        "import fileinput\nfor line in fileinput.input('/dev/fd/0'): print(2 * int(line))",
        "open('/dev/stderr', 'w').write('hm'); print(2 * int(open(0).read()))",
    ],
)
def test_standard_streams_can_be_opened_by_their_paths(program):
    assert run_python(program, "21\n").stdout == "42\n"


@confined
@pytest.mark.parametrize("program", ["open('/dev/stdin', 'w')", "open('/dev/stdout')", "open('/dev/tty', 'w')"])
def test_no_more_than_the_standard_streams_can(program):
    assert "PermissionError" in run_python(program, "21\n").stderr


@pytest.mark.parametrize(
    "tests",
    [None, "", [], "[{'input': '1', 'output': '2'}]", {"input": "1", "output": "2"}, [{"input": "1"}], ["1"],
     [{"input": 1, "output": 2}], float("nan")],
)  # fmt: skip
def test_tests_that_are_something_else_are_refused_by_name(tests):
    message = "a code_output example has a list of 'tests', each {'input': text, 'output': text}, but"
    with pytest.raises(UserError, match=message):
        code_output_reward("p", "```python\n1\n```", {"tests": tests})
    with pytest.raises(RewardError, match=message) as raised:
        Scorer("code_output")("p", "c", {"tests": tests})
    assert "return a number" not in str(raised.value)


def test_without_a_program_the_reward_is_0_and_without_tests_an_error():
    assert Scorer("code_output")("p", "no idea", DOUBLES).reward == 0.0
    with pytest.raises(RewardError, match="list of 'tests'"):
        Scorer("code_output")("p", "no idea", {})
