"""The commands of the pages on campaigns run as written, on a tiny model; what needs a server does not."""

import json
import os
import re
import subprocess
import sys
from pathlib import Path

import pytest
from tiny_folder import SMALL, write_tiny_model

ROOT = Path(__file__).parents[2]
PAGES = ["docs/13_tinker_campaigns.md"]
BLOCK = re.compile(r"^```(\w+)\n(.*?)^```$", re.MULTILINE | re.DOTALL)


def blocks(page, language):
    text = (ROOT / page).read_text(encoding="utf-8")
    return [body for found, body in BLOCK.findall(text) if found == language]


def commands(page):
    lines = [line.split("  #")[0].strip() for body in blocks(page, "bash") for line in body.splitlines()]
    return [line for line in lines if line and not needs_a_server(line)]


def needs_a_server(line):
    return "--execute" in line or "tinker_lr_sweep" in line


def shell(line, folder):
    python = f"{sys.executable} -m textpolicy "
    line = re.sub(r"^textpolicy ", python, line)
    line = re.sub(r"^python scripts/", f"{sys.executable} {ROOT}/scripts/", line)
    paths = os.pathsep.join(filter(None, [str(ROOT), os.environ.get("PYTHONPATH", "")]))
    environment = {**os.environ, "OPENBLAS_NUM_THREADS": "1", "PYTHONPATH": paths}
    return subprocess.run(line, shell=True, cwd=folder, env=environment, capture_output=True, text=True, check=False)


def on_tiny(toml, model):
    """The campaign of the page with one seed, a model of two layers and runs of two steps."""
    toml = toml.replace("[0, 1, 2, 3, 4, 5]", "[0]").replace('"smollm2-135m"', json.dumps(str(model)))
    small = [f"{key}.{k} = {json.dumps(v)}" for key, part in SMALL.items() if key != "steps" for k, v in part.items()]
    return toml.replace("steps = 24", "\n".join(["steps = 2", *small]))


@pytest.mark.slow
@pytest.mark.parametrize("page", PAGES)
def test_the_commands_of_a_page_run_as_written(page, tmp_path):
    write_tiny_model(model := tmp_path / "tiny", mkdir=True)
    for toml in blocks(page, "toml"):
        name = re.match(r"# (\S+\.toml)", toml)[1]
        (tmp_path / name).write_text(on_tiny(toml, model))
    assert commands(page)
    for line in commands(page):
        done = shell(line, tmp_path)
        assert done.returncode == 0, f"{line}\n{done.stdout}{done.stderr}"


def test_every_flag_of_the_campaign_script_is_in_its_table():
    from textpolicy.campaign.presets.tinker_math import MathCampaignArguments

    page = (ROOT / "docs/13_tinker_campaigns.md").read_text(encoding="utf-8")
    flags = {f"--{name.replace('_', '-')}" for name in MathCampaignArguments.model_fields}
    assert {flag for flag in flags if f"`{flag}`" not in page} == set()


def test_every_recommendation_is_on_the_page():
    from textpolicy.analysis import RECOMMENDATIONS

    page = (ROOT / "docs/13_tinker_campaigns.md").read_text(encoding="utf-8")
    assert all(f"| `{word}` |" in page for word in RECOMMENDATIONS)
