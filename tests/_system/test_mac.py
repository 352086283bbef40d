"""What the package does for macOS, told by pretending one: durable writes, Finder's files, faults of Metal, Rosetta."""

import errno
import fcntl
import os
import platform
import subprocess
import sys
from pathlib import Path

import pytest

from textpolicy._system import files, machine, openblas
from textpolicy._system.faults import machine_fault, resumable_errors
from textpolicy.cli.main import COMMANDS, main
from textpolicy.errors import MissingDependencyError, UserError
from textpolicy.mlx import blas

LITTER = [
    ".DS_Store",
    "._model.safetensors",
    "._.DS_Store",
    ".localized",
    "Icon\r",
    ".Spotlight-V100",
    "__MACOSX",
    "._",
]


# ---- durable writes


@pytest.mark.parametrize(
    ("refusal", "calls"),
    [
        (None, ["full"]),
        (errno.ENOTSUP, ["full", "fsync"]),
        (errno.EINVAL, ["full", "fsync"]),
        (errno.ENOTTY, ["full", "fsync"]),
        (errno.ENOSPC, ["full"]),
        (errno.EIO, ["full"]),
    ],
)
def test_a_write_reaches_the_disk_itself_where_macos_can_say_so(refusal, calls, monkeypatch, tmp_path):
    seen = []

    def fcntl_(descriptor, command, *rest):
        assert command == 51
        seen.append("full")
        if refusal is not None:
            raise OSError(refusal, os.strerror(refusal))

    monkeypatch.setattr(fcntl, "F_FULLFSYNC", 51, raising=False)
    monkeypatch.setattr(fcntl, "fcntl", fcntl_)
    monkeypatch.setattr(os, "fsync", lambda descriptor: seen.append("fsync"))
    (tmp_path / "a").write_text("x")
    if refusal in (errno.ENOSPC, errno.EIO):
        with pytest.raises(OSError, match=os.strerror(refusal)):
            files.sync(tmp_path / "a")
        assert seen == calls
        return
    files.sync(tmp_path / "a")
    assert seen == calls
    files.write_whole(tmp_path / "b", "text")  # its content, then the folder
    assert seen == 3 * calls


def test_no_module_syncs_past_the_one_place():
    package = Path(files.__file__).parents[1]
    found = [p.name for p in package.rglob("*.py") if "os.fsync" in p.read_text(encoding="utf-8")]
    assert found == ["files.py"]


# ---- what Finder leaves


def test_names_leave_out_what_macos_put_there(tmp_path):
    for name in [*LITTER, ".hidden", "_x", "a", ".DS_Store2", "DS_Store"]:
        (tmp_path / name).write_text("x")
    assert files.names(tmp_path) == {".hidden", "_x", "a", ".DS_Store2", "DS_Store"}


# ---- faults


@pytest.mark.parametrize(
    ("text", "words"),
    [
        ("[METAL] Command buffer execution failed: Impacting Interactivity (0000000e:kIOGPU...)", "display"),
        ("[METAL] Command buffer execution failed: Caused GPU Timeout Error (00000002:kIOGPU...Timeout)", "display"),
        ("[METAL] Command buffer execution failed: Caused GPU Hang Error (00000003:kIOGPU...Hang)", "the GPU gave up"),
        ("[METAL] Command buffer execution failed: Discarded (victim of GPU error/recovery)", "the GPU gave up"),
        ("[METAL] Command buffer execution failed: Insufficient Memory (00000008:kIOGPU...)", "memory ran out"),
        ("[metal::malloc] Resource limit (499000) exceeded.", "more buffers than Metal allows"),
        ("[metal::malloc] Resource limit (123) exceeded.", "more buffers than Metal allows"),
        ("[malloc] Unable to allocate 9 bytes.", "memory ran out"),
        ("filesystem error: cannot create directories: Read-only file system [/tmp/mlx/0.32.4/cpu]", "set TMPDIR to"),
        ('Failed to execute command with return code 1: "g++", the output is:\n' + "x" * 5000, "set TMPDIR to"),
        ("[METAL] Command buffer execution\nfailed: Internal Error", "the GPU gave up"),
    ],
)
def test_a_fault_of_the_gpu_ends_in_one_sentence_with_the_way_to_resume(text, words, tmp_path, capsys, monkeypatch):
    with pytest.raises(UserError) as raised, resumable_errors(tmp_path):
        raise RuntimeError(text)
    message = str(raised.value)
    assert words in message
    assert "\n" not in message
    assert f"textpolicy train --resume {tmp_path}" in message
    assert ("--allow machine" in message) is ("memory ran out" in message)

    def fails(arguments):
        raise RuntimeError(text)

    monkeypatch.setitem(COMMANDS, "generate", (fails, ""))
    assert main(["generate", "x"]) == 2
    assert words in capsys.readouterr().err


@pytest.mark.parametrize(
    "error", [RuntimeError("[metal::Device] no"), ValueError("[METAL] Command buffer"), KeyError("x")]
)
def test_other_errors_are_not_the_machines(error):
    assert machine_fault(error) is None


# ---- Macs that MLX has no build for


@pytest.mark.parametrize(
    ("system", "processor", "version", "why"),
    [
        ("darwin", "x86_64", "15.5", "built for x86_64 and mlx needs Apple silicon"),
        ("darwin", "i386", "10.15.7", "built for i386 and mlx needs Apple silicon"),
        ("darwin", "arm64", "13.7.1", "mlx needs macOS 14 and this is macOS 13.7.1"),
        ("darwin", "arm64", "11.0", "mlx needs macOS 14 and this is macOS 11.0"),
        ("darwin", "arm64", "14.0", None),
        ("darwin", "arm64", "26.2", None),
        ("darwin", "arm64", "10.16", None),  # what an old Python says on every later macOS
        ("darwin", "arm64", "", None),
        ("linux", "x86_64", "", None),
    ],
)
def test_a_mac_that_mlx_has_no_build_for_is_told_so_wherever_mlx_is_missing(
    system, processor, version, why, monkeypatch, capsys
):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(platform, "machine", lambda: processor)
    monkeypatch.setattr(platform, "mac_ver", lambda: (version, ("", "", ""), processor))
    found = machine.why_no_mlx()
    assert (found is None) if why is None else (why in found)
    monkeypatch.setitem(sys.modules, "mlx.core", None)
    with pytest.raises(MissingDependencyError, match="pip install" if why is None else why):
        blas.import_mlx()

    def lacking(arguments):
        raise ModuleNotFoundError("No module named 'mlx_lm'", name="mlx_lm")

    monkeypatch.setitem(COMMANDS, "train", (lacking, ""))
    assert main(["train"]) == 2
    assert ("pip install" if why is None else why) in capsys.readouterr().err


def test_make_says_so_before_it_makes_anything(tmp_path):
    code = (
        "import platform, runpy, sys; platform.machine = lambda: 'x86_64'; sys.platform = 'darwin'; "
        "runpy.run_path(sys.argv[1], run_name='made')['make_environment']()"
    )
    for name in ("scripts", "textpolicy"):
        (tmp_path / name).symlink_to(Path(files.__file__).parents[2] / name)
    copy = tmp_path / "bootstrap.py"
    copy.write_text((tmp_path / "scripts" / "bootstrap.py").read_text().replace(".resolve().parent.parent", ".parent"))
    (tmp_path / "pyproject.toml").write_text("")
    (tmp_path / "constraints.txt").write_text("")
    ran = subprocess.run([sys.executable, "-c", code, str(copy)], capture_output=True, text=True, cwd=tmp_path)
    assert ran.returncode == 1
    assert "mlx needs Apple silicon" in ran.stderr
    assert ran.stderr.count("\n") == 1
    assert not (tmp_path / ".venv").exists()


# ---- before mlx is imported


@pytest.mark.parametrize(
    ("system", "on_cpu", "given"),
    [("darwin", False, openblas.ON_A_MAC), ("linux", False, openblas.ON_NVIDIA), ("linux", True, {})],
)
def test_a_gpu_gets_its_variables_unless_they_are_set(system, on_cpu, given, monkeypatch):
    monkeypatch.setattr(sys, "platform", system)
    monkeypatch.setattr(sys, "meta_path", [*sys.meta_path])
    monkeypatch.setattr(openblas, "runs_on_linux_cpu", lambda: on_cpu)
    names = [*openblas.ON_A_MAC, *openblas.ON_NVIDIA]
    for name in names:
        monkeypatch.delenv(name, raising=False)
    openblas.await_mlx()
    assert {name: os.environ[name] for name in names if name in os.environ} == given
    for name in names:
        monkeypatch.setenv(name, "7")
    openblas.await_mlx()
    assert {os.environ[name] for name in names} == {"7"}


def test_the_finder_of_mlx_hides_no_other_finder():
    code = (
        "import sys, textpolicy\n"
        "class Next:\n"
        "    asked = []\n"
        "    def find_spec(self, name, path=None, target=None): self.asked.append(name)\n"
        "sys.meta_path.insert(1, Next())\n"
        "import mlx.core\n"
        "print('mlx.core' in Next.asked)"
    )
    ran = subprocess.run(
        [sys.executable, "-c", code], capture_output=True, text=True, cwd=Path(files.__file__).parents[2]
    )
    assert (ran.stdout, ran.stderr) == ("True\n", "")
