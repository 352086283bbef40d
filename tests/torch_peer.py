"""A process of another Python, with torch and transformers, that answers what transformers computes."""

import importlib.util
import json
import os
import subprocess
import sys
from pathlib import Path

import pytest
from platformdirs import user_cache_dir

PACKAGES = ("torch", "transformers", "peft")


def torch_python():
    """A Python with torch, transformers and peft, or None."""
    if named := os.environ.get("TEXTPOLICY_TORCH"):
        return named
    if all(importlib.util.find_spec(package) for package in PACKAGES):
        return sys.executable
    made = sorted(Path(user_cache_dir("textpolicy")).glob("peers/torch-*/bin/python"))
    return str(made[-1]) if made else None


PYTHON = torch_python()
needs_torch = pytest.mark.skipif(
    PYTHON is None, reason="no torch, transformers and peft here: python scripts/torch_env.py makes an environment"
)


@pytest.fixture(scope="module")
def torch():
    """Ask ``torch(folder=..., tokens=...)``; one process answers all, because importing it takes a while."""
    worker = Path(__file__).parent / "torch_worker.py"
    env = {key: value for key, value in os.environ.items() if key != "PYTHONPATH"}
    with subprocess.Popen(
        [str(PYTHON), str(worker)], stdin=subprocess.PIPE, stdout=subprocess.PIPE, text=True, env=env
    ) as process:

        def ask(**job):
            process.stdin.write(json.dumps(job) + "\n")
            process.stdin.flush()
            line = process.stdout.readline()
            assert line, "the process with torch died; its words are above"
            return json.loads(line)

        yield ask
        process.stdin.close()
