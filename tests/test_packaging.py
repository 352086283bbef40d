"""The source archive and the wheel are built, hold what they should, and work from an empty folder, without MLX too."""

import os
import re
import shutil
import subprocess
import sys
import tarfile
import zipfile

import pytest
from running import ROOT

LEFT_HERE = shutil.ignore_patterns(
    ".*", "__pycache__", "*.egg-info", "build", "dist", "runs", "results", "site"
)  # caches and products, and rows of benchmarks, whose copying is no part of the claim
BUILD_SDIST = "import setuptools.build_meta as backend; backend.build_sdist({!r})"

# Run in an empty folder against the installed wheel, with mlx and mlx_lm refused.
WITHOUT_MLX = """
import importlib.abc, sys

class Refuse(importlib.abc.MetaPathFinder):
    def find_spec(self, name, path=None, target=None):
        if name.split(".")[0] in ("mlx", "mlx_lm"):
            raise ModuleNotFoundError(f"No module named {name!r}", name=name)

sys.meta_path.insert(0, Refuse())
"""

USED_WITHOUT_MLX = """
from dataclasses import replace
import numpy as np
import textpolicy as tp
from textpolicy.algorithms import ALGORITHMS, algorithm
from textpolicy.analysis import compare
from textpolicy.rewards import Request, RewardConfig, Scorer
from textpolicy.tinker.advantages import apply_hicra, compute_grpo_advantages
from textpolicy.types import Completion, Episode

@tp.reward
def two_words(prompt, completion, example, **kwargs):
    return 1.0 if len(completion.split()) == 2 else 0.0

scorer = Scorer([RewardConfig("two_words"), RewardConfig("accuracy_reward", 0.5, {"ground_truth": "sky"})])
rewards = [s.reward for s in scorer.score([Request("?", text, {}) for text in ("blue sky", "the big sky", "no")])]
assert rewards == [1.5, 0.5, 0.0], rewards

said = Completion(np.array([3, 4], np.int32), np.array([-1.0, -2.0], np.float32), np.array([0.5, 0.1], np.float32))
episodes = [
    Episode.from_completion([1, 2], said, reward=r, group=0, is_correct=r > 1, pieces=(" let", " me")) for r in rewards
]
for name in ALGORITHMS:
    batch = replace(algorithm(name), length=2.0).credit(episodes)
    assert np.isfinite(batch.advantages).all() and batch.advantages.any(), name
assert tp.compute_advantages(np.array([1.0, 0.0])).tolist()[0] > 0

baseline, candidate = {1: 0.50, 2: 0.60, 3: 0.55, 4: 0.52}, {1: 0.70, 2: 0.80, 3: 0.75, 4: 0.73}
assert abs(compare(baseline, candidate).difference - 0.2025) < 1e-9
assert compute_grpo_advantages([1.0, 0.0]) == [0.5, -0.5]
assert apply_hicra([1.0, 1.0], [1, 0]) == [1.2, 1.0]
"""


COMMANDS_WITHOUT_MLX = """
from textpolicy.cli.main import main
from textpolicy.tinker import train_math

assert [main([name]) for name in ("algorithms", "tasks")] == [0, 0]
assert train_math.main(["--dry-run"]) == 0
assert main(["train", "--steps", "1"]) == 2
"""


def build(arguments, folder):
    done = subprocess.run([sys.executable, *arguments], cwd=folder, capture_output=True, text=True)
    assert done.returncode == 0, done.stdout + done.stderr


@pytest.fixture(scope="module")
def archive(tmp_path_factory):
    """The source archive, built from a copy of this repository by the declared backend."""
    pytest.importorskip("setuptools.build_meta", reason="setuptools, which builds the package, is not installed")
    folder = tmp_path_factory.mktemp("packaging")
    shutil.copytree(ROOT, folder / "here", ignore=LEFT_HERE)
    build(["-c", BUILD_SDIST.format(str(folder))], folder / "here")
    [path] = folder.glob("textpolicy-*.tar.gz")
    return path


@pytest.fixture(scope="module")
def wheel(archive):
    """The wheel, built from the source archive and nothing else, without a network."""
    with tarfile.open(archive) as tar:
        tar.extractall(archive.parent / "unpacked", filter="data")
    [source] = (archive.parent / "unpacked").iterdir()
    offline = ["--no-deps", "--no-build-isolation", "--no-index", "--disable-pip-version-check"]
    build(["-m", "pip", "wheel", *offline, "-w", str(archive.parent), str(source)], archive.parent)
    [path] = archive.parent.glob("*.whl")
    return path


@pytest.fixture(scope="module")
def installed(wheel):
    """The wheel's files in a folder of their own."""
    target = wheel.parent / "installed"
    offline = ["--no-deps", "--no-index", "--no-compile", "--disable-pip-version-check"]
    build(["-m", "pip", "install", *offline, "--target", str(target), str(wheel)], wheel.parent)
    return target


def run(installed, folder, *arguments):
    """A Python that finds the wheel's textpolicy before this repository's."""
    environment = {**os.environ, "PYTHONPATH": str(installed), "OPENBLAS_NUM_THREADS": "1", "NO_COLOR": "1"}
    return subprocess.run(
        [sys.executable, *arguments], cwd=folder, capture_output=True, text=True, env=environment, timeout=120
    )


def in_git(*paths):
    done = subprocess.run(["git", "ls-files", "-z", *paths], cwd=ROOT, capture_output=True, text=True)
    if done.returncode:
        pytest.skip("this is no git checkout, so nothing says which files belong to it")
    return {name for name in done.stdout.split("\0") if name and (ROOT / name).exists()}


def test_the_wheel_holds_the_package_its_templates_and_the_licence_and_nothing_else(wheel):
    with zipfile.ZipFile(wheel) as files:
        names = set(files.namelist())
    package = {name for name in names if name.startswith("textpolicy/")}
    assert package == in_git("textpolicy")
    for name in (
        "py.typed",
        "report/view/style.css",
        "report/view/base.html",
        "report/report.html",
        "tinker/engine.py",
    ):
        assert f"textpolicy/{name}" in package
    assert {name.split("/")[1] for name in names - package} == {
        "METADATA", "RECORD", "WHEEL", "entry_points.txt", "licenses", "top_level.txt",
    }  # fmt: skip
    assert any(name.endswith("licenses/LICENSE") for name in names)


def test_the_source_archive_holds_what_its_tests_and_examples_need(archive):
    with tarfile.open(archive) as tar:
        names = {name.split("/", 1)[1] for name in tar.getnames() if "/" in name}
    wanted = in_git("textpolicy", "docs", "examples", "experiments", "scripts", "tests", "benchmarks/*.py")
    assert {name for name in wanted if "/results/" not in name and "/." not in name} <= names
    assert {"LICENSE", "README.md", "CHANGELOG.md", "CONTRIBUTING.md", "Makefile", "constraints.txt"} <= names
    assert not [name for name in names if "__pycache__" in name or name.endswith(".pyc")]


def test_the_installed_wheel_runs_its_command(installed, tmp_path):
    [script] = [path for path in (installed / "bin").iterdir() if path.name == "textpolicy"]
    output = run(installed, tmp_path, str(script), "--version")
    assert output.returncode == 0, output.stderr
    version = re.search(r'^version = "(.+)"', (ROOT / "pyproject.toml").read_text(), re.MULTILINE)[1]
    assert output.stdout == f"textpolicy {version}\n"
    where = run(installed, tmp_path, "-c", "import textpolicy; print(textpolicy.__file__, textpolicy.__version__)")
    assert where.stdout.split() == [str(installed / "textpolicy" / "__init__.py"), version]


def test_without_mlx_rewards_algorithms_analysis_and_tinkers_credit_work(installed, tmp_path):
    done = run(installed, tmp_path, "-W", "error", "-c", WITHOUT_MLX + USED_WITHOUT_MLX)
    assert done.returncode == 0, done.stderr


def test_without_mlx_commands_that_need_no_model_work_and_training_names_the_missing_extra(installed, tmp_path):
    done = run(installed, tmp_path, "-W", "error", "-c", WITHOUT_MLX + COMMANDS_WITHOUT_MLX)
    assert done.returncode == 0, done.stderr
    assert "\nsapo " in done.stdout
    assert "\ncountdown " in done.stdout
    assert "no prices are given" in done.stdout
    last = done.stderr.splitlines()[-1]
    assert last == "textpolicy: mlx is not installed; install it with: pip install 'textpolicy[mlx]'"
    assert not list(tmp_path.iterdir())
