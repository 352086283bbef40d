"""Every Python block of the documentation runs as written, top to bottom, with the real model."""

import os
import re
import subprocess
import sys
from pathlib import Path

import pytest

from textpolicy.cli import COMMANDS

ROOT = Path(__file__).parents[1]
FILES = [
    "README.md",
    "docs/QUICKSTART_UV.md",
    "docs/02_rewards.md",
    "docs/04_environments.md",
    "docs/05_rollout_training.md",
    "docs/06_performance.md",
    "docs/10_lora_qlora.md",
    "docs/12_tinker_gpu.md",
    "docs/11_sepa_significance.md",
    "docs/13_tinker_campaigns.md",
    "docs/algorithms.md",
    "docs/run_folder.md",
    "docs/doctor.md",
]
SERVED = ["docs/12_tinker_gpu.md"]  # which start a Tinker server
FENCE = re.compile(r"^```(\w*)$")


def lines_of(file):
    path = ROOT / file
    if not path.exists():
        pytest.skip(f"{file} is not written yet")
    return path.read_text(encoding="utf-8").splitlines()


def code(file, language):
    """The file with every line outside a block of ``language`` blanked, so that line numbers stay."""
    kept, inside = [], None
    for line in lines_of(file):
        fence = FENCE.match(line)
        if fence:
            inside = fence[1] if inside is None else None
        kept.append(line if inside == language and not fence else "")
    return "\n".join(kept)


@pytest.mark.slow
@pytest.mark.parametrize("file", FILES)
def test_the_python_blocks_of_a_page_run_top_to_bottom(file, tmp_path, request):
    if file in SERVED:
        request.getfixturevalue("tinker_server_can_run")
    script = tmp_path / f"{Path(file).stem}.py"
    script.write_text(code(file, "python"), encoding="utf-8")
    done = subprocess.run(
        [sys.executable, "-W", "error::RuntimeWarning", script.name],
        cwd=tmp_path,
        capture_output=True,
        text=True,
        env={**os.environ, "OPENBLAS_NUM_THREADS": "1", "HF_HUB_OFFLINE": "1"},
    )
    assert done.returncode == 0, f"{file}, line numbers as in the file:\n{done.stderr}"


@pytest.mark.parametrize("file", FILES)
def test_every_command_of_a_page_exists(file):
    called = re.findall(r"^(?:\$ )?textpolicy (\S+)", code(file, "bash"), re.MULTILINE)
    assert {name for name in called if not name.startswith("-")} <= set(COMMANDS)


@pytest.mark.parametrize("file", FILES)
def test_every_block_of_a_page_says_its_language(file):
    opening = [FENCE.match(line)[1] for line in lines_of(file) if FENCE.match(line)][::2]
    assert all(opening)
    assert "python" in opening
