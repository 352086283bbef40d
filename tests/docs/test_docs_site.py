"""The site of the documentation builds without a warning, and loads nothing from elsewhere."""

import os
import re
import subprocess
import sys
from importlib.util import find_spec
from pathlib import Path

import pytest

ROOT = Path(__file__).parents[2]
OWN = ROOT / ".venv-docs" / "bin" / "python"  # made by make docs


@pytest.fixture(scope="module")
def site(tmp_path_factory):
    """The built site."""
    python = os.environ.get("TEXTPOLICY_DOCS_PYTHON") or (OWN if OWN.exists() else sys.executable)
    if python == sys.executable and find_spec("mkdocs") is None:
        pytest.skip("mkdocs is not installed; 'make docs' makes .venv-docs, which has it")
    folder = tmp_path_factory.mktemp("site")
    done = subprocess.run(
        [str(python), "-m", "mkdocs", "build", "--strict", "--quiet", "--site-dir", str(folder)],
        cwd=ROOT,
        capture_output=True,
        text=True,
        env={**os.environ, "NO_MKDOCS_2_WARNING": "1"},
    )
    assert done.returncode == 0, done.stdout + done.stderr
    assert "WARNING" not in done.stderr
    return folder


@pytest.mark.slow
def test_the_site_has_a_page_for_every_page_and_loads_nothing_from_elsewhere(site):
    pages = {page.stem for page in (ROOT / "docs").glob("*.md")}
    assert pages <= {page.stem for page in site.glob("*.html")}
    for page in site.rglob("*.html"):
        text = page.read_text(encoding="utf-8")
        loaded = re.findall(r"<(?:script|img|iframe|link)\b[^>]*(?:src|href)=\"?(?:https?:)?//[^\"> ]+", text)
        assert loaded == []
        assert 'class="mermaid"' not in text  # which the theme would fetch a library for


@pytest.mark.slow
def test_the_reference_has_every_public_name(site):
    import textpolicy

    text = "".join(page.read_text(encoding="utf-8") for page in (site / "reference").glob("*.html"))
    named = set(re.findall(r'id="textpolicy\.[\w.]*?(\w+)"', text))
    assert {*textpolicy.__all__} <= named
