"""Scripts that run in a process of their own, as a reader would start them."""

import os
import subprocess
import sys
from pathlib import Path

ROOT = Path(__file__).parents[1]


def run_script(path, folder, *arguments, warnings="error::RuntimeWarning"):
    """The script's process once it has ended well; ``path`` may be relative to the repository."""
    done = subprocess.run(
        [sys.executable, "-W", warnings, str(ROOT / path), *arguments],
        cwd=folder,
        capture_output=True,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, done.stderr
    return done
