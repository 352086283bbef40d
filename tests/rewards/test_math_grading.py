r"""Boxed answers and their grading, judged by hand; hostile answers end in time, from any thread."""

import contextlib
import importlib.util
import os
import shutil
import signal
import subprocess
import sys
import threading
import time
from multiprocessing.connection import Connection

import pytest

from textpolicy.errors import MissingDependencyError, RewardError, UserError
from textpolicy.rewards import math as grading
from textpolicy.rewards.math import extract_boxed, grade_math_answer, normalize_math_answer
from textpolicy.rewards.workers import ChildDiedError, Worker


@pytest.fixture(scope="module", autouse=True)
def one_process():
    """The grading processes of these tests, ended with them."""
    yield
    for worker in graders().all:
        worker.stop()


def graders():
    return grading._graders(os.getpid())


# ---- what is in the box


@pytest.mark.parametrize(
    ("text", "content"),
    [
        (r"so \boxed{1}, no, \boxed{2}.", "2"),
        (r"\boxed{\frac{1}{2}}", r"\frac{1}{2}"),
        (r"$\boxed{\left\{1,2\right\}}$", r"\left\{1,2\right\}"),
        (r"\boxed{\left\{x\right.} and } more", r"\left\{x\right."),
        (r"\boxed{a\\}b}", "a\\\\"),
        (r"} \boxed{3}", "3"),
        (r"\boxed{\boxed{4}}", "4"),
        (r"\boxed{}", ""),
        ("\\boxed{\n5\n}", "\n5\n"),
        (r"\boxed 7", "7"),
        (r"\boxed{1} then \boxed 7", "1"),
        (r"\boxed{1", None),
        (r"\boxed{\frac{1}{2}", None),
        (r"\boxed{1} then \boxed{2", None),
        (r"\boxed{1\}", None),
        (r"\boxed", None),
        (r"\fbox{3}", "3"),
        ("boxed{3}", None),
        ("the answer is 3", None),
        ("", None),
    ],
)
def test_the_last_closed_box_holds_the_answer(text, content):
    assert extract_boxed(text) == content


@pytest.mark.parametrize(
    "text", [r"\boxed{" * 100_000, r"\boxed{" + "{" * 500_000, "\\" * 500_000, r"\boxed " * 100_000]
)
def test_reading_the_box_takes_time_in_proportion_to_the_text(text):
    start = time.perf_counter()
    extract_boxed(text)
    assert time.perf_counter() - start < 2


# ---- spelling


@pytest.mark.parametrize(
    "spellings",
    [
        (r"\frac{1}{2}", r"\dfrac{1}{2}", r"\tfrac12", r"\frac 12", r"\frac1{2}", r"\frac{1}2", "1/2", r"\(1/2\)"),
        (r"\sqrt{2}", r"\sqrt2", r"\sqrt 2", "sqrt2"),
        ("1000", "1,000", "1{,}000", r"1,\!000", r"1\,000", "1 000", r"\$1,000", "1000."),
        ("90", r"90^\circ", r"90^{\circ}", "90\N{DEGREE SIGN}", r"90\%", "90%"),
        ("yes", "Yes", r"\text{yes}", r"\textbf{Yes}", r"\mathrm{YES}", " yes. "),
        (r"(1,2)", r"\left(1, 2\right)", r"( 1 ,2 )"),
        (r"\pi", "pi", " pi "),
        (r"7\frac{3}{4}", "7 3/4", r"7\tfrac34"),
        (r"\infty", "infinity", "oo", "\N{INFINITY}"),
        ("11_2", "11_{2}"),
        ("x^2", "x^{2}", "x**2"),
    ],
)  # fmt: skip
def test_one_answer_has_one_spelling(spellings):
    assert len({normalize_math_answer(s) for s in spellings}) == 1, [normalize_math_answer(s) for s in spellings]


def test_different_answers_keep_different_spellings():
    different = [
        "2 3",
        "23",
        "2,3",
        "(1,234)",
        "1234",
        "A",
        "-1",
        "1",
        r"\pi x",
        "pix",
        r"[1,2)",
        "[1,2]",
        r"\Delta",
        r"\delta",
    ]
    assert len({normalize_math_answer(s) for s in different}) == len(different)


@pytest.mark.parametrize("answer", [r"\begin{pmatrix} 1 \\ 2 \end{pmatrix}", r"\frac{1}{2}", "x^2", "no solution"])
def test_the_spelling_of_a_spelling_is_itself(answer):
    once = normalize_math_answer(answer)
    assert normalize_math_answer(once) == once


# ---- grading

EQUAL = [
    (r"x^2+2x+1", r"(x+1)^2"),
    (r"2\sqrt{2}", r"\sqrt{8}"),
    (r"\frac{2}{4}", r"\frac{1}{2}"),
    ("0.5", r"\frac{1}{2}"),
    ("5.0", "5"),
    ("007", "7"),
    ("+5", "5"),
    (r"\{1,2\}", r"\{2,1\}"),
    ("6, 4", "4, 6"),
    (r"x \in (1,2)", "(1,2)"),
    ("x=5", "5"),
    (r"12 \text{ cm}", "12"),
    (r"12\mathrm{~cm}", "12"),
    (r"12 \text{ cm}^2", "12"),
    ("12 cm^2", "12"),
    ("5 dollars", r"\$5"),
    ("90 degrees", r"90^\circ"),
    (r"50\%", "50"),
    (r"50\%", "0.5"),
    (r"\text{(C)}", "C"),
    ("(C)", r"\text{C}"),
    ("pi", r"\pi"),
    ("2pi/3", r"\frac{2\pi}{3}"),
    ("7 3/4", r"\frac{31}{4}"),
    ("-7 3/4", "-7.75"),
    ("1e3", "1000"),
    ("10^3", "1000"),
    (r"\pm 2", "2, -2"),
    (r"(1,\frac{\pi}{2})", r"\left(1, \pi/2\right)"),
    (r"(-\infty,1)\cup(2,\infty)", r"(2,\infty)\cup(-\infty,1)"),
    (r"\begin{pmatrix} 1 \\ 2/4 \end{pmatrix}", r"\begin{pmatrix} 1 \\ \frac12 \end{pmatrix}"),
    (r"\varnothing", r"\emptyset"),
    ("x^4+x^3+x^2+x", "x(x^3+x^2+x^1+1)"),
    ("2^{2^{4}}", "65536"),
    ("2^{-1.25}", r"\frac{1}{2^{1.25}}"),
    ("5!+2^3", "128"),
    ("(n-1)! n", "n!"),
    ("10^{1000}", "10^{999} \\cdot 10"),
    ("((((((1))))))", "1"),
    ("1" + "0" * 98, "10^{98}"),
]
UNEQUAL = [
    (None, "5"),
    ("", "5"),
    ("  ", "5"),
    ("$$", "5"),
    ("3", "4"),
    ("-5", "5"),
    ("1,000", "1"),
    ("1,234", "(1,234)"),
    ("2 3", "23"),
    ("0.333", r"\frac13"),
    ("3.14", r"\pi"),
    ("p", r"\pi"),
    ("7 3/4", r"\frac{21}{4}"),
    ("0.0000001", "0.0000002"),
    ("[1,2)", "[1,2]"),
    ("(1,2)", "(2,1)"),
    ("2,1", "(1,2)"),
    ("5 or 6", "5"),
    (r"\pm 2", "2"),
    ("y=5", "x=5"),
    ("x<5", "x>5"),
    (r"-\infty", r"\infty"),
    ("11_2", "11"),
    ("11", "11_2"),
    ("11_2", "11_3"),
    ("11_2", "3"),
    ("3:00", "4:00"),
    ("DAB", "BAD"),
    ("east", "seat"),
    (r"\text{even}", r"\text{odd}"),
    ("B", "A"),
    ("the answer is 5", "5"),
    (r"3} \boxed{4", "4"),
    (r"3} or \boxed{4", "3"),
    ("5" + " or 5" * 400, "5"),
]


@pytest.mark.parametrize(("given", "reference"), EQUAL)
def test_answers_that_a_person_finds_equal_are_equal(given, reference):
    assert grade_math_answer(given, reference)
    assert grade_math_answer(reference, given)


@pytest.mark.parametrize(("given", "reference"), UNEQUAL)
def test_answers_that_a_person_tells_apart_are_not_equal(given, reference):
    assert not grade_math_answer(given, reference)


@pytest.mark.parametrize("reference", ["", "  ", "$$", r"\,"])
@pytest.mark.parametrize("given", [None, "", "5"])
def test_an_empty_reference_is_refused(given, reference):
    with pytest.raises(UserError, match="empty"):
        grade_math_answer(given, reference)


@pytest.mark.parametrize("timeout", [0, -1])
def test_a_timeout_that_leaves_no_time_is_refused(timeout):
    with pytest.raises(UserError, match="timeout"):
        grade_math_answer("1", "1", timeout=timeout)


def test_an_answer_of_any_length_can_be_right():
    long = " + ".join(f"x_{{{i}}}" for i in range(400))
    assert grade_math_answer(f"${long}$", long)


# ---- in a process of its own

SLOW = "(x+y+1)^{999}"  # math-verify does not end

HOPELESS = [
    "9^{9^{9}}", "9^{9^{9^{9}}}", "2^{2^{2^{2^{2}}}}", "10^{10^{10}}", "100000000!", "((2^{1000})!)!",
    "1e999999999", "(" * 400 + "1" + ")" * 400, "-(" * 30 + "1" + ")" * 30, "+" * 300 + "5", r"\infty" * 30, "1" * 900,
]  # fmt: skip


@pytest.mark.parametrize("hostile", HOPELESS)
def test_answers_that_no_person_writes_are_not_parsed(hostile):
    assert grade_math_answer("x+1", "1+x")  # so that the process runs
    assert seconds(lambda: grade_math_answer(hostile, "5", timeout=5)) < 0.1
    assert not grade_math_answer(hostile, "5")
    assert grade_math_answer(f" ${hostile}$ ", hostile)


def seconds(call):
    start = time.perf_counter()
    call()
    return time.perf_counter() - start


@pytest.mark.parametrize("hostile", [SLOW, r"\sum_{i=1}^{9999} \frac{1}{i}", "9^{9^{9^{9}}}", "100000000!"])
def test_the_time_limit_holds_and_the_next_answer_is_graded(hostile):
    assert grade_math_answer("x+1", "1+x")  # so that the process runs
    assert seconds(lambda: grade_math_answer(hostile, "5", timeout=0.5)) < 5
    assert not grade_math_answer(hostile, "5", timeout=0.2)
    assert grade_math_answer("x+1", "1+x")


@pytest.mark.parametrize(
    "hostile",
    ["\x00\n1\n", "\u2028", "\ud800", "__import__('os')", r"\frac{" * 100, "^" * 900, "$" * 900, "-" * 900 + "5"],
)
def test_text_that_cannot_be_parsed_is_incorrect(hostile):
    assert not grade_math_answer(hostile, "5")


def test_answers_are_not_mixed_up_between_threads():
    verdicts = {}

    def grade(i):
        verdicts[i] = grade_math_answer(f"x+{i}", f"{i}+x"), grade_math_answer(f"x+{i}", f"{i + 1}+x")

    threads = [threading.Thread(target=grade, args=(i,)) for i in range(8)]
    for thread in threads:
        thread.start()
    for thread in threads:
        thread.join()
    assert verdicts == dict.fromkeys(range(8), (True, False))


def running():
    return [w.process for w in graders().all if w.process is not None and w.process.poll() is None]


def children_of(pid):
    listed = subprocess.run(["pgrep", "-P", str(pid)], capture_output=True, text=True, check=False)
    return [int(child) for child in listed.stdout.split()]


def test_a_process_that_was_killed_is_replaced_within_five_seconds():
    assert grade_math_answer("x+1", "1+x")
    killed = running()
    for process in killed:
        process.kill()
        process.wait()
    assert seconds(lambda: grade_math_answer("x+1", "1+x")) < 5
    assert grade_math_answer("x+2", "2+x")
    assert any(process not in killed for process in running())


@pytest.mark.skipif(shutil.which("pgrep") is None, reason="finds children by pgrep")
def test_a_child_that_was_killed_idle_or_at_work_is_replaced_and_the_request_repeated():
    assert grade_math_answer("x+1", "1+x")
    for process in running():
        for child in children_of(process.pid):
            os.kill(child, signal.SIGKILL)
    assert [grade_math_answer(f"x+{i}", "3+x") for i in (3, 2, 3)] == [True, False, True]

    def kill_at_work():
        time.sleep(0.3)
        for process in running():
            for child in children_of(process.pid):
                os.kill(child, signal.SIGKILL)

    killer = threading.Thread(target=kill_at_work)
    killer.start()
    assert seconds(lambda: grade_math_answer(SLOW, "5", timeout=1)) < 2  # both attempts share the second
    killer.join()
    assert grade_math_answer("x+1", "1+x")


@pytest.mark.skipif(shutil.which("pgrep") is None, reason="finds children by pgrep")
def test_a_process_that_is_killed_every_time_is_an_error_that_quotes_the_answer(monkeypatch):
    assert grade_math_answer("x+1", "1+x")
    start, attempts = Worker.start, []

    def killed(self):
        start(self)
        attempts.append(self)
        os.kill(self.process.pid, signal.SIGSTOP)  # it may be ready before it forks; stopped, it forks no more
        os.waitpid(self.process.pid, os.WUNTRACED)
        children = children_of(self.process.pid)
        self.process.kill()
        self.process.wait()
        for child in children:
            os.kill(child, signal.SIGKILL)

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "start", killed)
        with pytest.raises(RewardError, match=r"killed twice at the answer 'x\+1'; look for what kills it"):
            grade_math_answer("x+1", "1+x")
    assert len(attempts) == 2
    assert grade_math_answer("x+1", "1+x")


def test_an_answer_whose_child_is_killed_every_time_equals_nothing(monkeypatch):
    attempts = []

    def killed(self, request, limit):
        attempts.append(limit)
        raise ChildDiedError

    with monkeypatch.context() as patch:
        patch.setattr(Worker, "exchange", killed)
        assert not grade_math_answer("x+1", "1+x")
    assert len(attempts) == 2
    assert attempts[1] < attempts[0] == 3
    assert grade_math_answer("x+1", "1+x")


def test_a_late_answer_costs_its_limit_and_no_start():
    assert grade_math_answer("x+1", "1+x")
    assert 0.2 <= seconds(lambda: grade_math_answer(SLOW, "5", timeout=0.2)) < 0.4
    assert seconds(lambda: grade_math_answer("x+1", "1+x")) < 0.2


@pytest.mark.skipif(shutil.which("pgrep") is None, reason="finds children by pgrep")
def test_a_late_answer_leaves_no_process_behind():
    assert grade_math_answer("x+1", "1+x")
    before = {process.pid: children_of(process.pid) for process in running()}
    assert not grade_math_answer(SLOW, "5", timeout=0.2)
    assert grade_math_answer("x+1", "1+x")
    after = {process.pid: children_of(process.pid) for process in running()}
    assert after.keys() == before.keys()
    assert after != before  # the late child was replaced
    assert all(len(children) == 1 for children in after.values())


def test_a_worker_that_no_longer_answers_is_ended_although_its_alarm_never_came(monkeypatch):
    assert grade_math_answer("x+1", "1+x")
    monkeypatch.setattr("textpolicy.rewards.workers._GRACE", 0.2)
    stopped = [pid for process in running() for pid in (process.pid, *children_of(process.pid))]
    for pid in stopped:
        os.kill(pid, signal.SIGSTOP)
    assert seconds(lambda: grade_math_answer("x+1", "1+x", timeout=0.2)) < 2
    for pid in set(stopped) - {process.pid for process in running()}:
        with contextlib.suppress(ProcessLookupError):
            os.kill(pid, signal.SIGKILL)
    assert grade_math_answer("x+1", "1+x")


def test_an_interrupted_request_leaves_no_answer_to_the_next(monkeypatch):
    assert grade_math_answer("x+1", "1+x")
    poll = Connection.poll

    def interrupted(self, timeout=0.0):
        assert poll(self, 10)  # the answer is there, and is not read
        raise KeyboardInterrupt

    with monkeypatch.context() as patch:
        patch.setattr(Connection, "poll", interrupted)
        with pytest.raises(KeyboardInterrupt):
            grade_math_answer("x+2", "2+x")
    assert not grade_math_answer("x+1", "2+x")


def test_a_forked_process_starts_a_grader_of_its_own_and_leaves_the_others_running():
    assert grade_math_answer("x+1", "1+x")
    mine, [process, *_] = graders(), running()
    assert grading._graders(-1) is not mine
    child = os.fork()
    if child == 0:
        mine.close()
        os._exit(0)
    os.waitpid(child, 0)
    assert process.poll() is None
    assert grade_math_answer("x+1", "1+x")
    assert process in running()


def test_a_grader_that_cannot_start_raises_an_error(monkeypatch):
    for worker in graders().all:
        worker.stop()
    monkeypatch.setattr(sys, "executable", "false")
    with pytest.raises(RewardError, match="ended at its start; see why in what it wrote to the standard error"):
        grade_math_answer("x+1", "1+x")


def test_without_math_verify_the_install_line_is_given(monkeypatch):
    monkeypatch.setattr(importlib.util, "find_spec", lambda name: None)
    grading._require_math_verify.cache_clear()
    with pytest.raises(MissingDependencyError, match=r"pip install 'textpolicy\[math\]'"):
        grade_math_answer("1", "1")
    grading._require_math_verify.cache_clear()


def test_nothing_is_left_running_or_imported():
    program = (
        "import sys; from textpolicy.rewards.math import grade_math_answer, _graders; import os\n"
        "assert grade_math_answer('x+1', '1+x') and 'sympy' not in sys.modules\n"
        "print(_graders(os.getpid()).pids()[0])"
    )
    done = subprocess.run([sys.executable, "-W", "error", "-c", program], capture_output=True, text=True, check=True)
    assert done.stderr == ""
    with pytest.raises(ProcessLookupError):
        os.kill(int(done.stdout), 0)
